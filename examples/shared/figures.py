"""The figures of docs/experiments.md, as SVG that is the same for the same results."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.drawing import COLOURS, MARKERS, STYLE

from .results import Results
from .speed import median_ms

# Read on white and on black, as the page may be either.
TEXT, GRID = "#808080", "#80808060"
LOOK = {**STYLE, **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT)}
LOOK |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID)


@contextmanager
def drawn(found: dict[str, str], name: str, columns: int) -> Iterator[Sequence[Axes]]:
    """Axes side by side, with one legend above; at the end their SVG is in `found`."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.2, 4.2))
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield axes
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib ends lines with spaces.
    found[name] = "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def line(axes: Axes, at: int, label: str, x: Sequence[float], y: Sequence[float]) -> None:
    style = "-" if at < len(COLOURS) else "--"
    axes.plot(x, y, style, color=COLOURS[at % len(COLOURS)], marker=MARKERS[at % len(MARKERS)], markersize=3, label=label)


def language(trained: Results, timed: Results | None) -> dict[str, str]:
    """Validation loss against characters and, where a step's time was measured, against time."""
    found: dict[str, str] = {}
    with drawn(found, "language", 1 if timed is None else 2) as axes:
        for at, variant in enumerate(trained.variants):
            row = trained.of(variant)[0]
            losses = [point["validation"] for point in row["curve"]]
            each = trained.settings["batch"] * trained.settings["context"] / 1e6
            line(axes[0], at, variant, [each * point["step"] for point in row["curve"]], losses)
            of_variant = timed.of(variant) if timed else []
            if of_variant:
                seconds = median_ms(of_variant[0], "ours") / 1e3
                line(axes[1], at, variant, [seconds * point["step"] for point in row["curve"]], losses)
        axes[0].set(title="validation loss", xlabel="million characters")
        if timed:
            axes[1].set(xlabel="seconds of training steps")
    return found


def mlp(trained: Results, timed: Results | None) -> dict[str, str]:
    """Scores and gradients against depth; time and memory, where they were measured."""
    found: dict[str, str] = {}
    depths = trained.settings["depths"]
    for task in dict.fromkeys(variant.partition(":")[0] for variant in trained.variants):
        of_task = [variant for variant in trained.variants if variant.startswith(f"{task}:")]
        bodies = dict.fromkeys(variant.partition(": ")[2].rpartition(", depth ")[0] for variant in of_task)
        with drawn(found, f"mlp-{task}", 2) as axes:
            for at, body in enumerate(bodies):
                there = [depth for depth in depths if trained.of(f"{task}: {body}, depth {depth}")]
                rows = [trained.of(f"{task}: {body}, depth {depth}") for depth in there]
                line(axes[0], at, body, there, [mean(row["curve"][-1]["score"] for row in each) for each in rows])
                line(axes[1], at, body, there, [mean(row["gradient_before"] for row in each) for each in rows])
            axes[0].set(title="test accuracy" if task == "digits" else "test R²", xlabel="depth", xscale="log")
            axes[1].set(title="gradient at the input over that at the output", xlabel="depth", xscale="log", yscale="log")
            for each_axes in axes:
                each_axes.set_xticks(depths, [str(depth) for depth in depths], minor=False)
                each_axes.minorticks_off()
            axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    return found


FIGURES: dict[str, Callable[[Results, Results | None], dict[str, str]]] = {"language": language, "mlp": mlp}
