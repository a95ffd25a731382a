"""Scaled dot-product attention for `blas`: softmax(scale q k^T + mask) v, and its gradient by hand.

Shapes: q, k, v (B, heads, N, d), their last dimension contiguous; mask broadcastable to (B, heads, N, N), added, in q's
dtype, -inf where a key takes no part. What is kept for backward is the logsumexp of the scores, (B, heads, N). A row with
nothing to attend to gives 0, and zero gradients. No (N, N) matrix of all heads exists at a time beyond the scratch budget.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .settings import scratch_budget

aten = torch.ops.aten

# Matrices as large as the scores that exist at a time in backward.
_SCORES = 3


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out, and the logsumexp"""
    if q.device.type != "cpu":
        return chunked(q, k, v, mask, causal, scale)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # Without a mask torch takes a row of NaN scores for one with nothing to attend to.
    if mask is None and not lse.all():
        out += q.sum(-1, keepdim=True) * 0
    return out, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dq, dL/dk, dL/dv from g = dL/dout."""
    if q.device.type != "cpu":
        return chunked_backward(g, q, k, v, out, lse, mask, causal, scale)
    found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found


def chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` in torch's ordinary operators: the scores of as many query rows at a time as the scratch has room for."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows, keys in _chunks(q, causal):
        scores = _scores(q, k, mask, causal, scale, rows, keys)
        # 0 where nothing takes part, so that exp(-inf - lse) is 0.
        lse[:, :, rows] = torch.logsumexp(scores, -1)
        lse[:, :, rows].masked_fill_(lse[:, :, rows] == -torch.inf, 0)
        out[:, :, rows] = scores.sub_(lse[:, :, rows, None]).exp_() @ v[:, :, keys]
    return out, lse


def chunked_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward`, likewise: with P the weights, dv = P^T g and dS = P (g v^T - <g, out>)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _chunks(q, causal):
        weights = _scores(q, k, mask, causal, scale, rows, keys).sub_(lse[:, :, rows, None]).exp_()
        dv[:, :, keys] += weights.mT @ g[:, :, rows]
        dscores = g[:, :, rows] @ v[:, :, keys].mT
        dscores.sub_((g[:, :, rows] * out[:, :, rows]).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        dq[:, :, rows] = dscores @ k[:, :, keys]
        dk[:, :, keys] += dscores.mT @ q[:, :, rows]
    return dq, dk, dv


def relative(mask: Tensor, causal: bool) -> Tensor:
    """The mask less the largest value of a row that takes part, which changes no weight.

    With a sentinel as -1e9 in all of a row, the logsumexp would swallow the scores, and the number of keys.
    """
    if causal:
        tokens = mask.shape[-1]
        mask = mask.masked_fill(_later(mask.expand(*mask.shape[:-2], tokens, tokens)), -torch.inf)
    largest = mask.amax(-1, keepdim=True)
    return mask - largest.masked_fill_(largest == -torch.inf, 0)


def _chunks(q: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Query rows, and the keys that they can see."""
    batch, heads, tokens, _ = q.shape
    step = max(scratch_budget(q.device.type) // (_SCORES * batch * heads * tokens * q.element_size()), 1)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        yield slice(start, stop), slice(0, stop if causal else tokens)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, rows: slice, keys: slice) -> Tensor:
    scores = (q[:, :, rows] * scale) @ k[:, :, keys].mT
    if mask is not None:
        scores += mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys if mask.shape[3] > 1 else slice(None)]
    if causal:
        scores.masked_fill_(_later(scores, rows.start), -torch.inf)
    return scores


def _later(scores: Tensor, first: int = 0) -> Tensor:
    """(rows, keys): which keys come after the row; first: the first row's place."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(first + 1)
