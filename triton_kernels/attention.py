"""`attention` on whole sequences: F(x) = concat_heads(softmax(scale q k^T + mask) v) Wo^T + bo with q, k, v = x Wqkv^T + bqkv.

Sequences that share the rows of a program are blocks on the diagonal of the scores. Heads have d features, `chunk` padded.
Table columns: w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias. Ring: x, g, w u (D wide), dqkv (3D wide), x being the normed
state without gain and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .iterate import parameter, vector
from .sequences import attended, inside, position_of, slot

# Slots of scratch: the operands q, k and v; in forward w u takes the place of q. In backward also dL/du, the gradients of q, k
# and v, what QK-norm made of q and k, and what it multiplied them by, a column for each head.
Q = tl.constexpr(0)
K = tl.constexpr(1)
V = tl.constexpr(2)
DU = tl.constexpr(3)
DQ = tl.constexpr(4)
DK = tl.constexpr(5)
DV = tl.constexpr(6)
NORMED_Q = tl.constexpr(7)
NORMED_K = tl.constexpr(8)
SCALE_Q = tl.constexpr(9)
SCALE_K = tl.constexpr(10)


@triton.jit
def _rows_of(row, part: tl.constexpr, head, dtype, S: tl.constexpr):
    """The rows of Wqkv (3D, D) of one head's q, k or v: (chunk, columns)."""
    size: tl.constexpr = S.features // S.heads
    j = tl.arange(0, S.chunk)
    n = tl.arange(0, S.columns)
    at = parameter(row, 0, dtype) + (part * S.features + head * size + j[:, None]) * S.features + n[None, :]
    return tl.load(at, mask=(j[:, None] < size) & (n[None, :] < S.features), other=0.0)


@triton.jit
def _columns_of(row, head, dtype, S: tl.constexpr):
    """The columns of Wo (D, D) of one head, transposed: (chunk, columns)."""
    size: tl.constexpr = S.features // S.heads
    j = tl.arange(0, S.chunk)
    n = tl.arange(0, S.columns)
    at = parameter(row, 2, dtype) + n[None, :] * S.features + head * size + j[:, None]
    return tl.load(at, mask=(j[:, None] < size) & (n[None, :] < S.features), other=0.0)


@triton.jit
def _at(row, head, rows: tl.constexpr, left, S: tl.constexpr):
    """Offsets in a slot of one head's features of rows from `row` on, and which of them are there."""
    size: tl.constexpr = S.features // S.heads
    there = (row + tl.arange(0, rows)[:, None] < left) & (tl.arange(0, S.chunk)[None, :] < size)
    return inside(row, head * size, rows, S.chunk, S), there


@triton.jit
def _product(x, row, part: tl.constexpr, head, dtype, S: tl.constexpr):
    """One head's q, k or v, as float32."""
    a = tl.dot(x, tl.trans(_rows_of(row, part, head, dtype, S)), input_precision=S.precision)
    if S.present[1]:
        size: tl.constexpr = S.features // S.heads
        j = tl.arange(0, S.chunk)
        bias = tl.load(parameter(row, 1, dtype) + part * S.features + head * size + j, mask=j < size, other=0.0)
        a += bias.to(tl.float32)[None, :]
    return a


@triton.jit
def _rotate(x, block, place, sequences, BACK: tl.constexpr, S: tl.constexpr):
    """Turns features i and R + i by angle i of the row's position, or back."""
    j = tl.arange(0, S.chunk)
    low, turned = j < S.angles, (j < 2 * S.angles)[None, :]
    position, _number = position_of(block + tl.arange(0, S.tile), place, sequences, S)
    at = position[:, None] * S.angles + tl.where(low, j, j - S.angles)[None, :]
    cos = tl.load(sequences.cos + at, mask=turned, other=1.0)
    sin = tl.load(sequences.sin + at, mask=turned, other=0.0)
    partner = tl.where(low, j + S.angles, tl.where(j < 2 * S.angles, j - S.angles, j))
    other = tl.gather(x, tl.broadcast_to(partner[None, :], x.shape), 1)
    return x * cos + tl.where(low[None, :] != BACK, -sin, sin) * other


@triton.jit
def _prepare(
    x, OPERAND: tl.constexpr, NORMED: tl.constexpr, SCALE: tl.constexpr, head, block, place, sequences, dtype,
    BACKWARD: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One head's q or k, normed and turned, into the slot OPERAND; for backward what QK-norm did into the others."""
    left = place[1]
    at, there = _at(block, head, S.tile, left, S)
    if S.qk_norm:
        scale = tl.rsqrt(tl.sum(x * x, 1) / (S.features // S.heads) + sequences.eps)
        x = x * scale[:, None]
        if BACKWARD:
            row = block + tl.arange(0, S.tile)
            tl.store(slot(sequences, NORMED, tl.float32, S) + at, x, mask=there)
            tl.store(slot(sequences, SCALE, tl.float32, S) + row * S.columns + head, scale, mask=row < left)
    if S.angles > 0:
        x = _rotate(x, block, place, sequences, False, S)
    tl.store(slot(sequences, OPERAND, dtype, S) + at, x.to(dtype), mask=there)


@triton.jit
def project(x, block, place, sequences, row, dtype, BACKWARD: tl.constexpr, S: tl.constexpr):
    """q, k and v of a tile of rows into their slots."""
    for head in tl.range(0, S.heads, disable_licm=True):
        q = _product(x, row, 0, head, dtype, S)
        _prepare(q, Q, NORMED_Q, SCALE_Q, head, block, place, sequences, dtype, BACKWARD, S)
        k = _product(x, row, 1, head, dtype, S)
        _prepare(k, K, NORMED_K, SCALE_K, head, block, place, sequences, dtype, BACKWARD, S)
        v = _product(x, row, 2, head, dtype, S)
        at, there = _at(block, head, S.tile, place[1], S)
        tl.store(slot(sequences, V, dtype, S) + at, v.to(dtype), mask=there)


@triton.jit
def _operand(index: tl.constexpr, row, head, rows: tl.constexpr, place, sequences, dtype, S: tl.constexpr):
    """One head's features of rows from `row` on in a slot, and for each row a flaw: 0, or NaN where one is not finite.

    Where sequences share the rows they are made finite: the weight of another sequence, 0, would make NaN of them, where the
    flaw reaches those only that attend.
    """
    at, there = _at(row, head, rows, place[1], S)
    x = tl.load(slot(sequences, index, dtype, S) + at, mask=there, other=0.0)
    flaw = tl.full((rows,), 0.0, tl.float32)
    if S.several:
        flaw = tl.sum(x.to(tl.float32) * 0.0, 1)
        x = tl.where(x - x == 0.0, x, 0.0)
    return x, flaw


@triton.jit
def _exponentials(q, k, flaw, block, head, place, sequences, S: tl.constexpr):
    """exp(score - the row's largest), 0 where a key takes no part, and the sum of each row, 1 where none does."""
    allowed, added = attended(block, head, place, sequences, S)
    scores = tl.dot(q, tl.trans(k), input_precision=S.precision) * sequences.scale + added
    if S.several:
        scores += flaw
    scores = tl.where(allowed, scores, float("-inf"))
    largest = tl.max(scores, 1)
    # Not by exp(-inf): of a row with NaN that would be NaN for the keys of other sequences too.
    e = tl.where(allowed, tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None]), 0.0)
    total = tl.sum(e, 1)
    return e, tl.where(total == 0.0, 1.0, total)


@triton.jit
def attend(w, INTO: tl.constexpr, place, sequences, dtype, S: tl.constexpr):
    """w u of all rows into a slot, which that of q may be."""
    left = place[1]
    for head in tl.range(0, S.heads, num_stages=1, disable_licm=True):
        k, flaw_k = _operand(K, 0, head, S.rows, place, sequences, dtype, S)
        v, flaw_v = _operand(V, 0, head, S.rows, place, sequences, dtype, S)
        for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
            q, flaw_q = _operand(Q, block, head, S.tile, place, sequences, dtype, S)
            flaw = flaw_q[:, None] + (flaw_k + flaw_v)[None, :]
            e, total = _exponentials(q, k, flaw, block, head, place, sequences, S)
            u = tl.dot(e.to(dtype), v, input_precision=S.precision) * (w / total)[:, None]
            at, alive = _at(block, head, S.tile, left, S)
            tl.debug_barrier()
            tl.store(slot(sequences, INTO, dtype, S) + at, u.to(dtype), mask=alive)


@triton.jit
def land(y, w, FROM: tl.constexpr, block, place, sequences, row, dtype, S: tl.constexpr):
    """y + w F of a tile of rows, from what `attend` left in a slot."""
    left = place[1]
    if S.present[3]:
        y += w * vector(row, 3, dtype, tl.arange(0, S.columns), S.features)[None, :]
    for head in tl.range(0, S.heads, disable_licm=True):
        at, there = _at(block, head, S.tile, left, S)
        u = tl.load(slot(sequences, FROM, dtype, S) + at, mask=there, other=0.0)
        y = tl.dot(u, _columns_of(row, head, dtype, S), y, input_precision=S.precision)
    return y


@triton.jit
def spread(g, block, place, sequences, row, dtype, S: tl.constexpr):
    """dL/du, but for the factor w, of a tile of rows into its slot, from g as an operand."""
    left = place[1]
    for head in tl.range(0, S.heads, disable_licm=True):
        at, there = _at(block, head, S.tile, left, S)
        du = tl.dot(g, tl.trans(_columns_of(row, head, dtype, S)), input_precision=S.precision)
        tl.store(slot(sequences, DU, dtype, S) + at, du.to(dtype), mask=there)


@triton.jit
def attend_backward(w, place, sequences, dws, records, dtype, S: tl.constexpr):
    """dL/dq, dL/dk and dL/dv of all rows, as products take q, k and v, into their slots.

    dws: the addresses of <g, F(x)> of each row, which grow by <du, u>; not of a transformer's half, for F is not its own.
    records: of w u in the ring.
    """
    left = place[1]
    for head in tl.range(0, S.heads, num_stages=1, disable_licm=True):
        k, flaw_k = _operand(K, 0, head, S.rows, place, sequences, dtype, S)
        v, flaw_v = _operand(V, 0, head, S.rows, place, sequences, dtype, S)
        dk = tl.full((S.rows, S.chunk), 0.0, tl.float32)
        dv = tl.full((S.rows, S.chunk), 0.0, tl.float32)
        for block in tl.range(0, left, S.tile, num_stages=1, disable_licm=True):
            q, flaw_q = _operand(Q, block, head, S.tile, place, sequences, dtype, S)
            du, flaw_du = _operand(DU, block, head, S.tile, place, sequences, dtype, S)
            flaw = (flaw_q + flaw_du)[:, None] + (flaw_k + flaw_v)[None, :]
            e, total = _exponentials(q, k, flaw, block, head, place, sequences, S)
            # Where a row does not attend, a quotient or a product of its 0 would be NaN in a row that has one.
            p = tl.where(e == 0.0, 0.0, e / total[:, None])
            u = tl.dot(p.to(dtype), v, input_precision=S.precision)
            along = tl.sum(du.to(tl.float32) * u, 1)
            at, alive = _at(block, head, S.tile, left, S)
            if S.want_scalars and S.placement == "none":
                row = block + tl.arange(0, S.tile)
                dw = tl.load(dws + row, mask=row < left, other=0.0) + along
                tl.debug_barrier()
                tl.store(dws + row, dw, mask=row < left)
            if S.want_parameters:
                tl.store(records + _record(block, head, S.features, S), (w * u).to(dtype), mask=alive)
            dv = tl.dot(tl.trans(p.to(dtype)), du, dv, input_precision=S.precision)
            ds = tl.dot(du, tl.trans(v), input_precision=S.precision) - along[:, None]
            ds = (tl.where(e == 0.0, 0.0, p * ds) * (w * sequences.scale)).to(dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=S.precision)
            dq = tl.dot(ds, k, input_precision=S.precision)
            tl.store(slot(sequences, DQ, tl.float32, S) + at, dq, mask=alive)
            tl.debug_barrier()
        every, there = _at(0, head, S.rows, left, S)
        tl.store(slot(sequences, DK, tl.float32, S) + every, dk, mask=there)
        tl.store(slot(sequences, DV, tl.float32, S) + every, w * dv, mask=there)


@triton.jit
def _record(block, head, width: tl.constexpr, S: tl.constexpr):
    """Offsets in the ring of one head's features, in records of this width."""
    size: tl.constexpr = S.features // S.heads
    return (block + tl.arange(0, S.tile)[:, None]) * width + head * size + tl.arange(0, S.chunk)[None, :]


@triton.jit
def _prepare_backward(g, NORMED: tl.constexpr, SCALE: tl.constexpr, head, block, place, sequences, S: tl.constexpr):
    """From the gradient of a q or k, as products take it, to that of what `_prepare` made it of."""
    left = place[1]
    if S.angles > 0:
        g = _rotate(g, block, place, sequences, True, S)
    if S.qk_norm:
        at, there = _at(block, head, S.tile, left, S)
        x = tl.load(slot(sequences, NORMED, tl.float32, S) + at, mask=there, other=0.0)
        row = block + tl.arange(0, S.tile)
        scale = tl.load(slot(sequences, SCALE, tl.float32, S) + row * S.columns + head, mask=row < left, other=0.0)
        g = (g - x * (tl.sum(g * x, 1) / (S.features // S.heads))[:, None]) * scale[:, None]
    return g


@triton.jit
def _land_part(
    dx, part: tl.constexpr, GRADIENT: tl.constexpr, NORMED: tl.constexpr, SCALE: tl.constexpr, head, block, place, sequences,
    records, row, dtype, S: tl.constexpr,
):  # fmt: skip
    at, there = _at(block, head, S.tile, place[1], S)
    g = tl.load(slot(sequences, GRADIENT, tl.float32, S) + at, mask=there, other=0.0)
    if part < 2:
        g = _prepare_backward(g, NORMED, SCALE, head, block, place, sequences, S)
    g = g.to(dtype)
    if S.want_parameters:
        tl.store(records + part * S.features + _record(block, head, 3 * S.features, S), g, mask=there)
    return tl.dot(g, _rows_of(row, part, head, dtype, S), dx, input_precision=S.precision)


@triton.jit
def land_backward(block, place, sequences, records, row, dtype, S: tl.constexpr):
    """dL/dx of a tile of rows, from what `attend_backward` left. records: of dqkv in the ring."""
    dx = tl.full((S.tile, S.columns), 0.0, tl.float32)
    for head in tl.range(0, S.heads, disable_licm=True):
        dx = _land_part(dx, 0, DQ, NORMED_Q, SCALE_Q, head, block, place, sequences, records, row, dtype, S)
        dx = _land_part(dx, 1, DK, NORMED_K, SCALE_K, head, block, place, sequences, records, row, dtype, S)
        dx = _land_part(dx, 2, DV, NORMED_K, SCALE_K, head, block, place, sequences, records, row, dtype, S)
    return dx
