"""The kernels' algorithm in PyTorch calls: all T iterations of a tile of rows before the next tile, gradients by hand.

A tile stays in cache (or within the scratch budget on a GPU) for all T iterations and is updated in place. Backward keeps
nothing from forward but its inputs: it walks each tile again, keeps some of its states, and reverses the iterations from them.
This file is the executable specification of the fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import stages
from .attention import Attention
from .blocks import MLP, Block, Gradients, Linear, Rows
from .linalg import add_, dot
from .plan import Plan
from .problem import Problem
from .transformer import Transformer

# A block from a problem and where its parameters' gradients go.
Make = Callable[[Problem, Gradients | None], Block]

BLOCKS: dict[str, type[Block]] = {"linear": Linear, "mlp": MLP, "attention": Attention, "transformer": Transformer}


def kept(problem: Problem) -> int:
    """Numbers of a row that the block of this call keeps in backward, beside each state but the last of a walk."""
    return BLOCKS[problem.op].kept(problem) if problem.stages == 1 else 0


def forward(problem: Problem, plan: Plan, out: Tensor, make: Make | None = None) -> Tensor:
    """Writes h_T into `out` (like h, contiguous; h itself is allowed); returns all states (T+1, ...), or an empty tensor.

    make: of the block, another one than that of `BLOCKS`.
    """
    h = problem.h.reshape(-1, problem.features)
    x0 = None if problem.x0 is None else problem.x0.reshape(h.shape)
    iteration = _Iteration(problem, (make or BLOCKS[problem.op])(problem, None))
    keep = problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=problem.compute_dtype)
    states = trajectory.view(problem.iterations + 1, *h.shape) if keep else trajectory
    last = out.view(h.shape)
    for rows in iteration.block.tiles(h.shape[0], plan.rows):
        y = h[rows].to(problem.compute_dtype, copy=True)
        injected = _tile(x0, rows, y)
        for t in range(problem.iterations):
            if keep:
                states[t, rows] = y
            iteration.advance_(y, injected, t)
        last[rows] = y.to(last.dtype)
        if keep:
            states[-1, rows] = y
    return trajectory


def backward(
    problem: Problem,
    plan: Plan,
    grad_out: Tensor | None,
    grad_trajectory: Tensor | None,
    trajectory: Tensor | None,
    needs: Sequence[bool],
    make: Make | None = None,
) -> list[Tensor]:
    """Gradients of the inputs whose flag in `needs` is set, in the order of `Problem.build`; a missing gradient is zero."""
    shape, dtype = (-1, problem.features), problem.compute_dtype
    h = problem.h.reshape(shape)
    x0 = None if problem.x0 is None else problem.x0.reshape(shape)
    grad_out = None if grad_out is None else grad_out.reshape(shape)
    grad_trajectory = None if grad_trajectory is None else grad_trajectory.reshape(problem.iterations + 1, *h.shape)
    trajectory = None if trajectory is None else trajectory.reshape(problem.iterations + 1, *h.shape)

    flags = iter(needs)
    want_h, want_x0, want_table, want_state_scale, want_x0_scale = (next(flags) for _ in range(5))
    parameters: Gradients = {
        name: [
            torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format) if next(flags) else None for p in tensors
        ]
        for name, tensors in problem.parameters.items()
    }
    sums = h.new_zeros(problem.iterations, dtype=torch.float64)
    table = torch.zeros_like(problem.coefficients, dtype=torch.float64) if want_table else None
    state_scale, x0_scale = (sums.clone() if want else None for want in (want_state_scale, want_x0_scale))
    grad_h = h.new_empty(h.shape) if want_h else None
    grad_x0 = h.new_empty(h.shape) if want_x0 else None

    block = (make or BLOCKS[problem.op])(problem, parameters)
    iteration = _Iteration(problem, block, table, state_scale, x0_scale)
    for rows in iteration.block.tiles(h.shape[0], plan.backward_rows):
        g = h.new_zeros(h[rows].shape, dtype=dtype)
        if grad_out is not None:
            g.copy_(grad_out[rows])
        injected = _tile(x0, rows, g)
        dx0 = torch.zeros_like(g) if want_x0 else None
        for t, state, kept in _reversed_states(iteration, plan, h, injected, trajectory, rows):
            if grad_trajectory is not None:
                g.add_(grad_trajectory[t + 1, rows])
            g = iteration.reverse(state, injected, g, dx0, t, kept)
        if grad_trajectory is not None:
            g.add_(grad_trajectory[0, rows])
        if grad_h is not None:
            grad_h[rows] = g.to(grad_h.dtype) if problem.first_grad == 0 else 0
        if grad_x0 is not None and dx0 is not None:
            grad_x0[rows] = dx0.to(grad_x0.dtype)

    found = [
        None if grad_h is None else grad_h.view(problem.h.shape),
        None if grad_x0 is None else grad_x0.view(problem.h.shape),
        table if table is None else table.to(problem.coefficients.dtype),
        None if problem.state_scale is None or state_scale is None else state_scale.to(problem.state_scale.dtype),
        None if problem.x0_scale is None or x0_scale is None else x0_scale.to(problem.x0_scale.dtype),
    ]
    for name, tensors in problem.parameters.items():
        found += [None if g is None else g.to(p.dtype) for p, g in zip(tensors, parameters[name], strict=True)]
    return [g for g in found if g is not None]


class _Iteration:
    """One iteration of the stage program on a tile of rows, and its reverse, with the gradients it accumulates."""

    def __init__(
        self,
        problem: Problem,
        block: Block,
        table: Tensor | None = None,
        state_scale: Tensor | None = None,
        x0_scale: Tensor | None = None,
    ) -> None:
        self.problem, self.block = problem, block
        self.table, self.state_scale, self.x0_scale = table, state_scale, x0_scale
        self.coefficients = _numbers(problem.coefficients)
        self.r = None if problem.state_scale is None else _numbers(problem.state_scale)
        self.s = None if problem.x0_scale is None else _numbers(problem.x0_scale)
        self.uses_z = stages.uses_z(problem.options.solver)
        self.uses_sum = stages.uses_sum(problem.options.solver)

    def advance_(self, y: Tensor, x0: Tensor | None, t: int, kept: list[Any] | None = None) -> None:
        """y = h_t becomes h_{t+1}; `kept` receives what the block keeps of each stage."""
        self._start_(y, x0, t)
        z = y.clone() if self.uses_z else None
        total = torch.zeros_like(y) if self.uses_sum else None
        for stage, (*_, e) in enumerate(self.coefficients[t]):
            if total is not None:
                add_(total, e, y)
            self._update_(y, z, total, t, stage, kept)

    def reverse(self, h: Tensor, x0: Tensor | None, g: Tensor, dx0: Tensor | None, t: int, kept: list[Any]) -> Tensor:
        """From h_t and g = dL/dh_{t+1} (overwritten) to dL/dh_t; all other gradients are accumulated.

        kept: what the block has kept of the only stage, or nothing.
        """
        z, states, totals = self._replay(h, x0, t, kept)
        gz = torch.zeros_like(g) if self.uses_z else None
        gtotal = torch.zeros_like(g) if self.uses_sum else None
        for stage in reversed(range(len(states))):
            p, q, v, w, e = self.coefficients[t][stage]
            y, total = states[stage], totals[stage]
            if gtotal is not None:
                add_(gtotal, v, g)
            of_stage = kept[stage] if stage < len(kept) else None
            dy, dw = self.block.backward(y, g, w, self.problem.set_at(t), self.table is not None, of_stage)
            if self.table is not None and dw is not None:
                v_e = (g.new_zeros(()),) * 2 if total is None or gtotal is None else (dot(g, total), dot(gtotal, y))
                self.table[t, stage] += torch.stack([dot(g, z), dot(g, y), v_e[0], dw, v_e[1]])
            if gz is not None:
                add_(gz, p, g)
            g.mul_(q).add_(dy)
            if gtotal is not None:
                add_(g, e, gtotal)
        if gz is not None:
            g.add_(gz)
        return self._start_backward_(h, x0, g, dx0, t)

    def _replay(
        self, h: Tensor, x0: Tensor | None, t: int, kept: list[Any]
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """z, and for every stage its input y and the S that it reads; `kept` receives what the block keeps of those passed."""
        z = self._start_(h.clone(), x0, t)
        states, totals = [z], []
        total = torch.zeros_like(z) if self.uses_sum else None
        for stage, (*_, e) in enumerate(self.coefficients[t]):
            y = states[-1]
            total = None if total is None else add_(total.clone(), e, y)
            totals.append(total)
            if stage + 1 < len(self.coefficients[t]):
                states.append(self._update_(y.clone(), z, total, t, stage, kept))
        return z, states, totals

    def _update_(
        self, y: Tensor, z: Tensor | None, total: Tensor | None, t: int, stage: int, kept: list[Any] | None = None
    ) -> Tensor:
        """y <- p z + q y + v S + w F(y), the product of F landing on y."""
        p, q, v, w, _ = self.coefficients[t][stage]
        index = self.problem.set_at(t)
        if kept is None:
            u = self.block.inner(y, index)
        else:
            u, of_stage = self.block.inner_kept(y, index)
            kept.append(of_stage)
        self.block.outer_(y, u, index, q, w)
        if self.uses_z and z is not None:
            add_(y, p, z)
        return y if total is None else add_(y, v, total)

    def _start_(self, y: Tensor, x0: Tensor | None, t: int) -> Tensor:
        """y <- r y + s x0"""
        if self.r is not None:
            y.mul_(self.r[t])
        return y if x0 is None else add_(y, 1.0 if self.s is None else self.s[t], x0)

    def _start_backward_(self, h: Tensor, x0: Tensor | None, g: Tensor, dx0: Tensor | None, t: int) -> Tensor:
        if self.state_scale is not None:
            self.state_scale[t] += dot(g, h)
        if self.x0_scale is not None and x0 is not None:
            self.x0_scale[t] += dot(g, x0)
        if dx0 is not None:
            add_(dx0, 1.0 if self.s is None else self.s[t], g)
        return g if self.r is None else g.mul_(self.r[t])


def _reversed_states(
    iteration: _Iteration, plan: Plan, h: Tensor, x0: Tensor | None, trajectory: Tensor | None, rows: Rows
) -> Iterator[tuple[int, Tensor, list[Any]]]:
    """(t, h_t, what the block kept of it, if it did) of one tile, from the last iteration to the first that gradients reach.

    From the saved trajectory; else every `plan.interval`-th state is kept on a first walk, and the states between two of
    them are walked again when their turn comes, the block keeping its own (with an interval of 1 all are walked only once).
    """
    problem = iteration.problem
    first, last = problem.first_grad, problem.iterations
    if trajectory is not None:
        for t in reversed(range(first, last)):
            yield t, trajectory[t, rows].to(problem.compute_dtype), []
        return
    y = h[rows].to(problem.compute_dtype, copy=True)
    for t in range(first):
        iteration.advance_(y, x0, t)
    interval = max(last - first, 1) if plan.interval == 1 else plan.interval
    starts = range(first, last, interval)
    checkpoints: list[Tensor] = []
    for start in starts:
        checkpoints.append(y)
        y = y.clone()
        if start != starts[-1]:
            for t in range(start, start + interval):
                iteration.advance_(y, x0, t)
    for start in reversed(starts):
        segment = [checkpoints.pop()]
        kept: list[list[Any]] = []
        for t in range(start, min(start + interval, last) - 1):
            segment.append(segment[-1].clone())
            kept.append([])
            # Several stages are replayed from h_t, and what the block keeps of them is kept then.
            iteration.advance_(segment[-1], x0, t, kept[-1] if problem.stages == 1 else None)
        kept.append([])
        while segment:
            yield start + len(segment) - 1, segment.pop(), kept.pop()


def _tile(x: Tensor | None, rows: Rows, like: Tensor) -> Tensor | None:
    return None if x is None else x[rows].to(like.dtype)


def _numbers(x: Tensor) -> Any:
    """Coefficients as nested lists: of numbers on the CPU, of 0-dim tensors elsewhere, so that nothing waits for the device."""
    if x.device.type == "cpu":
        return x.tolist()
    return [_numbers(row) for row in x.unbind()] if x.dim() else x
