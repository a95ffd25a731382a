"""`python -m bench report`: result files as one HTML page (`--html PATH`) or as the tables of documents (`--markdown`)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from . import inputs, layout, measure, tables
from .layout import Sheet
from .providers import PROVIDERS, title
from .resultfile import Result, load, ratio
from .run import BASELINE, Row

TEMPLATE = Path(__file__).with_name("report.html.j2")

# What drawing a page takes; measuring needs none of it.
NEEDS = ("jinja2", "matplotlib")


@dataclass(frozen=True)
class Figure:
    """One number of a comparison, and the problem that it is of."""

    value: float
    case: str


@dataclass(frozen=True)
class Claim:
    """How two providers compare in one mode, over all problems that both were measured on: times the speed, or the memory."""

    what: str
    mode: str
    ours: str
    peer: str
    figures: tuple[Figure, ...]

    @property
    def median(self) -> float:
        return median(figure.value for figure in self.figures)

    @property
    def best(self) -> Figure:
        return max(self.figures, key=lambda figure: figure.value)

    @property
    def worst(self) -> Figure:
        return min(self.figures, key=lambda figure: figure.value)


def claims(result: Result, what: str) -> Iterator[Claim]:
    """Every provider of ours against every peer in "speed" or "memory", mode by mode; the preferred provider first."""
    of = {"speed": _faster, "memory": _smaller}[what]
    for ours in result.ours:
        for peer in result.peers:
            for mode in dict.fromkeys(row["mode"] for row in result.rows):
                found = [
                    Figure(value, case)
                    for (case, its_mode, _), rows in result.problems.items()
                    if its_mode == mode and (value := of(rows, peer, ours)) is not None
                ]
                if found:
                    yield Claim(what, mode, ours, peer, tuple(found))


def headline(result: Result) -> Iterator[Claim]:
    """The claims that matter most: what users get, its speed against every peer, its memory against the plain loop."""
    for what, peers in (("speed", result.peers), ("memory", [BASELINE])):
        yield from (claim for claim in claims(result, what) if claim.ours == result.ours[0] and claim.peer in peers)


def missing(result: Result) -> dict[tuple[str, str, str], list[str]]:
    """The problems of rows that are not ok, by provider, status and reason; what is absent comes last."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in sorted(result.rows, key=lambda row: row["status"] == "absent"):
        if row["status"] != "ok":
            found.setdefault((row["provider"], row["status"], row["error"]), []).append(f"{row['case']} {row['mode']}")
    return found


def page(results: Sequence[Result]) -> str:
    """The HTML page: it needs nothing but itself, and is the same for the same results."""
    jinja2, figures, drawing = (importlib.import_module(name, __package__) for name in ("jinja2", ".figures", ".drawing"))
    everybody = tuple(dict.fromkeys(name for result in results for name in result.providers))
    results = [replace(result, beside=everybody) for result in results]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    runs = [
        {
            "result": result,
            "cards": list(headline(result)),
            "claims": [*claims(result, "speed"), *claims(result, "memory")],
            "plots": [
                (plot, drawing.named(plot.svg, f"r{number}f{at}")) for at, plot in enumerate(figures.plots(result), start=1)
            ],
            "missing": missing(result),
            "environment": {name: text for name, value in result.environment.items() if (text := environment_text(value))},
            "sheet": (sheet := layout.results(result.environment, result.rows)),
            "lines": [(line, plan_text(row["plan"])) for line, row in zip(sheet.lines, result.rows, strict=True)],
            "samples": sorted({len(row["samples"]) for row in result.rows if row["samples"]}),
        }
        for number, result in enumerate(results, start=1)
    ]
    tolerances = {name: [f"{eps:g}" for eps in limits] for name, limits in inputs.TOLERANCE_EPS.items()}
    measured = {name: PROVIDERS[name].about for result in results for name in result.providers if name in PROVIDERS}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        runs=runs, confidence=measure.CONFIDENCE, tolerances=tolerances, title=title, providers=measured
    )


def plan_text(plan: dict[str, Any] | None) -> str:
    """A plan in one line: the backends, what is set of the rest, and why not a faster one."""
    if plan is None:
        return ""
    said = ("op", "backend", "backward", "device", "dtype", "skipped")
    backward = plan.get("backward", plan["backend"])
    parts = [plan["backend"] if backward == plan["backend"] else f"{plan['backend']}, backward {backward}"]
    parts += [
        f"{key.removesuffix('_bytes').replace('_', ' ')} {_compact(key, value)}"
        for key, value in plan.items()
        if key not in said and value
    ]
    parts += [f"not {name}: {reason}" for name, reason in plan.get("skipped", ())]
    return "; ".join(parts)


def environment_text(value: Any) -> str:
    """A value of the environment block; of one that has parts, those that there are."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, part in value.items() if (text := environment_text(part)))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("report", help="result files as an HTML page, or as the tables of Markdown documents")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results; with --markdown the documents")
    form = command.add_mutually_exclusive_group(required=True)
    form.add_argument("--html", type=Path, metavar="PATH", help="where to write the page, which needs no other file")
    form.add_argument("--markdown", action="store_true", help="fill in the tables of the documents, by their comments")
    command.set_defaults(execute=execute)


def execute(options: argparse.Namespace, show: Callable[[Sheet], object]) -> int:
    if options.markdown:
        for document in options.files:
            _fill(document)
        return 0
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ValueError(f"--html: {' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    options.html.write_text(page([load(path) for path in options.files]), encoding="utf-8")
    print(f"{options.html}: {', '.join(map(str, options.files))}")
    return 0


def _fill(document: Path) -> None:
    """Tables name their result files from the current folder."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{document}: expected a Markdown document, got {type(error).__name__}: {error}") from error
    filled = tables.filled(text, Path.cwd())
    if filled != text:
        document.write_text(filled, encoding="utf-8")
    print(f"{document}: {'written anew' if filled != text else 'as it was'}")


def _faster(rows: dict[str, Row], peer: str, ours: str) -> float | None:
    interval = ratio(rows, peer, ours)
    return None if interval is None else interval.median


def _smaller(rows: dict[str, Row], peer: str, ours: str) -> float | None:
    values = [rows[name]["peak_memory_mb"] for name in (peer, ours) if name in rows]
    return values[0] / values[1] if len(values) == 2 and all(values) else None


def _compact(key: str, value: Any) -> str:
    """A tile is its sizes; halves of a transformer are their names."""
    if key == "halves":
        return " and ".join(op for op, _ in value)
    if isinstance(value, dict):
        return " ".join(f"{name}={size}" for name, size in value.items() if size)
    return f"{value / 2**20:.1f} MiB" if key.endswith("_bytes") else str(value)
