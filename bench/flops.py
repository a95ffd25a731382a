"""Floating-point operations and compulsory memory traffic of a case: the only formulas that rates are computed from."""

from __future__ import annotations

import math

from score_kernels.stages import REPLACE, SOLVERS

from .cases import Case

# Passes over the products of F in each mode, forward and backward: the latter multiplies once for the state's gradient and once
# for the weights'. Work that a provider repeats to save memory is not counted: rates compare useful work.
PASSES = {"forward": (1, 0), "backward": (0, 2), "training": (1, 2)}


def flops(case: Case, mode: str) -> int:
    """Operations in matrix products, 2 per multiply-add, of all iterations and stages that the mode's passes reach."""
    stages = len(REPLACE if case.update == "replace" else SOLVERS[case.solver])
    forward, backward = PASSES[mode]
    passes = forward * case.iterations + backward * (case.iterations - case.first_grad)
    return passes * 2 * _products(case) * case.rows * stages


def _products(case: Case) -> int:
    """Multiply-adds of F for one row; of a causal row those with the keys that it sees, (N + 1) / 2 on average."""
    attention = 4 * case.features**2 + case.features * (case.tokens + 1 if case.causal else 2 * case.tokens)
    mlp = (3 if case.gated else 2) * case.features * case.hidden
    products = {"linear": case.features * case.hidden, "mlp": mlp, "attention": attention, "transformer": attention + mlp}
    return products[case.op]


def traffic(case: Case, mode: str, itemsize: int) -> int:
    """Bytes that any implementation has to move: inputs read once, outputs written once, nothing in between.

    A state that no gradient reaches has none to write.
    """
    state = case.rows * case.features
    weights = sum(math.prod(shape) for shape in case.shapes.values()) * case.sets
    forward = 2 * state + weights
    backward = (3 if case.first_grad == 0 else 2) * state + 2 * weights
    return itemsize * {"forward": forward, "backward": backward, "training": forward + backward}[mode]
