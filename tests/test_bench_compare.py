"""`python -m bench compare`: finds what became slower, and nothing where only the machine differs by its noise."""

from __future__ import annotations

import math
import random

import pytest
from result_files import PARAMS, broken, noisy, result, row, written

from bench import console, plain
from bench.__main__ import main
from bench.comparison import compare, medians_ratio, sheet, summary

SEEDS = range(200)


def verdicts(a, b, **options):
    return [change.verdict for change in compare(result(a), result(b), **options)]


@pytest.mark.parametrize("rounds", [7, 20])
@pytest.mark.parametrize("spread", [0.005, 0.03])
def test_two_runs_of_one_distribution_raise_no_alarm(rounds, spread):
    """With drift, outliers and noise of up to 3%: in none of 200 pairs of runs."""
    for seed in SEEDS:
        a, b = (row(samples=noisy((run, seed), rounds=rounds, spread=spread)) for run in "ab")
        assert verdicts(a, b) == ["same"], seed


@pytest.mark.parametrize(("spread", "found"), [(0.01, 0.98), (0.03, 0.8)])
def test_a_planted_slowdown_of_a_tenth_is_found(spread, found):
    """In nearly every pair of runs where the noise is 1%, in most where it is 3%; and backwards it is a speed-up."""
    slower = faster = 0
    for seed in SEEDS:
        a, b = row(samples=noisy(("a", seed), spread=spread)), row(samples=noisy(("b", seed), ms=11.0, spread=spread))
        slower += verdicts(a, b) == ["regression"]
        faster += verdicts(b, a) == ["improvement"]
    assert min(slower, faster) >= found * len(SEEDS)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    def lognormal(seed: str, median: float) -> list[float]:
        return [random.Random(f"{seed} {i}").lognormvariate(math.log(median), 0.1) for i in range(20)]

    intervals = [medians_ratio(lognormal(f"a{seed}", 10), lognormal(f"b{seed}", 12)) for seed in SEEDS]
    assert 0.97 * len(SEEDS) <= sum(low <= 1.2 <= high for _, low, high in intervals)
    assert sum(low <= 1.0 for _, low, high in intervals) <= 0.1 * len(SEEDS)
    assert medians_ratio([1.0, 2.0, 90.0], [3.0, 4.0, 5.0]).median == 2.0
    assert medians_ratio([2.0] * 5, [3.0] * 5) == (1.5, 1.5, 1.5)


def test_the_threshold_is_what_has_to_be_exceeded():
    before, after = row(samples=[10.0] * 7), row(samples=[10.5] * 7)
    assert verdicts(before, after) == ["regression"]
    assert verdicts(before, after, threshold=0.06) == ["same"]
    assert verdicts(after, before) == ["improvement"]
    assert verdicts(after, before, threshold=0.06) == ["same"]


def test_rows_without_times():
    ok = row()
    for status in ("wrong", "failed"):
        bad = broken(status, "planted")
        (change,) = compare(result(ok), result(bad))
        assert (change.verdict, change.detail) == ("regression", f"{status}, planted")
        assert verdicts(bad, ok) == ["improvement"]
        assert verdicts(bad, bad) == ["same"]
    absent = broken("absent", "no GPU")
    assert verdicts(ok, absent) == ["gone"]
    assert verdicts(absent, ok) == ["new"]
    assert verdicts(absent, absent) == []


def test_rows_of_one_result_only_stand_with_their_problem():
    a = result(row("x", "eager"), row("x", "old"), row("y"))
    b = result(row("x", "eager", samples=[10.2] * 7), row("y"), row("x", "fresh"), row("z"))
    found = [(change.row["case"], change.row["provider"], change.verdict) for change in compare(a, b)]
    assert found == [
        ("x", "eager", "same"), ("x", "old", "gone"), ("x", "fresh", "new"), ("y", "blas", "same"), ("z", "blas", "new"),
    ]  # fmt: skip
    assert summary(compare(a, b)).endswith(
        "2 the same, 0 unclear, 1 only in A, 2 only in B; peers: B / A is 1.02 in the median"
    )


def test_what_cannot_be_compared_is_unclear():
    slow = [20.0] * 7
    for change, said in (
        ({"rows": 2048}, "another problem, rows 1024 -> 2048"),
        ({"params": {**PARAMS, "solver": "rk4"}}, "another problem, solver euler -> rk4"),
        ({"samples": [20.0] * 4}, "4 samples, at least 5 are needed: run --rounds 5"),
    ):
        (found,) = compare(result(row()), result(row(**{"samples": slow, **change})))
        assert (found.verdict, found.detail) == ("unclear", said)
    # An option that only the newer version writes is no difference.
    assert verdicts(row(), row(samples=slow, params={**PARAMS, "grad_iterations": None})) == ["regression"]


@pytest.mark.parametrize("screen", [console, plain])
def test_command_line(tmp_path, capsys, monkeypatch, screen):
    monkeypatch.setattr("bench.__main__._screen", lambda: screen)
    fast = written(tmp_path / "fast.json", result(row(samples=noisy("a", spread=0.01)), row(provider="eager")))
    slow = written(tmp_path / "slow.json", result(row(samples=noisy("b", ms=11.0, spread=0.01)), row(provider="eager")))
    assert main(["compare", fast, slow]) == 1
    printed = capsys.readouterr().out
    assert "regression" in printed
    assert "1 regressions, 0 improvements, 1 the same" in printed
    assert main(["compare", slow, fast]) == 0
    assert "0 regressions, 1 improvements, 1 the same" in capsys.readouterr().out
    assert main(["compare", fast, slow, "--threshold", "0.2"]) == 0


def test_a_regression_is_red_and_an_improvement_green(monkeypatch):
    from rich.console import Console

    a, b = result(row("x", samples=[10.0] * 7), row("y", samples=[12.0] * 7)), result(row("x", samples=[12.0] * 7), row("y"))
    terminal = Console(force_terminal=True, width=140, color_system="standard")
    monkeypatch.setattr(console, "_console", lambda: terminal)
    with terminal.capture() as captured:
        console.show(sheet(a, b, compare(a, b)))
    lines = captured.get().splitlines()
    assert any("\x1b[1;31m" in line and "regression" in line for line in lines)
    assert any("\x1b[32m" in line and "improvement" in line for line in lines)


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"threads": 4}, {"gpu": "a GPU"}])
def test_results_of_different_machines_are_refused_unless_told(tmp_path, capsys, change):
    here, there = written(tmp_path / "a.json", result(row())), written(tmp_path / "b.json", result(row(), **change))
    with pytest.raises(SystemExit, match="2"):
        main(["compare", here, there])
    (name,) = change
    assert f"{name}: a is of" in capsys.readouterr().err
    assert main(["compare", here, there, "--any-machine"]) == 0


def test_a_gpu_s_results_may_be_of_different_hosts(tmp_path):
    here = written(tmp_path / "a.json", result(row(), gpu="a GPU"))
    there = written(tmp_path / "b.json", result(row(), gpu="a GPU", cpu="another", threads=8))
    assert main(["compare", here, there]) == 0


def test_what_is_no_result_is_said(tmp_path, capsys):
    good = written(tmp_path / "a.json", result(row()))
    for name, text in (
        ("none.json", None),
        ("text.json", "text"),
        ("list.json", "[]"),
        ("number.json", "1"),
        ("other.json", "{}"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(["compare", good, str(path)])
        assert f"{path}: expected a file written by `python -m bench run --json`, got" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["compare", good, good, "--threshold", "3"])
    assert "expected a share from 0 to below 1, like 0.03, got 3" in capsys.readouterr().err
