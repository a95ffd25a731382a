"""The build: Python, and where there is an nvcc the CUDA kernels as the module `score_kernels._cuda`. See docs/building.md.

CMakeLists.txt says how they are compiled: for which architectures, with which flags, how many at a time. It needs no torch and
no GPU. The version number is the one in `score_kernels/__init__.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
INIT = ROOT / "score_kernels" / "__init__.py"
SWITCH = "SCORE_KERNELS_CUDA"
PYTHON_ONLY = f"{SWITCH}=0 installs Python only"
# Stable, so that a second build compiles only what has changed.
TREE = ROOT / "build" / str(sys.implementation.cache_tag)
CMAKE, NINJA = (3, 24), (1, 10)


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f'error: {INIT}: expected a line __version__ = "..."')
    return match[1]


def find_nvcc(environ: Mapping[str, str], local: Path = Path("/usr/local")) -> tuple[str | None, str]:
    """The compiler, or None and why not. A variable that names a wrong place is not passed over in silence."""
    if cxx := environ.get("CUDACXX"):
        return shutil.which(cxx, path=environ.get("PATH")), f"CUDACXX={cxx} is no program"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ.get(name):
            return shutil.which("nvcc", path=str(Path(home) / "bin")), f"{name}={home} has no bin/nvcc"
    # The link that an administrator keeps, then the newest.
    homes = sorted(local.glob("cuda*"), key=lambda home: (home.name == "cuda", [int(n) for n in re.findall(r"\d+", home.name)]))
    path = [environ.get("PATH", ""), *(str(home / "bin") for home in reversed(homes))]
    return shutil.which("nvcc", path=os.pathsep.join(path)), f"there is no nvcc in PATH or {local}/cuda*/bin"


def wanted_nvcc(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The compiler to build with, or None and what to say of that: nothing, if Python only is what was asked for."""
    switch = environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"error: {SWITCH}: expected 0 (Python only), 1 (with the CUDA kernels) or nothing, got {switch!r}")
    if switch == "0":
        return None, ""
    nvcc, reason = find_nvcc(environ)
    if nvcc:
        return nvcc, ""
    reason = f"{reason}: install the CUDA toolkit (12.0 or newer), or set CUDA_HOME to the one to use"
    if switch == "1":
        raise SystemExit(f"error: {SWITCH}=1, but {reason}")
    return None, f"score_kernels: Python only, without the CUDA kernels. For them, {reason} ({SWITCH}=0: without this line)"


def tool(name: str, least: tuple[int, int]) -> str | None:
    """A program that is new enough: one in PATH, or one that pip has put beside an interpreter that is not activated."""
    for path in (os.environ.get("PATH"), str(Path(sys.executable).parent)):
        program = shutil.which(name, path=path)
        if program:
            # What pip put there may fail: in an isolated build it cannot import its other half.
            said = subprocess.run([program, "--version"], check=False, capture_output=True, text=True).stdout
            number = re.search(r"(\d+)\.(\d+)", said)
            if number and (int(number[1]), int(number[2])) >= least:
                return program
    return None


def missing() -> list[str]:
    """What the CUDA part needs and pip has to bring."""
    tools = [f"{name}>={least[0]}.{least[1]}" for name, least in (("cmake", CMAKE), ("ninja", NINJA)) if not tool(name, least)]
    return tools if importlib.util.find_spec("pybind11") else [*tools, "pybind11>=3.0"]


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and takes the module from there."""

    def build_extension(self, ext: Extension) -> None:
        if missing():
            raise SystemExit(f"error: the CUDA kernels need more: pip install {' '.join(map(repr, missing()))}; {PYTHON_ONLY}")
        cmake = str(tool("cmake", CMAKE))
        compiler = f"CMAKE_CUDA_COMPILER:STRING={nvcc}"
        configure = [cmake, "-S", str(ROOT), "-B", str(TREE), "-G", "Ninja", f"-D{compiler}"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja', NINJA)}", f"-DPython_EXECUTABLE={sys.executable}"]
        # CMake drops its settings when the compiler is another one, and stops when the folder was moved: it begins anew then.
        cache = TREE / "CMakeCache.txt"
        if not cache.exists() or not {compiler, f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}"} <= {*cache.read_text().splitlines()}:
            configure.append("--fresh")
        target = Path(self.get_ext_fullpath(ext.name))
        module = TREE / target.name
        commands = (configure, [cmake, "--build", str(TREE)])
        if any(subprocess.run(command, check=False).returncode for command in commands) or not module.exists():
            raise SystemExit(f"error: the CUDA kernels could not be built, see above; {PYTHON_ONLY}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


if __name__ == "__main__":
    nvcc, line = wanted_nvcc(os.environ)
    # pip first asks for metadata, several times: the line is for the command that builds.
    if line and not {"egg_info", "dist_info", "sdist"} & {*sys.argv}:
        print(line, file=sys.stderr)
    setup(
        version=version(),
        ext_modules=[Extension("score_kernels._cuda", sources=[])] if nvcc else [],
        cmdclass={"build_ext": CMakeBuild},
        # An isolated build asks by egg_info what it has to install. Any other command would install it here.
        setup_requires=missing() if nvcc and "egg_info" in sys.argv else [],
    )
