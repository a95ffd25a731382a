"""Result files as other commands read them: loading, and who is compared with whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import Interval, paired_ratio
from .run import Row

# Which provider of ours a comparison is about, where several were timed: the kernels, whose speed it is about, before `auto`,
# which takes blas on a GPU that nobody has verified them on.
PREFERRED = ("triton", "cuda", "auto", "blas")

# What providers are compared on: case, mode, dtype.
Key = tuple[str, str, str]


def problem_of(row: Row) -> Key:
    return row["case"], row["mode"], row["dtype"]


@dataclass(frozen=True)
class Result:
    """One result file: the environment block and the rows, in the file's order.

    beside: the providers of every result on the same page, which then have the same mark in all of its figures.
    """

    name: str
    environment: dict[str, Any]
    rows: list[Row]
    beside: tuple[str, ...] = ()

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(row["provider"] for row in self.rows))

    @property
    def ours(self) -> list[str]:
        """Providers that called this package, which is what leaves a plan; the preferred one first."""
        names = {row["provider"] for row in self.rows if row["plan"] is not None}
        timed = {row["provider"] for row in self.rows if row["status"] == "ok"}
        first = [name for name in PREFERRED if name in names & timed]
        return [*first, *(name for name in self.providers if name in names and name not in first)]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.providers if name not in self.ours]

    @property
    def problems(self) -> dict[Key, dict[str, Row]]:
        """Rows by problem and provider, those of every status."""
        found: dict[Key, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(problem_of(row), {})[row["provider"]] = row
        return found

    @property
    def where(self) -> str:
        """The machine, in words."""
        return self.environment["gpu"] or f"{self.environment['cpu']}, {self.environment['threads']} threads"


def load(path: Path) -> Result:
    """Reads a file of `python -m bench run --json`. Raises ValueError for anything else."""
    expected = "expected a file written by `python -m bench run --json`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("environment", "rows") if key not in content]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {expected}, got {type(error).__name__}: {error}") from error
    if missing:
        raise ValueError(f"{path}: {expected}, got JSON without {' and '.join(map(repr, missing))}")
    return Result(path.stem, content["environment"], content["rows"])


def write(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes it whole or not at all: whoever ends the run meanwhile leaves the file as it was."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def ratio(rows: dict[str, Row], peer: str, ours: str) -> Interval | None:
    """How many times faster `ours` is than `peer` on one problem, from rounds that both were timed in; None without both."""
    times = [rows[name]["samples"] for name in (peer, ours) if name in rows and rows[name]["samples"]]
    return paired_ratio(*times) if len(times) == 2 else None


def check_names(kind: str, names: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises ValueError for a name that is not known there."""
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{where}: expected {kind}s out of {', '.join(known)}, got {', '.join(wrong)}")
