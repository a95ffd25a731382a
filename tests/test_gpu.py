"""The fused kernels on hardware: the tests of test_triton.py in every dtype, and what a GPU has: streams, graphs, devices."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch
from cases import F64, LAYOUTS, assert_close, assert_same_bits, build, call, gradients, laid_out
from kernels import OPS, Kernels, both_ops, error, one_element_off, oracle_gradients, random_shapes, wide
from numerics import BLOCKS
from row_wise import COEFFICIENTS, EVERYTHING, seed_of

from score_kernels import functional as SF
from score_kernels import ops

pytestmark = pytest.mark.gpu

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    """float32 products in tf32, which the kernels and the eager loop then both take."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)


def mlp(*, device="cuda", dtype=torch.bfloat16, rows=300, features=64, hidden=128, iterations=4, **choices):
    return build(
        "mlp", rows=rows, features=features, hidden=hidden, iterations=iterations, dtype=dtype, device=device, **choices
    )


class TestHardware(Kernels):
    device = "cuda"
    dtypes = (*HALVES, torch.float32)
    # tf32 has 10 bits of mantissa.
    eps = {**{dtype: torch.finfo(dtype).eps for dtype in HALVES}, torch.float32: 2.0**-10}
    sizes = {"rows": 300, "features": 40, "hidden": 72, "iterations": 4}
    launches = ({"chunk_rows": 128, "programs": 1}, {"chunk_rows": 1 << 16, "programs": 2})
    exact = False
    blocks = tuple(name for name in BLOCKS if name != "mlp relu")
    accuracy = {"rows": 64, "features": 64, "hidden": 64}
    depths = (1, 4, 16, 64)
    test_random_shapes = random_shapes(20)

    @both_ops
    @pytest.mark.parametrize("features", [16, 17, 31, 48, 64, 100, 128, 200, 255, 256])
    def test_widths(self, op, features, dtype):
        self.compare(
            build(op, rows=300, features=features, hidden=2 * features, dtype=dtype, device="cuda", norm="rmsnorm gain"), dtype
        )


@pytest.mark.parametrize(
    ("op", "choices"),
    [(op, choices) for op in OPS for choices in cases.pairwise(op)],
    ids=lambda v: v if isinstance(v, str) else cases.label(v),
)
def test_blas_on_a_gpu(op, choices):
    case = build(op, seed=seed_of(choices), device="cuda", **choices)
    assert_close(gradients(case, "blas"), gradients(case, "oracle"))


@both_ops
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_blas_on_a_gpu_in_16_bits(op, dtype):
    case = build(op, **EVERYTHING[op], **COEFFICIENTS, device="cuda", dtype=dtype)
    expected = oracle_gradients(wide(case), dtype)
    for name, found in gradients(case, "blas").items():
        assert error(found, expected[name]) <= 16 * torch.finfo(dtype).eps, name


def test_blas_computes_full_float32_whatever_torch_allows():
    case = mlp(dtype=torch.float32)
    expected = call(wide(case), "oracle")
    assert error(call(case, "blas"), expected) <= 1e-6


def test_auto_takes_verified_architectures_only(monkeypatch):
    case = mlp()
    here = ops.machine_of(torch.device("cuda"))
    for known in (True, False):
        machine = dataclasses.replace(here, verified=frozenset({here.arch} if known else ()))
        monkeypatch.setattr(ops, "machine_of", lambda device, machine=machine: machine)
        monkeypatch.setattr(ops, "_announced", set())
        with ops.observe_plans() as plans, pytest.warns(UserWarning, match="score_mlp runs on"):
            call(case, "auto")
        assert plans[0].backend == ("triton" if known else "blas")


def test_failure_case_01_rows_past_2_31_elements():
    """The last rows of a state of more than 2^31 elements are those of a small one."""
    features = 64
    rows = 2**31 // features + 5
    case = mlp(rows=5, features=features, iterations=2)
    with torch.no_grad():
        expected = call(case, "triton")
        h = torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda")
        h[-5:] = case.leaves["h"]
        case.arguments |= {"h": h, "out": h}
        assert torch.equal(call(case, "triton")[-5:], expected)


def test_failure_case_02_more_tiles_than_a_grid_has_in_y():
    case = mlp(rows=65536 * 128 + 3, features=16, hidden=16, iterations=1)
    with torch.no_grad():
        found = call(case, "triton")
        case.arguments["h"] = case.leaves["h"][-100:]
        assert torch.equal(found[-100:], call(case, "triton"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_failure_case_03_a_device_that_is_not_the_current_one():
    here, there = (mlp(device=f"cuda:{i}") for i in (0, 1))
    assert torch.cuda.current_device() == 0
    expected, found = gradients(here, "triton"), gradients(there, "triton")
    assert_same_bits({name: x.to("cuda:0") for name, x in found.items()}, expected)


def test_failure_case_04_the_current_stream_is_used():
    """The input is written on a side stream after a long wait: a launch on another stream would read what was there before."""
    case = mlp()
    expected = gradients(case, "triton")
    leaf, stream = case.leaves["h"], torch.cuda.Stream()
    values = leaf.detach().clone()
    with torch.no_grad():
        leaf.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            leaf.copy_(values)
        found = gradients(case, "triton")
    stream.synchronize()
    assert_same_bits(found, expected)


def test_failure_case_05_misaligned_sets_in_one_tensor():
    for dtype in (*HALVES, torch.float32):
        case = mlp(dtype=dtype, features=33, hidden=65, sets="2 stacked", iterations=4)
        expected = gradients(case, "triton")
        for name, found in gradients(laid_out(case, one_element_off), "triton").items():
            assert error(found, expected[name].to(F64)) <= 16 * torch.finfo(dtype).eps, name


def test_failure_case_15_gradients_are_repeatable_on_a_full_device():
    case = mlp(rows=100_003, features=64, hidden=256, iterations=4, norm="layernorm gain bias", dt="vector")
    expected = gradients(case, "triton")
    for _ in range(3):
        assert_same_bits(gradients(case, "triton"), expected)


@pytest.mark.parametrize("dt", [0.4, None])
def test_failure_case_27_graph_of_forward(dt):
    case = mlp()
    case.arguments["dt"] = dt
    h = case.arguments["h"] = case.leaves["h"].detach().clone()
    inputs = [torch.randn_like(h) for _ in range(3)]
    with torch.no_grad():
        call(case, "triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(case, "triton")
        for x in inputs:
            h.copy_(x)
            graph.replay()
            other = dataclasses.replace(case, arguments={**case.arguments, "h": x})
            assert torch.equal(out, call(other, "triton"))


def test_failure_case_27_graph_of_training():
    case = mlp(norm="rmsnorm gain")
    leaves = list(case.leaves.values())
    given = torch.randn_like(case.leaves["h"])

    def step():
        return torch.autograd.grad(call(case, "triton"), leaves, given)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in range(3):
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
        graph.replay()
        captured = [x.clone() for x in found]
        assert_same_bits(dict(enumerate(captured)), dict(enumerate(step())))


@pytest.mark.parametrize(
    "layout", [torch.clone, one_element_off, LAYOUTS["transposed"]], ids=["plain", "misaligned", "transposed"]
)
def test_failure_case_27_graph_of_a_first_call(layout):
    """Parameters that no call before the capture had; where the op takes copies of them, no call has the same addresses."""
    case, other = mlp(), mlp(seed=1)
    names = [name for name in case.leaves if name != "h"]
    moved = [layout(case.leaves[name].detach()).requires_grad_() for name in names]
    new = cases.substitute(case, moved, names)
    new.leaves = {**case.leaves, **dict(zip(names, moved, strict=True))}
    given = torch.randn_like(case.leaves["h"])

    def step(case):
        return torch.autograd.grad(call(case, "triton"), list(case.leaves.values()), given)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(other)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(new)
    graph.replay()
    captured = [x.clone() for x in found]
    assert_same_bits(dict(enumerate(captured)), dict(enumerate(step(new))))


def test_memory_of_training_grows_with_no_iteration():
    """Between forward and backward nothing is kept; in backward, the scratch of the plan and what it returns."""
    kept, peaks = {}, {}
    for iterations in (4, 64):
        h = torch.randn(1 << 16, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        given = {
            n: (torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.1).requires_grad_()
            for n, s in (("w1", (128, 64)), ("w2", (64, 128)))
        }
        with ops.observe_plans() as plans:
            out = SF.score_mlp(h, given["w1"], None, given["w2"], None, iterations=iterations, backend="triton")
        torch.cuda.synchronize()
        kept[iterations] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out.backward(torch.ones_like(out))
        peaks[iterations] = torch.cuda.max_memory_allocated() - kept[iterations] - plans[0].scratch_bytes
        del h, given, out
    assert kept[64] - kept[4] <= 1 << 20, kept
    # The gradients of h and of the weights, and the weights' products of each iteration.
    assert max(peaks.values()) <= 4 * (1 << 16) * 64 * 2 + 64 * 128 * 64 * 4 * 2 + (1 << 22), peaks
