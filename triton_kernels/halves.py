"""A transformer by its halves: each a launch of its own op's kernels for every iteration, the state between them in float32.

For calls of which no whole iteration fits in one launch. The stage program, its reverse and the checkpoints are those of blas;
so is the half that has no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from score_kernels import blas
from score_kernels.attention import MASKS, of_sequences
from score_kernels.blocks import Block, Gradients, Rows
from score_kernels.linalg import Number
from score_kernels.plan import Plan
from score_kernels.pointers import NORM
from score_kernels.problem import ALL_ITERATIONS, Problem
from score_kernels.transformer import Transformer

from . import launch
from .groups import packed_bounds


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """As `launch.forward`."""
    return blas.forward(problem, plan, out, partial(Halves, plans=dict(plan.halves)))


def backward(
    problem: Problem,
    plan: Plan,
    grad_out: Tensor | None,
    grad_trajectory: Tensor | None,
    trajectory: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `launch.backward`."""
    plans = {op: of_half for op, of_half in plan.halves if of_half.backward_tile is not None}
    return blas.backward(problem, plan, grad_out, grad_trajectory, trajectory, needs, partial(Halves, plans=plans))


class Halves(Transformer):
    """A transformer of which the halves in `plans` run by these, the others as in `Transformer`."""

    def __init__(self, problem: Problem, gradients: Gradients | None = None, *, plans: dict[str, Plan]) -> None:
        self.plans = plans
        super().__init__(problem, gradients)

    def half(self, problem: Problem, gradients: Gradients) -> Block:
        plan = self.plans.get(problem.op)
        if plan is None:
            return super().half(problem, gradients)
        return (HalfOnSequences if problem.op == "attention" else Half)(problem, plan, gradients)


class Half(Block):
    """F of one half on the rows of a tile: a call of its op with one iteration, h <- w F(h)."""

    def __init__(self, problem: Problem, plan: Plan, gradients: Gradients) -> None:
        # Not the base's: kernels read the parameters as they are, but those of a norm that follows, which they do not have.
        self.problem, self.plan, self.gradients = problem, plan, gradients
        self.norm, self.eps, self.features = problem.options.norm, problem.options.eps, [problem.features]
        self.operand_dtype, self.dtype = problem.operand_dtype, problem.compute_dtype
        self.parameters = {name: [p.to(self.dtype) for p in problem.parameters[name]] for name in NORM}
        self.coefficients = problem.coefficients.new_zeros(1, 1, 5)
        # Of the tile: its shape as the op takes it, and the inputs of its sequences.
        self.shape: Sequence[int] = (-1, problem.features)
        self.inputs, self.known = problem.inputs, problem.known

    def inner(self, y: Tensor, index: int) -> Tensor:
        out = torch.empty_like(y)
        launch.forward(self._call(y, 1.0, index), self.plan, out)
        return out

    def outer(self, u: Tensor, index: int) -> Tensor:
        return u

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: object = None
    ) -> tuple[Tensor, Tensor | None]:
        call = self._call(y, w, index)
        into = {name: self.gradients[name][index % len(self.gradients[name])] for name, ps in call.parameters.items() if ps}
        needs = [True, False, want_dw, False, False, *(x is not None for x in into.values())]
        # y is all of the states that backward would walk again.
        found = launch.Backward(call, self.plan, g, None, call.h.expand(2, *call.h.shape), needs)
        found.run()
        gradients = found.gradients()
        for name, x in into.items():
            if x is not None:
                x += gradients[name][0]
        return found.grad_h, found.totals[0, 3] if want_dw else None

    def _call(self, y: Tensor, w: Number, index: int) -> Problem:
        """w F of the tile's y with this set of parameters."""
        coefficients = self.coefficients.clone()
        coefficients[..., 3] = w
        chosen = {name: self.problem.parameter(name, index) for name in self.problem.parameters}
        absent = NORM if self.norm == "none" else ()
        options = self.problem.options._replace(
            norm=self.norm, solver="euler", order="consecutive", grad_iterations=ALL_ITERATIONS, trajectory=False
        )
        return replace(
            self.problem, h=y.view(self.shape), x0=None, coefficients=coefficients, state_scale=None, x0_scale=None,
            parameters={name: [] if p is None or name in absent else [p] for name, p in chosen.items()},
            inputs=self.inputs, options=options, known=self.known,
        )  # fmt: skip


class HalfOnSequences(Half):
    """Attention: a tile is whole sequences, in their order."""

    def tiles(self, total: int, rows: int) -> Iterator[Rows]:
        problem, (tokens, features) = self.problem, self.problem.h.shape[-2:]
        if total <= rows:
            self.shape = problem.h.shape
            yield slice(0, total)
        elif problem.inputs["cu_seqlens"] is not None:
            lengths = problem.lengths * problem.h.shape[:-2].numel()
            starts = list(accumulate(lengths, initial=0))
            for first, last in pairwise(packed_bounds(lengths, rows)):
                offsets = [start - first for start in starts if first <= start <= last]
                of_tile = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=problem.h.device)}
                self.inputs = {**problem.inputs, **of_tile}
                self.known = [[stop - start for start, stop in pairwise(offsets)]]
                yield slice(first, last)
        else:
            self.shape, step = (-1, tokens, features), max(rows // tokens, 1)
            for first in range(0, total // tokens, step):
                sequences = slice(first, min(first + step, total // tokens))
                of_tile = {
                    name: of_sequences(problem, sequences, x, dims)
                    for name, dims in MASKS.items()
                    if (x := problem.inputs[name]) is not None
                }
                self.inputs = {**problem.inputs, **of_tile}
                yield slice(sequences.start * tokens, sequences.stop * tokens)
