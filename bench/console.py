"""What a run shows: progress on standard error while it lasts, a table on standard output at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .cases import SUITES
from .providers import PROVIDERS
from .run import Problem, Row, Settings

STYLES = {"ok": "", "wrong": "bold red", "failed": "bold red", "absent": "dim"}

# Where no terminal tells its width, tables may be this wide.
WIDTH = 140


class Meter:
    """The progress bar of a run, in rough units of work, one problem after the other."""

    def __init__(self, progress: Progress, targets: Sequence[Problem], providers: int, rounds: int) -> None:
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
def meter(targets: Sequence[Problem], providers: int, settings: Settings) -> Iterator[Meter]:
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Meter(progress, targets, providers, settings.rounds)


def show_list() -> None:
    """Suites with their cases, and providers."""
    console = _console()
    for name, suite in SUITES.items():
        table = Table(title=f"suite {name}: {suite.about}", title_justify="left", title_style="bold")
        for column in ("case", "op", "rows", "D", "H", "T", "mode", "dtype", "options", "source"):
            table.add_column(column, justify="right" if column in ("rows", "D", "H", "T") else "left")
        for case in suite.cases:
            gated = ["gated"] if case.gated else []
            sets = [f"L={case.sets} {case.order}"] if case.sets > 1 else []
            options = [case.activation, case.norm or "no norm", case.solver, case.update, *gated, *sets]
            sizes = (str(n) for n in (case.rows, case.features, case.hidden, case.iterations))
            table.add_row(case.name, case.op, *sizes, ", ".join(case.modes), case.dtype, ", ".join(options), case.source)
        console.print(table)
    table = Table("provider", "kind", "what", "here", title="providers", title_justify="left", title_style="bold")
    for provider in PROVIDERS.values():
        table.add_row(provider.name, provider.kind, provider.about, provider.absent() or "yes")
    console.print(table)


def show_results(environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """One line for each row of a result: times, ratio to eager with its interval, error, peak memory."""
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    table = Table(title=f"{where}, torch {environment['torch']}", title_justify="left", title_style="bold")
    for column in ("case", "mode", "dtype", "provider"):
        table.add_column(column)
    for column in ("ms", "eager / this [95% interval]", "rel. error", "peak MB"):
        table.add_column(column, justify="right")
    table.add_column("status")
    previous = None
    for row in rows:
        problem = (row["case"], row["mode"], row["dtype"])
        if previous not in (None, problem):
            table.add_section()
        status = row["status"] if row["error"] is None else f"{row['status']}: {row['error']}"
        table.add_row(
            *(problem if problem != previous else ("", "", "")),
            row["provider"],
            _number(row["ms_median"], ".3g" if (row["ms_median"] or 0) < 100 else ".0f"),
            _interval(row["speedup_vs_eager"]),
            _number(row["rel_error"], ".1e"),
            _number(row["peak_memory_mb"], ".1f"),
            escape(status),
            style=STYLES[row["status"]],
        )
        previous = problem
    _console().print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)
