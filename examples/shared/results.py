"""Result files of the examples: where they ran, their settings, and a row for every run, written whole after each."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environment import environment

from .experiment import Row

# What has to agree between a result and the run that goes on with it.
SAME = ("gpu", "torch", "cpu", "threads")


@dataclass
class Results:
    """Rows are known by their variant and seed."""

    path: Path
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], device: str, fresh: bool) -> Results:
        """The results in the file, to which this run adds. Raises ValueError for those of other settings or another machine."""
        settings = json.loads(json.dumps(settings))  # as they are read again
        new = cls(path, environment(device), settings)
        if fresh:
            path.unlink(missing_ok=True)
            shutil.rmtree(new.checkpoints, ignore_errors=True)
        if not path.exists():
            new.write()
            return new
        old = cls.load(path)
        differs = [f"{name} {old.environment[name]!r}, this is {new.environment[name]!r}" for name in SAME
                   if old.environment[name] != new.environment[name]]  # fmt: skip
        differs += [f"{name} {old.settings.get(name)!r}, this is {value!r}" for name, value in settings.items()
                    if old.settings.get(name) != value]  # fmt: skip
        if differs:
            raise ValueError(f"{path} has results with {'; '.join(differs)}: --fresh begins anew, --out writes elsewhere")
        return old

    @classmethod
    def load(cls, path: Path) -> Results:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, content["environment"], content["settings"], content["rows"])

    @property
    def checkpoints(self) -> Path:
        return self.path.with_suffix(".checkpoints")

    def has(self, variant: str, seed: int) -> bool:
        return any((row["variant"], row["seed"]) == (variant, seed) for row in self.rows)

    def of(self, variant: str) -> list[Row]:
        return [row for row in self.rows if row["variant"] == variant]

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row["variant"] for row in self.rows))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Whole or not at all. One row a line, so that a change shows in a diff as the rows that changed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {"environment": self.environment, "settings": self.settings}
        lines = ",\n".join(f"  {json.dumps(rounded(row), allow_nan=False)}" for row in self.rows)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        part.replace(self.path)


def rounded(value: Any) -> Any:
    """Numbers to 6 digits: what is behind them is noise, and files stay small."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
