"""`transformer` on whole sequences: both halves as one block F, attention's from `attention.py`, the mlp's from `mlp.py`.

F(z) = y + mlp(y) with y = z + attention(z), each half norming its input; "post": F(z) = norm(y + mlp(y)) with
y = norm(z + attention(z)). S is the `Static` of attention, M that of the mlp; the table has the columns of the one and then
those of the other. The mlp takes a tile of rows after attention, when that has its result in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import DK, DQ, DV
from .iterate import affine, keep, normalise_backward, scaled, whiten
from .mlp import mlp_reverse, mlp_update
from .sequences import slot

# Slots of backward: what `attend` makes, before its gradients are there, and the gradient of attention's result.
U = DQ
MIDDLE = tl.constexpr(15)


@triton.jit
def operand(y, row, dtype, eps, S: tl.constexpr):
    """What a block takes of y, without the norm's gain and bias and with them as an operand: y itself where norms follow."""
    if S.placement == "post":
        return y, y.to(dtype)
    else:
        x, _deviation = whiten(y, eps, S)
        return x, affine(x, row, dtype, S)


@triton.jit
def transformer_update(y, state, added, w, row, dtype, eps, slope, S: tl.constexpr, M: tl.constexpr):
    """y + w F(state), from attention(state), which was added to nothing.

    With norms before the halves y has w F's own `state` in it already, as (q + w) state: where the decay cancels q + w rounds
    to 1, and q state + w state would drift with T.
    """
    if S.placement == "pre":
        _x, taken = operand(state + added, row + S.parameters, dtype, eps, M)
        return mlp_update(taken, y + w * added, w, row + S.parameters, dtype, slope, M)
    else:
        middle, _deviation = whiten(state + added, eps, S)
        middle = scaled(middle, row, dtype, S)
        total = mlp_update(middle.to(dtype), middle, 1.0, row + S.parameters, dtype, slope, M)
        result, _deviation = whiten(total, eps, M)
        return y + w * scaled(result, row + S.parameters, dtype, M)


@triton.jit
def transformer_reverse(
    middle, of_g, here, w, row, sequences, ring, mlp_ring, record, capacity, at, dtype, eps, slope, live,
    S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """From x + attention(x) and where g is: the gradient of attention's result, which is that of x by its side too, and
    <g, F(x)>. The mlp writes its ring, and norms that follow write both."""
    if S.placement == "pre":
        return _reverse_pre(
            middle, of_g, here, w, row + S.parameters, sequences, mlp_ring, record, capacity, at, dtype, eps, slope, live, M
        )
    else:
        return _reverse_post(
            middle, of_g, here, w, row, sequences, ring, mlp_ring, record, capacity, at, dtype, eps, slope, live, S, M
        )


@triton.jit
def _reverse_pre(
    middle, of_g, here, w, row, sequences, ring, record, capacity, at, dtype, eps, slope, live, M: tl.constexpr
):  # fmt: skip
    """row, ring: of the mlp. The tile waits in scratch while the mlp is reversed."""
    of_middle = slot(sequences, MIDDLE, tl.float32, M) + here
    keep(of_middle, middle)
    x, taken = operand(middle, row, dtype, eps, M)
    if M.want_parameters:
        tl.store(ring + record * M.features + at, x.to(dtype), mask=live)
    dx, dw = mlp_reverse(taken, tl.load(of_g), of_g, w, row, ring, record, capacity, at, dtype, slope, live, M)
    middle, g = tl.load(of_middle), tl.load(of_g)
    return w * g + normalise_backward(dx, middle, row, dtype, eps, M), dw + tl.sum(g * middle, 1)


@triton.jit
def _reverse_post(
    attended, of_g, here, w, row, sequences, ring, mlp_ring, record, capacity, at, dtype, eps, slope, live,
    S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    of_attended, of_total = slot(sequences, DK, tl.float32, S) + here, slot(sequences, DV, tl.float32, S) + here
    keep(of_attended, attended)
    x, _deviation = whiten(attended, eps, S)
    middle = scaled(x, row, dtype, S)
    taken = middle.to(dtype)
    if M.want_parameters:
        tl.store(mlp_ring + record * M.features + at, taken, mask=live)
    total = mlp_update(taken, middle, 1.0, row + S.parameters, dtype, slope, M)
    x, _deviation = whiten(total, eps, M)
    g = tl.load(of_g)
    dw = tl.sum(g * scaled(x, row + S.parameters, dtype, M), 1)
    g = w * g
    # Behind x, g, w u, dz and dgate.
    _record_norm(x, g, mlp_ring, 2 * M.features + (3 if M.present[4] else 2) * M.hidden, record, capacity, at, dtype, live, M)
    g = normalise_backward(g, total, row + S.parameters, dtype, eps, M)
    keep(of_total, g)
    dx, _dw = mlp_reverse(taken, g, of_g, 1.0, row + S.parameters, mlp_ring, record, capacity, at, dtype, slope, live, M)
    g = tl.load(of_total) + dx
    attended = tl.load(of_attended)
    x, _deviation = whiten(attended, eps, S)
    # Behind x, g, u and dqkv.
    _record_norm(x, g, ring, 6 * S.features, record, capacity, at, dtype, live, S)
    return normalise_backward(g, attended, row, dtype, eps, S), dw


@triton.jit
def _record_norm(x, g, ring, width: tl.constexpr, record, capacity, at, dtype, live, S: tl.constexpr):
    """What the gradients of a gain and bias are sums of, behind fields of this width, from the whitened x and dL/dnorm."""
    if S.want_parameters:
        of_gain = ring + capacity * width + record * S.features + at
        tl.store(of_gain, (g * x).to(dtype), mask=live)
        tl.store(of_gain + capacity * S.features, g.to(dtype), mask=live)
