"""The environment switches of the package, all of them.

| switch | meaning | default |
| --- | --- | --- |
| SCORE_KERNELS_STRICT | 1: on a GPU, an error instead of a warning when `auto` cannot use a fused kernel | 0 |
| SCORE_KERNELS_SCRATCH_MB | MiB of states that backward may keep for recomputation, in all | 64 on a CPU, 512 on a GPU |
| TRITON_INTERPRET | Triton's own: 1 runs the Triton kernels on a CPU, slowly, to check them | 0 |
| SCORE_KERNELS_DATA | folder where the examples find their data sets | none |
| XDG_CACHE_HOME | everybody's: in its folder `score_kernels` is what `doctor --verify` found | ~/.cache |
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def strict() -> bool:
    return os.environ.get("SCORE_KERNELS_STRICT", "0") not in ("", "0")


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def scratch_budget(device: str) -> int:
    """Bytes of scratch that one call may use on a device of this type."""
    text = os.environ.get("SCORE_KERNELS_SCRATCH_MB", "64" if device == "cpu" else "512")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < math.inf:
        raise ValueError(f"SCORE_KERNELS_SCRATCH_MB: expected a positive number of MiB, got {text!r}")
    return int(megabytes * 2**20)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "score_kernels"


def data_folder() -> Path | None:
    text = os.environ.get("SCORE_KERNELS_DATA")
    return Path(text) if text else None
