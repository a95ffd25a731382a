"""Tiles of the attention kernels, by family of architectures, rows, width and features of a head: data, read by the planner.

A place without an entry takes the tile of the next wider one. A tile is in this table when
`python tests/test_attention_budgets.py` has compiled it as `configs.py` tells, for all places that take it, with every mask and
option at once and with the solver that has the most state; None is where that of the next wider place does not fit. Packed
sequences are not among them: on sm_90 some of these tiles spill up to 84 bytes then. Nor is tf32: some spill up to 60 bytes
there and take up to 4 KiB of shared memory more. None has been timed.
"""

from __future__ import annotations

from typing import NamedTuple


class SequenceTile(NamedTuple):
    """rows of a group of sequences, how many of them at a time, features of a head, padded; warps of a program, stages of its
    pipeline, bytes of shared memory; of a transformer the hidden features of a chunk."""

    rows: int
    tile: int
    features: int
    warps: int
    stages: int
    shared: int
    hidden: int = 0

    def __str__(self) -> str:
        shape = f"groups of {self.rows} rows, {self.tile} at a time, heads of {self.features} features"
        shape += f", {self.hidden} hidden features" if self.hidden else ""
        return f"{shape}, {self.warps} warps, {self.shared / 1024:.0f} KiB shared"


# family -> (rows of a group, D padded to a power of two, features of a head likewise) -> tile.
Table = dict[int, dict[tuple[int, int, int], SequenceTile | None]]

# Tiles (rows, columns) of float32 scratch that a program has; `attention.py`, `iterate_sequences.py` name what waits there.
FORWARD_SLOTS = 6
BACKWARD_SLOTS = 15

# The longest sequence, and the longest of which several share a group.
LONGEST = 128
SHORT = 32

# Triton's interpreter has no registers to fit: tiles so small that a sequence has several of them.
INTERPRETED_TILE = 16

# Of the forward pass, for 16-bit operands and any solver. Operands of 32 bits (tf32) take the tiles of twice the width and of
# twice the features.
FORWARD: Table = {
    80: {
        (64, 64, 16): SequenceTile(64, 64, 16, 8, 2, 20480),
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 2, 28672),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 32768),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 2, 49152),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 81920),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 45056),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728),
        (128, 64, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 64, 64): SequenceTile(128, 32, 64, 8, 2, 53248),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 2, 81920),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112),
        (128, 256, 64): None,
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112),
    },
    90: {
        (64, 64, 16): SequenceTile(64, 64, 16, 8, 2, 24576),
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 2, 40960),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 32768),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 2, 73728),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 131072),
        (64, 128, 128): SequenceTile(64, 64, 128, 8, 2, 65536),
        (64, 256, 64): SequenceTile(64, 32, 64, 8, 1, 49152),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728),
        (128, 64, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 2, 131072),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112),
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112),
    },
    100: {
        (64, 64, 16): SequenceTile(64, 64, 16, 8, 2, 24720),
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 2, 41200),
        (64, 64, 64): SequenceTile(64, 64, 64, 4, 2, 24576),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 2, 73968),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 123312),
        (64, 128, 128): SequenceTile(64, 64, 128, 8, 2, 53248),
        (64, 256, 64): SequenceTile(64, 32, 64, 8, 1, 49152),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728),
        (128, 64, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 2, 123312),
        (128, 128, 128): SequenceTile(128, 64, 128, 8, 2, 98304),
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112),
    },
}

# The same for the backward pass.
BACKWARD: Table = {
    80: {
        (64, 64, 32): SequenceTile(64, 16, 32, 8, 1, 20480),
    },
    90: {
        (64, 64, 16): SequenceTile(64, 16, 16, 8, 1, 13312),
        (64, 64, 32): SequenceTile(64, 16, 32, 4, 1, 22528),
        (64, 128, 32): SequenceTile(64, 16, 32, 4, 1, 22528),
        (64, 128, 64): SequenceTile(64, 16, 64, 8, 1, 40960),
        (64, 256, 32): SequenceTile(64, 16, 32, 8, 1, 24576),
        (128, 64, 32): SequenceTile(128, 16, 32, 8, 1, 45056),
        (128, 64, 64): SequenceTile(128, 16, 64, 8, 1, 81920),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 45056),
        (128, 128, 64): SequenceTile(128, 32, 64, 8, 1, 98304),
        (128, 256, 32): SequenceTile(128, 16, 32, 8, 1, 45056),
    },
    100: {
        (64, 64, 16): SequenceTile(64, 32, 16, 8, 1, 18432),
        (64, 64, 32): SequenceTile(64, 16, 32, 4, 1, 22528),
        (64, 64, 64): SequenceTile(64, 32, 64, 8, 1, 49152),
        (64, 128, 64): SequenceTile(64, 16, 64, 8, 1, 40960),
        (128, 64, 64): SequenceTile(128, 32, 64, 8, 1, 98304),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 45056),
        (128, 128, 64): SequenceTile(128, 16, 64, 8, 1, 81920),
    },
}


def group_rows(tokens: int) -> int:
    """Rows of a group for sequences of so many rows at most: short ones share it."""
    return 64 if tokens <= 64 else LONGEST


def backward_slots(tile: SequenceTile) -> int:
    """A transformer keeps the gradient of attention's result beside attention's own."""
    return BACKWARD_SLOTS + (tile.hidden > 0)


def interpreted(tokens: int, features: int, transformer: bool) -> SequenceTile:
    """What the interpreter runs, for heads of so many features."""
    rows = max(INTERPRETED_TILE, 1 << (tokens - 1).bit_length())
    hidden = INTERPRETED_TILE if transformer else 0
    return SequenceTile(rows, INTERPRETED_TILE, max(16, 1 << (features - 1).bit_length()), 4, 1, 1 << 19, hidden)
