"""The benchmark harness: what it reports is measured, right, and in the form that the schema holds."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from bench_rows import ROW, SCHEMA, SETTINGS, TIMES, TINY, peer, quiet, rows_of
from rich.console import Console
from triton.runtime.jit import JITFunction

from bench import console, environment, layout, resultfile
from bench.__main__ import main
from bench.cases import MODES, Case
from bench.inputs import tolerance
from bench.measure import Rates, compare
from bench.providers import PROVIDERS, Provider, eager
from bench.run import Problem, Settings, measure, problems, run
from bench.suites import SUITES, select

RESULTS = sorted((Path(environment.__file__).parent / "results").glob("*.json"))


@pytest.fixture(autouse=True)
def _one_thread(plain_machine):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    without = {key: value for key, value in row.items() if key not in ("registers", "spills", "tolerance")}
    jsonschema.validate(without, ROW)  # as rows of earlier versions are
    bad = [{**row, "status": "wrong", "error": "text"}, {**row, "ms_median": None}, {**row, "extra": 1}]
    bad += [{**row, "hidden": None}, {**row, "params": {}}, {**row, "spills": -1}, {**row, "tolerance": 0}]
    for other in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(other, ROW)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_valid(path):
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


@pytest.mark.parametrize("mode", MODES)
def test_wrong_provider_gets_no_times(mode):
    rows = rows_of(PROVIDERS["eager"], peer("off", changed_dt), peer("nan", not_a_number), PROVIDERS["blas"], mode=mode)
    assert {name: row["status"] for name, row in rows.items()} == {"eager": "ok", "off": "wrong", "nan": "wrong", "blas": "ok"}
    for name in ("off", "nan"):
        assert all(rows[name][key] is None for key in TIMES)
    assert rows["off"]["rel_error"] > 1e-4
    for row in rows.values():
        assert row["tolerance"] == tolerance(torch.finfo(torch.float32).eps, mode, TINY)
    assert "expected at most" in rows["off"]["error"]
    assert rows["nan"]["rel_error"] is None
    assert "not finite" in rows["nan"]["error"]


def test_wrong_row_is_red_and_sets_the_exit_status(monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "auto", peer("auto", changed_dt))
    arguments = ["run", "--case", "mlp-launch-bound", "--rounds", "1", "--device", "cpu", "--provider", "eager"]
    assert main([*arguments, "--provider", "auto"]) == 1
    assert "wrong: relative" in capsys.readouterr().out
    out = io.StringIO()
    monkeypatch.setattr(console, "_console", lambda: Console(file=out, force_terminal=True, color_system="standard", width=200))
    rows = rows_of(PROVIDERS["eager"], peer("off", changed_dt))
    console.show(layout.results({**environment.environment("cpu"), "rates": None}, list(rows.values())))
    lines = out.getvalue().splitlines()
    (wrong,) = (line for line in lines if "wrong:" in line)
    assert [line for line in lines if "\x1b[1;31m" in line] == [wrong]


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
    assert all(row[key] is None for key in (*TIMES, "tolerance"))


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
    assert (rows["triton"]["registers"], rows["triton"]["spills"]) == (None, None)  # the interpreter has none


def test_registers_and_spills_are_the_most_of_the_kernels_of_the_call(monkeypatch):
    kernels = [SimpleNamespace(n_regs=126, n_spills=0), SimpleNamespace(n_regs=96, n_spills=12)]
    monkeypatch.setattr(JITFunction, "run", lambda self, index: kernels[index])

    def launching(backend: str):
        def build(case: Case):
            forward = eager(case) if backend == "eager" else PROVIDERS[backend].build(case)

            def run(h, parameters):
                for index in range(2):
                    JITFunction.run(None, index)
                return forward(h, parameters)

            return run

        return peer(backend, build)

    before = JITFunction.run
    rows = rows_of(launching("blas"), launching("eager"))
    assert JITFunction.run is before
    assert (rows["blas"]["registers"], rows["blas"]["spills"]) == (126, 12)
    assert (rows["eager"]["registers"], rows["eager"]["spills"]) == (None, None)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"event": "1980, 54, 0x0000000000000004"}, {"sm_mhz": 1980, "temperature_c": 54, "throttling": "0x0000000000000004"}),
        (
            {"throttle": "1410, 33, 0x0000000000000000"},
            {"sm_mhz": 1410, "temperature_c": 33, "throttling": "0x0000000000000000"},
        ),
        ({"event": "[N/A], 54, 0x0", "throttle": "[N/A], 54, 0x0"}, None),
        ({}, None),
    ],
)
def test_clocks_are_nvidia_smi_s(monkeypatch, answers, found):
    """In older drivers the reasons have another name, and the query for the newer one fails."""
    said = {f"--query-gpu=clocks.sm,temperature.gpu,clocks_{name}_reasons.active": line for name, line in answers.items()}
    monkeypatch.setattr(environment, "_output", lambda *command: said.get(command[1]))
    assert environment.clocks("cuda") == found
    assert environment.clocks("cpu") is None
    jsonschema.validate(found, {**SCHEMA["$defs"]["clocks"], "$defs": SCHEMA["$defs"]})


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
    assert "not measured (--resume goes on): linear-leaky forward float32" in capsys.readouterr().err
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


def test_an_interrupted_run_tells_what_it_has(tmp_path, monkeypatch, capsys):
    path, providers = tmp_path / "result.json", ["--provider", "eager"]

    def interrupted(targets, *rest):
        yield from run([next(targets)], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.run", interrupted)
    cases = ["--case", "mlp-launch*", "--case", "linear*"]
    assert main(["run", "--suite", "quick", *cases, *providers, "--rounds", "1", "--device", "cpu", "--json", str(path)]) == 0
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["mlp-launch-bound"]
    said = capsys.readouterr()
    assert "mlp-launch-bound" in said.out
    assert "not measured (--resume goes on): linear-leaky forward float32" in said.err


def test_a_run_that_ends_while_it_writes_leaves_the_result_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    resultfile.write(path, {"gpu": None}, [{"row": 1}])
    with pytest.raises(ValueError, match="JSON"):
        resultfile.write(path, {"gpu": None}, [{"row": math.nan}])

    def ends(self, text):
        self.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ends)
    with pytest.raises(KeyboardInterrupt):
        resultfile.write(path, {"gpu": None}, [{"row": 2}])
    assert json.loads(path.read_text()) == {"environment": {"gpu": None}, "rows": [{"row": 1}]}


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
    assert row["compile_ms"] > 4 * max(row["samples"])
    assert row["speedup_vs_eager"] is None


def test_run_measures_memory_in_a_child():
    case = next(case for case in SUITES["quick"].cases if case.name == "mlp-launch-bound")
    settings = Settings(rounds=1, memory=True)
    (row,) = measure(Problem(replace(case, rows=32768), "forward", "float32"), [PROVIDERS["blas"]], settings, quiet)
    # The output is 16.8 MB; tiles and thread pools are small beside it.
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["peak_memory_mb"] == pytest.approx(32768 * 128 * 4 / 1e6, abs=8)


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
