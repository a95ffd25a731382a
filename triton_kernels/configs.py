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
INTERPRETED = Tile(16, 16, 4, 1, 1 << 19)

# family -> (block, tiles of state that the solver needs) -> D padded to a power of two -> config, for 16-bit operands;
# a pass that spills registers in every tile tried is None. Operands of 32 bits (tf32) take the tiles of twice the width.
CONFIGS: dict[int, dict[tuple[str, int], dict[int, Config]]] = {
    80: {
        ("mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 4196), Tile(128, 32, 8, 2, 14336)),
            32: Config(Tile(128, 64, 8, 2, 8192), Tile(64, 32, 4, 2, 12288)),
            64: Config(Tile(128, 64, 8, 2, 16384), Tile(32, 64, 4, 2, 32768)),
            128: Config(Tile(64, 64, 8, 2, 57344), Tile(32, 64, 8, 2, 65536)),
        },
        ("mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 4100), Tile(64, 64, 4, 2, 8192)),
            32: Config(Tile(128, 64, 8, 2, 8192), Tile(128, 32, 8, 2, 20480)),
            64: Config(Tile(128, 64, 8, 2, 16384), Tile(32, 64, 4, 2, 32768)),
            128: Config(Tile(64, 64, 8, 2, 57344), Tile(16, 32, 4, 2, 32768)),
        },
        ("mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 4100), Tile(128, 32, 8, 2, 14336)),
            32: Config(Tile(128, 64, 8, 2, 8192), None),
            64: Config(Tile(32, 64, 4, 2, 24576), None),
            128: Config(Tile(64, 32, 8, 2, 36864), None),
        },
        ("gated mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 6244), Tile(128, 32, 8, 2, 16384)),
            32: Config(Tile(128, 64, 8, 2, 12288), Tile(128, 32, 8, 2, 24576)),
            64: Config(Tile(128, 64, 8, 2, 24576), Tile(16, 32, 4, 2, 24576)),
            128: Config(Tile(64, 64, 8, 2, 73728), Tile(16, 32, 4, 2, 49152)),
        },
        ("gated mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 6148), Tile(64, 32, 4, 2, 10240)),
            32: Config(Tile(128, 64, 8, 2, 12288), Tile(32, 32, 4, 2, 12288)),
            64: Config(Tile(64, 32, 8, 2, 12288), None),
            128: Config(Tile(64, 32, 8, 2, 45056), None),
        },
        ("gated mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 6148), Tile(64, 32, 4, 2, 10240)),
            32: Config(Tile(128, 64, 8, 2, 12288), None),
            64: Config(Tile(32, 64, 4, 2, 32768), None),
        },
        ("linear", 1): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 10388), Tile(64, 32, 4, 2, 8192)),
            64: Config(Tile(128, 64, 8, 2, 24852), Tile(64, 64, 4, 2, 16384)),
            128: Config(Tile(64, 128, 8, 2, 49684), Tile(32, 128, 8, 2, 40960)),
        },
        ("linear", 2): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 10240), Tile(64, 32, 4, 2, 8192)),
            64: Config(Tile(128, 64, 8, 2, 24576), Tile(32, 64, 8, 2, 12288)),
            128: Config(Tile(64, 128, 8, 2, 49152), Tile(32, 128, 8, 2, 40960)),
        },
        ("linear", 3): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(32, 16, 4, 2, 2624)),
            32: Config(Tile(128, 32, 8, 2, 10240), Tile(64, 32, 4, 2, 10368)),
            64: Config(Tile(128, 64, 8, 2, 24576), Tile(32, 64, 8, 2, 16640)),
        },
    },
    90: {
        ("mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 8292), Tile(128, 32, 8, 2, 18432)),
            32: Config(Tile(128, 64, 8, 2, 16384), Tile(128, 64, 8, 2, 49152)),
            64: Config(Tile(128, 64, 8, 2, 32768), Tile(64, 32, 8, 2, 45056)),
            128: Config(Tile(128, 64, 8, 1, 32768), Tile(32, 64, 4, 1, 36864)),
        },
        ("mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 4100), Tile(128, 64, 8, 2, 16384)),
            32: Config(Tile(128, 64, 8, 2, 16384), Tile(128, 32, 8, 2, 28672)),
            64: Config(Tile(128, 64, 8, 2, 32768), Tile(64, 32, 8, 2, 45056)),
            128: Config(Tile(64, 64, 8, 2, 81920), Tile(32, 64, 8, 2, 65536)),
        },
        ("mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 4100), Tile(128, 32, 8, 2, 18432)),
            32: Config(Tile(128, 64, 8, 2, 16384), None),
            64: Config(Tile(128, 64, 8, 2, 32768), None),
        },
        ("gated mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 12388), Tile(128, 32, 8, 2, 22528)),
            32: Config(Tile(128, 64, 8, 2, 24576), Tile(128, 32, 8, 2, 36864)),
            64: Config(Tile(128, 64, 8, 2, 49152), Tile(64, 16, 8, 2, 40960)),
            128: Config(Tile(128, 64, 8, 1, 32768), None),
        },
        ("gated mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 6148), Tile(64, 32, 4, 2, 16384)),
            32: Config(Tile(128, 64, 8, 2, 24576), Tile(64, 16, 4, 2, 16384)),
            64: Config(Tile(64, 16, 4, 2, 12288), None),
            128: Config(Tile(64, 32, 8, 2, 65536), None),
        },
        ("gated mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 6148), Tile(64, 32, 4, 2, 16384)),
            32: Config(Tile(128, 64, 8, 2, 24576), Tile(64, 32, 8, 2, 32768)),
            64: Config(Tile(128, 32, 8, 2, 24576), None),
        },
        ("linear", 1): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 8192), Tile(64, 32, 4, 2, 8192)),
            64: Config(Tile(128, 64, 8, 2, 16660), Tile(64, 64, 8, 2, 16384)),
            128: Config(Tile(64, 128, 8, 2, 82452), Tile(32, 128, 8, 2, 40960)),
        },
        ("linear", 2): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 8192), Tile(64, 32, 4, 2, 8192)),
            64: Config(Tile(128, 64, 8, 2, 16384), Tile(64, 64, 8, 2, 16384)),
            128: Config(Tile(64, 128, 8, 2, 49152), Tile(32, 128, 8, 2, 40960)),
        },
        ("linear", 3): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 5184)),
            32: Config(Tile(128, 32, 8, 2, 8192), Tile(64, 32, 8, 2, 12416)),
            64: Config(Tile(128, 64, 8, 2, 16384), Tile(64, 64, 8, 2, 33024)),
            128: Config(Tile(32, 128, 4, 2, 40960), Tile(32, 128, 8, 2, 41472)),
        },
    },
    100: {
        ("mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 14628), Tile(128, 32, 8, 2, 22640)),
            32: Config(Tile(128, 64, 8, 2, 24736), Tile(128, 16, 8, 2, 26704)),
            64: Config(Tile(64, 64, 8, 2, 41120), Tile(32, 64, 4, 1, 20480)),
            128: Config(Tile(128, 64, 8, 1, 49160), None),
        },
        ("mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 10516), Tile(128, 64, 8, 2, 8192)),
            32: Config(Tile(128, 64, 8, 2, 24736), Tile(128, 32, 8, 2, 36976)),
            64: Config(Tile(128, 64, 8, 2, 49312), Tile(32, 64, 8, 2, 32768)),
            128: Config(Tile(64, 64, 8, 2, 82080), Tile(32, 64, 8, 2, 65536)),
        },
        ("mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 10548), Tile(128, 32, 8, 2, 22640)),
            32: Config(Tile(128, 64, 8, 2, 24736), Tile(64, 16, 8, 1, 10240)),
            64: Config(Tile(128, 64, 8, 2, 49312), Tile(32, 64, 8, 2, 32768)),
            128: Config(Tile(64, 32, 8, 2, 49248), Tile(32, 64, 8, 2, 65536)),
        },
        ("gated mlp", 1): {
            16: Config(Tile(128, 64, 8, 2, 16804), Tile(128, 32, 8, 2, 25792)),
            32: Config(Tile(128, 64, 8, 2, 33072), Tile(128, 32, 8, 2, 43200)),
            64: Config(Tile(128, 64, 8, 1, 24584), Tile(32, 32, 4, 2, 28672)),
            128: Config(Tile(128, 64, 8, 1, 49160), None),
        },
        ("gated mlp", 2): {
            16: Config(Tile(128, 64, 8, 2, 12692), Tile(64, 32, 4, 2, 17600)),
            32: Config(Tile(128, 64, 8, 2, 33072), Tile(32, 32, 4, 2, 12288)),
            64: Config(Tile(128, 64, 8, 2, 65840), Tile(32, 32, 4, 2, 28672)),
            128: Config(Tile(64, 32, 8, 2, 65712), None),
        },
        ("gated mlp", 3): {
            16: Config(Tile(128, 64, 8, 2, 12724), Tile(64, 32, 8, 2, 17600)),
            32: Config(Tile(128, 64, 8, 2, 33072), Tile(64, 32, 8, 2, 30912)),
            64: Config(Tile(128, 32, 8, 2, 41136), None),
            128: Config(Tile(32, 64, 4, 2, 61440), None),
        },
        ("linear", 1): {
            16: Config(Tile(128, 16, 8, 2, 5236), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 11476), Tile(64, 32, 4, 2, 4096)),
            64: Config(Tile(128, 64, 8, 2, 26004), Tile(32, 64, 8, 2, 12288)),
        },
        ("linear", 2): {
            16: Config(Tile(128, 16, 8, 2, 4096), Tile(64, 16, 4, 2, 4096)),
            32: Config(Tile(128, 32, 8, 2, 8192), Tile(64, 32, 4, 2, 4096)),
            64: Config(Tile(128, 64, 8, 2, 9600), Tile(32, 64, 8, 2, 12288)),
        },
        ("linear", 3): {
            16: Config(Tile(128, 16, 8, 2, 4096), None),
            32: Config(Tile(128, 32, 8, 2, 8192), Tile(64, 32, 4, 2, 4288)),
            64: Config(Tile(128, 64, 8, 2, 9600), Tile(64, 64, 8, 2, 12672)),
        },
    },
}


def family(arch: int) -> int:
    """The table's key for a compute capability (90 for 9.0): Hopper and Blackwell data-centre parts have their own."""
    return {9: 90, 10: 100}.get(arch // 10, 80)
