"""What a run shows: progress on standard error while it lasts, a table on standard output at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .layout import Sheet
from .run import Settings, Target

# By the status of a row, and by the verdict on a change; any other is plain.
STYLES = {"wrong": "bold red", "failed": "bold red", "absent": "dim", "regression": "bold red", "improvement": "green"}
STYLES |= {"gone": "yellow", "new": "dim", "unclear": "yellow"}

# Where no terminal tells its width, tables may be this wide.
WIDTH = 140


class Meter:
    """The progress bar of a run, in rough units of work, one problem after the other."""

    def __init__(self, progress: Progress, targets: Sequence[Target], providers: int, rounds: int) -> None:
        self.progress, self.targets = progress, targets
        self.work = [problem.work(providers, rounds) for problem in targets]
        self.done = 0
        self.task = progress.add_task("starting", total=sum(self.work))

    def tell(self, what: str, share: float) -> None:
        self.progress.update(self.task, description=what, advance=share * self.work[self.done])

    def next(self) -> None:
        """A problem is finished, whatever was left out of it."""
        self.done += 1
        if not self.progress.console.is_terminal:  # where no bar is drawn: one line for each problem
            self.progress.console.print(f"{self.done} of {len(self.targets)} done: {self.targets[self.done - 1]}")
        self.progress.update(self.task, completed=sum(self.work[: self.done]))


@contextmanager
def meter(targets: Sequence[Target], providers: int, settings: Settings) -> Iterator[Meter]:
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Meter(progress, targets, providers, settings.rounds)


def show(sheet: Sheet) -> None:
    table = Table(title=escape(sheet.title), title_justify="left", title_style="bold")
    for column in sheet.columns:
        table.add_column(column, justify="right" if column in sheet.right else "left", no_wrap=column == "case")
    for line in sheet.lines:
        if line.new and table.row_count:
            table.add_section()
        table.add_row(*map(escape, line.cells), style=STYLES.get(line.status, ""))
    _console().print(table)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)
