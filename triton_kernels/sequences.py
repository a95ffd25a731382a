"""Rows of whole sequences: which ones a program has, where their tiles wait, and which of them may attend to which."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequences(NamedTuple):
    """What the kernels of an op on sequences have to know beside a `Static`; tensors that are not given are never read.

    tokens: rows of a sequence, unless packed. groups: of sequences that share the rows of a program, in this launch. Packed:
    bounds (groups + 1), int64, the first rows of the groups, of those of the launch; positions (rows), int32, of the launch's
    rows in their sequences. padding: uint8, not 0 for padding; mask: uint8 or floating point; each with its strides, offsets in
    a group within 32 bits; first: the launch's first sequence among theirs. cos, sin (positions, angles), float32. eps: of
    QK-norm. scratch: `slots` float32 tiles (rows, columns) for each program.
    """

    scratch: Any
    tokens: int
    groups: int
    bounds: Any
    positions: Any
    first: int
    padding: Any
    padding_sequence: int
    padding_key: int
    mask: Any
    mask_sequence: int
    mask_head: int
    mask_row: int
    mask_key: int
    cos: Any
    sin: Any
    scale: float
    eps: float


@triton.jit
def span(group, rows, sequences, S: tl.constexpr):
    """The first row of a group of sequences, 64 bits wide, and how many rows it has."""
    if S.packed:
        first_row = tl.load(sequences.bounds + group)
        return first_row, (tl.load(sequences.bounds + group + 1) - first_row).to(tl.int32)
    else:
        step = S.rows // sequences.tokens * sequences.tokens
        first_row = tl.full((), 1, tl.int64) * group * step
        return first_row, tl.minimum(rows - first_row, step).to(tl.int32)


@triton.jit
def slot(sequences, index: tl.constexpr, dtype, S: tl.constexpr):
    """The address of a tile of the program's scratch, for elements of a dtype of up to 32 bits."""
    offset = (tl.program_id(0).to(tl.int64) * S.slots + index) * (S.rows * S.columns)
    return (sequences.scratch + offset).to(tl.pointer_type(dtype))


@triton.jit
def inside(row, column, rows: tl.constexpr, columns: tl.constexpr, S: tl.constexpr):
    """Offsets of rows and columns of a slot, from these on."""
    return (row + tl.arange(0, rows)[:, None]) * S.columns + column + tl.arange(0, columns)[None, :]


@triton.jit
def position_of(row, place, sequences, S: tl.constexpr):
    """Of rows of the group: their positions in their sequences, 0 for one that is not there, and these sequences' numbers."""
    first_row, left = place
    if S.packed:
        position = tl.load(sequences.positions + first_row + row, mask=row < left, other=0)
        return position, row - position
    else:
        number = row // sequences.tokens
        return tl.where(row < left, row - number * sequences.tokens, 0), number


@triton.jit
def attended(block, head, place, sequences, S: tl.constexpr):
    """(tile, rows): which keys the rows from `block` on attend to, and what the mask adds to their scores.

    It is taken less its largest value of a row, which changes no weight: a sentinel as -1e9 in all of a row would swallow the
    scores.
    """
    first_row, left = place
    row, key = block + tl.arange(0, S.tile), tl.arange(0, S.rows)
    position, number = position_of(row, place, sequences, S)
    key_position, key_number = position_of(key, place, sequences, S)
    # 64 bits wide: where the group's part of a mask begins. Offsets from there have 32.
    first = sequences.first + first_row // sequences.tokens
    seen = key < left
    if S.padding:
        at = key_number * sequences.padding_sequence + key_position * sequences.padding_key
        of_group = sequences.padding + first * sequences.padding_sequence
        seen &= tl.load(of_group + at.to(tl.int32), mask=seen, other=0) == 0
    allowed = (number[:, None] == key_number[None, :]) & seen[None, :]
    if S.causal:
        allowed &= row[:, None] >= key[None, :]
    added = 0.0
    if S.mask != "none":
        one = tl.full((), 1, tl.int64)
        of_group = sequences.mask + first * sequences.mask_sequence + one * head * sequences.mask_head
        at = (number * sequences.mask_sequence + position * sequences.mask_row).to(tl.int32)
        at = at[:, None] + (key_position * sequences.mask_key).to(tl.int32)[None, :]
        given = tl.load(of_group + at, mask=allowed, other=0)
        if S.mask == "boolean":
            allowed &= given != 0
        else:
            added = tl.where(allowed, given.to(tl.float32), float("-inf"))
            allowed = added != float("-inf")
            largest = tl.max(added, 1)
            added -= tl.where(largest == float("-inf"), 0.0, largest)[:, None]
    return allowed, added
