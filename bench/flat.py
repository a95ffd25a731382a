"""A result's rows as one table of plain values, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .targets import Row


def flattened(row: Row) -> dict[str, Any]:
    """Objects become columns named with a dot; lists become JSON; what is null stays empty."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": x for inner, x in flattened(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def write(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file with a column for everything that any of the rows has. An object is several, all empty where it is null."""
    flat = [flattened(row) for row in rows]
    objects = {key for row in rows for key, value in row.items() if isinstance(value, dict)}
    columns = [key for key in dict.fromkeys(key for row in flat for key in row) if key not in objects]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)
