"""Bugs that users of comparable kernels met: those of numbers and memory. A test's name has the row of the project's list."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    F64,
    LAYOUTS,
    SEQUENCES,
    assert_close,
    assert_same_bits,
    build,
    call,
    cotangent,
    gradients,
    laid_out,
    planned,
    public,
)
from row_wise import COEFFICIENTS, EVERYTHING

from score_kernels import functional as SF

OPS = tuple(EVERYTHING)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, F64)

every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.parametrize("backend", ["reference", "blas"])


def everything(op: str, **choices):
    return build(op, **{**EVERYTHING[op], **COEFFICIENTS, **choices})


@every_op
@every_backend
def test_failure_case_01_rows_past_2_31_elements(op, backend, tmp_path):
    """Rows 2^31 elements apart, in a sparse file: a row offset of 32 bits would wrap to the first row, or read outside."""
    case = build(op, rows=2, features=8, hidden=8, dtype=torch.float16)
    case.arguments["h"] = case.leaves["h"] = case.leaves["h"].detach()
    with torch.no_grad():
        expected = call(case, backend)
        file = torch.from_file(str(tmp_path / "state"), shared=True, size=2**31 + 8, dtype=torch.float16)
        far = file.as_strided(expected.shape, (*expected.stride()[:-2], 2**31 // (expected.shape[-2] - 1), 1))
        far.copy_(case.leaves["h"])
        case.arguments["h"] = far
        assert torch.equal(call(case, backend), expected)
        case.arguments["out"] = far
        assert call(case, backend) is far
        assert torch.equal(far, expected)
        assert torch.equal(file[2**31 :], expected[..., -1, :].flatten())


@every_op
@every_dtype
def test_failure_case_05_misaligned_views(op, dtype):
    def one_element_off(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)

    case = everything(op, dtype=dtype, rows=9, features=8)
    found = gradients(laid_out(case, one_element_off), "blas")
    # Equal but for the order in which a dot product sums.
    assert_close(found, gradients(case, "blas"), tolerance=4 * torch.finfo(dtype).eps)


@every_op
@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_failure_case_06_non_contiguous(op, backend, layout):
    for shape in ("rows", "batch"):
        case = everything(op, layout=shape, trajectory="return")
        expected = gradients(case, "oracle")
        with planned(rows=4, backward_rows=4, interval=2):
            assert_close(gradients(laid_out(case, LAYOUTS[layout]), backend), expected)


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_failure_case_06_non_contiguous_grad_output_and_out(op, layout):
    case = everything(op)
    out = call(case, "blas")
    given = cotangent(out)
    leaves = list(case.leaves.values())
    expected = torch.autograd.grad(out, leaves, given, retain_graph=True)
    found = torch.autograd.grad(out, leaves, LAYOUTS[layout](given))
    assert_same_bits(dict(zip(case.leaves, found, strict=True)), dict(zip(case.leaves, expected, strict=True)))
    with torch.no_grad():
        written = LAYOUTS[layout](torch.zeros_like(out))
        case.arguments["out"] = written
        assert call(case, "blas") is written
        assert torch.equal(written, out)


@every_op
@every_backend
@pytest.mark.parametrize("trajectory", ["none", "return", "save"])
def test_failure_case_07_grad_output_of_stride_zero(op, backend, trajectory):
    case = everything(op, trajectory=trajectory)
    leaves = list(case.leaves.values())
    with planned(rows=4, backward_rows=4, interval=2):
        out = call(case, backend)
        expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        found = torch.autograd.grad(out.sum(), leaves)
    assert_same_bits(dict(zip(case.leaves, found, strict=True)), dict(zip(case.leaves, expected, strict=True)))


@every_op
@every_backend
def test_failure_case_07_expanded_state(op, backend):
    case = build(op, rows=1)
    row = case.leaves["h"]
    case.arguments["h"] = row.expand(9, *row.shape[1:])
    with planned(rows=4, backward_rows=4, interval=2):
        assert_close(gradients(case, backend), gradients(case, "oracle"))


@every_op
@every_backend
@every_dtype
@pytest.mark.parametrize("trajectory", ["none", "return", "save"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 2, 5)], ids=str)
def test_failure_case_09_zero_rows(op, backend, dtype, trajectory, shape):
    case = everything(op, rows=0, features=5, dtype=dtype, trajectory=trajectory, mask="none")
    for name in ("h", "x0"):
        case.arguments[name] = case.leaves[name] = torch.empty(shape, dtype=dtype, requires_grad=True)
    found = gradients(case, backend)
    assert found["output"].shape == ((6, *shape) if trajectory == "return" else shape)
    assert found["output"].dtype == dtype
    for name, x in case.leaves.items():
        assert found[name].shape == x.shape, name
        assert not found[name].any(), name


@every_op
@every_backend
@every_dtype
def test_failure_case_09_zero_iterations(op, backend, dtype):
    case = everything(op, iterations=0, dtype=dtype)
    found = gradients(case, backend)
    assert torch.equal(found["output"], case.leaves["h"])
    assert torch.equal(found["h"], cotangent(found["output"]))
    assert not any(found[name].any() for name in case.leaves if name != "h")
    with torch.no_grad():
        assert call(case, backend).data_ptr() != case.leaves["h"].data_ptr()


@every_op
@every_dtype
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize(("features", "hidden"), [(1, 3), (3, 1), (17, 31), (65, 33), (100, 7)])
def test_failure_case_10_sizes_of_no_power_of_two(op, dtype, rows, features, hidden):
    """The result, near the oracle in float64; float64's values and gradients are tested in test_linear and test_mlp."""
    sizes = {"rows": rows, "features": features, "hidden": hidden, "iterations": 3}
    case = build(op, **sizes, norm="rmsnorm gain", dtype=dtype)
    wide = build(op, **sizes, norm="rmsnorm gain")
    with torch.no_grad():
        for name, x in wide.leaves.items():
            x.copy_(case.leaves[name])
        expected = call(wide, "oracle")
        with planned(rows=8, backward_rows=8, interval=2):
            found = call(case, "blas").to(F64)
    assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@every_op
@pytest.mark.parametrize("trajectory", ["none", "return"])
def test_failure_case_13_state_beyond_fp16(op, trajectory):
    """The state reaches 10^6 between two iterations and comes back: float32 inside, in both directions."""
    case = build(op, rows=16, features=32, hidden=32, iterations=4, dtype=torch.float16, norm="layernorm gain bias", dt="float")
    case.arguments["state_scale"] = torch.tensor([1e6, 1e-6, 1e6, 1e-6])
    wide = build(op, rows=16, features=32, hidden=32, iterations=4, norm="layernorm gain bias", dt="float")
    wide.arguments["state_scale"] = case.arguments["state_scale"].double()
    with torch.no_grad():
        for name, x in wide.leaves.items():
            x.copy_(case.leaves[name])
    expected = gradients(wide, "oracle")
    states = call(wide, "oracle")
    assert states.abs().max() < 100
    if trajectory == "return":
        wide.arguments["return_trajectory"] = case.arguments["return_trajectory"] = True
        out = call(case, "blas")
        # What leaves the op is fp16: inf where the state was too large, and finite after it.
        assert out[1].isinf().any()
        assert out[2].isfinite().all()
        found = torch.autograd.grad(out[-1], list(case.leaves.values()), cotangent(out[-1]))
        assert all(g.isfinite().all() for g in found), "gradients through a trajectory whose saved states overflowed"
        return
    found = gradients(case, "blas")
    for name, b in expected.items():
        assert (found[name].double() - b).norm() <= 16 * torch.finfo(torch.float16).eps * b.norm(), name


@every_op
def test_failure_case_13_sums_beyond_fp16(op):
    """Partial sums of 10^7 that cancel: fp16 would have inf - inf."""
    d = 64
    h = torch.full((4, d), 400.0, dtype=torch.float16)
    signs = torch.tensor([400.0, -400.0], dtype=torch.float16).repeat_interleave(d // 2)
    weight = signs.expand(d, d).contiguous()
    one, zero = torch.eye(d).half(), torch.zeros(d, d).half()
    given = {
        "linear": {"weight": weight, "activation": "identity"},
        "mlp": {"w1": weight, "b1": None, "w2": one, "b2": None, "activation": "identity"},
        "attention": {
            "w_qkv": torch.cat([zero, zero, weight]), "b_qkv": None, "w_out": one, "b_out": None, "num_heads": 2,
        },
    }  # fmt: skip
    given["transformer"] = given["attention"] | given["mlp"]
    out = getattr(SF, f"score_{op}")(h, **public(op, given[op]), iterations=1, dt=0.5)
    # A transformer has h in F too, and the decay cancels.
    assert torch.equal(out, h if op == "transformer" else h / 2)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_failure_case_15_gradients_are_repeatable(op, dtype, threads):
    case = everything(op, rows=300, features=24, hidden=40, iterations=3, dtype=dtype, solver="rk4")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with planned(rows=128, backward_rows=64, interval=2):
            expected = gradients(case, "blas")
            for size in (1, 1000, 50000):
                # Memory of other content, as a training loop has it.
                torch.full((size,), float("nan"))
                assert_same_bits(gradients(case, "blas"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", ["linear", "mlp"])
@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm", ["none", "layernorm gain bias", "rmsnorm gain"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_failure_case_18_nan_and_inf_stay_in_their_row(op, backend, bad, norm, activation):
    case = build(op, rows=9, norm=norm, activation=activation, dt="vector", solver="rk4")
    names = ("h",)
    with planned(rows=4, backward_rows=4, interval=2):
        expected = gradients(case, backend, names)
        with torch.no_grad():
            case.leaves["h"][5, 2] = bad
        found = gradients(case, backend, names)
    others = [row for row in range(9) if row != 5]
    for name in expected:
        assert torch.equal(found[name][others], expected[name][others]), name
    assert not found["output"][5].isfinite().all(), "hidden"


@every_backend
@pytest.mark.parametrize("op", SEQUENCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("choices", [{}, {"mask": "padding additive", "causal": True}, {"sequences": "packed"}], ids=str)
def test_failure_case_18_nan_and_inf_stay_in_their_sequence(op, backend, bad, choices):
    case = build(op, rows=9, dt="vector", solver="rk4", **choices)
    row = (1, 0) if "sequences" not in choices else (5,)
    with planned(rows=6, backward_rows=6, interval=2):
        expected = gradients(case, backend, ("h",))
        with torch.no_grad():
            case.leaves["h"][(*row, 2)] = bad
        found = gradients(case, backend, ("h",))
    others = torch.ones(case.leaves["h"].shape[:-1], dtype=torch.bool)
    # Packed: rows 4 to 6 are one sequence.
    others[slice(4, 7) if len(row) == 1 else 1] = False
    for name in expected:
        assert torch.equal(found[name][others], expected[name][others]), name
    assert not found["output"][row].isfinite().all(), "hidden"


@every_backend
@pytest.mark.parametrize("op", SEQUENCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_failure_case_18_nan_is_not_taken_for_a_row_with_nothing_to_attend_to(op, backend, tokens, causal):
    """The result is F alone, from scores that are NaN and values that are not."""
    case = build(op, rows=3 * tokens, update="replace", iterations=1, causal=causal)
    with torch.no_grad():
        case.arguments["h"] = case.leaves["h"].reshape(-1, tokens, 8)
        case.arguments["w_qkv"][0, 0] = float("nan")
        assert call(case, backend).isnan().any(-1).all()
