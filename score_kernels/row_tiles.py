"""Rows of the tiles that `blas` computes on, and what its backward keeps of them: for the planner, as pure arithmetic."""

from __future__ import annotations

import math

# Working set of a tile on a CPU: within the shared cache, and large enough that starting the threads of a call costs little.
CPU_TILE_BYTES = 8 << 20
CPU_ROWS = (256, 8192)
GPU_ROWS = (1024, 1 << 20)


def forward_rows(state: int, hidden: int, tokens: int, device: str, budget: int) -> int:
    """Rows of a tile: y, norm(y) and twice the hidden features within the cache (the budget on a GPU).

    state, hidden: bytes of a row. A power of two, or the whole sequences of `tokens` rows that it has room for.
    """
    (low, high), size = (CPU_ROWS, CPU_TILE_BYTES) if device == "cpu" else (GPU_ROWS, budget)
    fit = size // (2 * state + 2 * hidden)
    return _whole(min(max(power_of_two(fit), low), high), tokens)


def checkpoints(rows: int, iterations: int, state: int, kept: int, budget: int, tokens: int) -> tuple[int, int]:
    """Rows and checkpoint interval of backward, which may keep 2 ceil(sqrt(T)) forward tiles of states, `budget` bytes in all.

    Every state of a smaller tile costs one walk through the iterations; where that tile would be too small to multiply
    well, every sqrt(T)-th state of a larger one costs a second walk. A block that keeps more than states has half of a forward
    tile's rows, whatever T, for its working set is larger; within the bytes.
    """
    allowed = 2 * math.isqrt(max(iterations - 1, 0)) + 2
    for interval in (1, math.isqrt(max(iterations - 1, 0)) + 1):
        states = max(scratch_tiles(iterations, interval), 1)
        row = max(scratch_row(iterations, interval, state, kept), state)
        fit = min(max(rows // 2, 1) if kept else rows * min(allowed / states, 1), budget / row)
        if fit >= max(CPU_ROWS[0], tokens):
            break
    return _whole(power_of_two(int(fit)), tokens), interval


def scratch_tiles(iterations: int, interval: int) -> int:
    """States that backward keeps for one tile: the checkpoints, and the states between two of them."""
    return math.ceil(iterations / interval) + interval - 1


def scratch_row(iterations: int, interval: int, state: int, kept: int) -> int:
    """Bytes of backward's scratch for one row: its states, and what is kept beside those that a walk goes on from."""
    walked = iterations if interval == 1 else min(interval, iterations)
    return scratch_tiles(iterations, interval) * state + max(walked - 1, 0) * kept


def _whole(rows: int, tokens: int) -> int:
    """As many whole sequences as the rows have room for, at least one."""
    return max(rows // tokens, 1) * tokens


def power_of_two(limit: int) -> int:
    """The largest power of two within the limit, at least 1."""
    return 1 << max(limit, 1).bit_length() - 1
