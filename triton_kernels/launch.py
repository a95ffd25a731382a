"""From a `Problem` to launches: pointer tables, scratch, and the weight gradients from what a backward launch leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
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
from .ring import NORM, Layer, Ring

# The pointer table, coefficients and scales: what every launch of a call reads.
Tables = tuple[Tensor, Tensor, Tensor, Tensor]


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

# Bytes that Triton may take for granted of a parameter's address.
ALIGNMENT = 16


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Writes h_T into `out` (same shape as h; h itself is allowed); returns all states (T+1, ...), or an empty tensor."""
    problem = _prepared(problem)
    h, keep = _flat(problem.h, problem), problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape) if out.is_contiguous() else torch.empty_like(h)
    _walk(problem, plan, h, _flat(problem.x0, problem), last, _tables(problem), trajectory if keep else None, 0, 1)
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
    given, problem = problem, _prepared(problem)
    op, tile = OPS[problem.op], plan.backward_tile
    assert tile is not None
    h, x0, features = _flat(problem.h, problem), _flat(problem.x0, problem), problem.features
    rows, first = min(plan.chunk_rows, h.shape[0]), problem.first_grad
    iterations, stages_ = problem.iterations - first, problem.coefficients.shape[1]
    names = [name for name, tensors in problem.parameters.items() for _ in tensors]
    parameters = {name for name, need in zip(names, needs[LEADING:], strict=True) if need}
    width = {"D": features, "H": problem.hidden}
    fields = {name: width[w] for name, w in op.fields.items() if name != "dgate" or problem.gated}
    layers = tuple(layer for layer in op.layers if layer.left in fields)
    ring = Ring(problem, fields, layers, parameters, rows, plan.parts)
    static = _static(
        problem, tile, grad_trajectory=grad_trajectory is not None, want_x0=needs[1], want_scalars=any(needs[2:LEADING]),
        want_parameters=bool(parameters),
    )  # fmt: skip
    programs = min(plan.programs, triton.cdiv(rows, tile.rows))

    float32 = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
    # A trajectory has the inputs of first stages only.
    saved = None if trajectory is None or stages_ > 1 else trajectory.view(problem.iterations + 1, *h.shape)[first:]
    walked = float32((iterations * stages_ + 1) * rows * features if saved is None else 0)
    scratch = float32(programs * SLOTS * tile.rows * static.columns)
    fields_of_scalars = stages_ * 5 + SCALES
    scalars = float32(iterations * fields_of_scalars * rows if static.want_scalars else 0)
    totals = torch.zeros(problem.iterations, fields_of_scalars, dtype=torch.float64, device=h.device)
    grad_h, grad_x0 = torch.empty_like(h), torch.empty_like(h if needs[1] else h[:0])
    grad_out = torch.zeros_like(h) if grad_out is None else _flat(grad_out, problem)
    grad_states = None if grad_trajectory is None else grad_trajectory.reshape(problem.iterations + 1, *h.shape).contiguous()

    tables = _tables(problem)
    for start in range(0, h.shape[0], max(rows, 1)):
        chunk = slice(start, min(start + rows, h.shape[0]))
        count = chunk.stop - chunk.start
        if saved is None:
            states = walked[: (iterations * stages_ + 1) * count * features].view(-1, count, features)
            # The last state is not needed: it goes where the gradient of h will be.
            _walk(problem, plan, h[chunk], x0[chunk], grad_h[chunk], tables, states, first, stages_)
        else:
            states = saved[:, chunk]
        # What the kernel does not write is 0: fields that this solver does not have.
        written = scalars[: iterations * fields_of_scalars * count if static.want_scalars else 0].zero_()
        _launch(
            backward_kernel[(min(programs, triton.cdiv(count, tile.rows)),)], tile,
            x0[chunk], states, grad_out[chunk], states if grad_states is None else grad_states[:, chunk],
            grad_h[chunk], grad_x0[chunk], scratch, ring.records, written, *tables,
            count, states.stride(0) // features, h.shape[0], problem.iterations, first, problem.sets,
            problem.options.eps, problem.options.negative_slope, REVERSE=op.reverse, S=static,
        )  # fmt: skip
        if static.want_scalars:
            totals[first:] += written.view(iterations, fields_of_scalars, count).sum(-1, dtype=torch.float64)
        if ring.layers:
            ring.add(count)
    return _collect(given, needs, grad_h, grad_x0, totals, ring.gradients())


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


def _prepared(problem: Problem) -> Problem:
    """The parameters as the kernels read them: contiguous, at aligned addresses, gain and bias of the norm in one dtype.

    The new problem holds the copies that this takes for as long as the launches need them.
    """
    norm = {p.dtype for name in NORM for p in problem.parameters[name]}
    dtypes = dict.fromkeys(NORM, torch.float32) if len(norm) > 1 else {}

    def ready(p: Tensor, dtype: torch.dtype) -> Tensor:
        p = p.to(dtype).contiguous()
        return p.clone() if p.data_ptr() % ALIGNMENT else p

    parameters = {name: [ready(p, dtypes.get(name, p.dtype)) for p in ps] for name, ps in problem.parameters.items()}
    state_scale, x0_scale = (None if s is None else s.contiguous() for s in (problem.state_scale, problem.x0_scale))
    coefficients = problem.coefficients.contiguous()
    return replace(problem, parameters=parameters, coefficients=coefficients, state_scale=state_scale, x0_scale=x0_scale)


def _tables(problem: Problem) -> Tables:
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
