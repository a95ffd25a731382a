"""Tiles of the transformer kernels, by family of architectures, rows, width and features of a head: data, read by the planner.

They are as those of attention in `attention_configs.py`, found and compiled by the same script, with norms before the halves
and behind them. None has been timed.
"""

from __future__ import annotations

from .attention_configs import SequenceTile, Table

# Of the forward pass.
FORWARD: Table = {
    80: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 32768, 64),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 16),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 81920, 64),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 45056, 64),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728, 64),
        (128, 16, 16): SequenceTile(128, 32, 64, 8, 2, 53248, 64),
        (128, 64, 16): SequenceTile(128, 64, 16, 8, 2, 43008, 64),
        (128, 64, 64): SequenceTile(128, 32, 64, 8, 2, 53248, 64),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 128, 64): None,
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112, 64),
    },
    90: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 1, 32768, 64),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 32768, 32),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 1, 32768, 32),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 45056, 64),
        (64, 256, 64): SequenceTile(64, 32, 64, 8, 1, 53248, 64),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728, 64),
        (128, 64, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728, 64),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 1, 73728, 64),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 64): SequenceTile(128, 32, 64, 8, 1, 53248, 64),
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112, 64),
    },
    100: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 41120, 64),
        (64, 128, 16): SequenceTile(64, 32, 16, 8, 2, 45056, 64),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (64, 128, 64): SequenceTile(64, 32, 64, 8, 1, 53248, 64),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 45056, 64),
        (64, 256, 64): SequenceTile(64, 32, 64, 8, 1, 53248, 64),
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728, 64),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728, 64),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 128, 64): SequenceTile(128, 32, 64, 8, 1, 53248, 64),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112, 64),
    },
}

# The same for the backward pass.
BACKWARD: Table = {
    80: {},
    90: {
        (64, 64, 32): SequenceTile(64, 16, 32, 8, 1, 22528, 64),
        (64, 128, 16): SequenceTile(64, 32, 16, 8, 1, 26624, 32),
        (64, 128, 32): SequenceTile(64, 16, 32, 8, 1, 26624, 64),
        (64, 128, 64): SequenceTile(64, 16, 64, 8, 1, 40960, 64),
        (128, 64, 16): SequenceTile(128, 16, 32, 8, 1, 45056, 64),
        (128, 64, 64): SequenceTile(128, 16, 64, 8, 1, 81920, 16),
        (128, 128, 16): None,
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 45056, 64),
        (128, 128, 64): SequenceTile(128, 16, 64, 8, 1, 81920, 64),
    },
    100: {},
}

# The same where the mlp is gated.
GATED_FORWARD: Table = {
    80: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 32768, 32),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 81920, 64),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 61440, 64),
        (64, 256, 32): None,
        (64, 256, 64): SequenceTile(64, 16, 64, 8, 1, 43008, 64),
        (64, 256, 128): SequenceTile(64, 16, 128, 8, 1, 69632, 64),
        (128, 64, 16): SequenceTile(128, 64, 16, 8, 2, 43008, 32),
        (128, 64, 64): SequenceTile(128, 32, 64, 8, 2, 53248, 64),
        (128, 128, 32): SequenceTile(128, 32, 32, 8, 1, 34816, 64),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 2, 81920, 64),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 64): None,
        (128, 256, 128): SequenceTile(128, 16, 128, 8, 1, 77824, 64),
    },
    90: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 1, 32768, 64),
        (64, 128, 32): SequenceTile(64, 64, 32, 8, 1, 32768, 32),
        (64, 128, 64): SequenceTile(64, 64, 64, 8, 2, 131072, 64),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 61440, 64),
        (64, 256, 128): SequenceTile(64, 16, 128, 8, 1, 69632, 32),
        (128, 16, 16): SequenceTile(128, 64, 16, 8, 2, 43008, 64),
        (128, 32, 16): SequenceTile(128, 32, 16, 8, 2, 25600, 64),
        (128, 64, 16): SequenceTile(128, 64, 16, 4, 1, 43008, 64),
        (128, 64, 32): SequenceTile(128, 64, 32, 4, 2, 53248, 16),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728, 64),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 25600, 64),
        (128, 128, 64): SequenceTile(128, 64, 64, 8, 1, 73728, 64),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 128): SequenceTile(128, 16, 128, 8, 1, 77824, 32),
    },
    100: {
        (64, 64, 32): SequenceTile(64, 64, 32, 8, 1, 24576, 32),
        (64, 64, 64): SequenceTile(64, 64, 64, 8, 2, 57648, 64),
        (64, 128, 16): SequenceTile(64, 32, 16, 8, 2, 61440, 64),
        (64, 128, 32): SequenceTile(64, 32, 32, 8, 1, 18432, 32),
        (64, 128, 64): SequenceTile(64, 32, 64, 8, 1, 28672, 64),
        (64, 128, 128): SequenceTile(64, 32, 128, 8, 2, 61440, 64),
        (64, 256, 64): None,
        (64, 256, 128): SequenceTile(64, 32, 128, 8, 1, 73728, 32),
        (128, 64, 64): SequenceTile(128, 64, 64, 8, 2, 73728, 64),
        (128, 128, 32): SequenceTile(128, 16, 32, 8, 1, 25600, 64),
        (128, 128, 64): SequenceTile(128, 32, 64, 8, 1, 53248, 64),
        (128, 128, 128): SequenceTile(128, 32, 128, 8, 2, 90112, 64),
        (128, 256, 64): None,
        (128, 256, 128): SequenceTile(128, 32, 128, 8, 1, 90112, 32),
    },
}

GATED_BACKWARD: Table = {
    80: {},
    90: {
        (64, 64, 32): SequenceTile(64, 16, 32, 8, 1, 22528, 32),
        (64, 64, 64): SequenceTile(64, 16, 64, 8, 1, 40960, 32),
        (128, 64, 16): SequenceTile(128, 16, 32, 8, 1, 45056, 32),
        (128, 64, 64): SequenceTile(128, 16, 64, 8, 1, 81920, 16),
    },
    100: {},
}
