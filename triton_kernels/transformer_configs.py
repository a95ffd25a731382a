"""Tiles of the transformer kernels, by family of architectures, rows, width and features of a head: data, read by the planner.

They are as those of attention in `attention_configs.py`, found and compiled by the same script, with norms before the halves
and behind them. None has been timed.
"""

from __future__ import annotations

from .attention_configs import SequenceTile

Table = dict[int, dict[tuple[int, int, int], SequenceTile]]

# family -> (rows of a group, D padded to a power of two, features of a head likewise) -> tile of the forward pass.
FORWARD: Table = {
    80: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 16384, 32),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 16),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
    },
    90: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 16384, 32),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 32768, 32),
        (128, 64, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
    },
    100: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
    },
}

# The same for the backward pass.
BACKWARD: Table = {
    80: {},
    90: {
        (64, 64, 32): SequenceTile(64, 16, 32, 8, 1, 22528, 64),
        (64, 128, 32): SequenceTile(64, 16, 32, 8, 1, 26624, 64),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 45056, 64),
    },
    100: {},
}

# The same where the mlp is gated.
GATED_FORWARD: Table = {
    80: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 16384, 32),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
    },
    90: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 16384, 32),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 32768, 32),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 25600, 64),
    },
    100: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 25600, 64),
    },
}

GATED_BACKWARD: Table = {
    80: {},
    90: {
        (64, 64, 32): SequenceTile(64, 16, 32, 8, 1, 22528, 32),
    },
    100: {},
}
