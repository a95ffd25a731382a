"""The fused kernels on hardware: the tests of test_triton.py in every dtype, and what a GPU has: streams, graphs, devices."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import warnings

import cases
import pytest
import torch
from cases import F64, LAYOUTS, assert_close, assert_same_bits, build, call, gradients, laid_out
from kernels import Kernels, both_ops, error, one_element_off, oracle_gradients, random_shapes, wide
from numerics import BLOCKS
from row_wise import COEFFICIENTS, EVERYTHING, ROW_WISE, seed_of
from sequence_kernels import HalvesKernels, SequenceKernels, TransformerKernels

import score_kernels as sk
from score_kernels import functional as SF
from score_kernels import ops, stages

pytestmark = pytest.mark.gpu

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    """float32 products in tf32, which the kernels and the eager loop then both take."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """The backend of forward, and of backward where it has one."""
    if reason := getattr(ops.machine_of(torch.device("cuda")), request.param):
        pytest.skip(reason)
    return request.param


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
    blocks = tuple(name for name, (op, *_) in BLOCKS.items() if name != "mlp relu" and op in ROW_WISE)
    accuracy = {"rows": 64, "features": 64, "hidden": 64}
    depths = (1, 4, 16, 64)
    test_random_shapes = random_shapes(20)

    @both_ops
    @pytest.mark.parametrize("features", [16, 17, 31, 48, 64, 100, 128, 200, 255, 256])
    def test_widths(self, op, features, dtype):
        self.compare(
            build(op, rows=300, features=features, hidden=2 * features, dtype=dtype, device="cuda", norm="rmsnorm gain"), dtype
        )


class TestCuda(TestHardware):
    """Where the compiled kernels have no backward, Triton's runs."""

    backend = "cuda"
    always = {"solver": "euler"}
    dtypes = HALVES
    test_random_shapes = random_shapes(20)

    @pytest.fixture(autouse=True)
    def built(self):
        if reason := ops.machine_of(torch.device("cuda")).cuda:
            pytest.skip(reason)


# Heads of 64 features, of 128 and of 16, D = 256, and what takes the tile of a wider place.
WIDE = [(40, 64, 1), (128, 128, 2), (50, 256, 4), (128, 256, 4), (64, 256, 2), (128, 128, 8), (97, 24, 2)]


class Attention:
    """In 16 bits, which the tiles are for."""

    device = "cuda"
    dtypes = HALVES
    eps = {dtype: torch.finfo(dtype).eps for dtype in HALVES}
    launches = ({"chunk_rows": 128, "programs": 1}, {"chunk_rows": 1 << 16, "programs": 2})
    exact = False

    @pytest.mark.parametrize(("tokens", "features", "heads"), [(64, 64, 4), (65, 48, 2), (100, 100, 4), (128, 128, 4), *WIDE])
    def test_long_sequences(self, tokens, features, heads, dtype):
        sizes = {"rows": tokens, "features": features, "heads": heads, "layout": "vector"}
        self.compare(self.build(dtype=dtype, **sizes))


class TestAttention(Attention, SequenceKernels):
    sizes = {"rows": 300, "features": 64, "iterations": 4}
    covered = cases.pairwise("attention")


class TestTransformer(Attention, TransformerKernels):
    sizes = {"rows": 300, "features": 64, "hidden": 150, "iterations": 4}
    covered = cases.pairwise("transformer")


class TestTransformerByHalves(HalvesKernels, TestTransformer):
    covered = cases.pairwise("transformer")[::10]


@pytest.mark.parametrize(
    ("op", "choices"),
    [(op, choices) for op in EVERYTHING for choices in cases.pairwise(op)],
    ids=lambda v: v if isinstance(v, str) else cases.label(v),
)
def test_blas_on_a_gpu(op, choices):
    case = build(op, seed=seed_of(choices), device="cuda", **choices)
    assert_close(gradients(case, "blas"), gradients(case, "oracle"))


@pytest.mark.parametrize("op", EVERYTHING)
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
        machine = dataclasses.replace(here, verified=frozenset({("triton", here.arch)} if known else ()))
        monkeypatch.setattr(ops, "machine_of", lambda device, machine=machine: machine)
        monkeypatch.setattr(ops, "_announced", set())
        with ops.observe_plans() as plans, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call(case, "auto")
        assert plans[0].backend == ("triton" if known else "blas")
        assert any("score_mlp runs on 'blas', not on 'triton'" in str(w.message) for w in said) == (not known)


def test_failure_case_01_rows_past_2_31_elements(backend):
    """The last rows of a state of more than 2^31 elements are those of a small one."""
    features = 64
    rows = 2**31 // features + 5
    case = mlp(rows=5, features=features, iterations=2)
    with torch.no_grad():
        expected = call(case, backend)
        h = torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda")
        h[-5:] = case.leaves["h"]
        case.arguments |= {"h": h, "out": h}
        assert torch.equal(call(case, backend)[-5:], expected)


def test_failure_case_02_more_tiles_than_a_grid_has_in_y(backend):
    case = mlp(rows=65536 * 128 + 3, features=16, hidden=16, iterations=1)
    with torch.no_grad():
        found = call(case, backend)
        case.arguments["h"] = case.leaves["h"][-100:]
        assert torch.equal(found[-100:], call(case, backend))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_failure_case_03_a_device_that_is_not_the_current_one(backend):
    here, there = (mlp(device=f"cuda:{i}") for i in (0, 1))
    assert torch.cuda.current_device() == 0
    expected, found = gradients(here, backend), gradients(there, backend)
    assert_same_bits({name: x.to("cuda:0") for name, x in found.items()}, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_failure_case_03_no_context_on_the_device_that_is_current(backend):
    """In a process that uses another one only: a context takes hundreds of MiB."""
    code = f"""if True:
        import torch, score_kernels as sk
        module = sk.ScoreMLP(64, 128, backend={backend!r}, device="cuda:1", dtype=torch.bfloat16)
        module(torch.ones(5, 64, device="cuda:1", dtype=torch.bfloat16)).sum().backward()
        assert not torch._C._cuda_hasPrimaryContext(0)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failure_case_04_the_current_stream_is_used(backend):
    """The input is written on a side stream after a long wait: a launch on another stream would read what was there before."""
    case = mlp()
    expected = gradients(case, backend)
    leaf, stream = case.leaves["h"], torch.cuda.Stream()
    values = leaf.detach().clone()
    with torch.no_grad():
        leaf.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            leaf.copy_(values)
        found = gradients(case, backend)
    stream.synchronize()
    assert_same_bits(found, expected)


def test_failure_case_04_coefficients_that_another_stream_makes(backend, monkeypatch):
    """What a call keeps for later calls is there when one on another stream reads it, which waits for nothing."""
    case, dt, streams = mlp(), 0.40625, [torch.cuda.Stream() for _ in range(2)]
    case.arguments["dt"] = torch.tensor(dt, device="cuda")
    with torch.no_grad():
        expected = call(case, backend)
        case.arguments["dt"] = dt
        monkeypatch.setattr(stages, "_KEPT", {})
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                if stream is streams[0]:
                    torch.cuda._sleep(200_000_000)
                found = call(case, backend)
        streams[1].synchronize()
    assert torch.equal(found, expected)


def test_failure_case_05_misaligned_sets_in_one_tensor(backend):
    for dtype in (*HALVES, *([torch.float32] if backend == "triton" else [])):
        case = mlp(dtype=dtype, features=33, hidden=65, sets="2 stacked", iterations=4)
        expected = gradients(case, backend)
        for name, found in gradients(laid_out(case, one_element_off), backend).items():
            assert error(found, expected[name].to(F64)) <= 16 * torch.finfo(dtype).eps, name


def test_failure_case_15_gradients_are_repeatable_on_a_full_device(backend):
    case = mlp(rows=100_003, features=64, hidden=256, iterations=4, norm="layernorm gain bias", dt="vector")
    expected = gradients(case, backend)
    for _ in range(3):
        assert_same_bits(gradients(case, backend), expected)


@pytest.mark.parametrize("dt", [0.4, None])
def test_failure_case_27_graph_of_forward(dt, backend):
    case = mlp()
    case.arguments["dt"] = dt
    h = case.arguments["h"] = case.leaves["h"].detach().clone()
    inputs = [torch.randn_like(h) for _ in range(3)]
    with torch.no_grad():
        call(case, backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(case, backend)
        for x in inputs:
            h.copy_(x)
            graph.replay()
            other = dataclasses.replace(case, arguments={**case.arguments, "h": x})
            assert torch.equal(out, call(other, backend))


def test_failure_case_27_graph_of_training(backend):
    case = mlp(norm="rmsnorm gain")
    leaves = list(case.leaves.values())
    given = torch.randn_like(case.leaves["h"])

    def step():
        return torch.autograd.grad(call(case, backend), leaves, given)

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
def test_failure_case_27_graph_of_a_first_call(layout, backend):
    """Parameters that no call before the capture had; where the op takes copies of them, no call has the same addresses."""
    case, other = mlp(), mlp(seed=1)
    names = [name for name in case.leaves if name != "h"]
    moved = [layout(case.leaves[name].detach()).requires_grad_() for name in names]
    new = cases.substitute(case, moved, names)
    new.leaves = {**case.leaves, **dict(zip(names, moved, strict=True))}
    given = torch.randn_like(case.leaves["h"])

    def step(case):
        return torch.autograd.grad(call(case, backend), list(case.leaves.values()), given)

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


def module_and_copy(backend):
    module = sk.ScoreMLP(64, 128, norm="rmsnorm", learn_dt="scalar", backend=backend, device="cuda", dtype=torch.bfloat16)
    return module, copy.deepcopy(module)


def values_and_gradients(run, module, seed):
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16).requires_grad_()
    out = run(x)
    found = torch.autograd.grad(out, [x, *module.parameters()], torch.ones_like(out))
    return {str(i): t.detach().clone() for i, t in enumerate((out, *found))}


def test_make_graphed_callables(backend):
    """A module whose forward and backward are replayed from graphs gives the eager one's bits, for new data."""
    module, eager = module_and_copy(backend)
    sample = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    for seed in range(3):
        assert_same_bits(values_and_gradients(graphed, module, seed), values_and_gradients(eager, eager, seed))


def test_compile_reduce_overhead(backend):
    """torch.compile's CUDA graphs: a call that warms up, one that is captured, replays."""
    torch._dynamo.reset()
    module, eager = module_and_copy(backend)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        expected = values_and_gradients(eager, eager, seed)
        for name, found in values_and_gradients(compiled, module, seed).items():
            assert error(found, expected[name].to(F64)) <= 16 * torch.finfo(torch.bfloat16).eps, name


def test_memory_of_training_grows_with_no_iteration(backend):
    """Between forward and backward nothing is kept; in backward, the scratch of the plan and what it returns."""
    kept, peaks = {}, {}
    for iterations in (4, 64):
        h = torch.randn(1 << 16, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        given = {
            n: (torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.1).requires_grad_()
            for n, s in (("w1", (128, 64)), ("w2", (64, 128)))
        }
        with ops.observe_plans() as plans:
            out = SF.score_mlp(h, given["w1"], None, given["w2"], None, iterations=iterations, backend=backend)
        torch.cuda.synchronize()
        kept[iterations] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out.backward(torch.ones_like(out))
        peaks[iterations] = torch.cuda.max_memory_allocated() - kept[iterations] - plans[0].scratch_bytes
        del h, given, out
    assert kept[64] - kept[4] <= 1 << 20, kept
    # The gradients of h and of the weights, and the weights' products of each iteration.
    assert max(peaks.values()) <= 4 * (1 << 16) * 64 * 2 + 64 * 128 * 64 * 4 * 2 + (1 << 22), peaks
