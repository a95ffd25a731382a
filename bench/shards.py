"""pytest in several processes, where pytest-xdist is not installed: `python -m bench.shards DIR -m gpu tests/test_gpu.py`.

Tests of kernels spend their time compiling, on one processor each. Every process runs a part of the tests and has a log and a
JUnit file in DIR; the last line of each log is shown at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Each holds a GPU's context and what its tests allocate.
MOST = 8

# pytest's exit status where no test is selected: fewer tests than processes.
NO_TESTS = 5

# Which of how many parts a process runs: "3/8".
PART = "BENCH_PART_OF_TESTS"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """What pytest calls here, by `-p bench.shards`: neighbours, which take equally long, go to different processes."""
    at, count = map(int, os.environ[PART].split("/"))
    items[:] = items[at::count]


def main(out: Path, arguments: Sequence[str], processes: int) -> int:
    """The worst of pytest's exit statuses: 0 when no test failed. Interrupted, it waits for what pytest has to say."""
    logs = [out / f"part-{at}.log" for at in range(processes)]
    running = [_start(arguments, log, f"{at}/{processes}") for at, log in enumerate(logs)]
    with suppress(KeyboardInterrupt):
        for process in running:
            process.wait()
    statuses = [process.wait() for process in running]
    for log in logs:
        print(f"{log.name}: {log.read_text(errors='replace').strip().rpartition(chr(10))[2].strip('= ')}")
    return max(0 if status == NO_TESTS else abs(status) for status in statuses)


def _start(arguments: Sequence[str], log: Path, part: str) -> subprocess.Popen[bytes]:
    found = log.with_suffix(".xml")
    found.unlink(missing_ok=True)  # an earlier run's
    command = [sys.executable, "-m", "pytest", "-p", "bench.shards", *arguments, "--junitxml", str(found)]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, PART: part})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:], min(os.cpu_count() or 1, MOST)))
