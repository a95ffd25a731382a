"""What the figures of a report have in common: their look, their axes, and the SVG that they become."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .providers import title
from .resultfile import Key, Result

# Okabe and Ito's colours, which colour-blind readers tell apart, without the ones that vanish on white or black. There is one
# marker more than colours, so that many providers get different pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")

# Stand for the page's own colours, which matplotlib does not know.
TEXT, GRID = "#010203", "#040506"
OF_THE_PAGE = {TEXT: "currentColor", GRID: "var(--line)"}

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "bench",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "xtick.bottom": False,
    "ytick.left": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
}

# Round numbers of a logarithmic axis, from fine to coarse.
SCALES = ((1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0,))
DECADES = range(-9, 10)
MOST_TICKS = 9

WIDTH = 8.2
LEGEND_INCHES = 1.6

# A figure with more lines has its scale above, too.
SCREENFUL = 12


@contextmanager
def drawn(height: float, width: float = WIDTH) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure, and where its SVG is at the end: the same one for the same data, in the page's colours."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, out
        raw = io.StringIO()
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = raw.getvalue()
    svg = svg[svg.index("<svg") :]
    for sentinel, colour in OF_THE_PAGE.items():
        svg = svg.replace(sentinel, colour)
    out.write(svg)


def named(svg: str, prefix: str) -> str:
    """The SVG with its ids made unique in a page of several."""
    return re.sub(r'( id="|href="#|url\(#)', lambda found: f"{found[1]}{prefix}-", svg)


def by_problem(figure: Figure, result: Result) -> Axes:
    """Axes with a line for each problem, the first one on top."""
    axes = figure.subplots()
    labels = [label(key, result) for key in result.problems]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(labeltop=len(labels) > SCREENFUL)
    for line in range(1, len(labels)):
        axes.axhline(line - 0.5, color=GRID, linewidth=0.6)
    return axes


def label(key: Key, result: Result) -> str:
    """A problem in few words: what all of the result share is left out."""
    return ", ".join(part for at, part in enumerate(key) if at == 0 or len({other[at] for other in result.problems}) > 1)


def height(result: Result, lanes: int) -> float:
    return 1.1 + len(result.problems) * (0.12 + 0.11 * lanes)


def offset(at: int, count: int) -> float:
    return (at - (count - 1) / 2) * 0.7 / count


def mark(result: Result, provider: str) -> tuple[str, str]:
    """The same for a provider in every figure of a page."""
    at = list(dict.fromkeys((*result.beside, *result.providers))).index(provider)
    return COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]


def style(result: Result, provider: str) -> dict[str, Any]:
    colour, marker = mark(result, provider)
    return {"color": colour, "marker": marker}


def logarithmic(axes: Axes, which: str, values: Sequence[float], unit: str = "") -> None:
    """A logarithmic x or y axis that begins and ends at a round number, with as many of those between as are not too many."""
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    for steps in SCALES:
        numbers = [step * 10.0**decade for decade in DECADES for step in steps]
        low = max((x for x in numbers if x <= min(values)), default=numbers[0])
        high = min((x for x in numbers if x >= max(values)), default=numbers[-1])
        ticks = [x for x in numbers if low <= x <= high]
        if len(ticks) <= MOST_TICKS:
            break
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}{unit}"))
    axis.set_minor_locator(NullLocator())


def legend(figure: Figure) -> None:
    """Each provider once, above everything."""
    handles = {title(str(line.get_label())): line for axes in figure.axes for line in axes.get_lines()}
    handles = {name: line for name, line in handles.items() if not name.startswith("_")}
    columns = max(int(figure.get_figwidth() / LEGEND_INCHES), 1)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=min(len(handles), columns))
