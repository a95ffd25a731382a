"""Where a run was made: the environment block of a result file."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# A result that is being written does not make the tree it was measured on dirty.
CODE = (".", ":!bench/results", ":!examples/results")


def environment(device: str) -> dict[str, Any]:
    """The environment block; what this machine does not have is None."""
    gpu = device.startswith("cuda")
    status = _output("git", "status", "--porcelain", "--", *CODE)
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "git_sha": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# What nvidia-smi calls the reasons for lower clocks (a bit mask, 0 being none), in newer drivers and in older ones.
THROTTLING = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def clocks(device: str) -> dict[str, Any] | None:
    """The GPU's clock, temperature and reasons for throttling right now; None on a CPU and where nvidia-smi does not tell."""
    if not device.startswith("cuda"):
        return None
    for reasons in THROTTLING:
        query = f"--query-gpu=clocks.sm,temperature.gpu,{reasons}"
        line = _output("nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0")
        values = [value.strip() for value in line.split(",")] if line else []
        if len(values) == 3 and values[0].isdecimal() and values[1].isdecimal():
            return {"sm_mhz": int(values[0]), "temperature_c": int(values[1]), "throttling": values[2]}
    return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where the command, or the repository it asks about, does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's model name; Linux has it in /proc/cpuinfo only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
