"""The figures of a report, as SVG to be put into a page: its font and its colours, light or dark, are theirs too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .drawing import TEXT, by_problem, drawn, height, legend, logarithmic, mark, offset, style
from .measure import CONFIDENCE
from .resultfile import Result, ratio
from .run import BASELINE, Row

# What a sweep varies, and the sizes that are otherwise equal in one.
AXES = ("iterations", "rows")
SIZES = ("features", "hidden", "iterations", "rows")
SWEEP_FROM = 3


@dataclass(frozen=True)
class Plot:
    """An SVG element with its title and what a reader has to know of it."""

    title: str
    caption: str
    svg: str


def plots(result: Result) -> Iterator[Plot]:
    """Every figure that the rows of a result have something for."""
    timed = [row for row in result.rows if row["status"] == "ok"]
    if timed:
        yield speedups(result)
    if products := [row for row in timed if row["tflops"]]:  # a module of the user's own may have none
        yield rooflines(result, products)
    if any(map(_share, result.rows)):
        yield errors(result)
    for axis in AXES:
        for name, rows in sweeps(result, axis).items():
            yield sweep(result, name, axis, rows)


def speedups(result: Result) -> Plot:
    """How many times faster than the baseline every provider is on every problem."""
    baseline = next(name for name in (BASELINE, *result.peers, *result.providers) if name in result.providers)
    others = [name for name in result.providers if name != baseline] or [baseline]
    points = {
        name: [(at, interval) for at, rows in enumerate(result.problems.values()) if (interval := ratio(rows, baseline, name))]
        for name in others
    }
    with drawn(height(result, len(others))) as (figure, out):
        axes = by_problem(figure, result)
        axes.axvline(1, color=TEXT, linewidth=1)
        for at, name in enumerate(others):
            for line, (median, low, high) in points[name]:
                y = line + offset(at, len(others))
                axes.plot([low, high], [y, y], color=mark(result, name)[0], linewidth=2, solid_capstyle="butt")
                axes.plot(median, y, label=name, **style(result, name))
        logarithmic(axes, "x", [1, *(x for found in points.values() for _, interval in found for x in interval)], "x")
        axes.set_xlabel(f"time of {baseline} / time of the provider: to the right of 1 is faster")
        legend(figure)
    caption = f"Medians of paired rounds, the bar being the {CONFIDENCE:.0%} interval (a short one hides behind its mark)."
    return Plot(f"How many times faster than {baseline}", caption, out.getvalue())


def rooflines(result: Result, rows: Sequence[Row]) -> Plot:
    """The rate of every row against how many operations there are for each byte that has to move."""
    rates = result.environment.get("rates")
    intensity = [row["flops"] / row["bytes"] for row in rows]
    with drawn(4.0) as (figure, out):
        axes = figure.subplots()
        axes.set(xlabel="operations for each byte moved at least", ylabel="TFLOP/s")
        logarithmic(axes, "x", intensity)
        logarithmic(axes, "y", [row["tflops"] for row in rows] + ([rates["tflops"]] if rates else []))
        if rates:
            ridge = rates["tflops"] / rates["gb_per_s"] * 1e3
            x = [min(*intensity, ridge) / 2, ridge, max(*intensity, ridge) * 2]
            roof = [min(rates["tflops"], at * rates["gb_per_s"] / 1e3) for at in x]
            axes.plot(x, roof, color=TEXT, linewidth=1, gid="roof", label="roof")
        for row, at in zip(rows, intensity, strict=True):
            axes.plot(at, row["tflops"], label=row["provider"], **style(result, row["provider"]))
        legend(figure)
    known = (
        f"The roof is what was measured on the same machine: {rates['tflops']:.0f} TFLOP/s in bfloat16 products, "
        f"{rates['gb_per_s']:.0f} GB/s in copies. "
        if rates
        else "The machine's own rates were not measured in this run, so there is no roof. "
    )
    how = "Operations are those of the products; bytes are inputs and outputs once: what any implementation has to move."
    return Plot("Rate against intensity", known + how, out.getvalue())


def errors(result: Result) -> Plot:
    """The error of every row in shares of what it may be."""
    shares = {
        (line, name): share
        for line, rows in enumerate(result.problems.values())
        for name, row in rows.items()
        if (share := _share(row))
    }
    with drawn(height(result, 3)) as (figure, out):
        axes = by_problem(figure, result)
        axes.axvline(1, color=TEXT, linewidth=1)
        for (line, name), share in shares.items():
            y = line + offset(result.providers.index(name), len(result.providers))
            axes.plot(share, y, label=name, **style(result, name))
        logarithmic(axes, "x", [1, *shares.values()])
        axes.set_xlabel("relative error / largest that still counts as right: beyond 1 is wrong, and not timed")
        legend(figure)
    caption = (
        "norm(result - exact) / norm(exact), exact being the same inputs in float64; the worst of all outputs and gradients."
    )
    return Plot("How exact", caption, out.getvalue())


def _share(row: Row) -> float | None:
    """How much of its tolerance a row's error takes; None where it has none: rows of earlier versions do not say it."""
    return row["rel_error"] / row["tolerance"] if row["rel_error"] and row.get("tolerance") else None


def sweeps(result: Result, axis: str) -> dict[str, list[Row]]:
    """Timed rows of problems that differ in nothing but `axis`, under a name that tells what they share. A problem is what the
    first of its providers computes: there are some that stand in for it with another function."""
    found: dict[str, list[Row]] = {}
    for rows in result.problems.values():
        problem = next(iter(rows.values()))
        sizes = ", ".join(f"{key} {problem[key]}" for key in SIZES if key != axis)
        options = ", ".join(f"{key} {value}" for key, value in problem["params"].items())
        name = f"{problem['op']} {problem['mode']} {problem['dtype']}, {sizes}; {options}"
        found.setdefault(name, []).extend(row for row in rows.values() if row["status"] == "ok")
    return {name: group for name, group in found.items() if len({row[axis] for row in group}) >= SWEEP_FROM}


def sweep(result: Result, name: str, axis: str, rows: Sequence[Row]) -> Plot:
    """Time, and memory where it was measured, as one option grows."""
    panels = {"ms_median": "time of a call, ms", "peak_memory_mb": "peak memory, MB"}
    panels = {key: label for key, label in panels.items() if any(row[key] for row in rows)}
    with drawn(3.0, 4.1 * len(panels)) as (figure, out):
        for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for provider in result.providers:
                points = sorted((row[axis], row[key]) for row in rows if row["provider"] == provider and row[key])
                if points:
                    axes.plot(*zip(*points, strict=True), label=provider, linewidth=1.2, **style(result, provider))
            axes.set(xlabel="T" if axis == "iterations" else axis, title=label)
            logarithmic(axes, "x", [row[axis] for row in rows])
            axes.set_xticks(sorted({row[axis] for row in rows}))
            axes.tick_params(axis="x", rotation=45 if axis == "rows" else 0)  # long numbers
            logarithmic(axes, "y", [row[key] for row in rows if row[key]])
        legend(figure)
    shared, _, options = name.partition("; ")
    return Plot(f"Against {'T' if axis == 'iterations' else axis}: {shared}", f"Options: {options}.", out.getvalue())
