"""What a run shows where rich is not installed: a line for each finished problem, and tables of aligned text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .layout import Sheet
from .run import Settings, Target


class Meter:
    """Which problems are done."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets, self.done = targets, 0

    def tell(self, what: str, share: float) -> None:
        """Nothing: only finished problems are told."""

    def next(self) -> None:
        self.done += 1
        print(f"{self.done} of {len(self.targets)} done: {self.targets[self.done - 1]}", file=sys.stderr, flush=True)


@contextmanager
def meter(targets: Sequence[Target], providers: int, settings: Settings) -> Iterator[Meter]:
    yield Meter(targets)


def show(sheet: Sheet) -> None:
    table = [sheet.columns, *(line.cells for line in sheet.lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [str.rjust if name in sheet.right else str.ljust for name in sheet.columns]
    print(f"\n{sheet.title}")
    for cells in table:
        print("  ".join(align(cell, width) for align, cell, width in zip(aligned, cells, widths, strict=True)).rstrip())
