"""`python -m score_kernels demo`: its parts run, what they claim follows from the numbers, and a broken backend fails it."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_torch import break_blas
from rich.console import Console

from score_kernels import blas, demo
from score_kernels.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("plain_machine")


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m score_kernels demo` is run: from the root of the source checkout."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the whole demo takes seconds."""
    checks, digits, speed = (importlib.import_module(f"score_kernels.demo.{part}") for part in ("checks", "digits", "speed"))
    monkeypatch.setattr(checks, "CASES", checks.CASES[2:4])
    monkeypatch.setattr(checks, "QUICK_SEEDS", 2)
    monkeypatch.setattr(digits, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(digits, "BODIES", {name: digits.BODIES[name] for name in (digits.BASELINE, "SCORE, 1 block x 8")})
    monkeypatch.setattr(speed, "ROWS", 256)
    monkeypatch.setattr(speed, "SHAPES", ((32, 32),))
    monkeypatch.setattr(speed, "QUICK_ROUNDS", 2)


def console() -> Console:
    return Console(file=io.StringIO(), width=demo.COLUMNS)


def test_all_parts_run_and_say_what_they_measured(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(importlib.import_module("score_kernels.demo.speed").COMPARED, "torch.compile")
    assert main(["demo", "--quick", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= demo.COLUMNS
    assert "8 of 8 checks passed" in out
    assert "seed 3" in out
    assert "SCORE, 1 block x 8: 0.14x the stack's parameters" in out
    assert "x its memory" in " ".join(out.split())
    assert re.search(r"32 -> 32 -> 32: score_kernels is \d+\.\d\dx as fast as the plain loop\.", out)
    assert "were never run on one" in " ".join(out.split())


def test_a_broken_backend_fails_the_demo(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_blas(monkeypatch)
    for part in ("digits", "speed"):
        monkeypatch.setattr(f"score_kernels.demo.{part}.run", lambda *_: None)
    assert main(["demo", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "accuracy check FAILED" in out
    # The float32 results of blas: an error of 1e-4 is still within the rounding of bfloat16.
    assert [line.split()[-1] for line in out.splitlines() if re.search("float32 +blas", line)] == ["FAIL", "FAIL"]
    assert "6 of 8 checks passed" in out


def test_a_wrong_gradient_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from score_kernels.demo import checks

    right = blas.backward
    monkeypatch.setattr(blas, "backward", lambda *a: [x * (1.1 if i == 1 else 1) for i, x in enumerate(right(*a))])
    outcomes = {o.backend: o for o in checks.check(checks.CASES[2], torch.bfloat16, range(2))}
    assert outcomes["reference"].passed
    assert not outcomes["blas"].passed
    assert outcomes["blas"].forward_ratio <= 1


def test_interpreter_has_the_triton_kernels_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from score_kernels.demo import checks

    small = replace(checks.CASES[2], rows=32, features=16, hidden=24, iterations=2)
    assert [o.backend for o in checks.check(small, torch.float32, range(1))] == ["reference", "blas"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcomes = {o.backend: o for o in checks.check(small, torch.float32, range(2))}
    assert list(outcomes) == ["reference", "blas", "triton"]
    assert outcomes["triton"].passed
    assert checks.backends(torch.bfloat16) == ["reference", "blas"]


def test_not_a_number_fails_the_check() -> None:
    from score_kernels.demo.checks import Outcome

    good = Outcome("", torch.float32, "blas", 1e-7, 1.0, 1e-7, 1.0)
    assert good.passed
    assert not replace(good, forward_ratio=float("nan")).passed
    assert not replace(good, gradient_ratio=float("nan")).passed


def test_conclusions_follow_the_numbers() -> None:
    from score_kernels.demo.digits import BASELINE, Result, conclusions

    base = Result(1000, [96.0, 97.0], [0.2, 0.4], 100.0)

    def said(**changes: object) -> str:
        (sentence,) = conclusions({BASELINE: base, "SCORE, x": replace(Result(500, [95.5, 96.5], [0.6], 25.0), **changes)})
        return sentence

    assert said() == (
        "SCORE, x: 0.50x the stack's parameters; accuracy 96.0 ± 0.7 % against 96.5 ± 0.7 %, -0.5 points, no more than the "
        "spreads together; 2.00x its time per epoch; 0.25x its memory."
    )
    assert "+2.5 points, more than the spreads together" in said(accuracies=[98.9, 99.1])
    assert "-6.5 points, more than the spreads together" in said(accuracies=[90.0, 90.0])
    assert "one seed: that may be chance" in said(accuracies=[99.0])
    assert "memory" not in said(peak_mb=None)


def test_what_does_not_run_is_absent_with_its_reason_and_what_is_wrong_has_no_time(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.providers import PROVIDERS
    from score_kernels.demo import speed

    def no_compiler(case):
        raise RuntimeError("no working C++ compiler found\nand more lines")

    monkeypatch.setitem(PROVIDERS, "torch_compile", replace(PROVIDERS["torch_compile"], build=no_compiler))
    break_blas(monkeypatch)
    screen = console()
    speed.run(screen, quick=True)
    out = " ".join(screen.file.getvalue().split())  # type: ignore[attr-defined]
    assert "32 -> 32 -> 32: torch.compile is absent: RuntimeError: no working C++ compiler found" in out
    assert "and more lines" not in out
    assert "32 -> 32 -> 32: score_kernels is wrong: relative error 1.0" in out
    assert "as fast as" not in out


def test_memory_that_cannot_be_measured_is_said(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from score_kernels.demo import digits

    def unknown(*_):
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(digits, "peak_in_child", unknown)
    screen = console()
    digits.run(screen, quick=True, seed=0)
    out = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "Memory was not measured: no /proc here" in out
    assert "MB" not in out


def test_speeds_are_paired_ratios_whichever_way_they_turn_out() -> None:
    from score_kernels.demo.speed import conclusions

    def row(provider: str, samples: list[float]) -> dict[str, object]:
        return {"case": "x", "provider": provider, "status": "ok", "samples": samples}

    rows = [row("eager", [2.0, 4.0, 8.0]), row("torch_compile", [0.5, 1.0, 2.0]), row("blas", [1.0, 2.0, 4.0])]
    assert conclusions(rows) == ["x: score_kernels is 2.00x as fast as the plain loop and 0.50x as fast as torch.compile."]
    assert conclusions(rows[:2]) == []
    absent = {**row("torch_compile", []), "status": "failed", "samples": None}
    assert conclusions([rows[0], absent, rows[2]]) == ["x: score_kernels is 2.00x as fast as the plain loop."]


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("torch", "doctor"), ("rich", "score-kernels[demo]"), ("sklearn", "score-kernels[demo]"), ("bench", "make demo")],
)
def test_what_is_missing_is_named_with_its_fix(missing: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / f"{missing}.py").write_text(f"raise ImportError('no {missing}')")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "score_kernels", "demo", "--quick"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert fix in done.stderr
    assert missing in done.stderr
    assert done.stdout == ""
