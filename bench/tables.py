"""Markdown tables of result files, for README and docs: generated, never typed.

python -m bench.tables README.md docs/numerics.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .measure import Interval, paired_ratio

OURS = "blas"

MARKER = re.compile(r"(<!-- table: (\S+) -->)\n.*?(<!-- end -->)", re.DOTALL)


def markdown(path: Path) -> str:
    """One line for each problem of the file: times, peak memory where it was measured, and how many times faster ours is."""
    content = json.loads(path.read_text(encoding="utf-8"))
    problems: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["status"] == "ok":
            problems.setdefault((row["case"], row["mode"], row["dtype"]), {})[row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in content["rows"]))
    peers = [name for name in providers if name != OURS]
    memory = any(row["peak_memory_mb"] is not None for row in content["rows"])
    head = ["case", *(f"{name}, ms" for name in providers), *(f"{name} / {OURS}" for name in peers)]
    head += [f"{name}, peak MB" for name in providers] if memory else []
    lines = [head, ["---"] * len(head)]
    for (case, mode, _), rows in problems.items():
        cells = [f"{case}, {mode}", *(_figure(rows[name]["ms_median"]) for name in providers)]
        cells += [_ratio(paired_ratio(rows[name]["samples"], rows[OURS]["samples"])) for name in peers]
        cells += [_figure(rows[name]["peak_memory_mb"]) for name in providers] if memory else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(interval: Interval) -> str:
    return f"**{interval.median:.2f}** ({interval.low:.2f} to {interval.high:.2f})"


def filled(text: str, root: Path) -> str:
    """The text with the table of its file between every `<!-- table: FILE -->` and `<!-- end -->`."""
    return MARKER.sub(lambda found: f"{found[1]}\n{markdown(root / found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        document = Path(name)
        document.write_text(filled(document.read_text(encoding="utf-8"), Path.cwd()), encoding="utf-8")
