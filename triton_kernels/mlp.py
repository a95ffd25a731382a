"""`mlp` on a tile of rows: F(x) = u W2^T + b2 with u = act(x W1^T + b1), or gated u = act(x Wg^T + bg) * (x W1^T + b1).

The hidden features go by in chunks, so that the tile of them is small; the last product accumulates on the state.
Table columns: w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias. Ring: x, g (D wide), w u, dz, dgate (H wide), x being
the normed state without gain and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .iterate import parameter, vector


@triton.jit
def _rows_of(row, index: tl.constexpr, dtype, c, S: tl.constexpr):
    """A chunk of W1 or Wg (H, D): (chunk, columns)."""
    j = c + tl.arange(0, S.chunk)
    d = tl.arange(0, S.columns)
    at = parameter(row, index, dtype) + j[:, None] * S.features + d[None, :]
    return tl.load(at, mask=(j[:, None] < S.hidden) & (d[None, :] < S.features), other=0.0)


@triton.jit
def _columns_of(row, index: tl.constexpr, dtype, c, S: tl.constexpr):
    """A chunk of W2 (D, H), transposed: (chunk, columns)."""
    j = c + tl.arange(0, S.chunk)
    d = tl.arange(0, S.columns)
    at = parameter(row, index, dtype) + d[None, :] * S.hidden + j[:, None]
    return tl.load(at, mask=(j[:, None] < S.hidden) & (d[None, :] < S.features), other=0.0)


@triton.jit
def _product(x, row, weight: tl.constexpr, bias: tl.constexpr, dtype, c, S: tl.constexpr):
    """A chunk of x W^T + b"""
    a = tl.dot(x, tl.trans(_rows_of(row, weight, dtype, c, S)), input_precision=S.precision)
    if S.present[bias]:
        a += vector(row, bias, dtype, c + tl.arange(0, S.chunk), S.hidden)[None, :]
    return a


@triton.jit
def mlp_update(x, y, w, row, dtype, slope, S: tl.constexpr):
    if S.present[3]:
        y += w * vector(row, 3, dtype, tl.arange(0, S.columns), S.features)[None, :]
    for c in range(0, S.hidden, S.chunk):
        u = _product(x, row, 0, 1, dtype, c, S)
        if S.present[4]:
            u *= activate(_product(x, row, 4, 5, dtype, c, S), slope, S)
        else:
            u = activate(u, slope, S)
        y = tl.dot((w * u).to(dtype), _columns_of(row, 2, dtype, c, S), y, input_precision=S.precision)
    return y


@triton.jit
def mlp_reverse(x, g, own, w, row, ring, record, capacity, at, dtype, slope, live, S: tl.constexpr):
    operand = g.to(dtype)
    dx = tl.full((S.tile, S.columns), 0.0, tl.float32)
    # <g, F(x)>
    dw = tl.full((S.tile,), 0.0, tl.float32)
    if S.want_scalars and S.present[3]:
        dw += tl.sum(g * vector(row, 3, dtype, tl.arange(0, S.columns), S.features)[None, :], 1)
    if S.want_parameters:
        tl.store(ring + (capacity + record) * S.features + at, operand, mask=live)
    ring += capacity * (2 * S.features) + record * S.hidden
    inside = tl.sum(live.to(tl.int32), 1) > 0
    for c in range(0, S.hidden, S.chunk):
        j = c + tl.arange(0, S.chunk)
        alive = inside[:, None] & (j[None, :] < S.hidden)
        hidden = ring + tl.arange(0, S.tile)[:, None] * S.hidden + j[None, :]
        up = _product(x, row, 0, 1, dtype, c, S)
        du = tl.dot(operand, tl.trans(_columns_of(row, 2, dtype, c, S)), input_precision=S.precision)
        if S.present[4]:
            gate = _product(x, row, 4, 5, dtype, c, S)
            opened = activate(gate, slope, S)
            u = opened * up
            dgate = w * du * up * derivative(gate, slope, S)
            dz = w * du * opened
            if S.want_parameters:
                tl.store(hidden + capacity * (2 * S.hidden), dgate.to(dtype), mask=alive)
            dx = tl.dot(dgate.to(dtype), _rows_of(row, 4, dtype, c, S), dx, input_precision=S.precision)
        else:
            u = activate(up, slope, S)
            dz = w * du * derivative(up, slope, S)
        if S.want_scalars:
            dw += tl.sum(du * u, 1)
        if S.want_parameters:
            tl.store(hidden, (w * u).to(dtype), mask=alive)
            tl.store(hidden + capacity * S.hidden, dz.to(dtype), mask=alive)
        dx = tl.dot(dz.to(dtype), _rows_of(row, 0, dtype, c, S), dx, input_precision=S.precision)
    return dx, dw
