"""`python -m bench profile`, the names of our ops in anybody's profile, and the quick suite under pytest-benchmark."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import plain, profiling, test_quick
from bench.__main__ import _parser, main
from bench.cases import Case
from bench.peers import eager
from bench.providers import PROVIDERS, Provider
from bench.targets import Problem
from score_kernels import functional

ROOT = Path(__file__).parents[1]
TINY = Problem(Case("tiny", "mlp", 48, 16, 24, 3, "a test"), "training", "float32")


def names(call) -> dict[str, int]:
    """How often each range or operation of ours is in a profile of the call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.key: event.count for event in profiled.key_averages() if event.key.startswith("score_kernels::")}


def training_step(forward=functional.score_mlp, **options):
    h, w, b = torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True), torch.zeros(8)
    return lambda: forward(h, w, b, w, b, iterations=2, **options).sum().backward()


@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
def test_anybody_s_profile_has_the_names_of_our_backends(backend):
    """`reference` is ordinary autograd: it is in a profile as what it consists of."""
    found = names(training_step(backend=backend))
    ranges = {f"score_kernels::mlp {backend} forward": 1, f"score_kernels::mlp {backend} backward": 1}
    operators = {"score_kernels::mlp": 1, "score_kernels::mlp_backward": 1}
    assert found == ({} if backend == "reference" else {**ranges, **operators})


def test_the_names_are_there_after_compilation():
    step = training_step(torch.compile(functional.score_mlp, fullgraph=True), backend="blas")
    step()
    assert {"score_kernels::mlp blas forward", "score_kernels::mlp blas backward"} <= names(step).keys()


@pytest.fixture
def made(monkeypatch):
    """Commands take the tiny case for one of the suites'."""
    monkeypatch.setattr(profiling, "select", lambda suite, patterns: (TINY.case,))
    monkeypatch.setattr("bench.__main__._screen", lambda: plain)
    monkeypatch.setattr(profiling, "WARMUP", 1)
    return ["profile", "tiny", "--provider", "eager", "--provider", "blas", "--mode", "training", "--device", "cpu"]


def test_a_profile_is_a_table_a_trace_and_a_command(made, tmp_path, capsys):
    assert main([*made, "--calls", "2", "--trace", str(tmp_path / "traces")]) == 0
    printed = capsys.readouterr().out
    blas = printed[printed.index("tiny training float32, blas: 2 calls on cpu") :]
    assert re.search(r"^score_kernels::mlp blas forward +1 +\d+\.\d{3} +\d+\.\d{3} +\d+\.\d%$", blas, re.MULTILINE)
    assert "aten::" in printed
    assert "it needs an NVIDIA GPU, and this is a CPU" in printed
    assert (
        "ncu --set full --nvtx --profile-from-start off --export tiny-training-float32-eager python -m bench profile tiny "
        "--provider eager --mode training --dtype float32 --device cuda --calls 1 --bare\n"
    ) in printed
    for provider, calls in (("eager", 0), ("blas", 2)):
        events = json.loads((tmp_path / "traces" / f"tiny-training-float32-{provider}.json").read_text())["traceEvents"]
        recorded = [event.get("name") for event in events]
        assert recorded.count("score_kernels::mlp blas backward") == calls
        assert recorded.count(profiling.RANGE) == 2


def test_the_command_of_a_provider_with_kernels_looks_at_those():
    command = profiling.ncu(TINY, PROVIDERS["triton"])
    source = (ROOT / "triton_kernels" / "iterate.py").read_text()
    (names,) = re.findall(r"--kernel-name '?regex:(\S+?)'? ", command)
    assert set(names.split("|")) == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    ours = shlex.split(command[command.index(" bench profile ") :])
    options = _parser().parse_args(ours[1:])
    assert (options.case, options.provider, options.mode, options.dtype) == ("tiny", ["triton"], ["training"], "float32")
    assert (options.device, options.calls, options.bare) == ("cuda", 1, True)


def test_our_own_range_is_no_operation(monkeypatch):
    monkeypatch.setattr(profiling, "TOP", 1000)
    table = profiling.sheet("x", profiling.profiled(TINY, PROVIDERS["eager"], "cpu", 1), 1)
    assert len(table.lines) > 10
    assert profiling.RANGE not in {line.cells[0] for line in table.lines}


def test_shares_add_up_and_our_ops_come_first():
    table = profiling.sheet("x", profiling.profiled(TINY, PROVIDERS["blas"], "cpu", 2), 2)
    first = [line.cells[0] for line in table.lines[:4]]
    assert all(name.startswith("score_kernels::") for name in first)
    own = [float(line.cells[3]) for line in table.lines]
    assert own[4:] == sorted(own[4:], reverse=True)
    assert 30 < sum(float(line.cells[4].rstrip("%")) for line in table.lines) <= 100.5
    assert len(table.lines) == profiling.TOP
    calls = {line.cells[0]: line.cells[1] for line in table.lines}
    assert calls["score_kernels::mlp"] == "1"


def test_bare_calls_are_in_ranges_of_nvidia_s_on_a_gpu(monkeypatch):
    """The order of things, with recorded ranges in the place of a GPU's."""
    order = []

    @contextmanager
    def recorded(name):
        order.append(f"enter {name}")
        yield
        order.append(f"leave {name}")

    monkeypatch.setattr(torch.cuda.nvtx, "range", recorded)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: recorded("emit"))
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: recorded("watch"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    step = profiling.Prepared(lambda: order.append("prepare"), lambda _: order.append("run"))

    @contextmanager
    def warm(problem, provider, device):
        yield step

    monkeypatch.setattr(profiling, "_warm", warm)
    profiling.bare(TINY, PROVIDERS["eager"], "cuda", 2)
    call = ["prepare", "enter watch", "enter bench", "run", "wait", "leave bench", "leave watch"]
    assert order == ["enter emit", *call, *call, "leave emit"]
    order.clear()
    profiling.bare(TINY, PROVIDERS["eager"], "cpu", 1)
    assert order == ["prepare", "run"]


def test_a_profile_on_a_gpu_has_its_activities_and_waits_for_every_call(monkeypatch):
    """With a step that takes no GPU, and torch's profiler and NVTX in the place of one's."""
    told = []

    @contextmanager
    def recorded(**options):
        told.append(options)
        yield "the profile"

    monkeypatch.setattr(torch.profiler, "profile", recorded)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    step = profiling.Prepared(lambda: None, lambda _: told.append("run"))
    monkeypatch.setattr(profiling, "_warm", lambda problem, provider, device: nullcontext(step))
    assert profiling.profiled(TINY, PROVIDERS["eager"], "cuda", 2) == "the profile"
    assert told == [{"activities": [ProfilerActivity.CPU, ProfilerActivity.CUDA]}, *2 * ["run", "wait"]]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_table_of_a_gpu_counts_the_kernels_once(on_gpu):
    """A range has the time of the kernels in it for its own there: it is in the table, and not in the sum."""

    def event(key, device, cpu, annotation=False):
        times = {"self_device_time_total": device, "device_time_total": device, "cpu_time_total": cpu}
        return SimpleNamespace(key=key, count=2, self_cpu_time_total=cpu, is_user_annotation=annotation, **times)

    events = [event("kernel", 3000.0 * on_gpu, 0.0), event("score_kernels::mlp triton forward", 3000.0 * on_gpu, 50.0, True)]
    events += [event("aten::mm", 1000.0 * on_gpu, 150.0), event(profiling.RANGE, 4000.0, 200.0, True)]
    table = profiling.sheet("x", SimpleNamespace(key_averages=lambda: list(events)), 2)
    unit = "GPU ms" if on_gpu else "CPU ms"
    assert table.columns == ("operation", "calls", f"{unit}, all", f"{unit}, own", "own share")
    shares = {line.cells[0]: line.cells[3:] for line in table.lines}
    assert next(iter(shares)) == "score_kernels::mlp triton forward"
    if on_gpu:
        assert shares["kernel"] == ("1.500", "75.0%")
        assert shares["aten::mm"] == ("0.500", "25.0%")
    else:
        assert shares["aten::mm"] == ("0.075", "75.0%")


def test_bare_calls_show_no_profile(made, capsys, monkeypatch):
    done = []
    monkeypatch.setattr(profiling, "bare", lambda problem, provider, device, calls: done.append((provider.name, device, calls)))
    assert main([*made, "--bare", "--calls", "1"]) == 0
    assert done == [("eager", "cpu", 1), ("blas", "cpu", 1)]
    assert capsys.readouterr().out == ""


def test_what_cannot_be_profiled_is_said(made, capsys, plain_machine):
    assert main(["profile", "tiny", "--provider", "triton", "--device", "cpu"]) == 0
    assert "tiny forward float32, triton: absent, it needs a GPU" in capsys.readouterr().out
    assert main(["profile", "tiny", "--provider", "eager", "--dtype", "tf32", "--device", "cpu"]) == 0
    assert "tiny forward tf32, eager: absent, tf32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*made, "--calls", "0"])
    assert "--calls: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_case_is_one_case(capsys):
    for name, said in (
        ("mlp-*", "CASE: expected the name of one case, got 'mlp-*', which is mlp-"),
        ("no-such", "matches none"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["profile", name])
        assert said in capsys.readouterr().err


def test_quick_suite_runs_under_pytest_benchmark(tmp_path):
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "launch-bound and (eager or blas)", f"--benchmark-json={saved}"]
    # A worker of pytest-xdist hands down that it is one, which switches benchmarks off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    benchmarks = json.loads(saved.read_text())["benchmarks"]
    assert [bench["group"] for bench in benchmarks] == ["mlp-launch-bound forward float32"] * 2
    assert {bench["extra_info"]["backend"] for bench in benchmarks} == {None, "blas"}
    for bench in benchmarks:
        assert 0 < bench["extra_info"]["rel_error"] < 1e-5
        assert bench["stats"]["rounds"] == test_quick.ROUNDS


class Benchmark:
    """In pytest-benchmark's place."""

    def __init__(self):
        self.timed, self.extra_info = 0, {}

    def pedantic(self, function, *, setup, rounds, **options):
        args, kwargs = setup()
        function(*args, **kwargs)
        self.timed += 1


def test_quick_suite_times_nothing_that_is_wrong():
    wrong = Provider("wrong", "peer", "", lambda case: eager(replace(case, dt=0.51)))
    absent = replace(PROVIDERS["eager"], requires=("no_such_module",), install="pip install it")
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="wrong is wrong"):
        test_quick.test_quick(TINY, wrong, benchmark)
    with pytest.raises(pytest.skip.Exception, match="no_such_module not installed: pip install it"):
        test_quick.test_quick(TINY, absent, benchmark)
    assert benchmark.timed == 0
    test_quick.test_quick(TINY, PROVIDERS["eager"], benchmark)
    assert benchmark.timed == 1
