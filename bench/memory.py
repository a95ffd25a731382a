"""Peak memory of one call, measured in a fresh child process so that nothing else of the parent counts.

The child imports the target and calls it for the callable to measure (inputs and weights exist from here on), runs that once to
get imports, compilation and thread pools out of the way, returns freed memory to the system, and measures a second run: the
highest resident memory reached in it, less the resident memory before it. On a GPU: the same by the allocator's statistics.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEGABYTE = 1e6

# glibc raises its mmap threshold as large blocks are freed and then keeps them; fixed, every block above it goes back at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "131072"}


def peak_in_child(target: str, *args: Any, **kwargs: Any) -> float:
    """Peak memory in MB (1e6 bytes) of the callable that `target(*args, **kwargs)` returns, less what was there before it.

    target: "module:function", importable in a child with this process's `sys.path`; the function returns a callable without
    arguments. args, kwargs: picklable. The child has as many torch threads as this process. What the callable returns counts
    as long as the call lasts; a target on a GPU is measured by torch's CUDA allocator.
    Raises RuntimeError with the child's own error when it fails, and where Linux's /proc is not there to measure with.
    """
    paths = [str(Path(__file__).resolve().parent.parent), *(path or os.getcwd() for path in sys.path)]
    environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    job = pickle.dumps((target, args, kwargs, torch.get_num_threads()))
    child = subprocess.run([sys.executable, "-m", "bench.memory"], input=job, capture_output=True, env=environment, check=False)
    if child.returncode != 0:
        tail = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise RuntimeError(f"measuring the peak memory of {target} failed: {tail[0]}")
    return float(child.stdout.decode().split()[-1])


def peak_of(run: Callable[[], object]) -> float:
    """Peak memory in MB that one call of `run` adds, in this process, after one call that is not measured."""
    run()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    return _resident_peak(run) / MEGABYTE


def _resident_peak(run: Callable[[], object]) -> int:
    if sys.platform != "linux":
        raise RuntimeError(f"peak memory on the CPU is read from Linux's /proc, which {sys.platform} does not have")
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    # Resets the high-water mark of resident memory to what is resident now (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this kernel cannot tell the peak memory of a process")


def _child() -> None:
    target, args, kwargs, threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(threads)
    module, _, function = target.partition(":")
    run = getattr(importlib.import_module(module), function)(*args, **kwargs)
    print(peak_of(run))


if __name__ == "__main__":
    _child()
