"""From a `Problem` to launches of the kernels: one for forward, and for backward some for each chunk of rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from score_kernels import stages
from score_kernels.planner import Plan
from score_kernels.problem import LEADING, Problem

from .configs import SCALES, SLOTS, Tile
from .iterate import Static, backward_kernel, forward_kernel
from .linear import linear_reverse, linear_update
from .mlp import mlp_reverse, mlp_update
from .ring import Layer, Ring
from .tables import Tables, prepared, tables


class Op(NamedTuple):
    """The parts of an op's kernels. fields: of the ring, with their widths, "D" or "H"; layers: what they are for."""

    update: Any
    reverse: Any
    fields: dict[str, str]
    layers: tuple[Layer, ...]


OPS = {
    "linear": Op(linear_update, linear_reverse, {"x": "D", "da": "D"}, (Layer("weight", "bias", "da", "x"),)),
    "mlp": Op(
        mlp_update,
        mlp_reverse,
        {"x": "D", "g": "D", "u": "H", "dz": "H", "dgate": "H"},
        (
            Layer("w1", "b1", "dz", "x"),
            Layer("w2", "b2", "g", "u", unscaled=True),
            Layer("w_gate", "b_gate", "dgate", "x"),
        ),
    ),
}


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Writes h_T into `out` (same shape as h; h itself is allowed); returns all states (T+1, ...), or an empty tensor."""
    problem = prepared(problem)
    h, keep = _flat(problem.h, problem), problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape) if out.is_contiguous() else torch.empty_like(h)
    _walk(problem, plan, h, _flat(problem.x0, problem), last, tables(problem), trajectory if keep else None, 0, 1)
    if not out.is_contiguous():
        out.copy_(last.view(out.shape))
    return trajectory


def backward(
    problem: Problem,
    plan: Plan,
    grad_out: Tensor | None,
    grad_trajectory: Tensor | None,
    trajectory: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the inputs whose flag in `needs` is set, in the order of `Problem.build`; a missing gradient is zero.

    Chunks of rows, so that what a launch leaves behind is bounded: forward once more, keeping the inputs of the chunk's stages
    unless the trajectory that was saved has them; then the backward kernel; then the sums and products of what that wrote.
    """
    call = _Backward(prepared(problem), plan, grad_out, grad_trajectory, trajectory, needs)
    rows = call.h.shape[0]
    for start in range(0, rows, max(call.rows, 1)):
        chunk = slice(start, min(start + call.rows, rows))
        call.reverse(chunk, call.states(chunk))
    return _collect(problem, needs, call.grad_h, call.grad_x0, call.totals, call.ring.gradients())


class _Backward:
    """The tensors of a call, its gradients, and the buffers that its chunks of at most `rows` rows use one after the other."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        grad_out: Tensor | None,
        grad_trajectory: Tensor | None,
        trajectory: Tensor | None,
        needs: Sequence[bool],
    ) -> None:
        assert plan.backward_tile is not None
        self.problem, self.plan, self.tile, self.tables = problem, plan, plan.backward_tile, tables(problem)
        self.h, self.x0 = _flat(problem.h, problem), _flat(problem.x0, problem)
        h, self.rows = self.h, min(plan.chunk_rows, self.h.shape[0])
        self.first, self.iterations = problem.first_grad, problem.iterations - problem.first_grad
        self.stages = problem.coefficients.shape[1]
        shape = (problem.iterations + 1, *h.shape)
        self.grad_out = torch.zeros_like(h) if grad_out is None else _flat(grad_out, problem)
        self.grad_states = None if grad_trajectory is None else grad_trajectory.reshape(shape).contiguous()
        # A trajectory has the inputs of first stages only.
        self.saved = None if trajectory is None or self.stages > 1 else trajectory.view(shape)[self.first :]

        names = [name for name, tensors in problem.parameters.items() for _ in tensors]
        wanted = {name for name, need in zip(names, needs[LEADING:], strict=True) if need}
        self.static = _static(
            problem, self.tile, grad_trajectory=grad_trajectory is not None, want_x0=needs[1],
            want_scalars=any(needs[2:LEADING]), want_parameters=bool(wanted),
        )  # fmt: skip
        self.grad_h, self.grad_x0 = torch.empty_like(h), torch.empty_like(h if needs[1] else h[:0])
        self.totals = torch.zeros(problem.iterations, self.stages * 5 + SCALES, dtype=torch.float64, device=h.device)
        self.ring = self._ring(wanted)

        float32 = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
        self.programs = min(plan.programs, triton.cdiv(self.rows, self.tile.rows))
        self.scratch = float32(self.programs * SLOTS * self.tile.rows * self.static.columns)
        self.walked = float32((self.iterations * self.stages + 1) * h[: self.rows].numel() if self.saved is None else 0)
        self.scalars = float32(self.totals[self.first :].numel() * self.rows if self.static.want_scalars else 0)

    def _ring(self, wanted: set[str]) -> Ring:
        problem, op = self.problem, OPS[self.problem.op]
        width = {"D": problem.features, "H": problem.hidden}
        fields = {name: width[w] for name, w in op.fields.items() if name != "dgate" or problem.gated}
        layers = tuple(layer for layer in op.layers if layer.left in fields)
        return Ring(problem, fields, layers, wanted, self.rows, self.plan.parts)

    def states(self, chunk: slice) -> Tensor:
        """The inputs of the chunk's stages (iterations * stages + 1, rows, D), from `first` on."""
        if self.saved is not None:
            return self.saved[:, chunk]
        h = self.h[chunk]
        states = self.walked[: (self.iterations * self.stages + 1) * h.numel()].view(-1, *h.shape)
        # The last state is not needed: it goes where the gradient of h will be.
        _walk(self.problem, self.plan, h, self.x0[chunk], self.grad_h[chunk], self.tables, states, self.first, self.stages)
        return states

    def reverse(self, chunk: slice, states: Tensor) -> None:
        """Gradients of the chunk's rows; what sums over rows need of it is added up."""
        problem, options, count = self.problem, self.problem.options, chunk.stop - chunk.start
        # What the kernel does not write is 0: fields that this solver does not have.
        scalars = self.scalars[: self.totals[self.first :].numel() * count if self.static.want_scalars else 0].zero_()
        _launch(
            backward_kernel[(min(self.programs, triton.cdiv(count, self.tile.rows)),)], self.tile,
            self.x0[chunk], states, self.grad_out[chunk], states if self.grad_states is None else self.grad_states[:, chunk],
            self.grad_h[chunk], self.grad_x0[chunk], self.scratch, self.ring.records, scalars, *self.tables,
            count, states.stride(0) // problem.features, self.h.shape[0], problem.iterations, self.first, problem.sets,
            options.eps, options.negative_slope, REVERSE=OPS[problem.op].reverse, S=self.static,
        )  # fmt: skip
        if self.static.want_scalars:
            written = scalars.view(self.iterations, self.stages * 5 + SCALES, count)
            self.totals[self.first :] += written.sum(-1, dtype=torch.float64)
        if self.static.want_parameters:
            self.ring.add(count)


def _walk(
    problem: Problem,
    plan: Plan,
    h: Tensor,
    x0: Tensor,
    out: Tensor,
    tables: Tables,
    states: Tensor | None,
    first: int,
    records: int,
) -> None:
    """Forward: h_T of these rows into `out`; into `states`, if given, `records` of each iteration from `first` on, and h_T."""
    tile = plan.forward_tile
    assert tile is not None
    if h.shape[0] == 0:
        return
    _launch(
        forward_kernel[(triton.cdiv(h.shape[0], tile.rows),)], tile,
        h, x0, out, out if states is None else states, *tables, h.shape[0], problem.iterations, first, problem.sets,
        problem.options.eps, problem.options.negative_slope,
        UPDATE=OPS[problem.op].update, S=_static(problem, tile, records=0 if states is None else records),
    )  # fmt: skip


def _collect(
    problem: Problem, needs: Sequence[bool], grad_h: Tensor, grad_x0: Tensor, scalars: Tensor, parameters: dict[str, Tensor]
) -> list[Tensor]:
    """The gradients that are wanted, in the order and dtypes of the inputs."""
    leading = (problem.h, problem.x0, problem.coefficients, problem.state_scale, problem.x0_scale)
    table = scalars[:, :-SCALES].unflatten(1, (-1, 5))
    found = [
        gradient.to(like.dtype).view(like.shape)
        for need, gradient, like in zip(needs, (grad_h, grad_x0, table, scalars[:, -2], scalars[:, -1]), leading, strict=False)
        if need and like is not None
    ]
    flags = iter(needs[LEADING:])
    for name, tensors in problem.parameters.items():
        for index, parameter in enumerate(tensors):
            if next(flags):
                sets = parameters[name]
                # Copies: an operator's outputs must not share memory.
                found.append((sets[index] if len(tensors) > 1 else sets.sum(0)).to(parameter.dtype, copy=True))
    return found


def _launch(kernel: Any, tile: Tile, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel(*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _flat(x: Tensor | None, problem: Problem) -> Tensor:
    """(rows, D), contiguous; in the place of a tensor that is not given, h: never read, but of the right type."""
    return (problem.h if x is None else x).reshape(-1, problem.features).contiguous()


def _static(problem: Problem, tile: Tile, **flags: Any) -> Static:
    options, parameters = problem.options, problem.parameters
    norms = [*parameters["norm_weight"], *parameters["norm_bias"]]
    return Static(
        features=problem.features,
        hidden=problem.hidden,
        columns=max(triton.next_power_of_2(problem.features), 16),
        tile=tile.rows,
        chunk=tile.hidden,
        precision="tf32" if problem.h.dtype == torch.float32 else "ieee",
        activation=options.activation,
        norm=options.norm,
        present=tuple(bool(tensors) for tensors in parameters.values()),
        parameters=len(parameters),
        gain=bool(parameters["norm_weight"]),
        norm_bias=bool(parameters["norm_bias"]),
        gain_float32=bool(norms) and norms[0].dtype == torch.float32,
        stages=problem.coefficients.shape[1],
        uses_z=options.solver in stages.SOLVERS and stages.uses_z(options.solver),
        uses_sum=stages.uses_sum(options.solver),
        cyclic=options.order == "cyclic",
        x0=problem.x0 is not None,
        state_scale=problem.state_scale is not None,
        x0_scale=problem.x0_scale is not None,
        **flags,
    )
