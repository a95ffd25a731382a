"""The accuracy that is promised: against the same loop in plain PyTorch, in the input's dtype, over 20 random problems.

A 16-bit result is at least as accurate as the eager loop's, which rounds the state T times.
"""

from __future__ import annotations

import pytest
import torch
from cases import build, call
from numerics import BLOCKS, REPLACE_BOUND, eager_of, found_by, reference_of, rms_errors

SEEDS = 20
ROWS = FEATURES = 64

# A rounding error that takes a preactivation over the kink changes a gradient by a whole term: chance, not accuracy.
KINKED = ("mlp relu",)

COMBINATIONS = [
    *((block, update) for block in BLOCKS if "transformer" not in block for update in ("contractive", "replace")),
    *((block, "residual") for block in ("linear rmsnorm", "mlp")),
    # As language models, and as torch's layers and TRM: a stack of the first kind grows, one of the second is normed.
    ("transformer", "contractive"),
    ("transformer post", "replace"),
]
DEPTHS = (1, 4, 16, 64)
# Not at 64, which takes seconds: the same ops are there with the contractive update.
SHALLOW = (("attention", "replace"), ("transformer post", "replace"))

# Ours over eager's: the bound on the result's error, then on every gradient's. fp32: rounding is as good as it gets for both.
BOUNDS = {
    torch.float16: (1.0, 1.5),
    torch.bfloat16: (1.0, 1.5),
    torch.float32: (4.0, 4.0),
}


@pytest.mark.parametrize(
    ("block", "update", "iterations"),
    [(*chosen, t) for chosen in COMBINATIONS for t in DEPTHS if t < 64 or chosen not in SHALLOW],
)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_error_of_result_and_gradients_against_the_eager_loop(dtype, block, update, iterations):
    op, choices, gain = BLOCKS[block]
    sizes = {"rows": ROWS, "features": FEATURES, "hidden": FEATURES, "iterations": iterations}
    # Well conditioned at every depth: an ordinary stack of one random layer is chaotic at gain 1, and a residual one grows.
    gain = 0.3 if update == "replace" else gain
    problems = [build(op, **sizes, dtype=dtype, seed=seed, update=update, gain=gain, **choices) for seed in range(SEEDS)]
    for case in problems:
        case.arguments["dt"] = {"replace": None, "contractive": 0.4, "residual": 1 / iterations}[update]
    gradients = block not in KINKED
    expected = reference_of(problems, gradients)
    ours = rms_errors([found_by(lambda c: call(c, "blas"), case, gradients) for case in problems], expected)
    theirs = rms_errors([found_by(eager_of, case, gradients) for case in problems], expected)
    result, gradient = BOUNDS[dtype]
    if update == "replace" and dtype != torch.float32:
        result = REPLACE_BOUND
    for name, error in ours.items():
        if theirs[name] > 0.25:
            # The gradient of h_0 vanishes with depth, below what 16 bits can hold; every other one has a digit to compare.
            assert name == "h", f"{name}: eager has no digit ({theirs[name]:.1e}), take other problems"
            assert iterations >= 16, f"{name}: eager has no digit ({theirs[name]:.1e}), take other problems"
            continue
        bound = (result if name == "output" else gradient) * theirs[name]
        assert error <= bound, f"{name}: RMS error {error:.3e}, eager {theirs[name]:.3e}, allowed {bound:.3e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_error_of_small_problems_in_eps(block, dtype):
    """Too small for statistics against eager: a rounding of the result and of each product's operands."""
    op, choices, _ = BLOCKS[block]
    sizes = {"rows": 3, "features": 5, "hidden": 7}
    for iterations in (1, 4):
        problems = [build(op, **sizes, iterations=iterations, dtype=dtype, seed=seed, **choices) for seed in range(SEEDS)]
        found = [found_by(lambda c: call(c, "blas"), case, gradients=False) for case in problems]
        error = rms_errors(found, reference_of(problems, gradients=False))["output"]
        assert error <= 4 * torch.finfo(dtype).eps
