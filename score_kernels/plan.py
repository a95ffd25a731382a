"""What the planner answers: which backend runs a call, with which tiles, and why not a faster one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .machine import Kernel
from .triton_kernels.attention_configs import SequenceTile
from .triton_kernels.configs import Tile

# The blocks that a transformer is made of, in their order.
HALVES = ("attention", "mlp")


@dataclass(frozen=True)
class Plan:
    """How one call runs. `skipped` holds (backend, reason) for every faster backend that was not chosen.

    backend, backward: who runs the two passes. blas: rows, backward_rows of a tile, a state kept every `interval` iterations.
    triton: the tiles, `programs` of backward at a time, `chunk_rows` for each of its launches, `parts` of a product over rows;
    of an op on sequences forward has `forward_programs` at a time, for they have scratch.
    cuda: the kernels of the two passes, and programs (at most), chunk_rows and parts as for triton.
    halves: of a transformer of which a pass does not fit in one launch, the plans of those halves that fit, by their op: on
    tiles of rows as blas has them, each iteration takes a launch of each; a half without a backward tile runs forward only.
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
    kernel: Kernel | None = None
    backward_kernel: Kernel | None = None
    forward_tile: Tile | SequenceTile | None = None
    backward_tile: Tile | SequenceTile | None = None
    programs: int = 0
    forward_programs: int = 0
    chunk_rows: int = 0
    parts: int = 1
    halves: tuple[tuple[str, Plan], ...] = ()

    def by_halves(self, *, backward: bool) -> bool:
        """Whether this pass takes a launch for each half of an iteration."""
        runs, tile = (self.backward, self.backward_tile) if backward else (self.backend, self.forward_tile)
        return bool(self.halves) and runs == "triton" and tile is None

    def __str__(self) -> str:
        lines = [("op", self.op), ("backend", self.backend), ("device", f"{self.device}, {self.dtype}")]
        walk = "once" if self.interval == 1 else f"twice, a state kept every {self.interval} iterations"
        scratch = ("scratch", f"at most {self.scratch_bytes / 2**20:.1f} MiB in backward")
        if self.kernel is not None:
            lines.append(("forward", f"one launch, {self.kernel}"))
        elif self.forward_tile is not None:
            lines.append(("forward", f"one launch, {_describe(self.forward_tile)}, {self.iterations} iterations each"))
        elif self.by_halves(backward=False):
            halves = self._halves(of.forward_tile for _, of in self.halves)
            lines.append(("forward", f"tiles of {self.rows} rows, two halves an iteration: {halves}"))
        elif self.backend == "blas":
            lines.append(("forward", f"tiles of {self.rows} rows, {self.iterations} iterations each"))
        if self.backward_kernel is not None:
            lines += [("backward", f"{self.chunk_rows} rows a launch, {self.backward_kernel}"), scratch]
        elif self.backward_tile is not None:
            tiles = f"{_describe(self.backward_tile)}, {self.programs} programs"
            by = "" if self.backward == self.backend else f" ({self.backward})"
            lines += [("backward", f"{self.chunk_rows} rows a launch, {tiles}{by}"), scratch]
        elif self.by_halves(backward=True):
            halves = self._halves(of.backward_tile for _, of in self.halves)
            tiles = f"tiles of {self.backward_rows} rows, trajectory recomputed {walk}"
            lines += [("backward", f"{tiles}, two halves an iteration: {halves}"), scratch]
        elif self.backward == "blas":
            lines += [("backward", f"tiles of {self.backward_rows} rows, trajectory recomputed {walk}"), scratch]
        lines += [(f"not {name}", reason) for name, reason in self.skipped]
        width = max(len(key) for key, _ in lines)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)

    def _halves(self, tiles: Iterable[Tile | SequenceTile | None]) -> str:
        """Who runs each half, given the tiles of `halves` in this pass."""
        own = {op: _describe(tile) for (op, _), tile in zip(self.halves, tiles, strict=True) if tile is not None}
        return "; ".join(f"{op} in {own[op]}" if op in own else f"{op} by blas" for op in HALVES)


def _describe(tile: Tile | SequenceTile) -> str:
    if isinstance(tile, SequenceTile):
        return str(tile)
    return f"tiles of {tile.rows} rows x {tile.hidden} hidden features, {tile.warps} warps, {tile.shared / 1024:.0f} KiB shared"
