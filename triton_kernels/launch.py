"""From a `Problem` to launches of the kernels: one for forward, and for backward some for each chunk of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from score_kernels import stages
from score_kernels.plan import HALVES, Plan
from score_kernels.pointers import pointers, prepared
from score_kernels.problem import LEADING, SHAPES, Problem, in_half

from .attention_configs import FORWARD_SLOTS, SequenceTile, backward_slots
from .configs import SCALES, SLOTS, Tile
from .groups import Groups
from .iterate import Static, backward_kernel, forward_kernel
from .iterate_sequences import sequence_backward_kernel, sequence_forward_kernel
from .linear import linear_reverse, linear_update
from .mlp import mlp_reverse, mlp_update
from .ring import collected, rings, wanted_parameters

# The pointer table, coefficients and scales: what every launch of a call reads.
Tables = tuple[Tensor, Tensor, Tensor, Tensor]

# Bytes that Triton may take for granted of a parameter's address.
ALIGNMENT = 16


class Op(NamedTuple):
    """The parts of an op's kernels."""

    update: Any
    reverse: Any


OPS = {"linear": Op(linear_update, linear_reverse), "mlp": Op(mlp_update, mlp_reverse)}


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Writes h_T into `out` (like h, contiguous; h itself is allowed); returns all states (T+1, ...), or an empty tensor."""
    problem = prepared(problem, ALIGNMENT)
    h, keep = _flat(problem.h, problem), problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape)
    walk = _Walk(problem, plan)
    walk(slice(0, h.shape[0]), h, _injected(problem), last, _tables(problem), trajectory if keep else None, 0, 1)
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
    call = Backward(problem, plan, grad_out, grad_trajectory, trajectory, needs)
    call.run()
    return collected(problem, needs, call.grad_h, call.grad_x0, call.totals, call.gradients())


class Backward:
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
        problem = prepared(problem, ALIGNMENT)
        self.problem, self.plan, self.tile, self.tables = problem, plan, plan.backward_tile, _tables(problem)
        self.walk = _Walk(problem, plan)
        self.groups = Groups(problem, self.tile.rows) if isinstance(self.tile, SequenceTile) else None
        self.h, self.x0 = _flat(problem.h, problem), _injected(problem)
        h = self.h
        # A launch has a whole group at least.
        self.rows = min(plan.chunk_rows if self.groups is None else max(plan.chunk_rows, self.tile.rows), h.shape[0])
        self.first, self.iterations = problem.first_grad, problem.iterations - problem.first_grad
        self.stages = problem.stages
        shape = (problem.iterations + 1, *h.shape)
        self.grad_out = torch.zeros_like(h) if grad_out is None else _flat(grad_out, problem)
        self.grad_states = None if grad_trajectory is None else grad_trajectory.reshape(shape).contiguous()
        # A trajectory has the inputs of first stages only.
        self.saved = None if trajectory is None or self.stages > 1 else trajectory.view(shape)[self.first :]

        self.rings = rings(problem, wanted_parameters(problem, needs), self.rows, plan.parts)
        self.static, self.of_mlp = _statics(
            problem, self.tile, backward_slots(self.tile) if isinstance(self.tile, SequenceTile) else 0,
            grad_trajectory=grad_trajectory is not None, want_x0=needs[1], want_scalars=any(needs[2:LEADING]),
        )  # fmt: skip
        kept = [bool(ring.layers) for ring in self.rings.values()]
        self.static = self.static._replace(want_parameters=kept[0])
        if self.of_mlp is not None:
            # With norms that follow, F is theirs: the mlp has no <g, F(x)>.
            scalars = self.static.want_scalars and self.of_mlp.placement == "pre"
            self.of_mlp = self.of_mlp._replace(want_parameters=kept[1], want_scalars=scalars)
        self.grad_h, self.grad_x0 = torch.empty_like(h), torch.empty_like(h if needs[1] else h[:0])
        self.totals = torch.zeros(problem.iterations, self.stages * 5 + SCALES, dtype=torch.float64, device=h.device)

        float32 = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
        self.programs = min(plan.programs, triton.cdiv(self.rows, self.tile.rows) if self.groups is None else self.groups.count)
        self.scratch = float32(self.programs * SLOTS * self.tile.rows * self.static.columns if self.groups is None else 0)
        self.walked = float32((self.iterations * self.stages + 1) * h[: self.rows].numel() if self.saved is None else 0)
        self.scalars = float32(self.totals[self.first :].numel() * self.rows if self.static.want_scalars else 0)

    def run(self) -> None:
        for chunk in self._chunks():
            self._reverse(chunk, self._states(chunk))

    def _chunks(self) -> Iterator[slice]:
        """The rows of each launch."""
        if self.groups is not None:
            return self.groups.slices(self.rows)
        rows = self.h.shape[0]
        return (slice(start, min(start + self.rows, rows)) for start in range(0, rows, max(self.rows, 1)))

    def _states(self, chunk: slice) -> Tensor:
        """The inputs of the chunk's stages (iterations * stages + 1, rows, D), from `first` on."""
        if self.saved is not None:
            return self.saved[:, chunk]
        h = self.h[chunk]
        states = self.walked[: (self.iterations * self.stages + 1) * h.numel()].view(-1, *h.shape)
        # The last state is not needed: it goes where the gradient of h will be.
        self.walk(chunk, h, self.x0[chunk], self.grad_h[chunk], self.tables, states, self.first, self.stages)
        return states

    def _reverse(self, chunk: slice, states: Tensor) -> None:
        """Gradients of the chunk's rows; what sums over rows need of it is added up."""
        problem, options, count = self.problem, self.problem.options, chunk.stop - chunk.start
        # What the kernel does not write is 0: fields that this solver does not have.
        scalars = self.scalars[: self.totals[self.first :].numel() * count if self.static.want_scalars else 0].zero_()
        given = (
            self.x0[chunk], states, self.grad_out[chunk], states if self.grad_states is None else self.grad_states[:, chunk],
            self.grad_h[chunk], self.grad_x0[chunk],
        )  # fmt: skip
        records = [ring.records for ring in self.rings.values()]
        tables = (scalars, *self.tables)
        numbers = (
            count, states.stride(0) // problem.features, self.h.shape[0], problem.iterations, self.first, problem.sets,
            options.eps,
        )  # fmt: skip
        if self.groups is None:
            _launch(
                backward_kernel[(min(self.programs, triton.cdiv(count, self.tile.rows)),)], self.tile, *given, self.scratch,
                *records, *tables, *numbers, options.negative_slope, REVERSE=OPS[problem.op].reverse, S=self.static,
            )  # fmt: skip
        else:
            # Not kept, so that it is never there beside that of forward.
            sequences = self.groups.of(chunk, _scratch(self.h, self.programs, self.static))
            _launch(
                sequence_backward_kernel[(min(self.programs, sequences.groups),)], self.tile,
                *given, records[0], records[-1], *tables, sequences, *numbers, options.negative_slope,
                S=self.static, M=self.of_mlp,
            )  # fmt: skip
        if self.static.want_scalars:
            sums = scalars.view(self.iterations, self.stages * 5 + SCALES, count)
            self.totals[self.first :] += sums.sum(-1, dtype=torch.float64)
        for ring in self.rings.values():
            if ring.layers:
                ring.add(count)

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters, by name."""
        whole = self.problem.op != "transformer"
        of_halves = [(op, ring.gradients()) for op, ring in self.rings.items()]
        return {name if whole else in_half(op, name): x for op, found in of_halves for name, x in found.items()}


def _tables(problem: Problem) -> Tables:
    """In the place of a scale that is not given, the coefficients: never read."""
    coefficients = problem.coefficients
    state_scale, x0_scale = (coefficients if s is None else s for s in (problem.state_scale, problem.x0_scale))
    return pointers(problem), coefficients, state_scale, x0_scale


class _Walk:
    """The forward kernel on some rows of a call at a time; groups: of the sequences, of an op on them."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        assert plan.forward_tile is not None
        self.problem, self.plan, self.tile = problem, plan, plan.forward_tile
        self.groups = Groups(problem, self.tile.rows) if isinstance(self.tile, SequenceTile) else None

    def __call__(
        self,
        chunk: slice,
        h: Tensor,
        x0: Tensor,
        out: Tensor,
        tables: Tables,
        states: Tensor | None,
        first: int,
        records: int,
    ) -> None:
        """h_T of the rows `chunk`, which h and x0 are, into `out`; into `states`, if given, `records` of each iteration from
        `first` on, and h_T."""
        problem, options = self.problem, self.problem.options
        if h.shape[0] == 0:
            return
        static, of_mlp = _statics(problem, self.tile, FORWARD_SLOTS, records=0 if states is None else records)
        given = (h, x0, out, out if states is None else states, *tables)
        numbers = (h.shape[0], problem.iterations, first, problem.sets, options.eps)
        if self.groups is None:
            _launch(
                forward_kernel[(triton.cdiv(h.shape[0], self.tile.rows),)], self.tile,
                *given, *numbers, options.negative_slope, UPDATE=OPS[problem.op].update, S=static,
            )  # fmt: skip
        else:
            programs = min(self.plan.forward_programs, self.groups.count)
            scratch = _scratch(h, programs, static)
            _launch(
                sequence_forward_kernel[(programs,)], self.tile,
                *given, self.groups.of(chunk, scratch), *numbers, options.negative_slope, S=static, M=of_mlp,
            )  # fmt: skip


def _scratch(like: Tensor, programs: int, static: Static) -> Tensor:
    """Of the programs of a kernel on sequences."""
    return like.new_empty(programs * static.slots * static.rows * static.columns, dtype=torch.float32)


def _launch(kernel: Any, tile: Tile | SequenceTile, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel(*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def _flat(x: Tensor, problem: Problem) -> Tensor:
    """(rows, D), contiguous"""
    return x.reshape(-1, problem.features).contiguous()


def _injected(problem: Problem) -> Tensor:
    """x0 as rows; where it is not given, what kernels never read, but of the dtype of operands: h, or nothing."""
    if problem.x0 is None and problem.h.dtype != problem.operand_dtype:
        return problem.h.new_empty(0, problem.features, dtype=problem.operand_dtype)
    return _flat(problem.h if problem.x0 is None else problem.x0, problem)


def _statics(problem: Problem, tile: Tile | SequenceTile, slots: int, **flags: Any) -> tuple[Static, Static | None]:
    """Of the block, or of a transformer's attention and mlp. slots: of the scratch of a kernel on sequences."""
    if problem.op != "transformer":
        return _static(problem, tile, slots, **flags), None
    assert isinstance(tile, SequenceTile)
    flags["placement"] = problem.options.norm_placement
    attention, mlp = (_static(problem.half(op), tile, slots, **flags) for op in HALVES)
    return attention._replace(others=len(SHAPES["mlp"])), mlp._replace(chunk=tile.hidden)


def _static(problem: Problem, tile: Tile | SequenceTile, slots: int, **flags: Any) -> Static:
    options, parameters = problem.options, problem.parameters
    norms = [*parameters["norm_weight"], *parameters["norm_bias"]]
    if isinstance(tile, SequenceTile):
        flags |= _of_sequences(problem, tile, slots)
    else:
        flags |= {"tile": tile.rows, "chunk": tile.hidden}
    return Static(
        features=problem.features,
        hidden=problem.hidden,
        columns=max(triton.next_power_of_2(problem.features), 16),
        precision="tf32" if problem.operand_dtype == torch.float32 else "ieee",
        activation=options.activation,
        norm=options.norm,
        present=tuple(bool(tensors) for tensors in parameters.values()),
        parameters=len(parameters),
        gain=bool(parameters["norm_weight"]),
        norm_bias=bool(parameters["norm_bias"]),
        gain_float32=bool(norms) and norms[0].dtype == torch.float32,
        stages=problem.stages,
        uses_z=options.solver in stages.SOLVERS and stages.uses_z(options.solver),
        uses_sum=stages.uses_sum(options.solver),
        cyclic=options.order == "cyclic",
        x0=problem.x0 is not None,
        state_scale=problem.state_scale is not None,
        x0_scale=problem.x0_scale is not None,
        **flags,
    )


def _of_sequences(problem: Problem, tile: SequenceTile, slots: int) -> dict[str, Any]:
    """What a `Static` says of a group of sequences."""
    options, inputs = problem.options, problem.inputs
    mask, cos, packed = inputs["attn_mask"], inputs["rotary_cos"], inputs["cu_seqlens"] is not None
    return {
        "tile": tile.tile,
        "rows": tile.rows,
        "chunk": tile.features,
        "slots": slots,
        "heads": options.num_heads,
        "causal": options.causal,
        "qk_norm": options.qk_norm,
        "angles": 0 if cos is None else cos.shape[1],
        "padding": inputs["key_padding_mask"] is not None,
        "mask": "none" if mask is None else "additive" if mask.is_floating_point() else "boolean",
        "packed": packed,
        "several": packed or tile.rows >= 2 * problem.h.shape[-2],
    }
