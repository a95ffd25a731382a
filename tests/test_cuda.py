"""From a call to the compiled CUDA module: what score_kernels/cuda.py hands to it, with the emulation in the module's place."""

from __future__ import annotations

import dataclasses

import emulation
import pytest
import torch
from cases import LAYOUTS, assert_same_bits, build, call, gradients, laid_out
from kernels import both_ops, error, one_element_off, oracle_gradients, wide
from row_wise import EVERYTHING

import score_kernels as sk
from score_kernels import cuda, ops

# There is no Triton here, to run backward where these kernels do not.
pytestmark = pytest.mark.filterwarnings("ignore:backward of score_.* runs on 'blas'")

HALVES = (torch.float16, torch.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture
def compiled():
    with emulation.compiled((64, 64), (128, 64), (256, 32)) as module:
        yield module


def everything(op, **choices):
    return build(
        op, **{"rows": 70, "features": 24, "hidden": 40, "iterations": 4, **EVERYTHING[op], "solver": "euler", **choices}
    )


@both_ops
@both_dtypes
@pytest.mark.parametrize("features", [24, 64, 65, 128, 140])
def test_every_option_at_once(op, dtype, features, compiled):
    case = everything(op, dtype=dtype, features=features)
    with ops.observe_plans() as plans:
        found = gradients(case, "cuda")
    assert [(plan.backend, plan.backward) for plan in plans] == [("cuda", "cuda" if features <= 128 else "blas")]
    assert len(compiled.calls) == (3 if features <= 128 else 1), "forward, and for backward forward again and back"
    expected, eager = (oracle_gradients(x, dtype) for x in (wide(case), case))
    for name, x in expected.items():
        allowed = 16 * max(error(eager[name], x), torch.finfo(dtype).eps)
        assert error(found[name], x) <= allowed, name


@both_ops
def test_the_arguments_are_those_of_the_call(op, compiled):
    case = everything(op, dtype=torch.float16, sets="2 list", order="cyclic", norm="layernorm gain bias")
    with torch.no_grad():
        out = call(case, "cuda")
    (given,) = compiled.calls
    state = 70 * 24
    hidden = 24 if op == "linear" else 40
    numbers = {"device": 3, "stream": 77, "rows": 70, "features": 24, "hidden": hidden, "iterations": 4, "sets": 2}
    assert {name: given[name] for name in numbers} == numbers
    assert (given["order"], given["norm"]) == ("cyclic", "layernorm")
    assert given["out"] == (out.data_ptr(), state)
    assert given["h"] == (case.leaves["h"].data_ptr(), state)
    assert given["coefficients"][1] == 4 * 5
    assert given["table"][1] == 2 * (4 if op == "linear" else 8)
    assert given["packed"][1] == 256
    assert given["states"] is None


@both_ops
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), one_element_off], ids=[*LAYOUTS, "misaligned"])
def test_layouts(op, layout, compiled):
    """Contiguous parameters are read where they are, at any address."""
    case = everything(op, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(call(laid_out(case, layout), "cuda"), call(case, "cuda"))


@both_ops
def test_trajectory_out_and_no_iterations(op, compiled):
    case = everything(op, dtype=torch.float16, trajectory="return")
    with torch.no_grad():
        states = call(case, "cuda")
        case.arguments["return_trajectory"] = False
        last = call(case, "cuda")
        assert torch.equal(states[-1], last)
        assert torch.equal(states[0], case.leaves["h"])
        wide_out = torch.zeros(70, 48, dtype=torch.float16)
        in_place = case.leaves["h"].detach().clone()
        for out in (wide_out[:, ::2], in_place):
            new = dataclasses.replace(case, arguments={**case.arguments, "out": out})
            if out is in_place:
                new.arguments["h"] = in_place
            assert call(new, "cuda") is out
            assert torch.equal(out, last)
        assert not wide_out[:, 1::2].any()
    before = len(compiled.calls)
    still = everything(op, dtype=torch.float16, trajectory="return", iterations=0, sets="1", dt="number", x0="none")
    states = call(still, "cuda")
    assert torch.equal(states, still.leaves["h"][None])
    assert len(compiled.calls) == before


@both_ops
def test_states_are_walked_from_where_gradients_begin(op, compiled):
    """Backward has room for no others."""
    gradients(everything(op, dtype=torch.float16, grad_iterations=3), "cuda")
    forward, walk, back = compiled.calls
    assert (forward["first"], walk["first"], back["first"]) == (0, 1, 1)
    assert (forward["states"], walk["states"][1], back["states"][1]) == (None, 4 * 70 * 24, 3 * 70 * 24)


def test_no_rows(compiled):
    case = everything("mlp", dtype=torch.float16, rows=0)
    assert_same_bits({"output": call(case, "cuda")}, {"output": case.leaves["h"]})


def test_explain_names_the_kernel(compiled):
    lines = str(sk.explain(call, everything("mlp", dtype=torch.float16), "cuda")).splitlines()
    assert lines[1].split() == ["backend", "cuda"]
    blocks = "blocks of 64 rows x 64 hidden features, 128 threads, 0 KiB shared, compiled for sm_90"
    assert any(line.startswith("forward") and line.endswith(f"one launch, {blocks}") for line in lines)


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        ("sm_80 compute_80 sm_90a", {80: 80, 86: 80, 89: 80, 90: 90, 100: 80, 120: 80}),
        ("sm_80", {75: None, 80: 80, 86: 80, 89: 80, 90: None, 100: None}),
        ("sm_86", {80: None, 86: 80, 89: 80}),
        ("sm_90a", {80: None, 89: None, 90: 90, 100: None}),
        ("sm_89 compute_89", {80: None, 86: None, 89: 80, 90: 80, 120: 80}),
    ],
)
def test_what_a_device_runs(architectures, runs):
    assert {arch: cuda.serving(architectures.split(), arch) for arch in runs} == runs


def test_a_module_that_is_not_there_says_why(monkeypatch):
    def imported(error):
        def load(name, package):
            assert (name, package) == ("._cuda", "score_kernels")
            raise error

        monkeypatch.setattr(cuda, "importlib", type("importlib", (), {"import_module": staticmethod(load)}))
        return cuda.module.__wrapped__()

    assert imported(ModuleNotFoundError("x")) == "it was not built: docs/building.md says how"
    assert imported(ImportError("undefined symbol: y")) == "score_kernels._cuda cannot be imported: undefined symbol: y"
    module = emulation.Module((64, 64))
    monkeypatch.setattr(cuda, "module", lambda: module)
    found, reason = cuda.kernels.__wrapped__(80)
    assert found == ()
    assert reason.startswith("it was built for sm_90a, this device has compute capability 8.0")
