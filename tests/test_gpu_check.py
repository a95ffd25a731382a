"""`python -m bench.gpu_check`: every step has its verdict, whatever happens in it, and none hides another."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import cuda, gpu_check, shards, tiny
from bench.gpu_check import STEPS, Step, Verdict
from bench.providers import PROVIDERS
from bench.suites import SUITES

ROOT = Path(__file__).resolve().parent.parent


def python(name: str, code: str, share: float = 1.0, **options: object) -> Step:
    return Step(name, (sys.executable, "-c", code), share, **{"gpu": False, **options})


def checked(*steps: Step, out: Path, seconds: float = 60) -> dict[str, Verdict]:
    verdicts = {v.step: v for v in gpu_check.check(steps, out, seconds)}
    summary = json.loads((out / "summary.json").read_text())
    assert [Verdict(**step) for step in summary["steps"]] == list(verdicts.values())
    assert summary["passed"] == gpu_check.succeeded(list(verdicts.values()))
    return verdicts


def test_a_failed_step_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(
        python("first", "print('one'); print('two')"),
        python("second", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"),
        python("third", "print('three')"),
        out=tmp_path / "new" / "folder",
    )
    assert {name: v.status for name, v in found.items()} == {"first": "passed", "second": "failed", "third": "passed"}
    assert found["first"].detail == "two"
    assert found["second"].detail == "exit status 3; the reason"
    assert (tmp_path / "new" / "folder" / "first.log").read_text() == "one\ntwo\n"
    assert not gpu_check.succeeded(list(found.values()))
    assert gpu_check.succeeded([found["first"], found["third"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["first", "passed"], ["second", "failed"], ["third", "passed"]]


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    known = tmp_path / "child"
    child = f"import os, pathlib, time; pathlib.Path({str(known)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    found = checked(python("slow", parent, 0.05), python("next", "print('here')"), out=tmp_path, seconds=120)
    assert time.monotonic() - start < 60
    assert (found["slow"].status, found["slow"].detail) == ("timed out", "after 6 s; KeyboardInterrupt")
    assert (tmp_path / "slow.log").read_text().startswith("begun")
    assert 6 <= found["slow"].seconds < 60
    assert found["next"].status == "passed"
    assert not gpu_check.succeeded(list(found.values()))
    # Gone, or a zombie that nobody waits for, which has no command.
    command = Path("/proc", known.read_text(), "cmdline")
    assert not (command.exists() and command.read_text())


def test_all_steps_together_keep_to_the_time(tmp_path: Path) -> None:
    start = time.monotonic()
    found = checked(*(python(name, "import time; time.sleep(30)", 0.7) for name in "abc"), out=tmp_path, seconds=2)
    assert time.monotonic() - start < 20
    assert {v.status for v in found.values()} == {"timed out"}


def test_an_absent_tool_is_said_and_one_in_cuda_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    step = Step("sanitizer", ("no-such-tool", "--tool", "memcheck"), 1.0, gpu=False, tool="no-such-tool")
    verdict = checked(step, out=tmp_path)["sanitizer"]
    assert (verdict.status, verdict.detail) == ("absent", "no-such-tool is neither in PATH nor in CUDA_HOME/bin")
    assert gpu_check.succeeded([verdict])
    tool = tmp_path / "bin" / "no-such-tool"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "given $*"\nexit 1\n')
    tool.chmod(0o755)
    verdict = checked(step, out=tmp_path)["sanitizer"]
    assert (verdict.status, verdict.detail) == ("failed", "exit status 1; given --tool memcheck")


def test_a_command_that_cannot_run_here_is_absent_and_says_why(tmp_path: Path) -> None:
    verdict = checked(python("it", f"print('no compiler'); raise SystemExit({gpu_check.ABSENT})"), out=tmp_path)["it"]
    assert (verdict.status, verdict.detail) == ("absent", "no compiler")
    assert gpu_check.succeeded([verdict])


def test_the_cuda_part_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUTLASS_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "find_tool", lambda name: None if name == missing else f"/bin/{name}")
    for missing in ("nvcc", "cmake", "ctest"):
        assert cuda.lacking() == f"{missing} is neither in PATH nor in CUDA_HOME/bin"
    missing = ""
    assert "neither CUTLASS_DIR is set nor the package nvidia-cutlass installed" in (cuda.lacking() or "")
    monkeypatch.setenv("CUTLASS_DIR", str(tmp_path))
    assert cuda.lacking() is None


def test_the_cuda_part_is_built_for_the_gpu_and_tested(tmp_path: Path) -> None:
    """Its commands, on a project whose build makes a program and whose test is named as the real one."""
    if not (gpu_check.find_tool("cmake") and gpu_check.find_tool("ctest")):
        pytest.skip("needs cmake")
    source, tree = tmp_path / "source", tmp_path / "tree"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(it LANGUAGES NONE)\nenable_testing()\n"
        'file(WRITE ${CMAKE_BINARY_DIR}/archs "${CMAKE_CUDA_ARCHITECTURES}")\n'
        "add_custom_target(program ALL COMMAND ${CMAKE_COMMAND} -E touch built)\n"
        "add_test(NAME second_opinion COMMAND ${CMAKE_COMMAND} -E cat built)\nadd_test(NAME sass COMMAND false)\n"
        "set_tests_properties(second_opinion PROPERTIES SKIP_RETURN_CODE 77)\n"
    )
    for capability, archs in (((9, 0), "8.0+PTX;9.0a"), ((8, 6), "8.6")):
        log = ""
        for command in cuda.commands(capability, tree):
            words = [str(source) if word == str(ROOT) else word for word in command]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            log += done.stdout
        assert (tree / "archs").read_text() == archs
        (tmp_path / "cuda.log").write_text(log)
        assert gpu_check.undecided(tmp_path) is None
    (tree / "_cuda.of-this-python.so").write_text("the module")
    (tree / "_cuda.o").write_text("not it")
    cuda.install(tree, source)
    assert [path.name for path in source.glob("_cuda*")] == ["_cuda.of-this-python.so"]
    (tmp_path / "cuda.log").write_text(log.replace("   Passed", "***Skipped"))
    assert gpu_check.undecided(tmp_path) == "no CUDA kernel ran: see second_opinion in the log"


def test_without_a_gpu_what_needs_one_is_absent(tmp_path: Path) -> None:
    found = checked(
        python("gpu", "raise SystemExit('none')"), python("needs", "", gpu=True), python("other", "print('ran')"), out=tmp_path
    )  # fmt: skip
    assert {name: v.status for name, v in found.items()} == {"gpu": "failed", "needs": "absent", "other": "passed"}
    assert found["needs"].detail == "no GPU"
    found = checked(python("gpu", ""), python("needs", "", gpu=True), out=tmp_path)
    assert {v.status for v in found.values()} == {"passed"}


@pytest.mark.parametrize(
    ("tests", "status"), [("", "failed"), ("def test_a(): pass", "passed"), ("def test_a(): assert 0", "failed")]
)
def test_tests_that_were_all_skipped_have_not_passed(tests: str, status: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]")
    skipped = "import pytest\ndef test_skipped(): pytest.skip('no reason')\n"
    (tmp_path / "test_it.py").write_text(f"{skipped}{tests}\n")
    command = (sys.executable, "-m", "bench.shards", "{out}", str(tmp_path), "-p", "no:cacheprovider")
    verdict = checked(Step("tests", command, 1.0, gpu=False, check=gpu_check.untested), out=tmp_path)["tests"]
    assert verdict.status == status, verdict
    if not tests:
        assert verdict.detail == "no test ran: all were skipped"


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """Interrupts are ignored, as in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
def test_what_the_tests_found_before_their_time_was_over_is_told(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]")
    bad, slow = "def test_bad(): assert 0, 'the reason'", "def test_slow(): __import__('time').sleep(60)"
    (tmp_path / "test_it.py").write_text(f"{bad}\n{slow}\n")
    command = (sys.executable, "-m", "bench.shards", "{out}", str(tmp_path), "-p", "no:cacheprovider")
    verdict = checked(Step("tests", command, 1.0, gpu=False, check=gpu_check.untested), out=tmp_path, seconds=14)["tests"]
    assert verdict.status == "timed out"
    log = (tmp_path / "tests.log").read_text()
    assert "part-0.log: 1 failed" in log
    assert len(log.splitlines()) == min(os.cpu_count() or 1, shards.MOST)
    assert "the reason" in (tmp_path / "part-0.log").read_text()
    assert "test_bad" in (tmp_path / "part-0.xml").read_text()


def test_every_test_runs_in_one_of_the_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_it.py").write_text("".join(f"def test_{n}(): assert {n} != 3\n" for n in range(5)))
    assert shards.main(tmp_path, [str(tmp_path), "-p", "no:cacheprovider"], 3) == 1
    names = [set(re.findall(r'name="test_(\d)"', (tmp_path / f"part-{at}.xml").read_text())) for at in range(3)]
    assert names == [{"0", "3"}, {"1", "4"}, {"2"}]
    said = capsys.readouterr().out.splitlines()
    assert [re.sub(r" in .*", "", line) for line in said] == [
        "part-0.log: 1 failed, 1 passed", "part-1.log: 2 passed", "part-2.log: 1 passed",
    ]  # fmt: skip
    (tmp_path / "test_it.py").write_text("import os\ndef test_crash(): os.kill(os.getpid(), 9)\n")
    assert shards.main(tmp_path, [str(tmp_path), "-p", "no:cacheprovider"], 1) == 9


def test_a_step_that_does_not_listen_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LAST_WORDS", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    found = checked(python("deaf", deaf), out=tmp_path, seconds=5)
    assert (found["deaf"].status, found["deaf"].detail) == ("timed out", "after 5 s; deaf")
    assert found["deaf"].seconds < 30


def test_a_benchmark_without_a_triton_time_has_not_passed(tmp_path: Path) -> None:
    check = partial(gpu_check.unmeasured, name="headline")

    def verdict(*rows: tuple[str, str]) -> Verdict:
        result = {"rows": [{"provider": provider, "status": status} for provider, status in rows]}
        (tmp_path / "headline.json").write_text(json.dumps(result))
        return checked(python("bench", "", check=check), out=tmp_path)["bench"]

    assert verdict(("eager", "ok"), ("triton", "ok")).status == "passed"
    assert verdict(("eager", "ok"), ("triton", "absent")).detail == "no Triton kernel was timed"
    (tmp_path / "headline.json").write_text("{")
    broken = checked(python("bench", "", check=check), out=tmp_path)["bench"]
    assert (broken.status, broken.detail[:25]) == ("failed", "its result cannot be read")


def test_its_commands_are_ones_that_the_programs_take() -> None:
    from bench.__main__ import _parser

    for name, providers in (("headline", ["eager", "blas", "triton", "cuda", "auto"]), ("compiled", [])):
        (bench,) = (step for step in STEPS if step.name == name)
        words = [word.format(out="/somewhere", minutes="1.50") for word in bench.command]
        options = _parser().parse_args(words[words.index("run") :])
        assert (options.suite, options.minutes, options.resume) == ("headline", 1.5, True)
        assert (options.json, options.provider) == (Path(f"/somewhere/{name}.json"), providers)
        assert words[1:3] == ["-m", "bench"]
        assert not any(PROVIDERS[provider].compiles for provider in providers)
    assert any(PROVIDERS[provider].compiles for provider in SUITES["headline"].providers)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_what_the_sanitizer_runs_is_right_and_notices_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiny.run("cpu", torch.float32)
    monkeypatch.setattr(tiny, "tolerance", lambda dtype, mode: 0.0)
    with pytest.raises(AssertionError):
        tiny.run("cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    """With nothing but torch, triton and pytest installed, as it will be on the machine that it is for."""
    for name in ("rich", "hypothesis", "jsonschema", "sklearn", "numpy", "matplotlib", "jinja2", "torchdiffeq"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # Triton's interpreter needs numpy
    of_the_steps = "import bench.__main__, bench.cuda, bench.tiny, bench.plain, score_kernels.triton_kernels.launch"
    subprocess.run([sys.executable, "-W", "ignore", "-c", of_the_steps], check=True, cwd=ROOT, env=environment)
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out"), "--minutes", "6"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "no GPU that torch can use: nothing was checked on hardware" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {step["step"]: step["status"] for step in summary["steps"]} == {
        "gpu": "failed", "environment": "passed",
        "cuda": "absent", "tests": "absent", "memcheck": "absent", "racecheck": "absent", "synccheck": "absent",
        "headline": "absent", "compiled": "absent",
    }  # fmt: skip
    log = (tmp_path / "out" / "environment.log").read_text()
    assert json.loads(log[log.index("{") :])["works"]
