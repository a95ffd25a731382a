"""The tensors of a case, what a provider has to compute from them in each mode, and the float64 answer it is checked with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from score_kernels import functional
from score_kernels.problem import INPUTS
from score_kernels.transformer_arguments import nested

from .cases import Case
from .measure import Prepared

# A provider's function: (h, parameters by name) -> the state after T iterations.
Forward = Callable[[Tensor, dict[str, Tensor]], Tensor]

# Rows of the float64 reference computed at a time: rows (sequences) are independent, and its graph grows with T.
REFERENCE_ROWS = 1024

# Largest relative error that still counts as the same computation, in eps: of outputs and of gradients. Where products round to
# 16 bits or tf32, the inputs of an activation with a kink change sign by rounding, which shows in the gradients only.
TOLERANCE_EPS = {"wide": (16.0, 128.0), "narrow": (4.0, 32.0)}
NARROW_FROM = 1e-4


@dataclass(frozen=True)
class Inputs:
    """h and cotangent (M, D), of sequences (B, N, D); parameters by the op's names, with a leading L when it has several sets.

    leaves: the tensors whose gradients a backward pass has to answer.
    """

    h: Tensor
    parameters: dict[str, Tensor]
    cotangent: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.h, *self.parameters.values()) if x.requires_grad]

    def rows(self, rows: slice, parameters: dict[str, Tensor]) -> Inputs:
        """Some of the rows, or sequences, in float64, with these parameters."""
        h = self.h.detach()[rows].double().requires_grad_(self.h.requires_grad)
        return Inputs(h, parameters, self.cotangent[rows].double())


def make(case: Case, mode: str, dtype: torch.dtype, device: str) -> Inputs:
    """Random tensors, the same ones for a case every time and on every device."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
        value = random(*((case.sets,) if case.sets > 1 else ()), *shape)
        if name.endswith("norm_weight"):
            return 1 + 0.1 * value
        return value / math.sqrt(shape[1]) if len(shape) == 2 else 0.1 * value

    def leaf(value: Tensor) -> Tensor:
        return value.to(device, dtype).requires_grad_(mode != "forward")

    h, cotangent = random(*case.batch, case.features), random(*case.batch, case.features)
    parameters = {name: leaf(parameter(name, shape)) for name, shape in case.shapes.items()}
    return Inputs(leaf(h), parameters, cotangent.to(device, dtype))


def step(forward: Forward, inputs: Inputs, mode: str) -> Prepared:
    """What is measured in a mode. Its result is a list of tensors: the output in forward, the gradients of all leaves in
    backward (the forward pass being the set-up), both in training. A gradient that nothing reaches is zero."""

    def run() -> Tensor:
        return forward(inputs.h, inputs.parameters)

    def infer(_: Any) -> list[Tensor]:
        with torch.no_grad():
            return [run()]

    def backward(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, inputs.leaves, inputs.cotangent, materialize_grads=True))

    def train(_: Any) -> list[Tensor]:
        out = run()
        return [out.detach(), *backward(out)]

    return {
        "forward": Prepared(lambda: None, infer),
        "backward": Prepared(run, backward),
        "training": Prepared(lambda: None, train),
    }[mode]


def ours(case: Case, backend: str) -> Forward:
    """The case as a call of this package's op."""
    function: Callable[..., Tensor] = getattr(functional, f"score_{case.op}")
    names = ("iterations", "norm", "update", "solver", "dt", "order", "grad_iterations")
    options = {name: getattr(case, name) for name in names}
    if case.op in INPUTS:
        options |= {"num_heads": case.heads, "causal": case.causal}
    if case.op != "attention":
        options["activation"] = case.activation
    if case.op == "transformer":
        options["norm_placement"] = case.norm_placement
        return lambda h, parameters: function(h, **nested(parameters), **options, backend=backend)
    absent = dict.fromkeys({"linear": ("bias",), "mlp": ("b1", "b2"), "attention": ("b_qkv", "b_out")}[case.op])
    return lambda h, parameters: function(h, **{**absent, **parameters}, **options, backend=backend)


def reference(case: Case, inputs: Inputs, mode: str) -> list[Tensor]:
    """The result of `step` in float64, by this package's reference."""
    forward = ours(case, "reference")
    parameters = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in inputs.parameters.items()}
    per_row: list[list[Tensor]] = []
    sums = [torch.zeros_like(p) for p in parameters.values()]
    split = {"forward": 1, "backward": 1, "training": 2}[mode]
    count, *tokens = case.batch
    at_once = max(REFERENCE_ROWS // math.prod(tokens), 1)
    for start in range(0, count, at_once):
        prepare, run = step(forward, inputs.rows(slice(start, start + at_once), parameters), mode)
        results = run(prepare())
        assert isinstance(results, list)
        per_row.append(results[:split])
        for total, gradient in zip(sums, results[split:], strict=False):
            total += gradient
    whole = [torch.cat(parts) for parts in zip(*per_row, strict=True)]
    return whole if mode == "forward" else [*whole, *sums]


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm(x - reference) / norm(reference) of the results; NaN if one of them is not finite.

    Where the reference is zero, as the gradient of a state that no gradient reaches, the norm of the result.
    """
    errors = [(x.double() - y).norm().item() / (y.norm().item() or 1.0) for x, y in zip(results, expected, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def tolerance(eps: float, mode: str, case: Case | None = None) -> float:
    """The largest relative error with which a result of this mode and case is right, when products round to eps."""
    outputs, gradients = TOLERANCE_EPS["narrow" if eps > NARROW_FROM else "wide"]
    return (outputs * _growth(case) if mode == "forward" else gradients) * eps


def _growth(case: Case | None) -> float:
    """How much more than another case's the outputs of a stack that replaces its state may be off.

    A layer passes on all that those before it rounded, where a step of SCORE takes dt of it and keeps the rest: measured over
    activations and norms, the plain loop's error is at most 4, 8, 19 and 58 eps of float32 after 1, 4, 8 and 16 layers, and
    16 and 57 after 4 and 8 whose gate multiplies two rounded factors.
    """
    if case is None or case.update != "replace":
        return 1.0
    return max(case.iterations / (2 if case.gated else 4), 1.0)
