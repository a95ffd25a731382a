"""CUDA backward kernels that keep the gradients of the weights in registers: their own code, on a CPU (emulation.py)."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import assert_same_bits, build, planned
from emulation import DTYPES, SIZES, compiled
from kernels import KINKED, SEEDS, SUMS, error, oracle_gradients, wide
from numerics import eager_of, found_by, reference_of, rms_errors
from row_wise import COEFFICIENTS

from score_kernels import ops
from score_kernels.activations import ACTIVATIONS

EVERYTHING = {"norm": "layernorm gain bias", **COEFFICIENTS}


def gradients(emulate, case, size, wanted=None, rows=1 << 20, blocks=2):
    """The output and the gradients of the wanted leaves (all). rows: of a launch; blocks: of it, at most."""
    with compiled(size) as module, planned(chunk_rows=rows, programs=blocks), ops.observe_plans() as plans:
        found = cases.gradients(case, "cuda", wanted)
    assert [plan.backward_kernel.accumulates for plan in plans] == [True]
    backward = [given for given in module.calls if "partials" in given]
    assert all(given["ring"] is None and given["blocks"] <= blocks for given in backward)
    return found


def compare(emulate, case, size, **given):
    dtype = case.leaves["h"].dtype
    found = gradients(emulate, case, size, **given)
    expected, eager = oracle_gradients(wide(case), dtype), oracle_gradients(case, dtype)
    eps = torch.finfo(dtype).eps
    # A preactivation that rounding takes over the kink changes a gradient by a whole term.
    least = eps**0.5 if case.arguments["activation"] in KINKED else eps
    for name, b in expected.items():
        times = 1 if name == "output" else 16 if name in SUMS else 4
        allowed = times * max(error(eager[name], b), 4 * eps if name == "output" else least)
        assert error(found[name], b) <= allowed, f"{name}: {error(found[name], b):.2e}, {allowed:.2e}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sizes_and_activations(emulate, activation):
    """Blocks with two tiles and with one, then a launch that adds to theirs; D and H padded, and not."""
    for index, size in enumerate(SIZES[:2]):
        columns, one = size[0], list(ACTIVATIONS).index(activation) + index
        sizes = {"rows": 134, "features": columns - 3 * (one % 2), "hidden": columns - 5 * (one // 2 % 2), "iterations": 2}
        case = build("mlp", **sizes, dtype=DTYPES[one % 2], activation=activation, **EVERYTHING)
        compare(emulate, case, size, rows=130)


def test_rows_of_a_launch_and_blocks_change_no_state_gradient(emulate):
    case = build("mlp", rows=200, features=38, hidden=40, iterations=2, dtype=torch.float16, grad_iterations=1, **EVERYTHING)
    expected = gradients(emulate, case, SIZES[0])
    assert_same_bits(gradients(emulate, case, SIZES[0]), expected)
    for rows, blocks in ((64, 4), (100, 2), (1 << 20, 4)):
        found = gradients(emulate, case, SIZES[0], rows=rows, blocks=blocks)
        assert_same_bits({name: found[name] for name in ("output", "h", "x0")}, {n: expected[n] for n in ("output", "h", "x0")})
        for name, b in expected.items():
            assert error(found[name], b.double()) <= 16 * torch.finfo(torch.float16).eps, name


def test_any_inputs_can_want_gradients(emulate):
    """The gradients of some inputs have the bits that they have among the gradients of all."""
    case = build("mlp", rows=21, features=38, hidden=60, iterations=2, dtype=torch.float16, **EVERYTHING)
    names = list(case.leaves)
    full = gradients(emulate, case, SIZES[0])
    for wanted in (*([name] for name in names), names[1:]):
        assert_same_bits(gradients(emulate, case, SIZES[0], wanted), {name: full[name] for name in ("output", *wanted)})


def test_rows_that_are_not_there_count_as_nothing(emulate):
    """Of a state of zeros, and without eps, the norm is not a number."""
    case = build("mlp", rows=5, features=38, hidden=40, iterations=2, dtype=torch.float16, norm="rmsnorm")
    case.arguments["eps"] = 0.0
    compare(emulate, case, SIZES[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_the_eager_loop(emulate, dtype):
    """Section 5's rule, as in test_cuda_backward.py."""
    choices = {"activation": "gelu", "norm": "layernorm gain bias", "dt": "float"}
    problems = [
        build("mlp", rows=64, features=64, hidden=64, iterations=4, dtype=dtype, seed=seed, **choices) for seed in range(SEEDS)
    ]
    expected = reference_of(problems)
    ours = rms_errors([gradients(emulate, case, SIZES[0]) for case in problems], expected)
    theirs = rms_errors([found_by(eager_of, case) for case in problems], expected)
    for name, found in ours.items():
        assert found <= (1.0 if name == "output" else 1.5) * theirs[name], (name, found, theirs[name])
