"""The CUDA forward kernels' own code, on a CPU (emulation.py), against the oracle in float64 and the eager loop."""

from __future__ import annotations

import ctypes
import itertools

import cases
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import LAYOUTS, build, call
from emulation import DTYPES, SIZES, Forward, problem_of, run
from kernels import error, one_element_off, wide
from row_wise import COEFFICIENTS, EVERYTHING, ROW_WISE, seed_of

from score_kernels.activations import ACTIVATIONS

# No kernel, but the plain loops of tests/cuda/plain.cuh.
PLAIN = (0, 0)

both_ops = pytest.mark.parametrize("op", ROW_WISE)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward(emulate, case, size, *, in_place=False):
    """h_T, or all states where the case asks for a trajectory, of a kernel of this size."""
    p = problem_of(case)
    h = p.h.contiguous()
    out = h if in_place else torch.full_like(h, float("nan"))
    states = torch.full((p.iterations + 1, *h.shape), float("nan")) if p.options.trajectory else None
    run(emulate.forward, p, size, Forward, h=h, out=out, states=states)
    return out if states is None else states


def compare(emulate, case, size, room=4):
    found, dtype = forward(emulate, case, size), case.leaves["h"].dtype
    expected = call(wide(case), "oracle").detach()
    assert found.shape == expected.shape
    eps = torch.finfo(dtype).eps
    # Where the loop in plain PyTorch rounds as much, as without any contraction, that is the measure.
    allowed = max(room * eps, 2 * error(call(case, "oracle").detach(), expected))
    assert error(found, expected) <= allowed, (error(found, expected), allowed)


def options_of(op):
    """Those that the forward pass of Euler has, each alone and in pairs, none twice."""
    found = {}
    for given in (*cases.single(op), *cases.pairwise(op)):
        kept = {"trajectory": "return" if given.get("trajectory", "none") != "none" else "none"}
        choices = {**given, **kept, "solver": "euler", "grad_iterations": None}
        if cases.legal(choices):
            found[cases.label(choices)] = choices
    return list(found.values())


OPTIONS = [(op, choices) for op in ROW_WISE for choices in options_of(op)]


@both_dtypes
@pytest.mark.parametrize(("op", "choices"), OPTIONS, ids=[f"{op}-{cases.label(c)}" for op, c in OPTIONS])
def test_options(emulate, op, choices, dtype):
    """Every option alone and every pair of options, on problems with a ragged tile and padded features."""
    case = build(op, rows=21, features=38, hidden=70, iterations=4, dtype=dtype, seed=seed_of(choices), **choices)
    compare(emulate, case, SIZES[0])


@both_dtypes
@both_ops
def test_the_second_opinion_is_right(emulate, op, dtype):
    """The plain loops that judge the kernels on a GPU, with every option and every pair of options."""
    for choices in options_of(op):
        case = build(op, rows=3, features=38, hidden=70, iterations=4, dtype=dtype, seed=seed_of(choices), **choices)
        compare(emulate, case, PLAIN)
    for activation in ACTIVATIONS:
        choices = {**EVERYTHING[op], **COEFFICIENTS, "activation": activation}
        compare(emulate, build(op, rows=3, features=129, hidden=33, iterations=3, dtype=dtype, **choices), PLAIN)


def test_the_second_opinion_agrees_with_the_kernels_and_notices_faults(emulate, capfd):
    """What tests/cuda/second_opinion.cu does on a GPU, its problems included, with the emulated kernels."""
    worst = ctypes.c_double()
    wrong = emulate.second_opinions(0, ctypes.byref(worst))
    assert wrong == 0, capfd.readouterr().out
    assert 0.01 < worst.value < 1


@both_ops
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sizes_and_activations(emulate, op, size, activation):
    for dtype, features in zip(DTYPES, (size[0], size[0] - 3), strict=True):
        choices = {**EVERYTHING[op], **COEFFICIENTS, "activation": activation}
        compare(emulate, build(op, rows=18, features=features, hidden=150, iterations=3, dtype=dtype, **choices), size)


@both_ops
@pytest.mark.parametrize("features", [129, 130, 192, 193, 255])
def test_widths_of_256_columns(emulate, op, features):
    """From none to all but one of the last columns are padding: what is wholly padding is passed over."""
    for dtype, size in itertools.product(DTYPES, SIZES[-2:]):
        choices = {**EVERYTHING[op], **COEFFICIENTS, "activation": "sigmoid"}
        compare(emulate, build(op, rows=20, features=features, hidden=70, iterations=3, dtype=dtype, **choices), size)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_random_shapes(emulate, data):
    op, size = data.draw(st.sampled_from(ROW_WISE)), data.draw(st.sampled_from(SIZES))
    choices = data.draw(st.sampled_from(options_of(op)))
    sizes = {"rows": (1, 150), "features": (1, size[0]), "hidden": (1, 140), "iterations": (1, 7), "seed": (0, 99)}
    drawn = {n: data.draw(st.integers(*limits), n) for n, limits in sizes.items()}
    compare(emulate, build(op, **drawn, dtype=data.draw(st.sampled_from(DTYPES)), **choices), size)


@both_ops
def test_failure_case_05_and_06_misaligned_and_non_contiguous(emulate, op):
    case = build(op, rows=11, features=38, hidden=40, dtype=torch.float16, **EVERYTHING[op])
    expected = forward(emulate, case, SIZES[0])
    for layout in (one_element_off, *LAYOUTS.values()):
        assert torch.equal(forward(emulate, cases.laid_out(case, layout), SIZES[0]), expected)


@both_ops
def test_in_place(emulate, op):
    case = build(op, rows=70, features=64, hidden=64, dtype=torch.bfloat16, **EVERYTHING[op])
    expected = forward(emulate, case, SIZES[0])
    assert torch.equal(forward(emulate, case, SIZES[0], in_place=True), expected)


@both_ops
def test_failure_case_13_state_beyond_fp16(emulate, op):
    case = build(op, rows=9, features=24, hidden=24, iterations=4, dtype=torch.float16, norm="layernorm gain bias", dt="float")
    case.arguments["state_scale"] = torch.tensor([1e6, 1e-6, 1e6, 1e-6])
    other = wide(case)
    other.arguments["state_scale"] = case.arguments["state_scale"].double()
    assert error(forward(emulate, case, SIZES[0]), call(other, "oracle").detach()) <= 4 * torch.finfo(torch.float16).eps


@both_ops
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_failure_case_18_nan_and_inf_stay_in_their_row(emulate, op, bad, activation):
    case = build(op, rows=19, features=38, hidden=40, iterations=2, dtype=torch.bfloat16, activation=activation)
    expected = forward(emulate, case, SIZES[0]).clone()
    with torch.no_grad():
        case.leaves["h"][5, 2] = case.leaves["h"][-1, 2] = bad
    found = forward(emulate, case, SIZES[0])
    others = [row for row in range(19) if row not in (5, 18)]
    assert torch.equal(found[others], expected[others])
    assert not found[5].isfinite().all()
    assert not found[-1].isfinite().all()
