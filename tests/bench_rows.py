"""What the tests of the benchmark harness share: a tiny case, measured and held to the schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from bench.cases import Case
from bench.providers import Provider
from bench.run import Problem, Settings, measure

SCHEMA = json.loads((Path(__file__).parent.parent / "bench" / "schema.json").read_text())
ROW = {**SCHEMA["$defs"]["row"], "$defs": SCHEMA["$defs"]}
TIMES = ("ms_median", "ms_p20", "ms_p80", "samples", "compile_ms", "tflops", "roofline", "speedup_vs_eager")

TINY = Case("tiny", "mlp", 48, 16, 24, 3, "a test")
SETTINGS = Settings(rounds=3)


def quiet(what: str, share: float) -> None:
    if not what or share < 0:
        raise AssertionError(f"progress of {share} told as {what!r}")


def rows_of(*providers: Provider, case: Case = TINY, mode: str = "forward", dtype: str = "float32"):
    rows = {row["provider"]: row for row in measure(Problem(case, mode, dtype), providers, SETTINGS, quiet)}
    for row in rows.values():
        jsonschema.validate(row, ROW)
    return rows


def peer(name: str, build) -> Provider:
    return Provider(name, "peer", "made for a test", build)
