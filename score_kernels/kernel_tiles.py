"""Tiles of the Triton kernels for a call, and the programs that a machine runs at a time: for the planner, from the tables."""

from __future__ import annotations

from collections.abc import Mapping

from .machine import INTERPRETER, Machine
from .row_tiles import power_of_two
from .triton_kernels import attention_configs, transformer_configs
from .triton_kernels.attention_configs import FORWARD_SLOTS, SequenceTile, backward_slots
from .triton_kernels.configs import BACKWARD, FORWARD, INTERPRETED, SLOTS, Tile, family

# Warps of a multiprocessor, where each thread has all the registers that it can have.
WARPS = 8

# The tables of the blocks on sequences, of forward and of backward.
SEQUENCES = {
    "attention": (attention_configs.FORWARD, attention_configs.BACKWARD),
    "transformer": (transformer_configs.FORWARD, transformer_configs.BACKWARD),
    "gated transformer": (transformer_configs.GATED_FORWARD, transformer_configs.GATED_BACKWARD),
}


def tiles(
    kind: str, features: int, dtype: str, machine: Machine, state_tiles: int, tokens: int, head: int
) -> tuple[Tile | SequenceTile | None, Tile | SequenceTile | None, str | None]:
    """The tiles of the Triton kernels for the two passes of a call, or why it cannot have them. head: features of one."""
    if machine.triton is not None:
        return None, None, machine.triton
    if dtype == "float64":
        return None, None, "float64 is computed by blas"
    if dtype == "float32" and not machine.tf32:
        return None, None, "full float32 is computed by blas; torch.backends.cuda.matmul.allow_tf32 = True admits tf32"
    if kind in SEQUENCES and tokens > attention_configs.LONGEST:
        return None, None, f"N = {tokens} is longer than the sequences of its kernels ({attention_configs.LONGEST} at most)"
    if machine == INTERPRETER:
        tile = attention_configs.interpreted(tokens, head, kind != "attention") if kind in SEQUENCES else INTERPRETED
        return tile, tile, None
    # On ROCm, where no budget has been checked, the tiles of the family with the smallest shared memory.
    found = family(machine.arch) if machine.device == "cuda" else 80
    widths = FORWARD[found].get((kind, state_tiles), {})
    # The tiles are for 16-bit operands: those of 32 bits take the registers and the shared memory of twice the width.
    operands = 2 if dtype == "float32" else 1
    width = _columns(features) * operands
    if kind in SEQUENCES:
        key = (attention_configs.group_rows(tokens), width, _columns(head) * operands)
        wide = [place(table[found], *key) for table in SEQUENCES[kind]]
        forward, backward = (tile and tile._replace(features=tile.features // operands) for tile in wide)
        if forward is None:
            return None, None, f"D = {features} with heads of {head} features does not fit in registers for N = {tokens}"
        return forward, backward, machine.too_large(forward.shared)
    if width not in widths:
        most = max(widths, default=0) // operands
        return None, None, f"D = {features} does not fit in registers with this block and solver ({most} at most)"
    return widths[width], BACKWARD[found].get(kind, {}).get(width), machine.too_large(widths[width].shared)


def place(table: Mapping[tuple[int, int, int], SequenceTile | None], rows: int, columns: int, head: int) -> SequenceTile | None:
    """Of the tiles for such groups that have room for this width and these heads the one of the narrowest place."""
    able = [key for key in table if key[0] == rows and key[1] >= columns and key[2] >= head]
    return table[min(able)] if able else None


def forward_programs(tile: SequenceTile, features: int, machine: Machine, budget: int) -> int:
    """As many as run at a time and have their scratch within the budget, at least one."""
    return max(min(programs(tile, machine), budget // _scratch(tile, features, FORWARD_SLOTS)), 1)


def backward_scratch(tile: Tile | SequenceTile, features: int, of_forward: int, of_backward: int) -> int:
    """Bytes of scratch of so many programs; those of sequences have it in forward too, which runs before and not beside."""
    if isinstance(tile, SequenceTile):
        return max(of_forward * FORWARD_SLOTS, of_backward * backward_slots(tile)) * _scratch(tile, features, 1)
    return of_backward * _scratch(tile, features, SLOTS)


def _scratch(tile: Tile | SequenceTile, features: int, slots: int) -> int:
    """Bytes of a program."""
    return slots * tile.rows * _columns(features) * 4


def programs(tile: Tile | SequenceTile, machine: Machine) -> int:
    """As many as run at a time; of those with scratch not more than have registers, so that it stays in the caches."""
    most = max(machine.shared_memory // max(tile.shared, 1), 1)
    if isinstance(tile, SequenceTile):
        most = min(most, max(WARPS // tile.warps, 1))
    return machine.multiprocessors * most


def _columns(features: int) -> int:
    """D padded as the Triton kernels pad it: to a power of two, 16 or more."""
    return max(power_of_two(2 * features - 1), 16)
