"""From a `Problem` to launches: pointer tables, scratch, and the weight gradients from what a backward launch leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from score_kernels import stages
from score_kernels.planner import Plan
from score_kernels.problem import LEADING, SHAPES, Problem

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
    problem = _prepared(problem)
    h, keep = _flat(problem.h, problem), problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape) if out.is_contiguous() else torch.empty_like(h)
    _walk(problem, plan, h, _flat(problem.x0, problem), last, trajectory if keep else None, 0)
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

    Chunks of rows, so that what a launch leaves behind is bounded: forward once more, keeping the chunk's states unless the
    trajectory was saved; then the backward kernel; then the weight gradients as products of what it wrote to the ring.
    """
    given, problem = problem, _prepared(problem)
    op, tile = OPS[problem.op], plan.backward_tile
    assert tile is not None
    h, x0 = _flat(problem.h, problem), _flat(problem.x0, problem)
    rows, first = min(plan.chunk_rows, h.shape[0]), problem.first_grad
    wanted = Wanted.of(problem, needs)
    static = _static(
        problem, tile, grad_trajectory=grad_trajectory is not None, want_x0=wanted.x0, want_scalars=wanted.scalars,
        want_weights=bool(wanted.weights), want_sums=wanted.sums,
    )  # fmt: skip
    programs = min(plan.programs, triton.cdiv(rows, tile.rows))
    width = {"D": problem.features, "H": problem.hidden}
    fields = {name: width[w] for name, w in op.ring.items() if name != "dgate" or problem.gated}
    records = (problem.iterations - first) * static.stages

    float32 = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
    walked = float32((problem.iterations + 1 - first) * h[:rows].numel() if trajectory is None else 0)
    scratch = float32(programs * (stage_slots(static.stages) + 1) * tile.rows * static.columns)
    ring = h.new_empty(records * rows * sum(fields.values()) if wanted.weights else 0)
    sums = float32(programs, problem.sets, static.sums).zero_()
    scalars = float32(triton.cdiv(rows, tile.rows), problem.iterations, static.stages * 5 + SCALES).zero_()
    totals = torch.zeros(scalars.shape[1:], dtype=torch.float64, device=h.device)
    weights = {name: float32(problem.sets, *problem.parameters[name][0].shape).zero_() for name in wanted.weights}
    grad_h, grad_x0 = torch.empty_like(h), torch.empty_like(h if wanted.x0 else h[:0])
    grad_out = torch.zeros_like(h) if grad_out is None else _flat(grad_out, problem)
    saved = None if trajectory is None else trajectory.view(problem.iterations + 1, *h.shape)[first:]
    grad_states = None if grad_trajectory is None else grad_trajectory.reshape(problem.iterations + 1, *h.shape).contiguous()

    for start in range(0, h.shape[0], max(rows, 1)):
        chunk = slice(start, min(start + rows, h.shape[0]))
        count = chunk.stop - chunk.start
        if saved is None:
            states = walked[: (problem.iterations + 1 - first) * count * problem.features].view(-1, count, problem.features)
            # The last state is not needed: it goes where the gradient of h will be.
            _walk(problem, plan, h[chunk], x0[chunk], grad_h[chunk], states, first)
        else:
            states = saved[:, chunk]
        tiles = triton.cdiv(count, tile.rows)
        _launch(
            backward_kernel[(min(programs, tiles),)], tile,
            x0[chunk], states, grad_out[chunk], states if grad_states is None else grad_states[:, chunk],
            grad_h[chunk], grad_x0[chunk], scratch, ring, sums, scalars, *_tables(problem),
            count, states.stride(0) // problem.features, h.shape[0], problem.iterations, first, problem.sets,
            problem.options.eps, problem.options.negative_slope, UPDATE=op.update, REVERSE=op.reverse, S=static,
        )  # fmt: skip
        totals += scalars[:tiles].sum(0, dtype=torch.float64)
        if wanted.weights:
            _add_weights(weights, op, _fields(ring, fields, problem, static.stages, count), problem)
    return _collect(given, needs, grad_h, grad_x0, totals, sums.sum(0, dtype=torch.float64), weights, static.stages)


class Wanted(NamedTuple):
    """What the caller wants gradients of: x0; coefficients or scales; weights by name; any bias or norm parameter."""

    x0: bool
    scalars: bool
    weights: tuple[str, ...]
    sums: bool

    @classmethod
    def of(cls, problem: Problem, needs: Sequence[bool]) -> Wanted:
        op = OPS[problem.op]
        names = [name for name, tensors in problem.parameters.items() for _ in tensors]
        wanted = {name for name, need in zip(names, needs[LEADING:], strict=True) if need}
        weights = tuple(name for name in op.products if name in wanted)
        return cls(needs[1], any(needs[2:LEADING]), weights, bool(wanted & {*op.sums, *NORM_SUMS}))


def _walk(problem: Problem, plan: Plan, h: Tensor, x0: Tensor, out: Tensor, states: Tensor | None, first: int) -> None:
    """Forward: h_T of these rows into `out`, and h_first, ..., h_T into `states`."""
    tile = plan.forward_tile
    assert tile is not None
    if h.shape[0] == 0:
        return
    _launch(
        forward_kernel[(triton.cdiv(h.shape[0], tile.rows),)], tile,
        h, x0, out, out if states is None else states, *_tables(problem), h.shape[0], problem.iterations, first, problem.sets,
        problem.options.eps, problem.options.negative_slope,
        UPDATE=OPS[problem.op].update, S=_static(problem, tile, trajectory=states is not None),
    )  # fmt: skip


def _add_weights(weights: dict[str, Tensor], op: Op, ring: dict[str, Tensor], problem: Problem) -> None:
    """Adds the products of a launch to the weight gradients (L, ...)."""
    for name, gradient in weights.items():
        left, right = (ring[field] for field in op.products[name])
        for index in range(problem.sets):
            records = _records(problem, index)
            gradient[index] += _product(left[records], right[records])


def _collect(
    problem: Problem, needs: Sequence[bool], grad_h: Tensor, grad_x0: Tensor, scalars: Tensor, sums: Tensor,
    weights: dict[str, Tensor], stages_: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, in the order and dtypes of the inputs."""
    leading = (problem.h, problem.x0, problem.coefficients, problem.state_scale, problem.x0_scale)
    table = scalars[:, :-SCALES].unflatten(1, (stages_, 5))
    found = [
        gradient.to(like.dtype).view(like.shape)
        for need, gradient, like in zip(needs, (grad_h, grad_x0, table, scalars[:, -2], scalars[:, -1]), leading, strict=False)
        if need and like is not None
    ]
    offsets = dict(zip((*OPS[problem.op].sums, *NORM_SUMS), _sum_offsets(problem), strict=True))
    flags = iter(needs[LEADING:])
    for name, tensors in problem.parameters.items():
        for index, parameter in enumerate(tensors):
            if next(flags):
                start = offsets.get(name, 0)
                sets = weights[name] if name in weights else sums[:, start : start + parameter.numel()]
                # Copies: an operator's outputs must not share memory.
                found.append((sets[index] if len(tensors) > 1 else sets.sum(0)).to(parameter.dtype, copy=True))
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


def _prepared(problem: Problem) -> Problem:
    """The parameters as the kernels read them: contiguous, at aligned addresses, gain and bias of the norm in one dtype.

    The new problem holds the copies that this takes for as long as the launches need them.
    """
    norm = {p.dtype for name in NORM_SUMS for p in problem.parameters[name]}
    dtypes = dict.fromkeys(NORM_SUMS, torch.float32) if len(norm) > 1 else {}

    def ready(p: Tensor, dtype: torch.dtype) -> Tensor:
        p = p.to(dtype).contiguous()
        return p.clone() if p.data_ptr() % ALIGNMENT else p

    parameters = {name: [ready(p, dtypes.get(name, p.dtype)) for p in ps] for name, ps in problem.parameters.items()}
    state_scale, x0_scale = (None if s is None else s.contiguous() for s in (problem.state_scale, problem.x0_scale))
    coefficients = problem.coefficients.contiguous()
    return replace(problem, parameters=parameters, coefficients=coefficients, state_scale=state_scale, x0_scale=x0_scale)


def _tables(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pointers (L, parameters), coefficients and scales; a scale that is not given is never read."""
    rows = []
    for index in range(problem.sets):
        row = [problem.parameter(name, index) for name in problem.parameters]
        rows.append(tuple(0 if p is None else p.data_ptr() for p in row))
    coefficients = problem.coefficients
    state_scale, x0_scale = (coefficients if s is None else s for s in (problem.state_scale, problem.x0_scale))
    return _pointers(tuple(rows), problem.h.device), coefficients, state_scale, x0_scale


@functools.lru_cache(maxsize=256)
def _pointers(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Copied to the device once for each set of addresses, so that a call under CUDA-graph capture copies nothing."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "CUDA-graph capture: call the op with these parameters once before, so that their addresses are copied"
        )
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
