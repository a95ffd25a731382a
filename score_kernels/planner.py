"""Which backend runs a call, and how: a pure function of the call's shape and the machine, so it is tested anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

BACKENDS = ("reference", "blas")

# Backends that the design has and this version does not: what `explain` and errors say of them.
MISSING = {
    "cuda": "the CUDA kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
}

# Working set of a tile on a CPU: within the shared cache, and large enough that starting the threads of a call costs little.
CPU_TILE_BYTES = 8 << 20
CPU_ROWS = (256, 8192)
GPU_ROWS = (1024, 1 << 20)


@dataclass(frozen=True)
class Plan:
    """How one call runs. `skipped` holds (backend, reason) for every faster backend that was not chosen."""

    op: str
    backend: str
    device: str
    dtype: str
    iterations: int
    rows: int
    backward_rows: int
    interval: int
    scratch_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [
            ("op", self.op),
            ("backend", self.backend),
            ("device", f"{self.device}, {self.dtype}"),
        ]
        if self.backend == "blas":
            walk = "once" if self.interval == 1 else f"twice, a state kept every {self.interval} iterations"
            lines += [
                ("forward", f"tiles of {self.rows} rows, {self.iterations} iterations each"),
                ("backward", f"tiles of {self.backward_rows} rows, trajectory recomputed {walk}"),
                ("scratch", f"at most {self.scratch_bytes / 2**20:.1f} MiB of states in backward"),
            ]
        lines += [(f"not {name}", reason) for name, reason in self.skipped]
        width = max(len(key) for key, _ in lines)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def plan(
    op: str,
    *,
    features: int,
    hidden: int,
    gated: bool,
    iterations: int,
    dtype: str,
    itemsize: int,
    device: str,
    scratch_budget: int,
    backend: str = "auto",
) -> Plan:
    """Plans one call.

    features, hidden: D and H. iterations: those that gradients reach. dtype: the input's, for display.
    itemsize: bytes of an element of state (4, or 8 for float64). device: "cpu", "cuda" ... scratch_budget: bytes.
    Raises ValueError for a backend that is unknown or not part of this version.
    """
    if backend in MISSING:
        raise ValueError(f"backend={backend!r}: {MISSING[backend]}; available: {', '.join(BACKENDS)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    skipped = tuple(MISSING.items()) if backend == "auto" and device != "cpu" else ()
    chosen = "blas" if backend == "auto" else backend

    state = features * itemsize
    rows = _rows(state, hidden * (2 if gated else 1) * itemsize, device, scratch_budget)
    backward_rows, interval = _checkpoints(rows, iterations, scratch_budget // state)
    scratch = scratch_tiles(iterations, interval) * backward_rows * state
    return Plan(op, chosen, device, dtype, iterations, rows, backward_rows, interval, scratch, skipped)


def scratch_tiles(iterations: int, interval: int) -> int:
    """States that backward keeps for one tile: the checkpoints, and the states between two of them."""
    return math.ceil(iterations / interval) + interval - 1


def _rows(state: int, hidden: int, device: str, budget: int) -> int:
    """Rows of a tile, a power of two: y, norm(y) and twice the hidden features within the cache (the budget on a GPU)."""
    (low, high), size = (CPU_ROWS, CPU_TILE_BYTES) if device == "cpu" else (GPU_ROWS, budget)
    fit = size // (2 * state + 2 * hidden)
    return min(max(_power_of_two(fit), low), high)


def _power_of_two(limit: int) -> int:
    """The largest power of two within the limit, at least 1."""
    return 1 << max(limit, 1).bit_length() - 1


def _checkpoints(rows: int, iterations: int, budget: int) -> tuple[int, int]:
    """Rows and checkpoint interval of backward, which may keep 2 ceil(sqrt(T)) forward tiles of state, `budget` rows in all.

    Every state of a smaller tile costs one walk through the iterations; where that tile would be too small to multiply
    well, every sqrt(T)-th state of a larger one costs a second walk.
    """
    allowed = 2 * math.isqrt(max(iterations - 1, 0)) + 2
    for interval in (1, math.isqrt(max(iterations - 1, 0)) + 1):
        kept = max(scratch_tiles(iterations, interval), 1)
        fit = min(rows * min(allowed / kept, 1), budget / kept)
        if fit >= CPU_ROWS[0]:
            break
    return _power_of_two(int(fit)), interval
