"""`linear` on a tile of rows: F(x) = act(x W^T + b). Its activation follows the product, which so has a tile of its own.

Table columns: weight, bias, norm_weight, norm_bias. Ring: x, da (D wide), x being the normed state without gain and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .iterate import keep, parameter, vector


@triton.jit
def _weight(row, dtype, S: tl.constexpr):
    n = tl.arange(0, S.columns)
    at = parameter(row, 0, dtype) + n[:, None] * S.features + n[None, :]
    return tl.load(at, mask=(n[:, None] < S.features) & (n[None, :] < S.features), other=0.0)


@triton.jit
def _product(x, row, dtype, S: tl.constexpr):
    a = tl.dot(x, tl.trans(_weight(row, dtype, S)), input_precision=S.precision)
    if S.present[1]:
        a += vector(row, 1, dtype, tl.arange(0, S.columns), S.features)[None, :]
    return a


@triton.jit
def linear_update(x, y, w, row, dtype, slope, S: tl.constexpr):
    u = activate(_product(x, row, dtype, S), slope, S)
    # act(0) need not be 0, and the padding has to stay 0.
    return y + tl.where(tl.arange(0, S.columns)[None, :] < S.features, w * u, 0.0)


@triton.jit
def linear_reverse(x, g, own, w, row, ring, record, capacity, at, dtype, slope, live, S: tl.constexpr):
    a = _product(x, row, dtype, S)
    dw = tl.full((S.tile,), 0.0, tl.float32)
    da = (w * g * derivative(a, slope, S)).to(dtype)
    if S.want_scalars:
        dw += tl.sum(g * activate(a, slope, S), 1)
    if S.want_parameters:
        tl.store(ring + (capacity + record) * S.features + at, da, mask=live)
    if S.tile >= 64:
        # Through memory: where a product feeds another, Triton has both warpgroups of 64 rows compute all of the first.
        keep(own, da.to(tl.float32))
        da = tl.load(own).to(dtype)
    return tl.dot(da, _weight(row, dtype, S), input_precision=S.precision), dw
