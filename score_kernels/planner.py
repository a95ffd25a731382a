"""Which backend runs a call, and how: a pure function of the call's shape and the machine, so it is tested anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .triton_kernels.configs import BACKWARD, FORWARD, INTERPRETED, SCALES, SLOTS, Tile, family

BACKENDS = ("reference", "blas", "triton")

# Backends that the design has and this version does not: what `explain` and errors say of them.
MISSING = {"cuda": "no op calls the CUDA kernels yet"}

# What the name of a backend that was not chosen for backward alone ends with.
IN_BACKWARD = " in backward"

# Working set of a tile on a CPU: within the shared cache, and large enough that starting the threads of a call costs little.
CPU_TILE_BYTES = 8 << 20
CPU_ROWS = (256, 8192)
GPU_ROWS = (1024, 1 << 20)

# Rows and columns of a weight gradient that one program of a library's product has.
PRODUCT_TILE = 128


@dataclass(frozen=True)
class Machine:
    """What a call runs on.

    device: "cpu", "cuda" or "hip", else torch's device type. arch: compute capability, 90 for 9.0. multiprocessors,
    shared_memory: of the device, the latter in bytes for one program. tf32: torch may use it for float32 products.
    triton: why it cannot run here, or None.
    verified: the architectures on which the kernels have been compared with float64 on hardware.
    """

    device: str = "cpu"
    arch: int = 0
    multiprocessors: int = 0
    shared_memory: int = 0
    tf32: bool = False
    triton: str | None = "it needs a GPU"
    verified: frozenset[int] = frozenset()


# Architectures with committed hardware results, which `auto` needs to choose a kernel. None yet.
VERIFIED: frozenset[int] = frozenset()

# What Triton's interpreter is planned as.
INTERPRETER = Machine("cpu", multiprocessors=2, shared_memory=1 << 20, tf32=True, triton=None)


@dataclass(frozen=True)
class Plan:
    """How one call runs. `skipped` holds (backend, reason) for every faster backend that was not chosen.

    backend, backward: who runs the two passes. blas: rows, backward_rows of a tile, a state kept every `interval` iterations.
    triton: the tiles, `programs` of backward at a time, `chunk_rows` for each of its launches, `parts` of a product over rows.
    """

    op: str
    backend: str
    backward: str
    device: str
    dtype: str
    iterations: int
    rows: int
    backward_rows: int
    interval: int
    scratch_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()
    forward_tile: Tile | None = None
    backward_tile: Tile | None = None
    programs: int = 0
    chunk_rows: int = 0
    parts: int = 1

    def __str__(self) -> str:
        lines = [("op", self.op), ("backend", self.backend), ("device", f"{self.device}, {self.dtype}")]
        walk = "once" if self.interval == 1 else f"twice, a state kept every {self.interval} iterations"
        scratch = ("scratch", f"at most {self.scratch_bytes / 2**20:.1f} MiB in backward")
        if self.forward_tile is not None:
            lines.append(("forward", f"one launch, tiles of {_describe(self.forward_tile)}, {self.iterations} iterations each"))
        elif self.backend == "blas":
            lines.append(("forward", f"tiles of {self.rows} rows, {self.iterations} iterations each"))
        if self.backward_tile is not None:
            tiles = f"tiles of {_describe(self.backward_tile)}, {self.programs} programs"
            lines += [("backward", f"{self.chunk_rows} rows a launch, {tiles}"), scratch]
        elif self.backward == "blas":
            lines += [("backward", f"tiles of {self.backward_rows} rows, trajectory recomputed {walk}"), scratch]
        lines += [(f"not {name}", reason) for name, reason in self.skipped]
        width = max(len(key) for key, _ in lines)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


def _describe(tile: Tile) -> str:
    return f"{tile.rows} rows x {tile.hidden} hidden features, {tile.warps} warps, {tile.shared / 1024:.0f} KiB shared"


def plan(
    op: str,
    *,
    features: int,
    hidden: int,
    gated: bool,
    iterations: int,
    dtype: str,
    itemsize: int,
    machine: Machine,
    scratch_budget: int,
    state_tiles: int = 1,
    stages: int = 1,
    backend: str = "auto",
) -> Plan:
    """Plans one call.

    features, hidden: D and H. iterations: those that gradients reach. dtype: the input's, as "bfloat16".
    itemsize: bytes of an element of state (4, or 8 for float64). scratch_budget: bytes. state_tiles, stages: of the solver.
    Raises ValueError for a backend that is unknown, not part of this version, or named and unable to run the call.
    """
    if backend in MISSING:
        raise ValueError(f"backend={backend!r}: {MISSING[backend]}; available: {', '.join(BACKENDS)}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    state = features * itemsize
    rows = _rows(state, hidden * (2 if gated else 1) * itemsize, machine.device, scratch_budget)
    backward_rows, interval = _checkpoints(rows, iterations, scratch_budget // state)
    scratch = scratch_tiles(iterations, interval) * backward_rows * state
    chosen = "blas" if backend == "auto" else backend
    base = Plan(op, chosen, chosen, machine.device, dtype, iterations, rows, backward_rows, interval, scratch)
    if backend != "triton" and (backend != "auto" or machine.device == "cpu"):
        return base

    skipped = tuple(MISSING.items()) if backend == "auto" else ()
    kind = f"gated {op}" if gated else op
    forward, backward, reason = _tiles(kind, features, dtype, machine, state_tiles)
    if backend == "auto" and reason is None and machine.arch not in machine.verified:
        reason = f"no hardware results are committed for compute capability {machine.arch / 10}; backend='triton' selects it"
    if forward is None or reason is not None:
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot run this call: {reason}")
        return replace(base, skipped=(*skipped, ("triton", str(reason))))
    base = replace(base, backend="triton", forward_tile=forward, skipped=skipped)
    if backward is None:
        reason = f"backward of D = {features} does not fit in registers"
        return replace(base, backward="blas", skipped=(*skipped, (f"triton{IN_BACKWARD}", reason)))
    operands = 2 * features + ((3 if gated else 2) * hidden if op == "mlp" else 0)
    # Of a row and iteration: the ring's records, the stages' inputs and the gradients of scalars.
    record = stages * (operands * (4 if dtype == "float32" else 2) + features * 4) + (5 * stages + SCALES) * 4
    row = iterations * record + features * 4
    return _backward(base, backward, features, hidden, row, machine, scratch_budget)


def _tiles(
    kind: str, features: int, dtype: str, machine: Machine, state_tiles: int
) -> tuple[Tile | None, Tile | None, str | None]:
    """The tiles of the Triton kernels for the two passes of a call, or why it cannot have them."""
    if machine.triton is not None:
        return None, None, machine.triton
    if dtype == "float64":
        return None, None, "float64 is computed by blas"
    if dtype == "float32" and not machine.tf32:
        return None, None, "full float32 is computed by blas; torch.backends.cuda.matmul.allow_tf32 = True admits tf32"
    if machine == INTERPRETER:
        return INTERPRETED, INTERPRETED, None
    # On ROCm, where no budget has been checked, the tiles of the family with the smallest shared memory.
    found = family(machine.arch) if machine.device == "cuda" else 80
    widths = FORWARD[found].get((kind, state_tiles), {})
    # The tiles are for 16-bit operands: those of 32 bits take the registers and the shared memory of twice the width.
    operands = 2 if dtype == "float32" else 1
    width = _columns(features) * operands
    if width not in widths:
        most = max(widths, default=0) // operands
        return None, None, f"D = {features} does not fit in registers with this block and solver ({most} at most)"
    forward = widths[width]
    if forward.shared > machine.shared_memory:
        return None, None, f"it needs {forward.shared} bytes of shared memory, this device has {machine.shared_memory}"
    return forward, BACKWARD[found].get(kind, {}).get(width), None


def _backward(base: Plan, tile: Tile, features: int, hidden: int, row: int, machine: Machine, scratch_budget: int) -> Plan:
    """Programs and rows of a launch within the scratch budget; blas where not even one tile fits. row: bytes of a row."""
    programs = machine.multiprocessors * max(machine.shared_memory // max(tile.shared, 1), 1)
    # Two programs of a product for every multiprocessor.
    parts = max(2 * machine.multiprocessors // (math.ceil(features / PRODUCT_TILE) * math.ceil(hidden / PRODUCT_TILE)), 1)
    fixed = programs * SLOTS * tile.rows * _columns(features) * 4 + parts * features * hidden * 4
    chunk = (scratch_budget - fixed) // row // tile.rows * tile.rows
    if tile.shared > machine.shared_memory or chunk < tile.rows:
        reason = f"backward needs more shared memory or scratch than there is ({tile.shared} bytes, {scratch_budget} bytes)"
        return replace(base, backward="blas", skipped=(*base.skipped, (f"triton{IN_BACKWARD}", reason)))
    return replace(
        base, backward="triton", backward_tile=tile, programs=programs, chunk_rows=chunk, parts=parts,
        scratch_bytes=fixed + chunk * row,
    )  # fmt: skip


def scratch_tiles(iterations: int, interval: int) -> int:
    """States that backward keeps for one tile: the checkpoints, and the states between two of them."""
    return math.ceil(iterations / interval) + interval - 1


def _rows(state: int, hidden: int, device: str, budget: int) -> int:
    """Rows of a tile, a power of two: y, norm(y) and twice the hidden features within the cache (the budget on a GPU)."""
    (low, high), size = (CPU_ROWS, CPU_TILE_BYTES) if device == "cpu" else (GPU_ROWS, budget)
    fit = size // (2 * state + 2 * hidden)
    return min(max(_power_of_two(fit), low), high)


def _columns(features: int) -> int:
    """D padded as the Triton kernels pad it: to a power of two, 16 or more."""
    return max(_power_of_two(2 * features - 1), 16)


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
