"""The benchmark harness: what it reports is measured, right, and in the form that the schema holds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import inputs, memory
from bench.__main__ import main
from bench.cases import MODES, SUITES, Case, select
from bench.flops import flops, traffic
from bench.measure import CallableError, Prepared, Rates, Summary, _cuda_ms, compare, paired_ratio, rates
from bench.providers import PROVIDERS, Provider, eager
from bench.run import Problem, Settings, measure, problems, run

SCHEMA = json.loads((Path(__file__).parent.parent / "bench" / "schema.json").read_text())
TIMES = ("ms_median", "ms_p20", "ms_p80", "samples", "compile_ms", "tflops", "roofline", "speedup_vs_eager")

TINY = Case("tiny", "mlp", 48, 16, 24, 3, "a test")
SETTINGS = Settings(rounds=3)


@pytest.fixture(autouse=True)
def _one_thread(plain_machine):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(what: str, share: float) -> None:
    assert what
    assert share >= 0


def rows_of(*providers: Provider, case: Case = TINY, mode: str = "forward", dtype: str = "float32"):
    rows = {row["provider"]: row for row in measure(Problem(case, mode, dtype), providers, SETTINGS, quiet)}
    for row in rows.values():
        jsonschema.validate(row, {**SCHEMA["$defs"]["row"], "$defs": SCHEMA["$defs"]})
    return rows


def peer(name: str, build) -> Provider:
    return Provider(name, "peer", "made for a test", build)


def changed_dt(case: Case):
    return eager(replace(case, dt=case.dt * 1.01))


def not_a_number(case: Case):
    forward = eager(case)
    return lambda h, parameters: forward(h, parameters) * math.nan


def raising(case: Case):
    def forward(h, parameters):
        raise ArithmeticError("planted")

    return forward


def raising_after(calls: int):
    def build(case: Case):
        forward, count = eager(case), iter(range(calls))

        def counted(h, parameters):
            if next(count, None) is None:
                raise ArithmeticError("planted, late")
            return forward(h, parameters)

        return counted

    return build


def test_cli_run_writes_a_valid_result(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["run", "--case", "mlp-launch*", "--rounds", "2", "--threads", "1", "--device", "cpu", "--json", str(path)]
    arguments += ["--provider", "eager", "--provider", "blas", "--mode", "forward", "--mode", "training"]
    assert main(arguments) == 0
    result = json.loads(path.read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__
    assert [row["key"] for row in result["rows"]] == [
        f"mlp-launch-bound/{mode}/float32/{provider}" for mode in ("forward", "training") for provider in ("eager", "blas")
    ]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert len(row["samples"]) == 2
        assert min(row["samples"]) <= row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] <= max(row["samples"])
        assert row["tflops"] == pytest.approx(row["flops"] / (row["ms_median"] / 1e3) / 1e12)
        assert 0 < row["rel_error"] < 1e-5
        assert (row["plan"] is not None) == (row["provider"] == "blas")
        assert row["roofline"] is None
    ours = result["rows"][1]
    ratios = [a / b for a, b in zip(result["rows"][0]["samples"], ours["samples"], strict=True)]
    assert ours["speedup_vs_eager"]["median"] == pytest.approx(sum(ratios) / 2)
    assert "mlp-launch-bound" in capsys.readouterr().out


def test_schema_refuses_times_of_a_row_that_is_not_ok():
    row = rows_of(PROVIDERS["eager"])["eager"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"environment": {}, "rows": []}, SCHEMA)
    schema = {**SCHEMA["$defs"]["row"], "$defs": SCHEMA["$defs"]}
    for bad in ({**row, "status": "wrong", "error": "text"}, {**row, "ms_median": None}, {**row, "extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


@pytest.mark.parametrize("mode", MODES)
def test_wrong_provider_gets_no_times(mode):
    rows = rows_of(PROVIDERS["eager"], peer("off", changed_dt), peer("nan", not_a_number), PROVIDERS["blas"], mode=mode)
    assert {name: row["status"] for name, row in rows.items()} == {"eager": "ok", "off": "wrong", "nan": "wrong", "blas": "ok"}
    for name in ("off", "nan"):
        assert all(rows[name][key] is None for key in TIMES)
    assert rows["off"]["rel_error"] > 1e-4
    assert "expected at most" in rows["off"]["error"]
    assert rows["nan"]["rel_error"] is None
    assert "not finite" in rows["nan"]["error"]


def test_raising_provider_fails_and_the_run_goes_on():
    late = peer("late", raising_after(4))
    providers = [peer("early", raising), PROVIDERS["eager"], late, PROVIDERS["blas"]]
    targets = problems([TINY, replace(TINY, name="second")], [], [])
    found = [row for rows in run(targets, providers, SETTINGS, quiet) for row in rows]
    jsonschema.validate(found, {"items": SCHEMA["properties"]["rows"]["items"], "$defs": SCHEMA["$defs"]})
    assert [(row["case"], row["provider"], row["status"]) for row in found] == [
        (case, name, status)
        for case in ("tiny", "second")
        for name, status in (("early", "failed"), ("eager", "ok"), ("late", "failed"), ("blas", "ok"))
    ]
    assert found[0]["error"] == "ArithmeticError: planted"
    assert found[2]["error"] == "raised while it was timed: ArithmeticError: planted, late"
    assert all(found[2][key] is None for key in TIMES)
    assert found[3]["speedup_vs_eager"]["low"] <= found[3]["speedup_vs_eager"]["high"]


def test_absent_peer_says_how_to_install_it():
    absent = Provider("elsewhere", "peer", "", eager, requires=("torch", "no_such_module"), install="pip install it")
    row = rows_of(absent, PROVIDERS["eager"])["elsewhere"]
    assert (row["status"], row["error"]) == ("absent", "no_such_module not installed: pip install it")
    assert all(row[key] is None for key in TIMES)


def test_kernel_is_absent_on_a_cpu_unless_it_is_interpreted(monkeypatch):
    kernels = (PROVIDERS["eager"], PROVIDERS["triton"], PROVIDERS["auto"])
    rows = rows_of(*kernels)
    assert (rows["triton"]["status"], rows["triton"]["error"]) == ("absent", "it needs a GPU")
    assert all(rows["triton"][key] is None for key in TIMES)
    assert rows["auto"]["plan"]["backend"] == "blas"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows = rows_of(*kernels, case=replace(TINY, iterations=1), mode="training")
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(("eager", "triton", "auto"), "ok")
    assert (rows["triton"]["plan"]["backend"], rows["triton"]["plan"]["backward"]) == ("triton", "triton")


def test_case_that_the_planner_refuses_is_absent_with_its_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows = rows_of(PROVIDERS["triton"], PROVIDERS["blas"], dtype="float64")
    assert rows["blas"]["status"] == "ok"
    assert rows["triton"]["status"] == "absent"
    assert rows["triton"]["error"] == "backend='triton' cannot run this call: float64 is computed by blas"


def test_roofline_is_the_share_of_the_bound_of_measured_rates():
    # 4 TFLOP at 100 TFLOP/s take 40 ms; 1 GB at 100 GB/s takes 10 ms.
    assert Rates(100, 100).bound_ms(4 * 10**12, 10**9) == pytest.approx(40)
    assert Rates(100, 10).bound_ms(4 * 10**12, 10**9) == pytest.approx(100)
    settings = replace(SETTINGS, rates=Rates(2, 5))
    (row,) = measure(Problem(TINY, "forward", "bfloat16"), [PROVIDERS["eager"]], settings, quiet)
    bound_ms = max(row["flops"] / 2e12, row["bytes"] / 5e9) * 1e3
    assert row["roofline"] == pytest.approx(bound_ms / row["ms_median"])
    (row,) = measure(Problem(TINY, "forward", "float32"), [PROVIDERS["eager"]], settings, quiet)
    assert row["roofline"] is None


def test_rates_are_of_a_product_and_of_a_copy(monkeypatch):
    size, results = 64, {}

    def two_milliseconds(callables, rounds, *, device):
        results.update({name: run() for name, run in callables.items()})
        return dict.fromkeys(callables, Summary([2.0], 2.0, 2.0, 2.0))

    monkeypatch.setattr("bench.measure.compare", two_milliseconds)
    found = rates("cpu", size)
    assert results["product"].shape == (size, size)
    assert {x.dtype for x in results.values()} == {torch.bfloat16}
    # 2 operations per multiply-add; every byte of the copy is read and written.
    assert found.tflops == pytest.approx(2 * size**3 / 2e-3 / 1e12)
    assert found.gb_per_s == pytest.approx(2 * 2 * results["copy"].numel() / 2e-3 / 1e9)


def test_cache_is_flushed_for_what_does_not_stay_in_it(monkeypatch):
    flushes = []

    def recording(steps, rounds, *, flush, **options):
        flushes.append(flush)
        return compare(steps, rounds, **options)

    monkeypatch.setattr("bench.run.compare", recording)
    for rows in (48, 100_000):
        measure(Problem(replace(TINY, rows=rows, iterations=1), "forward", "float32"), [PROVIDERS["eager"]], SETTINGS, quiet)
    assert flushes == [False, True]


def test_headline_cases_are_right_in_bfloat16():
    """On few rows, by what a CPU has: that every case of a GPU's table is within the tolerance it is held to."""
    for case in SUITES["headline"].cases:
        (mode,) = case.modes
        rows = rows_of(PROVIDERS["eager"], PROVIDERS["blas"], case=replace(case, rows=64), mode=mode, dtype=case.dtype)
        assert {name: row["status"] for name, row in rows.items()} == {"eager": "ok", "blas": "ok"}, case.name


def test_resumed_run_keeps_what_is_there_and_measures_the_rest(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["run", "--suite", "quick", "--case", "mlp-launch*", "--case", "linear*", "--rounds", "1", "--device", "cpu"]
    arguments += ["--provider", "eager", "--json", str(path), "--resume"]
    assert main([*arguments, "--minutes", "0"]) == 0
    assert not path.exists()
    assert "not measured, no time left (--resume goes on): linear-leaky forward float32" in capsys.readouterr().err
    assert main([*arguments[:5], *arguments[7:]]) == 0
    first = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in first] == ["mlp-launch-bound"]
    assert main(arguments) == 0
    result = json.loads(path.read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["rows"][:1] == first
    assert [row["case"] for row in result["rows"]] == ["mlp-launch-bound", "linear-leaky"]
    for change, said in (
        (["--provider", "blas"], "was measured with other providers: eager"),
        (["--threads", "2"], "is of threads 1, this is 2"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, *change])
        assert said in capsys.readouterr().err


def test_shows_its_results_without_rich(tmp_path):
    """A machine with a GPU and nothing but torch, triton and pytest."""
    for name in ("rich", "hypothesis", "jsonschema", "sklearn"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    hidden = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'rich' else find(name, *a)\n"
        "from bench.__main__ import main\n"
        "sys.exit(main(['list']) or main(sys.argv[1:]))"
    )
    arguments = ["run", "--case", "mlp-launch-bound", "--provider", "eager", "--rounds", "1", "--device", "cpu"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 done: mlp-launch-bound forward float32" in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("mlp-launch-bound") and line.endswith("ok") for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in PROVIDERS)


def test_failed_row_sets_the_exit_status(monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "eager", peer("eager", raising))
    assert main(["run", "--case", "mlp-launch-bound", "--provider", "eager", "--rounds", "1", "--device", "cpu"]) == 1
    assert "failed: ArithmeticError:" in capsys.readouterr().out


def test_compiled_provider_reports_its_compile_time():
    row = rows_of(PROVIDERS["torch_compile"], case=replace(TINY, iterations=1))["torch_compile"]
    assert (row["status"], row["error"]) == ("ok", None)
    # A compiled kernel is called in microseconds; what is compiled again in a timed call would show as a second or so.
    assert row["compile_ms"] > 20 * max(row["samples"])
    assert row["speedup_vs_eager"] is None


VARIANTS = [
    {"op": "linear", "activation": "leaky_relu", "norm": None, "hidden": 16},
    {"gated": True, "norm": "rmsnorm", "bias": False, "activation": "silu"},
    {"solver": "midpoint"},
    {"solver": "heun", "dt": 0.25},
    {"solver": "rk4", "update": "residual", "dt": None},
    {"update": "residual", "sets": 2, "iterations": 5},
    {"update": "replace", "dt": None, "sets": 3},
    {"sets": 2, "order": "cyclic", "iterations": 5},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_peers_compute_the_same_as_float64_reference(change):
    case = replace(TINY, **change)
    for mode in MODES:
        given = inputs.make(case, mode, torch.float64, "cpu")
        expected = inputs.reference(case, given, mode)
        assert len(expected) == {"forward": 1, "backward": 1 + len(case.shapes), "training": 2 + len(case.shapes)}[mode]
        for name in ("eager", "blas"):
            step = inputs.step(PROVIDERS[name].build(case), given, mode)
            assert inputs.relative_error(step.run(step.prepare()), expected) < 1e-13


def test_reference_in_parts_is_the_reference(monkeypatch):
    given = inputs.make(TINY, "training", torch.float32, "cpu")
    whole = inputs.reference(TINY, given, "training")
    monkeypatch.setattr(inputs, "REFERENCE_ROWS", 7)
    assert inputs.relative_error(inputs.reference(TINY, given, "training"), whole) < 1e-13


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_flops_are_what_torch_counts(change, mode):
    case = replace(TINY, **change)
    step = inputs.step(eager(case), inputs.make(case, mode, torch.float32, "cpu"), mode)
    with FlopCounterMode(display=False) as counter:
        step.run(step.prepare())
    assert flops(case, mode) == counter.get_total_flops()


def test_traffic_is_inputs_and_outputs_once():
    case = replace(TINY, norm=None, sets=2)
    state, weights = 48 * 16, 2 * (2 * 16 * 24 + 16 + 24)
    assert traffic(case, "forward", 2) == 2 * (2 * state + weights)
    assert traffic(case, "backward", 4) == 4 * (3 * state + 2 * weights)
    assert traffic(case, "training", 4) == 4 * (5 * state + 3 * weights)


def test_memory_is_that_of_one_call():
    assert memory.peak_in_child("functools:partial", torch.ones, 16_000_000) == pytest.approx(64, abs=2)


def test_memory_excludes_what_is_there_before():
    there = torch.ones(16_000_000)
    assert memory.peak_in_child("functools:partial", torch.sum, there) < 2


def test_memory_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"functools:no_such.*AttributeError.*no_such"):
        memory.peak_in_child("functools:no_such")


def test_run_measures_memory_in_a_child():
    case = next(case for case in SUITES["quick"].cases if case.name == "mlp-launch-bound")
    settings = Settings(rounds=1, memory=True)
    (row,) = measure(Problem(replace(case, rows=32768), "forward", "float32"), [PROVIDERS["blas"]], settings, quiet)
    # The output is 16.8 MB; tiles and thread pools are small beside it.
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["peak_memory_mb"] == pytest.approx(32768 * 128 * 4 / 1e6, abs=8)


def test_paired_ratio_cancels_what_both_share():
    generator = torch.Generator().manual_seed(1)
    drift = 1 + torch.rand(40, generator=generator, dtype=torch.float64)
    noise = 1 + 0.02 * torch.randn(40, generator=generator, dtype=torch.float64)
    median, low, high = paired_ratio((1.5 * drift * noise).tolist(), drift.tolist())
    assert low <= median <= high
    assert median == pytest.approx(1.5, abs=0.02)
    assert high - low < 0.04
    assert paired_ratio([3.0, 3.0], [2.0, 2.0]) == (1.5, 1.5, 1.5)


def test_confidence_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(100):
        noise = torch.exp(0.1 * torch.randn(20, generator=generator, dtype=torch.float64))
        interval = paired_ratio(noise.tolist(), [1.0] * 20)
        covered += interval.low <= 1.0 <= interval.high
    assert 85 <= covered <= 100


def test_compare_interleaves_and_times_only_the_run():
    calls: list[str] = []

    def prepare() -> str:
        time.sleep(0.05)
        return "state"

    def prepared(state: str) -> None:
        assert state == "state"
        calls.append("b")
        time.sleep(0.004)

    def plain() -> None:
        calls.append("a")
        time.sleep(0.008)

    done: list[int] = []
    times = compare({"a": plain, "b": Prepared(prepare, prepared)}, 4, baseline="a", warmup=1, on_round=done.append)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert done == [1, 2, 3, 4]
    assert 4 <= times["b"].median_ms < 40
    assert times["a"].speedup == (1, 1, 1)
    assert times["b"].speedup.median == pytest.approx(
        torch.tensor([a / b for a, b in zip(times["a"].samples_ms, times["b"].samples_ms, strict=True)]).quantile(0.5).item()
    )


def test_gpu_clock_flushes_before_it_starts_and_stops_after_the_run(monkeypatch):
    """The order of things on the stream, with recorded events in place of a GPU's."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("tick")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    step = Prepared(lambda: order.append("prepare"), lambda _: order.append("run"))
    assert _cuda_ms(step, 2, lambda: order.append("flush")) == 3.0
    assert order == 2 * ["prepare", "flush", "tick", "run", "tick"] + ["wait"]


def test_compare_errors():
    with pytest.raises(ValueError, match="rounds: expected 1 or more, got 0"):
        compare({"a": lambda: None}, 0)
    with pytest.raises(ValueError, match="baseline: expected one of a, got 'b'"):
        compare({"a": lambda: None}, 1, baseline="b")
    with pytest.raises(CallableError, match="b raised") as caught:
        compare({"a": lambda: None, "b": lambda: 1 / 0}, 1)
    assert caught.value.name == "b"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_cli_list_and_selection(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name, suite in SUITES.items():
        assert f"suite {name}" in listed
        assert all(case.name in listed for case in suite.cases)
    assert all(name in listed for name in PROVIDERS)
    assert [case.name for case in select(None, ["mlp-64*", "linear*"])] == ["linear-leaky", "mlp-64x64-t8", "mlp-64x64-t16"]
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--case", "no-such-*"])
    assert "'no-such-*' matches none of: mlp-launch-bound" in capsys.readouterr().err


def test_case_names_are_unique():
    names = [case.name for suite in SUITES.values() for case in suite.cases]
    assert len(set(names)) == len(names)
