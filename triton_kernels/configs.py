"""Tiles of the Triton kernels, by family of architectures, op, solver and width: data, read by the planner.

A tile is in this table when `tests/test_budgets.py` has compiled it, ahead of time, for its family: no spill, no serialised
wgmma, shared memory within the smallest limit of the family. `shared` is what the compiler reported. None has been timed.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """rows of a tile, hidden features of a chunk, warps of a program, stages of its pipeline, bytes of shared memory."""

    rows: int
    hidden: int
    warps: int
    stages: int
    shared: int


# Tiles of float32 scratch that a program of the backward kernel has: dL/dx0, dL/dz, dL/dS, g, dL/dx.
SLOTS = 5

# Gradients of scalars that an iteration has: p, q, v, w, e of every stage, then those of the two scales.
SCALES = 2

# Triton's interpreter has no registers to fit: tiles so small that a test of a few rows has several of them.
INTERPRETED = Tile(16, 16, 4, 1, 1 << 19)

# family -> (block, tiles of state that the solver needs) -> D padded to a power of two -> tile of the forward pass, for 16-bit
# operands. A width whose every tile tried spills registers is not there. Operands of 32 bits (tf32) take the tiles of twice the
# width.
FORWARD: dict[int, dict[tuple[str, int], dict[int, Tile]]] = {
    80: {
        ("mlp", 1): {
            16: Tile(128, 64, 8, 2, 16484),
            32: Tile(128, 64, 4, 2, 16384),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(128, 32, 8, 1, 65536),
            256: Tile(64, 64, 8, 1, 73728),
        },
        ("mlp", 2): {
            16: Tile(128, 64, 8, 2, 12356),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(64, 64, 8, 2, 57344),
        },
        ("mlp", 3): {
            16: Tile(128, 64, 8, 2, 12356),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(32, 64, 8, 2, 24576),
            128: Tile(64, 64, 8, 2, 57344),
        },
        ("gated mlp", 1): {
            16: Tile(128, 64, 8, 2, 18532),
            32: Tile(128, 64, 8, 3, 24576),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(64, 64, 8, 2, 73728),
            256: Tile(64, 32, 8, 2, 86016),
        },
        ("gated mlp", 2): {
            16: Tile(128, 64, 8, 2, 14404),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(128, 32, 8, 2, 32768),
            128: Tile(64, 64, 8, 2, 73728),
        },
        ("gated mlp", 3): {
            16: Tile(128, 64, 8, 2, 14404),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(32, 64, 4, 2, 32768),
            128: Tile(64, 32, 8, 2, 45056),
        },
        ("linear", 1): {
            16: Tile(128, 16, 8, 2, 12372),
            32: Tile(128, 32, 8, 2, 26772),
            64: Tile(128, 64, 8, 2, 57620),
            128: Tile(64, 128, 8, 2, 66068),
        },
        ("linear", 2): {
            16: Tile(128, 16, 4, 2, 8768),
            32: Tile(128, 32, 8, 2, 18560),
            64: Tile(128, 64, 8, 2, 41216),
            128: Tile(64, 128, 8, 1, 24576),
        },
        ("linear", 3): {
            16: Tile(128, 16, 8, 3, 8280),
            32: Tile(128, 32, 8, 2, 18560),
            64: Tile(128, 64, 8, 2, 41216),
            128: Tile(64, 128, 8, 1, 24576),
        },
    },
    90: {
        ("mlp", 1): {
            16: Tile(128, 64, 8, 2, 20580),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(128, 64, 8, 1, 65536),
            256: Tile(64, 32, 8, 2, 98304),
        },
        ("mlp", 2): {
            16: Tile(128, 64, 8, 2, 16452),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(64, 64, 8, 2, 81920),
        },
        ("mlp", 3): {
            16: Tile(128, 64, 8, 2, 16452),
            32: Tile(128, 64, 8, 2, 16384),
            64: Tile(128, 64, 8, 2, 32768),
            128: Tile(64, 16, 8, 2, 32768),
        },
        ("gated mlp", 1): {
            16: Tile(128, 64, 8, 2, 24676),
            32: Tile(128, 64, 8, 2, 24576),
            64: Tile(128, 64, 8, 2, 49152),
            128: Tile(128, 64, 8, 1, 65536),
            256: Tile(64, 16, 8, 2, 81920),
        },
        ("gated mlp", 2): {
            16: Tile(128, 64, 8, 2, 20548),
            32: Tile(128, 64, 8, 2, 24576),
            64: Tile(128, 64, 8, 1, 32768),
            128: Tile(64, 32, 8, 2, 65536),
        },
        ("gated mlp", 3): {
            16: Tile(128, 64, 8, 2, 20548),
            32: Tile(128, 64, 8, 2, 24576),
            64: Tile(128, 32, 8, 2, 32768),
            128: Tile(64, 32, 8, 2, 65536),
        },
        ("linear", 1): {
            16: Tile(128, 16, 8, 2, 12372),
            32: Tile(128, 32, 8, 2, 28820),
            64: Tile(128, 64, 8, 2, 65812),
            128: Tile(64, 128, 8, 2, 115220),
        },
        ("linear", 2): {
            16: Tile(128, 16, 8, 2, 8256),
            32: Tile(128, 32, 8, 2, 20608),
            64: Tile(128, 64, 8, 2, 49408),
            128: Tile(64, 128, 8, 2, 98816),
        },
        ("linear", 3): {
            16: Tile(128, 16, 8, 2, 8256),
            32: Tile(128, 32, 8, 2, 20608),
            64: Tile(128, 64, 8, 2, 49408),
            128: Tile(64, 128, 8, 2, 98816),
        },
    },
    100: {
        ("mlp", 1): {
            16: Tile(128, 32, 8, 2, 8288),
            32: Tile(128, 64, 8, 2, 24736),
            64: Tile(128, 32, 8, 2, 32864),
            128: Tile(128, 64, 8, 1, 49160),
            256: Tile(32, 64, 8, 2, 86016),
        },
        ("mlp", 2): {
            16: Tile(128, 32, 8, 2, 8288),
            32: Tile(128, 32, 8, 1, 10248),
            64: Tile(128, 64, 8, 2, 49312),
            128: Tile(64, 64, 8, 2, 82080),
        },
        ("mlp", 3): {
            16: Tile(128, 64, 8, 2, 14644),
            32: Tile(128, 64, 8, 3, 24776),
            64: Tile(128, 64, 8, 2, 49312),
            128: Tile(64, 64, 8, 1, 32776),
        },
        ("gated mlp", 1): {
            16: Tile(128, 64, 8, 2, 20900),
            32: Tile(128, 32, 8, 3, 20728),
            64: Tile(128, 64, 8, 1, 24584),
            128: Tile(128, 64, 8, 1, 49160),
            256: Tile(64, 64, 8, 1, 65544),
        },
        ("gated mlp", 2): {
            16: Tile(128, 64, 8, 2, 16788),
            32: Tile(128, 64, 8, 3, 33144),
            64: Tile(128, 64, 8, 2, 65840),
            128: Tile(64, 64, 8, 1, 32776),
        },
        ("gated mlp", 3): {
            16: Tile(128, 64, 8, 2, 16820),
            32: Tile(128, 64, 8, 2, 33072),
            64: Tile(128, 64, 8, 2, 65840),
            128: Tile(64, 64, 8, 1, 32776),
        },
        ("linear", 1): {
            16: Tile(128, 16, 8, 2, 12404),
            32: Tile(128, 32, 8, 2, 14548),
            64: Tile(128, 64, 8, 2, 33172),
            128: Tile(64, 128, 8, 1, 32776),
        },
        ("linear", 2): {
            16: Tile(128, 16, 4, 2, 4096),
            32: Tile(128, 32, 4, 2, 6336),
            64: Tile(128, 64, 8, 2, 16768),
            128: Tile(64, 128, 8, 2, 41728),
        },
        ("linear", 3): {
            16: Tile(128, 16, 8, 2, 8288),
            32: Tile(128, 32, 8, 2, 8192),
            64: Tile(128, 64, 8, 2, 16768),
            128: Tile(64, 128, 8, 2, 41728),
        },
    },
}

# family -> block -> D padded to a power of two -> tile of the backward pass, whatever the solver.
BACKWARD: dict[int, dict[str, dict[int, Tile]]] = {
    80: {
        "mlp": {
            16: Tile(128, 32, 8, 2, 18432),
            32: Tile(128, 16, 8, 2, 22528),
            64: Tile(32, 64, 8, 2, 32768),
            128: Tile(32, 64, 8, 1, 36864),
        },
        "gated mlp": {
            16: Tile(128, 32, 8, 2, 20480),
            32: Tile(128, 16, 8, 2, 24576),
            64: Tile(32, 64, 8, 2, 49152),
        },
        "linear": {
            16: Tile(64, 16, 4, 2, 4096),
            32: Tile(128, 32, 8, 2, 16384),
            64: Tile(32, 64, 8, 2, 12288),
            128: Tile(32, 128, 8, 2, 40960),
        },
    },
    90: {
        "mlp": {
            16: Tile(128, 32, 8, 2, 22528),
            32: Tile(128, 32, 8, 2, 36864),
            64: Tile(64, 64, 8, 2, 73728),
            128: Tile(64, 32, 8, 2, 86016),
        },
        "gated mlp": {
            16: Tile(128, 32, 8, 2, 26624),
            32: Tile(128, 32, 8, 2, 45056),
            64: Tile(64, 32, 8, 2, 61440),
            128: Tile(16, 64, 8, 2, 90112),
        },
        "linear": {
            16: Tile(128, 16, 8, 2, 8192),
            32: Tile(128, 32, 8, 2, 16384),
            64: Tile(64, 64, 8, 2, 16384),
            128: Tile(64, 128, 8, 2, 49152),
        },
    },
    100: {
        "mlp": {
            16: Tile(128, 32, 8, 2, 22640),
            32: Tile(128, 32, 8, 2, 36976),
            64: Tile(64, 64, 8, 1, 24584),
            128: Tile(32, 64, 8, 2, 65536),
        },
        "gated mlp": {
            16: Tile(128, 32, 8, 2, 25792),
            32: Tile(128, 32, 8, 2, 43200),
            64: Tile(64, 64, 8, 1, 24584),
            128: Tile(16, 64, 8, 2, 90112),
        },
        "linear": {
            16: Tile(128, 16, 8, 2, 8192),
            32: Tile(128, 32, 8, 2, 8192),
            64: Tile(64, 64, 8, 2, 8200),
            128: Tile(32, 128, 8, 2, 40960),
        },
    },
}


def family(arch: int) -> int:
    """The table's key for a compute capability (90 for 9.0): Hopper and Blackwell data-centre parts have their own."""
    return {9: 90, 10: 100}.get(arch // 10, 80)
