"""Everything that only a GPU can tell, in one command: `python -m bench.gpu_check --out DIR [--minutes 8]`.

It needs a GPU, torch, triton and pytest, no network, and installs nothing. Every step has a time limit and a log in DIR; a step
that fails never hides the others. `summary.json` holds the verdicts: passed, failed, timed out, or absent where this machine
lacks what the step needs. Called again with the same DIR, the benchmarks go on where they stopped: torch.compile takes longer
than all the rest, so the headline suite is measured without it first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

# The benchmark is told to begin nothing new after this share of its time: the problem under way has the rest.
BENCH_SHARE = 0.6

# The exit status of a command that cannot run on this machine; its last line says what is missing. ctest's tests have the same.
ABSENT = 77

# What a step whose time is over has left to say what it found: interrupted, pytest tells of the tests that failed.
LAST_WORDS = 5.0

FIND_GPU = "import torch; print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda)"


@dataclass(frozen=True)
class Step:
    """One command. `{out}` in it is the folder, `{minutes}` what the benchmark may use of the time left.

    share: of the whole time, that it may take at most. gpu: it is absent without one. tool: a program that it needs, the
    command's first word. check: what its output says against it although it ended with 0, given the folder.
    """

    name: str
    command: tuple[str, ...]
    share: float
    gpu: bool = True
    tool: str | None = None
    check: Callable[[Path], str | None] = lambda out: None


@dataclass(frozen=True)
class Verdict:
    """status: passed, failed, timed out, absent. detail: why."""

    step: str
    status: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.step:<12} {self.status:<10} {self.seconds:6.1f} s  {self.detail}".rstrip()


def untested(out: Path) -> str | None:
    """A run of tests that were all skipped shows nothing."""
    suites = (suite for path in out.glob("part-*.xml") for suite in ElementTree.parse(path).getroot().iter("testsuite"))
    counts = [(int(suite.get("tests", 0)), int(suite.get("skipped", 0))) for suite in suites]
    ran = sum(tests - skipped for tests, skipped in counts)
    return None if ran > 0 else "no test ran: all were skipped"


def unmeasured(out: Path, name: str) -> str | None:
    """A benchmark in which no Triton kernel was timed shows nothing of them."""
    rows = json.loads((out / f"{name}.json").read_text())["rows"]
    return None if any(r["provider"] == "triton" and r["status"] == "ok" for r in rows) else "no Triton kernel was timed"


def undecided(out: Path) -> str | None:
    """Tests of the CUDA part in which no kernel ran on the GPU show nothing of them."""
    passed = re.search(r"second_opinion \.+ +Passed", (out / "cuda.log").read_text(errors="replace"))
    return None if passed else "no CUDA kernel ran: see second_opinion in the log"


PYTHON = (sys.executable, "-m")
# All pairs of options are half of the tests and take too long to compile: `pytest -m gpu` has them.
TESTS = (*PYTHON, "bench.shards", "{out}", "-m", "gpu", "-k", "not in_pairs", "tests/test_gpu.py")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
TINY = (*PYTHON, "bench.tiny")


def bench(name: str, share: float, *providers: str) -> Step:
    """The headline suite with these providers (none: its own), into a result of the step's name."""
    command = (*PYTHON, "bench", "run", "--suite", "headline", "--device", "cuda", "--rounds", "10", "--resume")
    chosen = (word for provider in providers for word in ("--provider", provider))
    paths = ("--json", f"{{out}}/{name}.json", "--minutes", "{minutes}")
    return Step(name, (*command, *chosen, *paths), share, check=partial(unmeasured, name=name))


STEPS = (
    Step("gpu", (sys.executable, "-c", FIND_GPU), 0.1, gpu=False),
    Step("environment", (*PYTHON, "score_kernels", "doctor", "--json"), 0.15, gpu=False),
    Step("cuda", (*PYTHON, "bench.cuda"), 0.35, check=undecided),
    Step("tests", TESTS, 0.35, check=untested),
    Step("memcheck", (*SANITIZER, "memcheck", *TINY), 0.1, tool="compute-sanitizer"),
    Step("racecheck", (*SANITIZER, "racecheck", *TINY), 0.1, tool="compute-sanitizer"),
    Step("synccheck", (*SANITIZER, "synccheck", *TINY), 0.1, tool="compute-sanitizer"),
    bench("headline", 0.5, "eager", "blas", "triton", "cuda", "auto"),
    bench("compiled", 1.0),
)


def check(steps: Sequence[Step], out: Path, seconds: float) -> list[Verdict]:
    """Runs all steps within this time, prints a line for each, and writes them to `summary.json` as they come."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    gpu = True
    for step in steps:
        limit = min(step.share * seconds, end - time.monotonic())
        verdict = run(step, out, limit) if gpu or not step.gpu else Verdict(step.name, "absent", 0.0, "no GPU")
        gpu &= not (step.name == "gpu" and verdict.status != "passed")
        verdicts.append(verdict)
        print(verdict, flush=True)
        summary = {"passed": succeeded(verdicts), "steps": [asdict(v) for v in verdicts]}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return verdicts


def succeeded(verdicts: Sequence[Verdict]) -> bool:
    """What is absent has not failed; it has not passed either, and its line says so."""
    return all(v.status in ("passed", "absent") for v in verdicts)


def run(step: Step, out: Path, limit: float) -> Verdict:
    """One step; whatever happens in it becomes its verdict, with the last line of its log."""
    start = time.monotonic()

    def verdict(status: str, detail: str) -> Verdict:
        return Verdict(step.name, status, round(time.monotonic() - start, 1), detail)

    command = [word.format(out=out, minutes=f"{BENCH_SHARE * limit / 60:.2f}") for word in step.command]
    if step.tool is not None:
        path = find_tool(step.tool)
        if path is None:
            return verdict("absent", f"{step.tool} is neither in PATH nor in CUDA_HOME/bin")
        command[0] = path
    log = out / f"{step.name}.log"
    with log.open("w") as file:
        status = _status(command, file, limit)
    lines = log.read_text(errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if any(map(str.isalpha, line))), "")
    if status is None:
        return verdict("timed out", f"after {limit:.0f} s; {last}")
    if status == ABSENT:
        return verdict("absent", last)
    if status != 0:
        return verdict("failed", f"exit status {status}; {last}")
    try:
        reason = step.check(out)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        reason = f"its result cannot be read: {type(error).__name__}: {error}"
    return verdict("failed", reason) if reason else verdict("passed", last)


def _status(command: Sequence[str], log: IO[str], limit: float) -> int | None:
    """The exit status of a command, or None when it took too long: it is interrupted, and ended with everything it started."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with _listening():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _listening() -> Iterator[None]:
    """What a shell runs in the background ignores interrupts, and so would all that it starts: not what starts in here.

    A preexec_fn would do it in the child, which may wait for ever for a lock that a thread had at the fork.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def find_tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(str(Path(home) / "bin" / name))


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a step failed or took too long, no GPU included."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=sys.modules[__name__].__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where logs, results and the summary go")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together (default: 8)")
    options = parser.parse_args(arguments)
    verdicts = check(STEPS, options.out.resolve(), 60 * options.minutes)
    failed = [v.step for v in verdicts if v.status in ("failed", "timed out")]
    if "gpu" in failed:
        print("no GPU that torch can use: nothing was checked on hardware")
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed", f"(logs and results: {options.out})")
    return 0 if succeeded(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
