"""All T iterations of a group of whole sequences in one program: the stage program of `iterate.py` where rows need each other.

F of a row takes all rows of its sequence, so an iteration goes over the group's tiles of rows several times. Between two passes
tiles wait in scratch, which is the program's own and stays in the caches: the state in float32, operands in the input's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import Q, attend, attend_backward, land, land_backward, project, spread
from .iterate import load_tile, normalise_backward, stage_input, start, table_row, tile_of, vector
from .sequences import inside, slot, span
from .transformer import MIDDLE, U, operand, transformer_reverse, transformer_update

# Slots of scratch behind those of the block: the state, and what solvers need beside it. In backward dL/dx0, dL/dz, dL/dS, g.
Y = tl.constexpr(3)
Z = tl.constexpr(4)
TOTAL = tl.constexpr(5)
GRAD_X0 = tl.constexpr(11)
GRAD_Z = tl.constexpr(12)
GRAD_TOTAL = tl.constexpr(13)
GRAD = tl.constexpr(14)

# Arguments whose values, 1 or multiples of 16, would each compile a kernel anew: no better one.
NUMBERS = ("rows", "states_rows", "grad_rows", "iterations", "first", "sets")


@triton.jit(do_not_specialize=NUMBERS)
def sequence_forward_kernel(
    h, x0, out, states, table, coefficients, state_scale, x0_scale, sequences, rows, iterations, first, sets, eps, slope,
    S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, for the groups that are dealt to the program. M: the `Static` of a transformer's mlp, or None."""
    size = tl.full((), S.features, tl.int64) * rows
    dtype = x0.dtype.element_ty
    state, of_z = slot(sequences, Y, tl.float32, S), slot(sequences, Z, tl.float32, S)
    of_total = slot(sequences, TOTAL, tl.float32, S)
    for group in tl.range(tl.program_id(0), sequences.groups, tl.num_programs(0), disable_licm=True):
        first_row, left = span(group, rows, sequences, S)
        place = (first_row, left)
        for block in tl.range(0, left, S.tile, disable_licm=True):
            _live, _at, there = tile_of(left - block, S)
            tl.store(state + inside(block, 0, S.tile, S.columns, S), load_tile(h + (first_row + block) * S.features + there, S))
        for t in tl.range(0, iterations, disable_licm=True):
            row, _index = table_row(table, t, iterations, sets, S)
            for stage in tl.range(0, S.stages, disable_licm=True):
                c = coefficients + (t * S.stages + stage) * 5
                tl.debug_barrier()
                for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
                    begin = (first_row + block) * S.features
                    live, at, there = tile_of(left - block, S)
                    here = inside(block, 0, S.tile, S.columns, S)
                    y = tl.load(state + here)
                    if S.records > 0:
                        record = states + ((t - first) * S.records + stage) * size + begin
                        tl.store(record + at, y, mask=live & (t >= first) & (stage < S.records))
                    if stage == 0:
                        y = start(y, x0 + begin + there, state_scale, x0_scale, t, S)
                    if S.uses_sum:
                        total = tl.load(c + 4) * y
                        if stage > 0:
                            total += tl.load(of_total + here)
                    tl.debug_barrier()
                    if stage == 0:
                        tl.store(state + here, y)
                        if S.uses_z:
                            tl.store(of_z + here, y)
                    if S.uses_sum:
                        tl.store(of_total + here, total)
                    _x, taken = operand(y, row, dtype, eps, S)
                    project(taken, block, place, sequences, row, dtype, False, S)
                tl.debug_barrier()
                attend(tl.load(c + 3) if M is None else 1.0, Q, place, sequences, dtype, S)
                tl.debug_barrier()
                for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
                    here = inside(block, 0, S.tile, S.columns, S)
                    w, q = tl.load(c + 3), tl.load(c + 1)
                    if M is None:
                        y = land(_carried(q, c, here, sequences, S), w, Q, block, place, sequences, row, dtype, S)
                    else:
                        added = land(_zeros(S), 1.0, Q, block, place, sequences, row, dtype, S)
                        y = _carried(q + w if S.placement == "pre" else q, c, here, sequences, S)
                        y = transformer_update(y, tl.load(state + here), added, w, row, dtype, eps, slope, S, M)
                    tl.debug_barrier()
                    tl.store(state + here, y)
        tl.debug_barrier()
        for block in tl.range(0, left, S.tile, disable_licm=True):
            begin = (first_row + block) * S.features
            live, at, _there = tile_of(left - block, S)
            y = tl.load(state + inside(block, 0, S.tile, S.columns, S))
            if S.records > 0:
                tl.store(states + (iterations - first) * S.records * size + begin + at, y, mask=live)
            tl.store(out + begin + at, y.to(out.dtype.element_ty), mask=live)
        tl.debug_barrier()


@triton.jit
def _zeros(S: tl.constexpr):
    return tl.full((S.tile, S.columns), 0.0, tl.float32)


@triton.jit
def _carried(q, c, here, sequences, S: tl.constexpr):
    """q y + p z + v S of a tile of rows."""
    y = q * tl.load(slot(sequences, Y, tl.float32, S) + here)
    if S.uses_z:
        y += tl.load(c) * tl.load(slot(sequences, Z, tl.float32, S) + here)
    if S.uses_sum:
        y += tl.load(c + 2) * tl.load(slot(sequences, TOTAL, tl.float32, S) + here)
    return y


@triton.jit(do_not_specialize=NUMBERS)
def sequence_backward_kernel(
    x0, states, grad_out, grad_states, grad_h, grad_x0, ring, mlp_ring, scalars, table, coefficients, state_scale, x0_scale,
    sequences, rows, states_rows, grad_rows, iterations, first, sets, eps, slope,
    S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """As `backward_kernel`, for the groups that are dealt to the program. M: the `Static` of a transformer's mlp, or None."""
    dtype = x0.dtype.element_ty
    one = tl.full((), 1, tl.int64)
    size, grad_size = one * S.features * states_rows, one * S.features * grad_rows
    capacity = one * S.stages * (iterations - first) * rows
    of_g, of_x0 = slot(sequences, GRAD, tl.float32, S), slot(sequences, GRAD_X0, tl.float32, S)
    for group in tl.range(tl.program_id(0), sequences.groups, tl.num_programs(0), disable_licm=True):
        first_row, left = span(group, rows, sequences, S)
        place = (first_row, left)
        for block in tl.range(0, left, S.tile, disable_licm=True):
            here = inside(block, 0, S.tile, S.columns, S)
            live, at, _there = tile_of(left - block, S)
            g = tl.load(grad_out + (first_row + block) * S.features + at, mask=live, other=0.0).to(tl.float32)
            tl.store(of_g + here, g)
            if S.want_x0:
                tl.store(of_x0 + here, tl.full((S.tile, S.columns), 0.0, tl.float32))
        for back in tl.range(0, iterations - first, disable_licm=True):
            t = iterations - 1 - back
            row, _index = table_row(table, t, iterations, sets, S)
            for done in tl.range(0, S.stages, disable_licm=True):
                s = S.stages - 1 - done
                c = coefficients + (t * S.stages + s) * 5
                record = one * ((t - first) * S.stages + s) * rows + first_row
                field = scalars + one * (t - first) * (S.stages * 5 + 2) * rows + first_row
                tl.debug_barrier()
                for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
                    begin = (first_row + block) * S.features
                    state = states + ((t - first) * S.stages * size + begin)
                    _enter(
                        block, s, done, t, c, state, size, x0 + begin, grad_states + ((t + 1) * grad_size + begin),
                        ring + (record + block) * S.features, capacity, field + (s * 5 + 3) * rows, state_scale, x0_scale,
                        place, sequences, row, dtype, eps, S,
                    )  # fmt: skip
                tl.debug_barrier()
                if M is not None:
                    attend(1.0, U, place, sequences, dtype, S)
                    tl.debug_barrier()
                    for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
                        begin = (first_row + block) * S.features
                        state = states + ((t - first) * S.stages * size + begin)
                        _between(
                            block, s, t, c, state, size, x0 + begin, ring, mlp_ring, record + block, capacity,
                            field + (s * 5 + 3) * rows, state_scale, x0_scale, place, sequences, row, dtype, eps, slope, S, M,
                        )  # fmt: skip
                    tl.debug_barrier()
                attend_backward(
                    tl.load(c + 3) if M is None else 1.0, place, sequences, field + (s * 5 + 3) * rows,
                    ring + (2 * capacity + record) * S.features, dtype, S,
                )  # fmt: skip
                tl.debug_barrier()
                for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
                    begin = (first_row + block) * S.features
                    state = states + ((t - first) * S.stages * size + begin)
                    _leave(
                        block, s, t, coefficients + t * S.stages * 5, state, size, x0 + begin,
                        ring + 3 * (capacity + record) * S.features, field + block, rows, state_scale, x0_scale,
                        place, sequences, row, dtype, eps, S,
                    )  # fmt: skip
        tl.debug_barrier()
        for block in tl.range(0, left, S.tile, disable_licm=True):
            here = inside(block, 0, S.tile, S.columns, S)
            begin = (first_row + block) * S.features
            live, at, _there = tile_of(left - block, S)
            g = tl.load(of_g + here)
            if S.grad_trajectory:
                g += tl.load(grad_states + begin + at, mask=live, other=0.0)
            tl.store(grad_h + begin + at, tl.where(first == 0, g, 0.0).to(grad_h.dtype.element_ty), mask=live)
            if S.want_x0:
                tl.store(grad_x0 + begin + at, tl.load(of_x0 + here).to(dtype), mask=live)
        tl.debug_barrier()


@triton.jit
def _enter(
    block, s, done, t, c, state, size, x0, grad_states, records, capacity, dws, state_scale, x0_scale,
    place, sequences, row, dtype, eps, S: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows, before its sequences attend: what the stage's g adds to dL/dz and dL/dS, q, k, v and dL/du.

    In a transformer `_between` has dL/du.
    """
    here = inside(block, 0, S.tile, S.columns, S)
    live, at, there = tile_of(place[1] - block, S)
    g = tl.load(slot(sequences, GRAD, tl.float32, S) + here)
    if S.grad_trajectory:
        g += tl.load(grad_states + at, mask=live & (done == 0), other=0.0)
    if S.uses_z:
        gz = tl.load(c) * g
        if done > 0:
            gz += tl.load(slot(sequences, GRAD_Z, tl.float32, S) + here)
    if S.uses_sum:
        gtotal = tl.load(c + 2) * g
        if done > 0:
            gtotal += tl.load(slot(sequences, GRAD_TOTAL, tl.float32, S) + here)
    tl.debug_barrier()
    tl.store(slot(sequences, GRAD, tl.float32, S) + here, g)
    if S.uses_z:
        tl.store(slot(sequences, GRAD_Z, tl.float32, S) + here, gz)
    if S.uses_sum:
        tl.store(slot(sequences, GRAD_TOTAL, tl.float32, S) + here, gtotal)
    if S.placement == "none":
        if S.want_parameters:
            tl.store(records + capacity * S.features + at, g.to(dtype), mask=live)
        if S.want_scalars:
            # <g, F(x)>, which `attend_backward` adds to.
            dw = tl.full((S.tile,), 0.0, tl.float32)
            if S.present[3]:
                dw += tl.sum(g * vector(row, 3, dtype, tl.arange(0, S.columns), S.features)[None, :], 1)
            tile_row = block + tl.arange(0, S.tile)
            tl.store(dws + tile_row, dw, mask=tile_row < place[1])
        spread(g.to(dtype), block, place, sequences, row, dtype, S)
    y = stage_input(s, state + there, size, x0 + there, state_scale, x0_scale, t, S)
    x, taken = operand(y, row, dtype, eps, S)
    if S.want_parameters:
        tl.store(records + at, x.to(dtype), mask=live)
    project(taken, block, place, sequences, row, dtype, True, S)


@triton.jit
def _between(
    block, s, t, c, state, size, x0, ring, mlp_ring, record, capacity, dws, state_scale, x0_scale,
    place, sequences, row, dtype, eps, slope, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Of a transformer's tile of rows, after its sequences attended: <g, F(x)>, dL/d attention(x), and by that dL/du."""
    here = inside(block, 0, S.tile, S.columns, S)
    live, at, there = tile_of(place[1] - block, S)
    added = land(_zeros(S), 1.0, U, block, place, sequences, row, dtype, S)
    y = stage_input(s, state + there, size, x0 + there, state_scale, x0_scale, t, S)
    g, dw = transformer_reverse(
        y + added, slot(sequences, GRAD, tl.float32, S) + here, here, tl.load(c + 3), row, sequences,
        ring, mlp_ring, record, capacity, at, dtype, eps, slope, live, S, M,
    )  # fmt: skip
    if S.want_scalars:
        tile_row = block + tl.arange(0, S.tile)
        tl.store(dws + tile_row, dw, mask=tile_row < place[1])
    if S.want_parameters:
        tl.store(ring + (capacity + record) * S.features + at, g.to(dtype), mask=live)
    tl.debug_barrier()
    tl.store(slot(sequences, MIDDLE, tl.float32, S) + here, g)
    spread(g.to(dtype), block, place, sequences, row, dtype, S)


@triton.jit
def _leave(
    block, s, t, coefficients, state, size, x0, records, scalars, rows, state_scale, x0_scale,
    place, sequences, row, dtype, eps, S: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows, after its sequences attended: from the stage's g to that of the stage before it, or to dL/dh_t.

    coefficients: of the iteration. scalars: of the tile's first row.
    """
    here = inside(block, 0, S.tile, S.columns, S)
    _live, _at, there = tile_of(place[1] - block, S)
    state, x0 = state + there, x0 + there
    c = coefficients + s * 5
    tile_row = tl.arange(0, S.tile)
    alive = tile_row < place[1] - block
    field = scalars + s * 5 * rows + tile_row
    g = tl.load(slot(sequences, GRAD, tl.float32, S) + here)
    if S.want_scalars:
        z = stage_input(0, state, size, x0, state_scale, x0_scale, t, S)
        tl.store(field, tl.sum(g * z, 1), mask=alive)
        y = stage_input(s, state, size, x0, state_scale, x0_scale, t, S)
        tl.store(field + rows, tl.sum(g * y, 1), mask=alive)
        if S.uses_sum:
            along = tl.full((S.tile,), 0.0, tl.float32)
            for i in range(s + 1):
                y_i = stage_input(i, state, size, x0, state_scale, x0_scale, t, S)
                along += tl.load(coefficients + i * 5 + 4) * tl.sum(g * y_i, 1)
            tl.store(field + 2 * rows, along, mask=alive)
            gtotal = tl.load(slot(sequences, GRAD_TOTAL, tl.float32, S) + here)
            tl.store(field + 4 * rows, tl.sum(gtotal * y, 1), mask=alive)
    dx = land_backward(block, place, sequences, records, row, dtype, S)
    if S.placement != "post":
        y = stage_input(s, state, size, x0, state_scale, x0_scale, t, S)
        dx = normalise_backward(dx, y, row, dtype, eps, S)
    if S.placement != "none":
        dx += tl.load(slot(sequences, MIDDLE, tl.float32, S) + here)
    g = tl.load(c + 1) * tl.load(slot(sequences, GRAD, tl.float32, S) + here) + dx
    if S.uses_sum:
        g += tl.load(c + 4) * tl.load(slot(sequences, GRAD_TOTAL, tl.float32, S) + here)
    if s == 0:
        if S.uses_z:
            g += tl.load(slot(sequences, GRAD_Z, tl.float32, S) + here)
        field = scalars + S.stages * 5 * rows + tile_row
        if S.want_scalars and S.state_scale:
            tl.store(field, tl.sum(g * load_tile(state, S), 1), mask=alive)
        if S.want_scalars and S.x0_scale:
            tl.store(field + rows, tl.sum(g * load_tile(x0, S), 1), mask=alive)
        if S.want_x0:
            of_x0 = slot(sequences, GRAD_X0, tl.float32, S) + here
            dx0 = tl.load(of_x0) + (g * tl.load(x0_scale + t) if S.x0_scale else g)
            tl.debug_barrier()
            tl.store(of_x0, dx0)
        if S.state_scale:
            g = g * tl.load(state_scale + t)
    tl.debug_barrier()
    tl.store(slot(sequences, GRAD, tl.float32, S) + here, g)
