"""What the row-wise kernels share: all T iterations of a tile of rows in one program, forward and backward.

The state is a tile of float32 registers. An iteration runs the stage program of `score_kernels.stages` on it; the op's own
part, the block F between norm and update, comes in as two functions (`mlp.py`, `linear.py`):

    update(x, y, w, ...)   y + w F(x), the last product accumulating on the state y
    reverse(x, g, w, ...)  dL/dx and, row by row, dL/dw for L = <g, w F(x)>; it writes what the gradients of its parameters
                           are sums and products of to the ring; a slot of scratch is its own

`x` is the normed state rounded to the operands' dtype. Parameters come through a table of pointers, one row for each set.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .configs import SLOTS


class Static(NamedTuple):
    """What a kernel is specialised for.

    features, hidden: D, H; columns: D padded to a power of two; tile, chunk: rows of a tile, hidden features of a chunk.
    parameters: columns of the pointer table, the norm's gain and bias last; present: which of them are given.
    gain_float32: the norm's parameters are float32, not the operands' dtype. uses_z, uses_sum: what the solver needs beside y.
    records: states that the forward kernel keeps of an iteration: none, h_t, or the inputs of all stages.

    Of an op on sequences, `rows` belong together, `tile` of them at a time, `slots` tiles of `rows` are scratch, and chunk is
    the features of a head, padded. angles: of the rotary embedding. padding, mask: of keys, of pairs ("none", "boolean",
    "additive"). packed: sequences of any lengths. several: sequences share the rows.

    Of a transformer's half: where its norms are, "pre" or "post", and how many columns the other half has in the table.
    """

    features: int
    hidden: int
    columns: int
    tile: int
    chunk: int
    precision: str
    activation: str
    norm: str
    present: tuple[bool, ...]
    parameters: int
    gain: bool
    norm_bias: bool
    gain_float32: bool
    stages: int
    uses_z: bool
    uses_sum: bool
    cyclic: bool
    x0: bool
    state_scale: bool
    x0_scale: bool
    records: int = 0
    grad_trajectory: bool = False
    want_x0: bool = False
    want_scalars: bool = False
    want_parameters: bool = False
    rows: int = 0
    slots: int = 0
    heads: int = 0
    causal: bool = False
    qk_norm: bool = False
    angles: int = 0
    padding: bool = False
    mask: str = "none"
    packed: bool = False
    several: bool = False
    placement: str = "none"
    others: int = 0


_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def parameter(row, index: tl.constexpr, dtype):
    """Pointer `index` of a row of the table; `launch.py` makes sure of the alignment."""
    return tl.multiple_of(tl.load(row + index).to(tl.pointer_type(dtype)), 16)


@triton.jit
def vector(row, index: tl.constexpr, dtype, offsets, size: tl.constexpr):
    """A bias or gain as float32, 0 beyond its size."""
    return tl.load(parameter(row, index, dtype) + offsets, mask=offsets < size, other=0.0).to(tl.float32)


@triton.jit
def gain(row, index: tl.constexpr, dtype, S: tl.constexpr):
    column = tl.arange(0, S.columns)
    if S.gain_float32:
        return vector(row, index, tl.float32, column, S.features)
    else:
        return vector(row, index, dtype, column, S.features)


@triton.jit
def table_row(table, t, iterations, sets, S: tl.constexpr):
    index = t % sets if S.cyclic else (t * sets) // iterations
    return table + index * (S.parameters + S.others), index


@triton.jit
def whiten(y, eps, S: tl.constexpr):
    """(y - mean) / deviation, and 1 / deviation; the padding stays 0 and counts in no sum."""
    deviation = tl.full((S.tile,), 1.0, tl.float32)
    if S.norm == "layernorm":
        mean = tl.sum(y, 1) / S.features
        y = tl.where(tl.arange(0, S.columns)[None, :] < S.features, y - mean[:, None], 0.0)
    if S.norm != "none":
        deviation = tl.rsqrt(tl.sum(y * y, 1) / S.features + eps)
        y = y * deviation[:, None]
    return y, deviation


@triton.jit
def scaled(x, row, dtype, S: tl.constexpr):
    """What follows `whiten` in a norm. The norm's parameters are the table's last two columns."""
    if S.gain:
        x = x * gain(row, S.parameters - 2, dtype, S)[None, :]
    if S.norm_bias:
        x = x + gain(row, S.parameters - 1, dtype, S)[None, :]
    return x


@triton.jit
def affine(x, row, dtype, S: tl.constexpr):
    """`scaled`, rounded to an operand."""
    return scaled(x, row, dtype, S).to(dtype)


@triton.jit
def normalise_backward(dx, y, row, dtype, eps, S: tl.constexpr):
    """dL/dy from dx = dL/dnorm(y)"""
    if S.norm == "none":
        return dx
    x, deviation = whiten(y, eps, S)
    if S.gain:
        dx = dx * gain(row, S.parameters - 2, dtype, S)[None, :]
    along = tl.sum(dx * x, 1) / S.features
    if S.norm == "layernorm":
        dx = tl.where(tl.arange(0, S.columns)[None, :] < S.features, dx - (tl.sum(dx, 1) / S.features)[:, None], 0.0)
    return (dx - x * along[:, None]) * deviation[:, None]


@triton.jit
def tile_of(rows, S: tl.constexpr):
    """Which elements of a tile are there, `rows` being left, and two kinds of offsets from its first one.

    The first kind is for stores, which are masked. The second reads a tile: rows that are not there repeat the last one that
    is, whatever its values, so that nothing but their gradient, which is 0, keeps them out of sums. Masked, it serves as well:
    backward has no registers for both. Offsets are 32 bits wide: what is 64 bits wide is the address of the first element.
    """
    row = tl.arange(0, S.tile)[:, None]
    column = tl.arange(0, S.columns)[None, :]
    rows = tl.minimum(rows, S.tile).to(tl.int32)
    return (row < rows) & (column < S.features), row * S.features + column, tl.minimum(row, rows - 1) * S.features + column


@triton.jit
def load_tile(at, S: tl.constexpr):
    """From the second kind of offsets, as float32; 0 beyond D."""
    if S.features == S.columns:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=tl.arange(0, S.columns)[None, :] < S.features, other=0.0).to(tl.float32)


@triton.jit
def start(y, x0, state_scale, x0_scale, t, S: tl.constexpr):
    """z = r y + s x0"""
    if S.state_scale:
        y = y * tl.load(state_scale + t)
    if S.x0:
        injected = load_tile(x0, S)
        y = y + (injected * tl.load(x0_scale + t) if S.x0_scale else injected)
    return y


@triton.jit
def stage_update(y, z, total, c, row, dtype, eps, slope, UPDATE: tl.constexpr, S: tl.constexpr):
    """p z + q y + v S + w F(y)"""
    x, _ = whiten(y, eps, S)
    x = affine(x, row, dtype, S)
    y = y * tl.load(c + 1)
    if S.uses_z:
        y += tl.load(c) * z
    if S.uses_sum:
        y += tl.load(c + 2) * total
    return UPDATE(x, y, tl.load(c + 3), row, dtype, slope, S)


@triton.jit
def forward_kernel(
    h, x0, out, states, table, coefficients, state_scale, x0_scale, rows, iterations, first, sets, eps, slope,
    UPDATE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """out = h_T for one tile of rows; with `S.records`, states (records * (T-first) + 1, rows, D) from h_first on as well.

    Operands of products have x0's dtype; h and out may be float32 beside it: a state between two launches.
    """
    first_row = tl.program_id(0).to(tl.int64) * S.tile
    live, at, there = tile_of(rows - first_row, S)
    begin = first_row * S.features
    size = tl.full((), S.features, tl.int64) * rows
    dtype = x0.dtype.element_ty
    y = load_tile(h + begin + there, S)
    for t in range(iterations):
        record = states + ((t - first) * S.records * size + begin)
        if S.records > 0:
            tl.store(record + at, y, mask=live & (t >= first))
        row, _ = table_row(table, t, iterations, sets, S)
        y = start(y, x0 + begin + there, state_scale, x0_scale, t, S)
        z = y
        total = tl.full((S.tile, S.columns), 0.0, tl.float32) if S.uses_sum else 0.0
        for stage in range(S.stages):
            c = coefficients + (t * S.stages + stage) * 5
            if S.records > 1:
                tl.store(record + stage * size + at, y, mask=live & (t >= first) & (stage > 0))
            if S.uses_sum:
                total += tl.load(c + 4) * y
            y = stage_update(y, z, total, c, row, dtype, eps, slope, UPDATE, S)
    if S.records > 0:
        tl.store(states + ((iterations - first) * S.records * size + begin) + at, y, mask=live)
    tl.store(out + begin + at, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def backward_kernel(
    x0, states, grad_out, grad_states, grad_h, grad_x0, scratch, ring, scalars, table, coefficients, state_scale, x0_scale,
    rows, states_rows, grad_rows, iterations, first, sets, eps, slope,
    REVERSE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradients of `rows` rows from their states: the tiles are dealt to the programs in turn.

    states: the inputs of all stages from iteration `first` on (of a first stage, h_t), `states_rows` rows apart; grad_states:
    dL/dh_0, dL/dh_1, ..., `grad_rows` rows apart. `scratch` has SLOTS float32 tiles for each program. `ring` receives what the
    gradients of the parameters are computed from, `scalars` (T-first, stages * 5 + SCALES, rows) the gradients of coefficients
    and scales, row by row.
    """
    dtype = x0.dtype.element_ty
    size = tl.full((), S.features, tl.int64) * states_rows
    grad_size = tl.full((), S.features, tl.int64) * grad_rows
    slot: tl.constexpr = S.tile * S.columns
    local = tl.arange(0, S.tile)[:, None] * S.columns + tl.arange(0, S.columns)[None, :]
    own = scratch + tl.program_id(0).to(tl.int64) * (_SLOTS * slot) + local
    for tile in range(tl.program_id(0), tl.cdiv(rows, S.tile), tl.num_programs(0)):
        first_row = tl.full((), S.tile, tl.int64) * tile
        live, _, at = tile_of(rows - first_row, S)
        begin = first_row * S.features
        g = tl.load(grad_out + begin + at, mask=live, other=0.0).to(tl.float32)
        if S.want_x0:
            keep(own, tl.full((S.tile, S.columns), 0.0, tl.float32))
        for back in range(iterations - first):
            t = iterations - 1 - back
            if S.grad_trajectory:
                g += tl.load(grad_states + ((t + 1) * grad_size + begin) + at, mask=live, other=0.0)
            g = reverse(
                states + ((t - first) * S.stages * size + begin) + at, size, g, x0 + begin + at, own, at, live,
                ring, scalars, first_row, coefficients, state_scale, x0_scale, table, t, iterations, first, rows,
                sets, dtype, eps, slope, REVERSE, S,
            )  # fmt: skip
        if S.grad_trajectory:
            g += tl.load(grad_states + begin + at, mask=live, other=0.0)
        tl.store(grad_h + begin + at, tl.where(first == 0, g, 0.0).to(grad_h.dtype.element_ty), mask=live)
        if S.want_x0:
            tl.store(grad_x0 + begin + at, tl.load(own).to(dtype), mask=live)


@triton.jit
def stage_input(s, state, size, x0, state_scale, x0_scale, t, S: tl.constexpr):
    """The input of a stage, from memory: a second reading costs less than the registers to hold it through the products."""
    y = load_tile(state + s * size, S)
    if s == 0:
        y = start(y, x0, state_scale, x0_scale, t, S)
    return y


@triton.jit
def keep(at, value):
    """at <- value in the program's scratch: other threads may have read what was there, and may read this from here on."""
    tl.debug_barrier()
    tl.store(at, value)
    tl.debug_barrier()


@triton.jit
def reverse(
    state, size, g, x0, own, at, live, ring, scalars, ring_row,
    coefficients, state_scale, x0_scale, table, t, iterations, first, ring_rows, sets, dtype, eps, slope,
    REVERSE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """From the addresses of h_t and g = dL/dh_{t+1} to dL/dh_t; everything else is written or accumulated.

    dL/dx0, dL/dz and dL/dS are added up in scratch, where g waits for the products and dL/dx for the scalars: every solver
    takes Euler's registers.
    """
    slot: tl.constexpr = S.tile * S.columns
    row, _ = table_row(table, t, iterations, sets, S)
    coefficients += t * S.stages * 5
    alive = tl.arange(0, S.tile) < ring_rows - ring_row
    one = tl.full((), 1, tl.int64)
    scalars += one * (t - first) * (S.stages * 5 + 2) * ring_rows + ring_row + tl.arange(0, S.tile)
    capacity = one * S.stages * (iterations - first) * ring_rows
    for done in range(S.stages):
        s = S.stages - 1 - done
        c = coefficients + s * 5
        record = one * ((t - first) * S.stages + s) * ring_rows + ring_row
        if S.uses_z:
            gz = tl.load(c) * g
            keep(own + slot, gz if done == 0 else gz + tl.load(own + slot))
        if S.uses_sum:
            gtotal = tl.load(c + 2) * g
            keep(own + 2 * slot, gtotal if done == 0 else gtotal + tl.load(own + 2 * slot))
        keep(own + 3 * slot, g)
        x, _deviation = whiten(stage_input(s, state, size, x0, state_scale, x0_scale, t, S), eps, S)
        if S.want_parameters:
            tl.store(ring + record * S.features + at, x.to(dtype), mask=live)
        x = affine(x, row, dtype, S)
        dx, dw = REVERSE(x, g, own + 4 * slot, tl.load(c + 3), row, ring, record, capacity, at, dtype, slope, live, S)
        if S.want_scalars:
            keep(own + 4 * slot, dx)
        g = tl.load(own + 3 * slot)
        field = scalars + s * 5 * ring_rows
        if S.want_scalars:
            z = stage_input(0, state, size, x0, state_scale, x0_scale, t, S)
            tl.store(field, tl.sum(g * z, 1), mask=alive)
        y = stage_input(s, state, size, x0, state_scale, x0_scale, t, S)
        if S.want_scalars:
            tl.store(field + ring_rows, tl.sum(g * y, 1), mask=alive)
            tl.store(field + 3 * ring_rows, dw, mask=alive)
            if S.uses_sum:
                along = tl.full((S.tile,), 0.0, tl.float32)
                for i in range(s + 1):
                    y_i = stage_input(i, state, size, x0, state_scale, x0_scale, t, S)
                    along += tl.load(coefficients + i * 5 + 4) * tl.sum(g * y_i, 1)
                tl.store(field + 2 * ring_rows, along, mask=alive)
                tl.store(field + 4 * ring_rows, tl.sum(tl.load(own + 2 * slot) * y, 1), mask=alive)
        g = tl.load(c + 1) * g
        if S.uses_sum:
            g += tl.load(c + 4) * tl.load(own + 2 * slot)
        if S.want_scalars:
            dx = tl.load(own + 4 * slot)
        g += normalise_backward(dx, y, row, dtype, eps, S)
    if S.uses_z:
        g += tl.load(own + slot)
    if S.want_scalars:
        field = scalars + S.stages * 5 * ring_rows
        if S.state_scale:
            tl.store(field, tl.sum(g * load_tile(state, S), 1), mask=alive)
        if S.x0_scale:
            tl.store(field + ring_rows, tl.sum(g * load_tile(x0, S), 1), mask=alive)
    if S.want_x0:
        keep(own, tl.load(own) + (g * tl.load(x0_scale + t) if S.x0_scale else g))
    if S.state_scale:
        g = g * tl.load(state_scale + t)
    return g
