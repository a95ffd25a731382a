"""From a `Problem` to launches: pointer tables, scratch, and the weight gradients from what a backward launch leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from score_kernels import stages
from score_kernels.planner import Plan
from score_kernels.problem import SHAPES, Problem

from .configs import Tile
from .iterate import SCALES, Static, backward_kernel, forward_kernel, stage_slots
from .linear import linear_reverse, linear_update
from .mlp import mlp_reverse, mlp_update


@dataclass(frozen=True)
class Op:
    """The parts of an op's kernels, and what a backward launch leaves for the host to add up.

    ring: fields of the ring with their widths ("D" or "H"). products: weight -> (left, right) fields, its gradient being
    left^T right. sums: the biases, in the order of their gradients.
    """

    update: Any
    reverse: Any
    ring: dict[str, str]
    products: dict[str, tuple[str, str]]
    sums: tuple[str, ...]


OPS = {
    "linear": Op(linear_update, linear_reverse, {"x": "D", "da": "D"}, {"weight": ("da", "x")}, ("bias",)),
    "mlp": Op(
        mlp_update,
        mlp_reverse,
        {"x": "D", "g": "D", "u": "H", "dz": "H", "dgate": "H"},
        {"w1": ("dz", "x"), "w2": ("g", "u"), "w_gate": ("dgate", "x")},
        ("b1", "b2", "b_gate"),
    ),
}
NORM_SUMS = ("norm_weight", "norm_bias")

# Bytes that Triton may take for granted of a parameter's address.
ALIGNMENT = 16


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Writes h_T into `out` (same shape as h; h itself is allowed); returns all states (T+1, ...), or an empty tensor."""
    h = _flat(problem.h, problem)
    keep = problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape) if out.is_contiguous() else torch.empty_like(h)
    tile = plan.forward_tile
    assert tile is not None
    static = _static(problem, tile, trajectory=keep)
    if h.shape[0]:
        _launch(
            forward_kernel[(triton.cdiv(h.shape[0], tile.rows),)], tile,
            h, _flat(problem.x0, problem), last, trajectory, *_tables(problem), h.shape[0], problem.iterations, problem.sets,
            problem.options.eps, problem.options.negative_slope, UPDATE=OPS[problem.op].update, S=static,
        )  # fmt: skip
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
    """Gradients of the inputs whose flag in `needs` is set, in the order of `Problem.build`; a missing gradient is zero."""
    op, tile, width = OPS[problem.op], plan.backward_tile, {"D": problem.features, "H": problem.hidden}
    assert tile is not None
    h = _flat(problem.h, problem)
    _, want_x0, *want_scalars = needs[:5]
    names = [name for name, tensors in problem.parameters.items() for _ in tensors]
    wanted = {name for name, need in zip(names, needs[5:], strict=True) if need}
    fields = {name: width[w] for name, w in op.ring.items() if name != "dgate" or problem.gated}
    static = _static(
        problem, tile,
        trajectory=trajectory is not None, grad_trajectory=grad_trajectory is not None, want_x0=want_x0,
        want_scalars=any(want_scalars), want_weights=bool(wanted & op.products.keys()),
        want_sums=bool(wanted & {*op.sums, *NORM_SUMS}),
    )  # fmt: skip

    records, rows = (problem.iterations - problem.first_grad) * static.stages, plan.chunk_rows
    programs = min(plan.programs, triton.cdiv(min(rows, h.shape[0]), tile.rows))
    new = functools.partial(torch.empty, device=h.device)
    slots = (
        triton.cdiv(problem.iterations - problem.first_grad, plan.interval)
        + plan.interval
        - 1
        + stage_slots(static.stages)
        + want_x0
    )
    scratch = new(programs * slots * static.tile * static.columns, dtype=torch.float32)
    ring = new(records * min(rows, h.shape[0]) * sum(fields.values()) if static.want_weights else 0, dtype=h.dtype)
    sums = torch.zeros((programs, problem.sets, static.sums), dtype=torch.float32, device=h.device)
    scalars = torch.zeros(
        (triton.cdiv(min(rows, h.shape[0]), tile.rows), problem.iterations, static.stages * 5 + SCALES),
        dtype=torch.float32, device=h.device,
    )  # fmt: skip
    scalar_sums = torch.zeros(scalars.shape[1:], dtype=torch.float64, device=h.device)
    weights = {
        name: torch.zeros((problem.sets, *problem.parameters[name][0].shape), dtype=torch.float32, device=h.device)
        for name in op.products
        if name in wanted
    }
    x0 = _flat(problem.x0, problem)
    grad_h, grad_x0 = torch.empty_like(h), torch.empty_like(h if want_x0 else h[:0])
    grad_out = torch.zeros_like(h) if grad_out is None else _flat(grad_out, problem)
    states = h if trajectory is None else trajectory.contiguous()
    grad_states = h if grad_trajectory is None else grad_trajectory.contiguous()

    for first_row in range(0, h.shape[0], rows):
        last_row = min(first_row + rows, h.shape[0])
        tiles = triton.cdiv(last_row - first_row, tile.rows)
        _launch(
            backward_kernel[(min(programs, tiles),)], tile,
            h, x0, states, grad_out, grad_states, grad_h, grad_x0, scratch, ring, sums, scalars, *_tables(problem),
            h.shape[0], first_row, last_row, problem.iterations, problem.first_grad, plan.interval, slots, problem.sets,
            problem.options.eps, problem.options.negative_slope, UPDATE=op.update, REVERSE=op.reverse, S=static,
        )  # fmt: skip
        scalar_sums += scalars[:tiles].sum(0, dtype=torch.float64)
        if static.want_weights:
            views = _fields(ring, fields, problem, static.stages, last_row - first_row)
            for name, gradient in weights.items():
                left, right = (views[field] for field in op.products[name])
                for index in range(problem.sets):
                    gradient[index] += _product(left[_records(problem, index)], right[_records(problem, index)])

    table = scalar_sums[:, :-SCALES].unflatten(1, (static.stages, 5))
    found: list[Tensor] = []
    scales = (problem.state_scale, problem.x0_scale)
    for need, gradient, like in zip(
        needs, (grad_h, grad_x0, table, scalar_sums[:, -2], scalar_sums[:, -1]),
        (problem.h, problem.x0, problem.coefficients, *scales), strict=False,
    ):  # fmt: skip
        if need and like is not None:
            found.append(gradient.to(like.dtype).view(like.shape))
    totals = sums.sum(0, dtype=torch.float64)
    offsets = dict(zip((*op.sums, *NORM_SUMS), _sum_offsets(problem), strict=True))
    flags = iter(needs[5:])
    for name, tensors in problem.parameters.items():
        for index, parameter in enumerate(tensors):
            if next(flags):
                if name in weights:
                    total = weights[name][index] if len(tensors) > 1 else weights[name].sum(0)
                else:
                    part = totals[:, offsets[name] : offsets[name] + parameter.numel()]
                    total = part[index] if len(tensors) > 1 else part.sum(0)
                found.append(total.to(parameter.dtype))
    return found


def _launch(kernel: Any, tile: Tile, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel(*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _flat(x: Tensor | None, problem: Problem) -> Tensor:
    """(rows, D), contiguous; in the place of a tensor that is not given, h: never read, but of the right type."""
    return (problem.h if x is None else x).reshape(-1, problem.features).contiguous()


def _static(problem: Problem, tile: Tile, **flags: bool) -> Static:
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
        sums=_sum_offsets(problem)[-1] + problem.features,
        stages=problem.coefficients.shape[1],
        uses_z=options.solver in stages.SOLVERS and stages.uses_z(options.solver),
        uses_sum=stages.uses_sum(options.solver),
        cyclic=options.order == "cyclic",
        x0=problem.x0 is not None,
        state_scale=problem.state_scale is not None,
        x0_scale=problem.x0_scale is not None,
        **flags,
    )


def _sum_offsets(problem: Problem) -> list[int]:
    """Where the gradients of biases, gain and norm bias start in a set's part of `sums`."""
    width = {"D": problem.features, "H": problem.hidden}
    names = (*OPS[problem.op].sums, *NORM_SUMS)
    return list(accumulate((width[SHAPES[problem.op][name]] for name in names[:-1]), initial=0))


def _tables(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pointers (L, parameters), coefficients and scales; a scale that is not given is never read."""
    rows = []
    for index in range(problem.sets):
        row = [problem.parameter(name, index) for name in problem.parameters]
        rows.append(tuple(0 if p is None else p.data_ptr() for p in row))
    coefficients = problem.coefficients.contiguous()
    state_scale, x0_scale = (coefficients if s is None else s for s in (problem.state_scale, problem.x0_scale))
    return _pointers(tuple(rows), problem.h.device), coefficients, state_scale, x0_scale


@functools.lru_cache(maxsize=256)
def _pointers(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Copied to the device once for each set of addresses, so that a call under CUDA-graph capture copies nothing."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _fields(ring: Tensor, fields: dict[str, int], problem: Problem, stages_: int, rows: int) -> dict[str, Tensor]:
    """The ring's fields as (iterations, stages, rows, width)."""
    iterations, views, start = problem.iterations - problem.first_grad, {}, 0
    for name, width in fields.items():
        size = iterations * stages_ * rows * width
        views[name] = ring[start : start + size].view(iterations, stages_, rows, width)
        start += size
    return views


def _records(problem: Problem, index: int) -> slice:
    """The iterations of a parameter set, from `first_grad` on: one apart, or L apart."""
    found = [t - problem.first_grad for t in range(problem.first_grad, problem.iterations) if problem.set_at(t) == index]
    return slice(found[0], found[-1] + 1, found[1] - found[0] if len(found) > 1 else 1) if found else slice(0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of left^T right over iterations, stages and rows: one product for each iteration and stage, added in order."""
    left, right = left.flatten(0, 1).mT, right.flatten(0, 1)
    if left.device.type == "cpu" or left.dtype == torch.float32:
        return torch.bmm(left.float(), right.float()).sum(0)
    return torch.bmm(left, right, out_dtype=torch.float32).sum(0)
