"""`python -m examples.report`: docs/experiments.md, README.md and the figures, from the files in examples/results/.

What stands between `<!-- experiment: NAME -->` and `<!-- end -->` is written by the function of that name in BLOCKS: no number
of a result is typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from examples.shared import figures, tables
from examples.shared.results import Results
from examples.shared.runner import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "docs" / "experiments.md", ROOT / "README.md")
FIGURES = ROOT / "docs" / "figures"

MARKER = re.compile(r"(<!-- experiment: ([\w-]+) -->)\n.*?(<!-- end -->)", re.DOTALL)

Block = Callable[[Results, Results | None], str]

# Block -> the experiment that it is of, and what writes it.
BLOCKS: dict[str, tuple[str, Block]] = {
    "molecules-where": ("molecules", tables.where),
    "molecules-table": ("molecules", tables.molecules),
    "molecules-found": ("molecules", tables.molecules_found),
    "molecules-speed": ("molecules", tables.speed),
    "language-where": ("language", tables.where),
    "language-table": ("language", tables.language),
    "language-found": ("language", tables.language_found),
    "language-speed": ("language", tables.speed),
    "language-samples": ("language", tables.samples),
    "mlp-where": ("mlp", tables.where),
    "mlp-scores": ("mlp", tables.mlp_scores),
    "mlp-gradients": ("mlp", tables.mlp_gradients),
    "mlp-found": ("mlp", tables.mlp_found),
    "mlp-speed": ("mlp", tables.speed),
    "summary": ("molecules", tables.summary),
}


def results(name: str, part: str, preset: str = "cpu") -> Results | None:
    path = RESULTS / f"{name}-{preset}-{part}.json"
    return Results.load(path) if path.exists() else None


def filled(text: str) -> str:
    """The text with every block as the results have it. Raises ValueError for a name that is not in BLOCKS."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise ValueError(f"experiment: expected one of {', '.join(BLOCKS)}, got {found[2]}")
        name, write = BLOCKS[found[2]]
        trained = results(name, "train")
        if trained is None:
            raise ValueError(f"{found[2]}: expected results in {RESULTS}: run python -m examples.{name}")
        return f"{found[1]}\n{write(trained, results(name, 'speed'))}\n{found[3]}"

    return MARKER.sub(block, text)


def drawn() -> dict[Path, str]:
    """The figures, as SVG."""
    found: dict[Path, str] = {}
    for name, draw in figures.FIGURES.items():
        trained = results(name, "train")
        if trained is not None:
            found |= {FIGURES / f"{file}.svg": svg for file, svg in draw(trained, results(name, "speed")).items()}
    return found


def main() -> None:
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    for path, svg in drawn().items():
        path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
