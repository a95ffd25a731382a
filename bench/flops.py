"""Floating-point operations and compulsory memory traffic of a case: the only formulas that rates are computed from."""

from __future__ import annotations

import math

from score_kernels.stages import REPLACE, SOLVERS

from .cases import Case

# Passes over the products of F in each mode: backward multiplies once for the state's gradient and once for the weights'.
# Work that a provider repeats to save memory is not counted: rates compare useful work.
PASSES = {"forward": 1, "backward": 2, "training": 3}


def flops(case: Case, mode: str) -> int:
    """Operations in matrix products, 2 per multiply-add, of all iterations and stages."""
    products = {"linear": 1, "mlp": 3 if case.gated else 2}[case.op]
    stages = len(REPLACE if case.update == "replace" else SOLVERS[case.solver])
    return PASSES[mode] * 2 * products * case.rows * case.features * case.hidden * case.iterations * stages


def traffic(case: Case, mode: str, itemsize: int) -> int:
    """Bytes that any implementation has to move: inputs read once, outputs written once, nothing in between."""
    state = case.rows * case.features
    weights = sum(math.prod(shape) for shape in case.shapes.values()) * case.sets
    forward = 2 * state + weights
    backward = 3 * state + 2 * weights
    return itemsize * {"forward": forward, "backward": backward, "training": forward + backward}[mode]
