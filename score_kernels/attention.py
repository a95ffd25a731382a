"""Attention as a block of the `blas` backend: a tile is a few whole sequences, iterated and reversed like any other block's.

The rows of a tile go through the products together; between them its sequences attend, those of one length in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from . import sdpa
from .blocks import Block, Gradients, Rows
from .linalg import Number, dot, product
from .problem import Problem

# Inputs of which each sequence may have its own, and the dimensions of one.
MASKS = {"key_padding_mask": 1, "attn_mask": 3}


class Group(NamedTuple):
    """Sequences of one length, one after the other in a tile: their rows there, and how many they are."""

    rows: slice
    sequences: int


class Kept(NamedTuple):
    """q, k, v as operands (rows, 3D), what the norm of q and k keeps, what the heads made (rows, D), and what SDPA keeps."""

    qkv: Tensor
    normed: tuple[Tensor, Tensor] | None
    out: Tensor
    of_groups: list[Tensor]


class Attention(Block):
    """F(y) = u Wo^T + bo with n = norm(y), q, k, v = n Wqkv^T + bqkv, u = concat_heads(softmax(scale q k^T + mask) v)"""

    def __init__(self, problem: Problem, gradients: Gradients | None = None) -> None:
        super().__init__(problem, gradients)
        self.problem, self.options = problem, problem.options
        self.groups: list[Group] = []
        self.mask: Tensor | None = None
        self.rotary: tuple[Tensor, Tensor] | None = None

    def tiles(self, total: int, rows: int) -> Iterator[Rows]:
        """Whole sequences, as many as `rows` have room for, at least one. Packed ones come in the order of their lengths."""
        if self.problem.inputs["cu_seqlens"] is not None:
            yield from self._packed_tiles(rows)
            return
        tokens = self.problem.h.shape[-2]
        step = max(rows // max(tokens, 1), 1) * tokens
        for start in range(0, total, max(step, 1)):
            stop = min(start + step, total)
            sequences = slice(start // tokens, stop // tokens)
            self._enter([tokens] * (sequences.stop - sequences.start))
            self.mask = self._mask(sequences)
            yield slice(start, stop)

    def _packed_tiles(self, rows: int) -> Iterator[Rows]:
        packed, lengths = self.problem.h.shape[-2], self.problem.lengths
        starts = accumulate(lengths[:-1], initial=0)
        batch = self.problem.h.numel() // max(packed * self.problem.features, 1)
        found = [(n, i * packed + start) for start, n in zip(starts, lengths, strict=True) for i in range(batch) if n]
        tile: list[tuple[int, int]] = []
        size = 0
        for length, start in sorted(found):
            if tile and size + length > rows:
                yield self._rows(tile)
                tile, size = [], 0
            tile.append((length, start))
            size += length
        if tile:
            yield self._rows(tile)

    def _rows(self, sequences: list[tuple[int, int]]) -> Tensor:
        """The rows of sequences given as (length, first row)."""
        self._enter([length for length, _ in sequences])
        device = self.problem.h.device
        return torch.cat([torch.arange(start, start + length, device=device) for length, start in sequences])

    def _enter(self, lengths: list[int]) -> None:
        """Prepares for a tile of sequences of these lengths, equal ones side by side."""
        self.groups, start = [], 0
        for tokens, equal in groupby(lengths):
            sequences = len(list(equal))
            self.groups.append(Group(slice(start, start + sequences * tokens), sequences))
            start += sequences * tokens
        cos, sin = (self.problem.inputs[name] for name in ("rotary_cos", "rotary_sin"))
        if cos is not None and sin is not None:
            of_groups = [
                torch.arange((group.rows.stop - group.rows.start) // group.sequences, device=cos.device).repeat(group.sequences)
                for group in self.groups
            ]
            positions = torch.cat(of_groups)
            self.rotary = cos[positions, None].to(self.dtype), sin[positions, None].to(self.dtype)

    def _mask(self, sequences: slice) -> Tensor | None:
        """What is added to the scores of these sequences, broadcastable to (sequences, heads, N, N)."""
        padding, mask = self.problem.inputs["key_padding_mask"], self.problem.inputs["attn_mask"]
        if padding is not None:
            padding = of_sequences(self.problem, sequences, padding, MASKS["key_padding_mask"])[:, None, None]
        if mask is None:
            return None if padding is None else _minus_infinity(padding, self.dtype)
        mask = of_sequences(self.problem, sequences, mask, MASKS["attn_mask"])
        added = mask.is_floating_point()
        mask = mask.to(self.dtype) if added else _minus_infinity(~mask, self.dtype)
        mask = mask if padding is None else mask.masked_fill(padding, -torch.inf)
        return sdpa.relative(mask, self.options.causal) if added else mask

    @staticmethod
    def kept(problem: Problem) -> int:
        heads, features = problem.options.num_heads, problem.features
        copied = problem.inputs["rotary_cos"] is not None or problem.operand_dtype != problem.compute_dtype
        norm = 2 * heads + (2 * features if copied else 0)
        return 4 * features + heads + (norm if problem.options.qk_norm else 0)

    def inner(self, y: Tensor, index: int) -> Tensor:
        x, _ = self.normalise(y, index)
        return self.round(self._heads_of(x, index, keep=False).out)

    def inner_kept(self, y: Tensor, index: int) -> tuple[Tensor, Kept]:
        x, _ = self.normalise(y, index)
        kept = self._heads_of(x, index, keep=True)
        return self.round(kept.out), kept

    def _heads_of(self, x: Tensor, index: int, keep: bool) -> Kept:
        """From norm(y) to what the heads make of it; keep: with what the gradient of q's and k's norm needs."""
        qkv = product(x, self.weight("w_qkv", index), self.get("b_qkv", index))
        normed = self._prepare_(qkv, keep)
        return Kept(qkv, normed, *self._attend(qkv))

    def outer(self, u: Tensor, index: int) -> Tensor:
        return product(u, self.weight("w_out", index), self.get("b_out", index))

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x, saved = self.normalise(y, index)
        qkv, normed, out, of_groups = self._heads_of(x, index, keep=True) if kept is None else kept
        u, g = self.round(out), self.round(g)
        self.accumulate_linear("w_out", "b_out", index, g, u, w)
        du = product(g, self.transposed("w_out", index))
        dw = dot(du, u) if want_dw else None
        bias = self.get("b_out", index)
        if dw is not None and bias is not None:
            dw += torch.dot(g.sum(0), bias)
        dqkv = self._attend_backward(du.mul_(w), qkv, out, of_groups)
        dqkv = self.round(self._prepare_backward_(dqkv, normed))
        self.accumulate_linear("w_qkv", "b_qkv", index, dqkv, x)
        return self.normalise_backward(product(dqkv, self.transposed("w_qkv", index)), y, saved, index), dw

    def _prepare_(self, qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor] | None:
        """q and k normed and rotated, and all three as operands, in place; to keep: what the norm's gradient needs."""
        qk, kept = self._qk(qkv), None
        rounds = self.operand_dtype != self.dtype
        if self.options.qk_norm:
            rstd = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().div_(qk.shape[-1]).add_(self.eps).rsqrt_()
            qk.mul_(rstd)
            kept = (rstd, qk.clone() if self.rotary is not None or rounds else qk) if keep else None
        if self.rotary is not None:
            rotate_(qk, *self.rotary)
        if rounds:
            qkv.copy_(qkv.to(self.operand_dtype))
        return kept

    def _prepare_backward_(self, dqkv: Tensor, kept: tuple[Tensor, Tensor] | None) -> Tensor:
        dqk = self._qk(dqkv)
        if self.rotary is not None:
            cos, sin = self.rotary
            rotate_(dqk, cos, -sin)
        if kept is not None:
            rstd, normed = kept
            dqk.addcmul_(normed, (dqk * normed).mean(-1, keepdim=True), value=-1).mul_(rstd)
        return dqkv

    def _qk(self, qkv: Tensor) -> Tensor:
        """The heads of q and k in (rows, 3D), as (rows, 2 heads, d)."""
        features = self.problem.features
        return qkv[:, : 2 * features].unflatten(1, (2 * self.options.num_heads, features // self.options.num_heads))

    def _heads(self, x: Tensor, group: Group) -> Tensor:
        """(rows, n D) as (n, sequences, heads, N, d)"""
        heads, features = self.options.num_heads, self.problem.features
        shape = group.sequences, -1, x.shape[1] // max(features, 1), heads, features // heads
        return x[group.rows].view(shape).permute(2, 0, 3, 1, 4)

    def _attend(self, qkv: Tensor) -> tuple[Tensor, list[Tensor]]:
        """u (rows, D), and what SDPA keeps of each group."""
        outs, kept = [], []
        for group in self.groups:
            q, k, v = self._heads(qkv, group)
            out, of_group = sdpa.forward(q, k, v, self.mask, self.options.causal, self.options.scale)
            outs.append(out.transpose(1, 2).reshape(-1, self.problem.features))
            kept.append(of_group)
        return outs[0] if len(outs) == 1 else torch.cat(outs), kept

    def _attend_backward(self, du: Tensor, qkv: Tensor, u: Tensor, kept: list[Tensor]) -> Tensor:
        dqkv = torch.empty_like(qkv)
        for group, of_group in zip(self.groups, kept, strict=True):
            (g,), (q, k, v), (out,) = (self._heads(x, group) for x in (du, qkv, u))
            found = sdpa.backward(g, q, k, v, out, of_group, self.mask, self.options.causal, self.options.scale)
            for into, gradient in zip(self._heads(dqkv, group), found, strict=True):
                into.copy_(gradient)
        return dqkv


def of_sequences(problem: Problem, sequences: slice, x: Tensor, dims: int) -> Tensor:
    """The part of these sequences of x, whose dimensions before the last `dims` broadcast to those of the batch."""
    batch, x = problem.h.shape[:-2], x[(None,) * (dims + 1 - x.dim())]
    own = x.shape[: x.dim() - dims]
    if all(size == 1 for size in own):
        return x.reshape(1, *x.shape[len(own) :])
    indices = torch.unravel_index(torch.arange(sequences.start, sequences.stop, device=x.device), batch)
    chosen = indices[len(batch) - len(own) :]
    return x[tuple(torch.zeros_like(i) if size == 1 else i for i, size in zip(chosen, own, strict=True))]


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns features i and R + i of every head by their angle, in place: x (rows, heads, d), cos and sin (rows, 1, R)."""
    width = cos.shape[-1]
    a, b = x[..., :width], x[..., width : 2 * width]
    turned = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)
    return x


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -torch.inf)
