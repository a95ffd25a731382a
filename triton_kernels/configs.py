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


class Config(NamedTuple):
    """Tiles of the two passes; None: that pass does not fit."""

    forward: Tile | None
    backward: Tile | None


# Triton's interpreter has no registers to fit: tiles so small that a test of a few rows has several of them.
INTERPRETED = Tile(16, 16, 4, 1, 0)

# family -> (op, tiles of state that the solver needs) -> D padded to a power of two -> config
CONFIGS: dict[int, dict[tuple[str, int], dict[int, Config]]] = {
    90: {
        ("mlp", 1): {
            16: Config(Tile(64, 64, 4, 2, 32900), Tile(64, 32, 8, 2, 49152)),
            32: Config(Tile(64, 64, 4, 2, 32900), Tile(64, 32, 8, 2, 49152)),
            64: Config(Tile(64, 64, 4, 2, 32900), Tile(64, 32, 8, 2, 49152)),
            128: Config(Tile(128, 64, 8, 2, 65536), None),
        },
        ("linear", 1): {
            64: Config(Tile(64, 64, 4, 2, 32900), None),
            128: Config(Tile(128, 64, 8, 2, 65792), None),
        },
    },
}


def family(arch: int) -> int:
    """The table's key for a compute capability (90 for 9.0): Hopper and Blackwell data-centre parts have their own."""
    return {9: 90, 10: 100}.get(arch // 10, 80)
