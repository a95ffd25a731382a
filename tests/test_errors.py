"""Bad input raises before anything runs, and the message names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from helpers_torch import D, H, call, draw, parameters

import score_kernels as sk
from score_kernels import functional as SF

META = torch.device("meta")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def state(**kwargs):
    return draw(5, D, **kwargs)


def complaint(error, function, *args, **kwargs):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error, repr(caught.value)
    return str(caught.value)


def changed(op="mlp", gated=False, **changes):
    """The call with some of its arguments changed; `h` among them."""
    given = {"h": state(), **parameters(op, gated=gated), **changes}
    return lambda: call(op, given.pop("h"), {}, **given)


# Arguments that are changed, the error, and what its message says: the argument, the expected, the given.
BAD = {
    # The state.
    "h list": ({"h": [1.0]}, TypeError, ("h: expected a tensor", "got list")),
    "h None": ({"h": None}, TypeError, ("h: expected a tensor", "got NoneType")),
    "h int": ({"h": torch.ones(5, D, dtype=torch.int64)}, TypeError, ("h: expected a floating-point tensor", "torch.int64")),
    "h complex": ({"h": torch.ones(5, D) + 0j}, TypeError, ("h: expected a floating-point tensor", "torch.complex64")),
    "h scalar": ({"h": torch.tensor(1.0)}, ValueError, ("h: expected shape (..., D)", "got ()")),
    "h no features": ({"h": torch.ones(5, 0)}, ValueError, ("h: expected shape (..., D) with D >= 1", "got (5, 0)")),
    "h last dimension": (
        {"h": draw(5, D + 1)}, ValueError,
        ("w1: expected shape (H, D) = (12, 9)", "last dimension 9", "got (12, 8)"),
    ),
    # Weights: shapes that do not chain, layouts, types.
    "w1 transposed": ({"w1": draw(D, H)}, ValueError, ("w1: expected shape (H, D) = (8, 8)", "got (8, 12)")),
    "w1 vector": ({"w1": draw(D)}, ValueError, ("w1: expected shape (H, D)", "got (8,)")),
    "w1 4 dimensions": ({"w1": draw(1, 1, H, D)}, ValueError, ("w1: expected shape (H, D)", "leading L", "got (1, 1, 12, 8)")),
    "w1 None": ({"w1": None}, TypeError, ("w1: expected a tensor or a list of tensors", "got None")),
    "w2 None": ({"w2": None}, TypeError, ("w2: expected a tensor or a list of tensors", "got None")),
    "w1 number": ({"w1": 1.0}, TypeError, ("w1: expected a tensor or a list of tensors", "got float")),
    "w1 list of numbers": ({"w1": [1.0]}, TypeError, ("w1: expected a tensor", "got float")),
    "w1 empty list": ({"w1": []}, ValueError, ("w1: expected at least one tensor", "got an empty list")),
    "w2 does not chain": ({"w2": draw(D, H + 1)}, ValueError, ("w2: expected shape (D, H) = (8, 12)", "got (8, 13)")),
    "b1 does not chain": ({"b1": draw(D)}, ValueError, ("b1: expected shape (H) = (12,)", "got (8,)")),
    "b2 does not chain": ({"b2": draw(H)}, ValueError, ("b2: expected shape (D) = (8,)", "got (12,)")),
    "w_gate does not chain": (
        {"w_gate": draw(H + 1, D)}, ValueError,
        ("w_gate: expected shape (H, D) = (12, 8)", "got (13, 8)"),
    ),
    "b_gate does not chain": (
        {"w_gate": draw(H, D), "b_gate": draw(D)}, ValueError, ("b_gate: expected shape (H) = (12,)", "got (8,)"),
    ),
    "b_gate alone": ({"b_gate": draw(H)}, ValueError, ("b_gate: expected w_gate to be given", "got w_gate=None")),
    "shapes in a list": (
        {"w1": [draw(H, D), draw(H + 1, D)]}, ValueError,
        ("w1: expected shape (H, D) = (12, 8)", "got (13, 8)"),
    ),
    # Parameter sets.
    "L > T": (
        {"w1": draw(4, H, D)}, ValueError,
        ("parameter sets: expected at most one set for each of the 3 iterations", "L = 4"),
    ),
    "L unequal": (
        {"w1": draw(2, H, D), "w2": [draw(D, H)] * 3}, ValueError,
        ("parameter sets: expected the same number L", "'w1': 2", "'w2': 3"),
    ),
    # Devices.
    "w1 device": ({"w1": draw(H, D).to(META)}, ValueError, ("w1: expected a tensor on cpu", "got one on meta")),
    "h device": ({"h": state().to(META)}, ValueError, ("w1: expected a tensor on meta", "got one on cpu")),
    "x0 device": ({"x0": state().to(META)}, ValueError, ("x0: expected a tensor on cpu", "got one on meta")),
    "dt device": ({"dt": torch.tensor(0.5, device=META)}, ValueError, ("dt: expected a tensor on cpu", "got one on meta")),
    "state_scale device": (
        {"state_scale": torch.tensor(0.5, device=META)}, ValueError,
        ("state_scale: expected a tensor on cpu", "got one on meta"),
    ),
    "norm_weight device": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(D, device=META)}, ValueError,
        ("norm_weight: expected a tensor on cpu", "got one on meta"),
    ),
    "out device": ({"out": state().to(META)}, ValueError, ("out: expected a tensor on cpu", "got one on meta")),
    # Dtypes.
    "w1 dtype": (
        {"w1": draw(H, D, dtype=BF16)}, TypeError,
        ("w1: expected dtype torch.float32", "got torch.bfloat16", "convert"),
    ),
    "h dtype": ({"h": state(dtype=F16)}, TypeError, ("w1: expected dtype torch.float16", "got torch.float32")),
    "b2 dtype": ({"b2": draw(D, dtype=F64)}, TypeError, ("b2: expected dtype torch.float32", "got torch.float64")),
    "x0 dtype": ({"x0": state(dtype=F64)}, TypeError, ("x0: expected dtype torch.float32", "got torch.float64")),
    "out dtype": ({"out": state(dtype=F64)}, TypeError, ("out: expected dtype torch.float32", "got torch.float64")),
    "norm_weight dtype": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(D, dtype=F16)}, TypeError,
        ("norm_weight: expected dtype torch.float32", "got torch.float16"),
    ),
    "dt int tensor": ({"dt": torch.tensor(1)}, TypeError, ("dt: expected a floating-point tensor", "got torch.int64")),
    # Iterations, dt, scales.
    "iterations negative": ({"iterations": -1}, ValueError, ("iterations: expected 0 or more", "got -1")),
    "iterations float": ({"iterations": 3.0}, TypeError, ("iterations: expected an int", "got float")),
    "iterations bool": ({"iterations": True}, TypeError, ("iterations: expected an int", "got bool")),
    "iterations tensor": ({"iterations": torch.tensor(3)}, TypeError, ("iterations: expected an int", "got Tensor")),
    "dt length": ({"dt": torch.ones(4)}, ValueError, ("dt: expected shape () or (T,) = (3,)", "got (4,)")),
    "dt matrix": ({"dt": torch.ones(3, 1)}, ValueError, ("dt: expected shape () or (T,) = (3,)", "got (3, 1)")),
    "dt text": ({"dt": "0.5"}, TypeError, ("dt: expected a number or a tensor", "got str")),
    "dt list": ({"dt": [0.5, 0.5, 0.5]}, TypeError, ("dt: expected a number or a tensor", "got list")),
    "dt bool": ({"dt": True}, TypeError, ("dt: expected a number or a tensor", "got bool")),
    "dt with replace": (
        {"update": "replace", "dt": 0.5}, ValueError,
        ('update="replace"', "without dt or solver", "got dt=0.5"),
    ),
    "solver with replace": ({"update": "replace", "solver": "rk4"}, ValueError, ('update="replace"', "got solver='rk4'")),
    "state_scale length": (
        {"state_scale": torch.ones(2)}, ValueError, ("state_scale: expected shape () or (T,) = (3,)", "got (2,)"),
    ),
    "state_scale text": ({"state_scale": "1"}, TypeError, ("state_scale: expected a number or a tensor", "got str")),
    "x0_scale length": (
        {"x0": state(), "x0_scale": torch.ones(2)}, ValueError, ("x0_scale: expected shape () or (T,) = (3,)", "got (2,)"),
    ),
    "x0_scale alone": ({"x0_scale": 0.5}, ValueError, ("x0_scale: expected x0 to be given", "got x0=None")),
    "x0 shape": ({"x0": draw(4, D)}, ValueError, ("x0: expected the shape of h, (5, 8)", "got (4, 8)")),
    "x0 number": ({"x0": 1.0}, TypeError, ("x0: expected a tensor", "got float")),
    "grad_iterations 0": ({"grad_iterations": 0}, ValueError, ("grad_iterations: expected 1 or more", "got 0")),
    "grad_iterations negative": ({"grad_iterations": -2}, ValueError, ("grad_iterations: expected 1 or more", "got -2")),
    "grad_iterations float": ({"grad_iterations": 1.5}, TypeError, ("grad_iterations: expected an int", "got float")),
    "grad_iterations bool": ({"grad_iterations": True}, TypeError, ("grad_iterations: expected an int", "got bool")),
    # Names.
    "activation": ({"activation": "swish"}, ValueError, ("activation: expected one of", "silu", "got 'swish'")),
    "activation function": ({"activation": torch.relu}, ValueError, ("activation: expected one of", "got <built-in")),
    "norm": ({"norm": "batchnorm"}, ValueError, ("norm: expected one of none, layernorm, rmsnorm", "got 'batchnorm'")),
    "update": ({"update": "euler"}, ValueError, ("update: expected one of contractive, residual, replace", "got 'euler'")),
    "solver": ({"solver": "dopri5"}, ValueError, ("solver: expected one of euler, midpoint, heun", "got 'dopri5'")),
    "order": ({"order": "random"}, ValueError, ("order: expected one of consecutive, cyclic", "got 'random'")),
    "backend": ({"backend": "mkl"}, ValueError, ("backend: expected one of auto, reference, blas", "got 'mkl'")),
    "backend list": ({"backend": ["blas"]}, ValueError, ("backend: expected one of auto, reference, blas", "got ['blas']")),
    "backend triton": ({"backend": "triton"}, ValueError, ("backend='triton' cannot run this call", "it needs a GPU")),
    "backend cuda": (
        {"backend": "cuda"}, ValueError,
        ("backend='cuda'", "no op calls the CUDA kernels yet", "available: reference, blas, triton"),
    ),
    # The norm.
    "norm_weight alone": (
        {"norm_weight": torch.ones(D)}, ValueError,
        ("norm_weight: expected norm to be layernorm or rmsnorm", "got norm='none'"),
    ),
    "norm_bias alone": (
        {"norm_bias": torch.ones(D)}, ValueError,
        ("norm_bias: expected norm to be layernorm", "got norm='none'"),
    ),
    "norm_bias of rmsnorm": (
        {"norm": "rmsnorm", "norm_bias": torch.ones(D)}, ValueError,
        ("norm_bias: expected norm to be layernorm", "got norm='rmsnorm'"),
    ),
    "norm_weight shape": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(H)}, ValueError, ("norm_weight: expected shape (D) = (8,)", "got (12,)"),
    ),
    "eps negative": ({"norm": "rmsnorm", "eps": -1e-5}, ValueError, ("eps: expected 0 or more", "got -1e-05")),
    "eps nan": ({"norm": "rmsnorm", "eps": float("nan")}, ValueError, ("eps: expected 0 or more", "got nan")),
    "eps text": ({"eps": "1e-5"}, TypeError, ("eps: expected a number", "got str")),
    "negative_slope None": ({"negative_slope": None}, TypeError, ("negative_slope: expected a number", "got NoneType")),
    # out.
    "out list": ({"out": [1.0]}, TypeError, ("out: expected a tensor", "got list")),
    "out shape": ({"out": draw(4, D)}, ValueError, ("out: expected the shape of h, (5, 8)", "got (4, 8)")),
    "out with trajectory": (
        {"out": state(), "return_trajectory": True}, ValueError, ("out: expected return_trajectory=False", "got True"),
    ),
    "out expanded": (
        {"out": draw(1, D).expand(5, D)}, ValueError,
        ("out: expected memory of its own", "got an expanded tensor, strides (0, 1)"),
    ),
    # Keywords.
    "unexpected": (
        {"dropout": 0.1}, TypeError,
        ("score_mlp() got an unexpected keyword argument 'dropout'", "grad_iterations"),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case):
    changes, error, parts = BAD[case]
    message = complaint(error, changed(**changes))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"weight": draw(D, H)}, ValueError, ("weight: expected shape (D, D) = (8, 8)", "got (8, 12)")),
        ({"weight": None}, TypeError, ("weight: expected a tensor or a list of tensors", "got None")),
        ({"bias": draw(H)}, ValueError, ("bias: expected shape (D) = (8,)", "got (12,)")),
        ({"h": draw(5, H)}, ValueError, ("weight: expected shape (D, D) = (12, 12)", "got (8, 8)")),
        ({"w_gate": draw(H, D)}, TypeError, ("score_linear() got an unexpected keyword argument 'w_gate'",)),
        ({"iterations": -3}, ValueError, ("iterations: expected 0 or more", "got -3")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_of_linear(changes, error, parts):
    message = complaint(error, changed("linear", **changes))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("backend", ["auto", "reference", "blas"])
def test_errors_do_not_depend_on_the_backend(backend):
    assert "w2: expected shape (D, H)" in complaint(ValueError, changed(w2=draw(D, H + 1), backend=backend))


def test_missing_arguments_are_named():
    assert "'iterations'" in complaint(TypeError, SF.score_linear, state(), draw(D, D))
    assert "'w2'" in complaint(TypeError, SF.score_mlp, state(), draw(H, D), None, iterations=3)


@pytest.mark.parametrize("name", ["h", "w1", "b2", "x0", "dt", "state_scale", "x0_scale", "norm_weight", "out", "w_gate"])
def test_out_refuses_whatever_requires_grad(name):
    options = {"x0": state(), "dt": torch.tensor(0.5), "state_scale": torch.ones(3), "x0_scale": torch.ones(3)}
    options |= {"norm": "rmsnorm", "norm_weight": torch.ones(D), "out": state(), "h": state()}
    given = {**parameters("mlp", gated=True), **options}
    given[name].requires_grad_()
    message = complaint(ValueError, changed(gated=True, **given))
    assert "out: expected no input that requires grad" in message
    assert "torch.no_grad()" in message
    with torch.no_grad():
        assert changed(gated=True, **given)() is given["out"]


@pytest.mark.parametrize("target", ["w1", "b1", "w2", "x0", "norm_weight", "rows of h", "h reversed"])
def test_out_refuses_to_overlap_an_input(target):
    memory = torch.zeros(2000)
    h, shifted = memory[: 5 * D].view(5, D), memory[D : 6 * D].view(5, D)
    given = {"h": h, "x0": state(), "norm": "rmsnorm", "norm_weight": torch.ones(D), **parameters("mlp")}
    if target == "rows of h":
        out = shifted
    elif target == "h reversed":
        given["h"] = draw(D, D)
        out = given["h"].t()
    else:
        size = given[target].numel()
        given[target] = memory[100 : 100 + size].view(given[target].shape)
        out = memory[100 + size - 1 : 100 + size - 1 + 5 * D].view(5, D)
    if target == "h reversed":
        given["x0"] = draw(D, D)
    message = complaint(ValueError, changed(out=out, **given))
    assert "out: expected h itself or memory that no input uses, got a tensor that overlaps an input" in message


def test_out_beside_an_input_in_one_allocation_is_accepted():
    memory = torch.zeros(2 * 5 * D)
    h, out = memory[: 5 * D].view(5, D), memory[5 * D :].view(5, D)
    assert changed(h=h, out=out)() is out


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_norm_parameters_of_16_bit_weights_may_be_float32(dtype):
    given = parameters("mlp", dtype=dtype)
    gain, bias = draw(D, seed=3) + 1, draw(D, seed=4)
    options = {
        "norm": "layernorm",
        "norm_weight": gain,
        "norm_bias": bias,
        "dt": torch.tensor(0.3),
        "state_scale": torch.ones(3),
    }
    found = call("mlp", state(dtype=dtype), given, **options)
    assert found.dtype == dtype
    expected = call("mlp", state(dtype=dtype), given, backend="reference", **options)
    assert (found - expected).float().norm() <= 4 * torch.finfo(dtype).eps * expected.float().norm()
    message = complaint(TypeError, changed(**given, h=state(dtype=dtype), norm="rmsnorm", norm_weight=gain.double()))
    assert f"norm_weight: expected dtype {dtype} or torch.float32" in message
    assert "got torch.float64" in message


@pytest.mark.parametrize("text", ["zero", "0", "-1", "", "nan", "inf"])
def test_scratch_budget_must_be_a_number(text, monkeypatch):
    monkeypatch.setenv("SCORE_KERNELS_SCRATCH_MB", text)
    message = complaint(ValueError, changed())
    assert "SCORE_KERNELS_SCRATCH_MB: expected a positive number of MiB" in message
    assert f"got {text!r}" in message


MODULES = {
    "unexpected": ({"dropout": 0.1}, TypeError, ("ScoreLinear() got an unexpected keyword argument 'dropout'",)),
    "activation": ({"activation": "swish"}, ValueError, ("activation: expected one of", "got 'swish'")),
    "norm": ({"norm": "batch"}, ValueError, ("norm: expected one of", "got 'batch'")),
    "update": ({"update": "euler"}, ValueError, ("update: expected one of", "got 'euler'")),
    "solver": ({"solver": "rk5"}, ValueError, ("solver: expected one of", "got 'rk5'")),
    "order": ({"order": "random"}, ValueError, ("order: expected one of", "got 'random'")),
    "backend": ({"backend": "mkl"}, ValueError, ("backend: expected one of auto, reference, blas, triton", "got 'mkl'")),
    "backend cuda": ({"backend": "cuda"}, ValueError, ("backend='cuda'", "no op calls the CUDA kernels yet")),
    "iterations": ({"iterations": -1}, ValueError, ("iterations: expected 0 or more", "got -1")),
    "iterations float": ({"iterations": 2.5}, TypeError, ("iterations: expected an int", "got float")),
    "eps": ({"eps": -1.0}, ValueError, ("eps: expected 0 or more", "got -1.0")),
    "dt replace": ({"update": "replace", "dt": 0.1}, ValueError, ('update="replace"', "got dt=0.1")),
    "layers 0": ({"layers": 0}, ValueError, ("layers: expected 1 to iterations = 4", "got 0")),
    "layers > T": ({"layers": 5}, ValueError, ("layers: expected 1 to iterations = 4", "got 5")),
    "learn_dt True": ({"learn_dt": True}, ValueError, ("learn_dt: expected one of False, scalar, per_iteration", "got 'True'")),
    "learn_dt replace": ({"learn_dt": "scalar", "update": "replace"}, ValueError, ("learn_dt: expected False", "got 'scalar'")),
    "start 1": ({"learn_dt": "scalar", "dt": 1.0}, ValueError, ("dt: expected a start strictly inside (0, 1)", "got 1.0")),
    "start 0": (
        {"learn_dt": "per_iteration", "dt": 0.0}, ValueError,
        ("dt: expected a start strictly inside (0, 1)", "got 0.0"),
    ),
    "start nan": ({"learn_dt": "scalar", "dt": float("nan")}, ValueError, ("dt: expected a start strictly inside", "got nan")),
    "start shape": (
        {"learn_dt": "scalar", "dt": torch.full((4,), 0.5)}, ValueError,
        ("dt: expected a number or shape ()", "got shape (4,)"),
    ),
    "start length": (
        {"learn_dt": "per_iteration", "dt": torch.full((3,), 0.5)}, ValueError,
        ("dt: expected a number or shape (4,)", "got shape (3,)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_bad_argument_of_a_module(case):
    changes, error, parts = MODULES[case]
    message = complaint(error, sk.ScoreLinear, D, **changes)
    for part in parts:
        assert part in message, message


@pytest.mark.usefixtures("plain_machine")
def test_bad_input_of_a_module():
    assert "got (8, 8)" in complaint(ValueError, sk.ScoreLinear(D), draw(5, D + 1))
    assert "iterations: expected 0 or more, got -1" in complaint(ValueError, sk.ScoreMLP(D, H), state(), iterations=-1)
    on_cpu = sk.ScoreLinear(D, backend="triton")
    assert "backend='triton' cannot run this call: it needs a GPU" in complaint(ValueError, on_cpu, state())


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="module 'score_kernels' has no attribute 'ScoreAttenion'"):
        sk.ScoreAttenion  # noqa: B018
