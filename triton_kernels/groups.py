"""Groups of whole sequences, each the rows of a program: how a call's rows are dealt, and its masks as kernels read them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from score_kernels.problem import Problem

from .sequences import Sequences

# Offsets of a mask's elements from the first of a group, which kernels compute in 32 bits.
LARGEST_OFFSET = 1 << 31


class Groups:
    """The groups of a call, of at most `rows` rows each: `bounds` are their first rows and the end.

    Sequences of one length come as many to a group as it has room for; packed ones in their order, while there is room.
    """

    def __init__(self, problem: Problem, rows: int) -> None:
        self.problem, self.rows = problem, rows
        self.batch, self.tokens = problem.h.shape[:-2], problem.h.shape[-2]
        self.total = problem.h.shape[:-1].numel()
        self.padding, self.mask = self._padding(), self._mask()
        cos, sin = (problem.inputs[name] for name in ("rotary_cos", "rotary_sin"))
        self.rotary = tuple(None if x is None else x.float().contiguous() for x in (cos, sin))
        packed, device = problem.inputs["cu_seqlens"], problem.h.device
        self.bounds: Sequence[int]
        if packed is None:
            step = rows // max(self.tokens, 1) * self.tokens
            # The last one may end behind the last row: `slices` and the kernel see to that.
            self.bounds = range(0, self.total + step, step) if self.total else range(1)
            self.starts = self.positions = problem.coefficients
        else:
            self.bounds = packed_bounds(problem.lengths * self.batch.numel(), rows)
            self.starts = torch.tensor(self.bounds, dtype=torch.int64, device=device)
            first = torch.repeat_interleave(packed[:-1].long(), packed.diff().long(), output_size=self.tokens)
            self.positions = (torch.arange(self.tokens, device=device) - first).int().repeat(self.batch.numel())

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    def slices(self, rows: int) -> Iterator[slice]:
        """The rows of launches of at most so many rows, in whole groups, at least one."""
        step = max(rows // self.rows, 1)
        for group in range(0, self.count, step):
            yield slice(self.bounds[group], min(self.bounds[min(group + step, self.count)], self.total))

    def of(self, chunk: slice, scratch: Tensor) -> Sequences:
        """What the kernels have to know of the rows of a launch."""
        problem, packed = self.problem, self.problem.inputs["cu_seqlens"] is not None
        first, last = bisect_left(self.bounds, chunk.start), bisect_left(self.bounds, chunk.stop)
        unused = problem.coefficients
        padding, mask = (unused if x is None else x for x in (self.padding, self.mask))
        padding_strides = (0, 0) if self.padding is None else self.padding.stride()
        mask_strides = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        cos, sin = (unused if x is None else x for x in self.rotary)
        return Sequences(
            scratch=scratch,
            tokens=1 if packed else self.tokens,
            groups=last - first,
            # At aligned addresses, whichever the launch: for others Triton compiles the kernel anew.
            bounds=self.starts[first : last + 1] - chunk.start if packed else unused,
            positions=self.positions[chunk].clone() if packed else unused,
            # A number of no use would do the same.
            first=0 if self.padding is None and self.mask is None else chunk.start // self.tokens,
            padding=padding,
            padding_sequence=padding_strides[0],
            padding_key=padding_strides[1],
            mask=mask,
            mask_sequence=mask_strides[0],
            mask_head=mask_strides[1],
            mask_row=mask_strides[2],
            mask_key=mask_strides[3],
            cos=cos,
            sin=sin,
            scale=problem.options.scale,
            eps=problem.options.eps,
        )

    def _padding(self) -> Tensor | None:
        """(sequences, N), 1 for padding."""
        padding = self.problem.inputs["key_padding_mask"]
        if padding is None:
            return None
        return self._within(self._of_sequences(padding, 1).expand(-1, self.tokens).view(torch.uint8))

    def _mask(self) -> Tensor | None:
        """(sequences, heads, N, N), of which 0 is False."""
        mask = self.problem.inputs["attn_mask"]
        if mask is None:
            return None
        mask = mask if mask.is_floating_point() else mask.view(torch.uint8)
        return self._within(self._of_sequences(mask, 3).expand(-1, self.problem.options.num_heads, self.tokens, self.tokens))

    def _within(self, mask: Tensor) -> Tensor:
        """A mask whose elements of a group are near each other: itself, if its strides allow it."""
        sizes = (self.rows // max(self.tokens, 1), *mask.shape[1:])
        reach = sum((size - 1) * stride for size, stride in zip(sizes, mask.stride(), strict=True))
        return mask if reach < LARGEST_OFFSET else mask.contiguous()

    def _of_sequences(self, x: Tensor, dims: int) -> Tensor:
        """x with one leading dimension, over the sequences, for those that broadcast to the batch's; a copy where need be."""
        x = x[(None,) * (len(self.batch) + dims - x.dim())]
        own = x.shape[-dims:]
        if x.shape[:-dims].numel() == 1:
            return x.reshape(1, *own).expand(self.batch.numel(), *own)
        return x.expand(*self.batch, *own).reshape(-1, *own)


def packed_bounds(lengths: Sequence[int], rows: int) -> list[int]:
    """Bounds of groups of sequences of these lengths, one after the other; empty ones go with their neighbours."""
    bounds, end = [0], 0
    for length in lengths:
        if end + length - bounds[-1] > rows:
            bounds.append(end)
        end += length
    return [*bounds, end] if end else bounds
