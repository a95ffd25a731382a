"""The tables that `python -m bench` shows, as plain data: `console` prints them with rich, `plain` without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .providers import PROVIDERS, title
from .run import Row
from .suites import SUITES

# Columns of a result: what they show, and the keys of those that are left out where nothing was measured.
NUMBERS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: _number(row["ms_median"], ".3g" if (row["ms_median"] or 0) < 100 else ".0f"),
    "eager / this [95% interval]": lambda row: _interval(row["speedup_vs_eager"]),
    "of roofline": lambda row: _number(row["roofline"], ".0%"),
    "rel. error": lambda row: _number(row["rel_error"], ".1e"),
    "peak MB": lambda row: _number(row["peak_memory_mb"], ".1f"),
}
OPTIONAL = {"of roofline": "roofline", "peak MB": "peak_memory_mb"}


@dataclass(frozen=True)
class Line:
    """status: of the row that it shows, or the verdict on it. new: it starts a group of lines."""

    cells: tuple[str, ...]
    status: str = "ok"
    new: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table; `right`: the columns whose cells are aligned to the right."""

    title: str
    columns: tuple[str, ...]
    right: tuple[str, ...] = ()
    lines: list[Line] = field(default_factory=list)


def listing(device: str) -> list[Sheet]:
    """Suites with their cases, and the providers with why they cannot run on this device."""
    sheets = []
    columns = ("case", "op", "rows", "D", "H", "T", "mode", "dtype", "options", "source")
    for name, suite in SUITES.items():
        sheet = Sheet(f"suite {name}: {suite.about}", columns, ("rows", "D", "H", "T"))
        for case in suite.cases:
            sizes = (str(n) for n in (case.rows, case.features, case.hidden, case.iterations))
            modes = ", ".join(case.modes)
            sheet.lines.append(Line((case.name, case.op, *sizes, modes, case.dtype, ", ".join(case.options), case.source)))
        sheets.append(sheet)
    sheet = Sheet("providers", ("provider", "kind", "what", "here"))
    for provider in PROVIDERS.values():
        sheet.lines.append(Line((provider.name, provider.kind, provider.about, provider.absent(device) or "yes")))
    return [*sheets, sheet]


def results(environment: dict[str, Any], rows: Sequence[Row]) -> Sheet:
    """One line for each row of a result: times, ratio to eager with its interval, error, peak memory."""
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    if rates := environment.get("rates"):
        where += f" (measured: {rates['tflops']:.0f} TFLOP/s, {rates['gb_per_s']:.0f} GB/s)"
    there = [name for name in NUMBERS if name not in OPTIONAL or any(row[OPTIONAL[name]] is not None for row in rows)]
    columns = ("case", "mode", "dtype", "provider", *there, "status")
    sheet = Sheet(f"{where}, torch {environment['torch']}", columns, tuple(there))
    previous = None
    for row in rows:
        problem = (row["case"], row["mode"], row["dtype"])
        cells = (
            *(problem if problem != previous else ("", "", "")),
            title(row["provider"]),
            *(NUMBERS[name](row) for name in there),
            row["status"] if row["error"] is None else f"{row['status']}: {row['error']}",
        )
        sheet.lines.append(Line(cells, row["status"], new=problem != previous))
        previous = problem
    return sheet


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
