"""The package as it is built and imported: what the archives hold, lazy imports, names, the version, the type marker."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import score_kernels as sk

ROOT = Path(__file__).parents[1]
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "score_kernels").rglob("*.py")}
# In the tree the package reaches them through a link, in the archives they are files like any other.
KERNELS = {f"score_kernels/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
MODULES |= KERNELS
TYPES = {"score_kernels/py.typed", "score_kernels/_cuda.pyi"}
SOURCES = {"CMakeLists.txt", *(f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir())}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """What is in the source distribution, without its leading folder, and in the wheel that is built from it, Python only."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("score_kernels", "triton_kernels", "csrc", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # No network: nothing is installed for the build, and nothing of torch is needed by it.
    (folder / "blocked").mkdir()
    (folder / "blocked" / "torch.py").write_text("raise ImportError('the build must not need torch')")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)],
        check=True, capture_output=True, text=True, timeout=300,
        env={**os.environ, "SCORE_KERNELS_CUDA": "0", "PYTHONPATH": str(folder / "blocked")},
    )  # fmt: skip
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(source) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        files = {member.name.partition("/")[2]: archive.extractfile(member).read() for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        return files, {name: archive.read(name) for name in archive.namelist()}


def test_source_distribution(archives):
    source, _ = archives
    assert source.keys() >= MODULES | SOURCES | TYPES | {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
        "PKG-INFO",
    }
    elsewhere = ("tests/", "bench/", "examples/", ".ci/", "docs/", "build/", "score_kernels/_cuda.")
    assert not [name for name in source.keys() - TYPES if name.startswith(elsewhere)]


def test_wheel(archives):
    _, wheel = archives
    package = {name for name in wheel if not name.startswith(f"score_kernels-{sk.__version__}.dist-info/")}
    assert package == MODULES | TYPES
    assert wheel[f"score_kernels-{sk.__version__}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for name in MODULES:
        assert wheel[name] == (ROOT / name).read_bytes()


def test_wheel_is_pure_python_and_says_what_it_needs(archives):
    _, wheel = archives
    folder = f"score_kernels-{sk.__version__}.dist-info"
    assert b"Root-Is-Purelib: true" in wheel[f"{folder}/WHEEL"]
    metadata = wheel[f"{folder}/METADATA"].decode()
    for line in (
        f"Version: {sk.__version__}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch>=2.11",
    ):
        assert line in metadata.splitlines()


def test_version():
    assert importlib.metadata.version("score-kernels") == sk.__version__


def test_typed():
    assert (ROOT / "score_kernels" / "py.typed").read_text() == ""


def imported_after(code):
    """The modules that are loaded after running `code` in a fresh interpreter."""
    command = [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"]
    return set(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()[-1])
    )


def test_importing_the_package_loads_nothing_heavy():
    loaded = imported_after("import score_kernels; dir(score_kernels); score_kernels.__version__")
    assert not loaded & {"torch", "triton", "numpy", "sklearn"}
    assert {name for name in loaded if name.startswith("score_kernels")} == {"score_kernels"}


def test_importing_the_ops_loads_no_compiler():
    loaded = imported_after("from score_kernels import functional; import score_kernels; score_kernels.ScoreMLP")
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "triton"}


def test_public_names():
    assert set(sk.__all__) <= set(dir(sk))
    for name in sk.__all__:
        assert getattr(sk, name) is not None
    assert sorted(sk.__all__) == list(sk.__all__)
    ops = ["score_attention", "score_linear", "score_mlp", "score_transformer"]
    assert sk.functional.__all__ == ["AttentionParams", "MLPParams", *ops]
    with pytest.raises(AttributeError, match="module 'score_kernels' has no attribute 'missing'"):
        _ = sk.missing
    with pytest.raises(ImportError, match="cannot import name 'missing'"):
        exec("from score_kernels import missing")


def test_every_public_name_has_a_docstring():
    for name in sk.__all__:
        assert getattr(sk, name).__doc__, name
    for name in sk.functional.__all__:
        assert getattr(sk.functional, name).__doc__, name
