"""Builds the CUDA kernels for this machine's GPU and runs their tests on it: `python -m bench.cuda`.

It needs nvcc, cmake and CUTLASS's headers, and no network; where one is missing it says which, and ends with `ABSENT`. The
build stays in build/gpu-check, so that a second run compiles nothing; docs/building.md has the settings. The Python module goes
into the package, for `backend="cuda"`; it takes pybind11.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu_check import ABSENT, ROOT, find_tool

TREE = ROOT / "build" / "gpu-check"


def lacking() -> str | None:
    """What the build needs and this machine has not."""
    for name in ("nvcc", "cmake", "ctest"):
        if find_tool(name) is None:
            return f"{name} is neither in PATH nor in CUDA_HOME/bin"
    if not os.environ.get("CUTLASS_DIR") and importlib.util.find_spec("cutlass_library") is None:
        return "CUTLASS's headers are missing: neither CUTLASS_DIR is set nor the package nvidia-cutlass installed"
    return None


def commands(capability: tuple[int, int], tree: Path = TREE) -> list[list[str]]:
    """Configure, build, test. On Hopper both families of kernels run: the portable one as PTX, which the driver compiles."""
    archs = "8.0+PTX;9.0a" if capability[0] == 9 else "{}.{}".format(*capability)
    configure = [f"-DCMAKE_CUDA_COMPILER={find_tool('nvcc')}", f"-DPython_EXECUTABLE={sys.executable}"]
    cmake, ctest = str(find_tool("cmake")), str(find_tool("ctest"))
    return [
        [cmake, "-S", str(ROOT), "-B", str(tree), *configure, f"-DCMAKE_CUDA_ARCHITECTURES={archs}"],
        [cmake, "--build", str(tree), "--parallel", str(os.cpu_count() or 1)],
        # What a disassembler says needs no GPU, and that program.
        [ctest, "--test-dir", str(tree), "--output-on-failure", "--verbose", "--exclude-regex", "sass"],
    ]


def main() -> int:
    reason = lacking()
    if reason:
        print(reason)
        return ABSENT
    import torch

    configure, build, test = commands(torch.cuda.get_device_capability())
    for command in (configure, build):
        if subprocess.run(command, check=False).returncode:
            return 1
    install()
    return min(subprocess.run(test, check=False).returncode, 1)


def install(tree: Path = TREE, package: Path = ROOT / "score_kernels") -> None:
    """The module that was built, if it was, into the package."""
    for module in tree.glob("_cuda.*"):
        if module.suffix in (".so", ".pyd"):
            shutil.copy(module, package)


if __name__ == "__main__":
    sys.exit(main())
