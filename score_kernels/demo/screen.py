"""What the demo's parts share of the screen: its tables and its paragraphs."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table


def table(left: Iterable[str], right: Iterable[str]) -> Table:
    """A table with columns of names on the left and columns of numbers, aligned to the right, after them."""
    lines = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in left:
        lines.add_column(name, no_wrap=True)
    for name in right:
        lines.add_column(name, justify="right", no_wrap=True)
    return lines


def paragraph(console: Console, text: str) -> None:
    console.print(escape(text))


def points(console: Console, sentences: Iterable[str]) -> None:
    """One point for each sentence; its further lines are indented."""
    for sentence in sentences:
        lines = Table.grid(padding=(0, 1))
        lines.add_row("-", escape(sentence))
        console.print(Padding(lines, (0, 0, 0, 1)))
