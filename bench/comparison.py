"""`python -m bench compare A.json B.json`: did anything become slower, or wrong, from one result to the other?

Rows of one key are compared by the ratio of their medians, B over A, with an unpaired bootstrap interval. A row is a regression
when the whole interval lies above 1 + threshold, an improvement when it lies below 1 / (1 + threshold).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from .layout import Line, Sheet
from .measure import RESAMPLES, Interval
from .resultfile import Result, load, problem_of
from .run import Row

THRESHOLD = 0.03

# Wider than the intervals of a table: a result has many rows, and one false alarm in one of them stops a pipeline.
CONFIDENCE = 0.99

# From fewer samples no interval of a median follows.
FEWEST = 5

# What has to be equal for two rows to be times of the same work.
WORK = ("op", "rows", "features", "hidden", "iterations")


@dataclass(frozen=True)
class Change:
    """What became of one row. verdict: regression, improvement, same, unclear (not comparable), or gone and new for rows that
    only one of the results has. ratio: of the medians, B over A, where both have times."""

    verdict: str
    before: Row | None
    after: Row | None
    ratio: Interval | None = None
    detail: str = ""

    @property
    def row(self) -> Row:
        """The row, as it is now if it still is."""
        row = self.after or self.before
        assert row is not None
        return row


def compare(a: Result, b: Result, threshold: float = THRESHOLD) -> list[Change]:
    """One change for every key that was measured in either result, problem by problem: those of A in its order, then B's."""
    before, after = ({row["key"]: row for row in result.rows if row["status"] != "absent"} for result in (a, b))
    order = list(dict.fromkeys([*a.problems, *b.problems]))
    keys = dict.fromkeys([*before, *after])
    changes = [_change(before.get(key), after.get(key), threshold) for key in keys]
    return sorted(changes, key=lambda change: order.index(problem_of(change.row)))


def medians_ratio(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The ratio of the medians, `after` over `before`, with its bootstrap percentile interval (fixed seed). The samples are of
    different runs, so they are drawn apart."""
    generator = torch.Generator().manual_seed(0)

    def medians(samples: Sequence[float]) -> torch.Tensor:
        """Of the samples as they are, then of every resample."""
        times = torch.tensor(samples, dtype=torch.float64)
        drawn = torch.randint(len(times), (RESAMPLES, len(times)), generator=generator)
        return torch.cat([times.quantile(0.5)[None], times[drawn].quantile(0.5, dim=1)])

    ratios = medians(after) / medians(before)
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = ratios[1:].quantile(ends).tolist()
    return Interval(ratios[0].item(), low, high)


def same_machine(a: Result, b: Result) -> None:
    """Raises ValueError when the results are of different GPUs, or of different CPUs or thread counts where there is none."""
    names = ("gpu",) if a.environment["gpu"] or b.environment["gpu"] else ("cpu", "threads")
    for name in names:
        if a.environment[name] != b.environment[name]:
            raise ValueError(
                f"{name}: {a.name} is of {a.environment[name]!r}, {b.name} of {b.environment[name]!r}: times of different "
                "machines say nothing about the code. Measure both on one machine, or compare all the same with --any-machine"
            )


def sheet(a: Result, b: Result, changes: Sequence[Change]) -> Sheet:
    """One line for each change."""
    ratio = f"B / A [{CONFIDENCE:.0%} interval]"
    table = Sheet(
        f"A: {a.name} ({_code(a)}), B: {b.name} ({_code(b)}), {b.where}",
        ("case", "mode", "dtype", "provider", "A, ms", "B, ms", ratio, "verdict"),
        ("A, ms", "B, ms", ratio),
    )
    previous = None
    for change in changes:
        problem = problem_of(change.row)
        times = (_time(change.before), _time(change.after))
        interval = "-" if change.ratio is None else "{:.3f} [{:.3f}, {:.3f}]".format(*change.ratio)
        verdict = f"{change.verdict}: {change.detail}" if change.detail else change.verdict
        shown = problem if problem != previous else ("", "", "")
        table.lines.append(
            Line((*shown, change.row["provider"], *times, interval, verdict), change.verdict, problem != previous)
        )
        previous = problem
    return table


def summary(changes: Sequence[Change]) -> str:
    """One line. How the peers fared, whose code is not ours, tells how alike the machine was in the two runs."""
    counts = Counter(change.verdict for change in changes)
    names = {"regression": "regressions", "improvement": "improvements", "same": "the same", "unclear": "unclear"}
    parts = [f"{counts[verdict]} {text}" for verdict, text in names.items()]
    line = ", ".join([*parts, f"{counts['gone']} only in A", f"{counts['new']} only in B"])
    peers = [change.ratio.median for change in changes if change.ratio and change.row["plan"] is None]
    return f"{line}; peers: B / A is {median(peers):.2f} in the median" if peers else line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("compare", help="what became slower, faster or wrong from result A to result B")
    command.add_argument("a", type=Path, metavar="A.json", help="the result before")
    command.add_argument("b", type=Path, metavar="B.json", help="the result after")
    command.add_argument(
        "--threshold", type=_threshold, default=THRESHOLD, metavar="SHARE",
        help=f"a regression is surely slower by more than this share (default: {THRESHOLD})",
    )  # fmt: skip
    command.add_argument("--any-machine", action="store_true", help="compare results of different machines too")
    command.set_defaults(execute=execute)


def execute(options: argparse.Namespace, show: Callable[[Sheet], object]) -> int:
    """Exit status: 1 when there is a regression, else 0."""
    a, b = load(options.a), load(options.b)
    if not options.any_machine:
        same_machine(a, b)
    changes = compare(a, b, options.threshold)
    show(sheet(a, b, changes))
    print(summary(changes))
    return int(any(change.verdict == "regression" for change in changes))


def _change(before: Row | None, after: Row | None, threshold: float) -> Change:
    if before is None or after is None:
        return Change("gone" if after is None else "new", before, after, detail=_error(after))
    if after["status"] != "ok":
        return Change("regression" if before["status"] == "ok" else "same", before, after, detail=_error(after))
    if before["status"] != "ok":
        return Change("improvement", before, after, detail=f"was {_error(before)}")
    if different := _difference(before, after):
        return Change("unclear", before, after, detail=f"another problem, {different}")
    fewest = min(len(before["samples"]), len(after["samples"]))
    if fewest < FEWEST:
        return Change("unclear", before, after, detail=f"{fewest} samples, at least {FEWEST} are needed: run --rounds {FEWEST}")
    ratio = medians_ratio(before["samples"], after["samples"])
    slower, faster = ratio.low > 1 + threshold, ratio.high < 1 / (1 + threshold)
    return Change("regression" if slower else "improvement" if faster else "same", before, after, ratio)


def _difference(before: Row, after: Row) -> str:
    """How the problem of a key has changed. Options that only one of the versions knows are no difference."""
    a, b = ({**{name: row[name] for name in WORK}, **row["params"]} for row in (before, after))
    return ", ".join(f"{name} {a[name]} -> {b[name]}" for name in a if name in b and a[name] != b[name])


def _error(row: Row | None) -> str:
    return "" if row is None or row["error"] is None else f"{row['status']}, {row['error']}"


def _time(row: Row | None) -> str:
    return "-" if row is None or row["ms_median"] is None else f"{row['ms_median']:.4g}"


def _code(result: Result) -> str:
    sha = result.environment["git_sha"]
    return (sha[:8] if sha else "no commit") + (", dirty" if result.environment["dirty"] else "")


def _threshold(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, like 0.03, got {text}")
    return value
