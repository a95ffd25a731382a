"""Markdown tables of result files, for README and docs: generated, never typed.

`python -m bench report --markdown README.md docs/*.md` fills in what stands between such a pair of comments:

    <!-- table: bench/results/cpu-floor.json ours=blas peers=eager,torch_compile columns=time,ratio -->
    <!-- end -->

ours: whose speed the ratios are of; peers: the others, in order; columns: of COLUMNS. All have a default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .measure import Interval
from .providers import title
from .resultfile import Result, check_names, load, ratio
from .run import Row

MARKER = re.compile(r"(<!-- table: (\S+)((?: \w+=[\w,]+)*) -->)\n.*?(<!-- end -->)", re.DOTALL)

OPTIONS = ("ours", "peers", "columns")


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


# Columns that are there once for each provider: heading, key of the row, form.
FIGURES: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "time": ("ms", "ms_median", _figure),
    "memory": ("peak MB", "peak_memory_mb", _figure),
    "error": ("relative error", "rel_error", "{:.1e}".format),
    "rate": ("TFLOP/s", "tflops", "{:.3g}".format),
    "roofline": ("of roofline", "roofline", "{:.0%}".format),
}
# And for each peer: how many times faster ours is.
RATIO = "ratio"
COLUMNS = (*FIGURES, RATIO)


def markdown(result: Result, ours: str | None = None, peers: list[str] | None = None, columns: list[str] | None = None) -> str:
    """One line for each problem. By default: the preferred provider of ours against all others, times, ratios, and peak memory
    where it was measured. What was not measured is `-`. Raises ValueError for names that the result does not have."""
    ours = ours or (result.ours or result.providers)[0]
    others = [name for name in result.providers if name != ours]
    check_names("provider", [ours, *(peers or [])], result.providers, result.name)
    check_names("column", columns or [], COLUMNS, result.name)
    memory = ["memory"] if any(row["peak_memory_mb"] is not None for row in result.rows) else []
    peers, columns = others if peers is None else peers, columns or ["time", RATIO, *memory]
    providers = [name for name in result.providers if name in (ours, *peers)]
    head = ["case", *(cell for column in columns for cell in _heads(column, providers, peers, ours))]
    lines = [head, ["---"] * len(head)]
    for (case, mode, _), rows in result.problems.items():
        lines.append([f"{case}, {mode}", *(c for column in columns for c in _cells(column, rows, providers, peers, ours))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def filled(text: str, root: Path) -> str:
    """The text with the table of its file between every pair of comments; files are named from `root`."""

    def table(found: re.Match[str]) -> str:
        options = dict(option.split("=", 1) for option in found[3].split())
        check_names("option", list(options), OPTIONS, found[2])
        peers, columns = (options[name].split(",") if name in options else None for name in ("peers", "columns"))
        return f"{found[1]}\n{markdown(load(root / found[2]), options.get('ours'), peers, columns)}\n{found[4]}"

    return MARKER.sub(table, text)


def _heads(column: str, providers: list[str], peers: list[str], ours: str) -> list[str]:
    if column == RATIO:
        return [f"{title(name)} / {title(ours)}" for name in peers]
    return [f"{title(name)}, {FIGURES[column][0]}" for name in providers]


def _cells(column: str, rows: dict[str, Row], providers: list[str], peers: list[str], ours: str) -> list[str]:
    if column == RATIO:
        return [_ratio(ratio(rows, name, ours)) for name in peers]
    _, key, form = FIGURES[column]
    values = [rows[name][key] if name in rows else None for name in providers]
    return ["-" if value is None else form(value) for value in values]


def _ratio(interval: Interval | None) -> str:
    return "-" if interval is None else "**{:.2f}** ({:.2f} to {:.2f})".format(*interval)
