"""`python -m score_kernels doctor`, on this machine and on ones where torch is missing or broken, which a fake torch plays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_torch import break_blas

from score_kernels import doctor
from score_kernels.__main__ import main
from score_kernels.planner import BACKENDS, FUSED

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("plain_machine")

# What is wrong with torch -> its __init__.py, what the doctor says of it.
BROKEN = {
    "missing": ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "pip install torch"),
    "library": ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so: cannot open shared"),
    "symbol": ("raise ImportError('undefined symbol: _ZN2at4_ops')", "undefined symbol"),
    "error of its own": ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
    "exit": ("raise SystemExit(0)", "SystemExit"),
    "something else of that name": ("", "named torch"),
    "too old": ("__version__ = '1.9.0'\nclass version: cuda = None\ndef get_num_threads(): return 1", "is too old"),
}


def run(folder: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(p) for p in (folder, ROOT) if p is not None)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def fake(folder: Path, source: str, name: str = "torch") -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_torch_is_a_problem_with_its_fix_and_exit_status_1(kind: str, tmp_path: Path) -> None:
    source, said = BROKEN[kind]
    folder = fake(tmp_path, source)
    for arguments in ([], ["--json"]):
        done = run(folder, "-m", "score_kernels", "doctor", *arguments)
        assert done.returncode == 1, done.stderr
        assert done.stderr == ""
        assert said in " ".join(done.stdout.split())
    report = json.loads(done.stdout)
    assert not report["works"]
    assert report["smoke"] == []
    assert "cannot work" in report["verdict"]
    assert len(report["problems"]) == 1
    assert "pip install" in report["problems"][0]["fix"]
    if kind != "too old":
        assert report["torch"]["version"] is None
        assert report["backends"]["blas"] == report["backends"]["triton"] == "torch cannot be imported"


def test_json_of_a_machine_that_works() -> None:
    done = run(None, "-m", "score_kernels", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["works"]
    assert report["problems"] == []
    assert report["torch"]["version"] == torch.__version__
    assert list(report["backends"]) == list(BACKENDS)
    assert {report["backends"][name] for name in BACKENDS if name not in FUSED} == {None}
    if not torch.cuda.is_available():
        assert {report["backends"][name] for name in FUSED} == {"it needs a GPU"}
    for smoke in report["smoke"]:
        assert 0 < smoke["forward_error"] <= smoke["limit"]
        assert 0 < smoke["gradient_error"] <= smoke["limit"]
    assert report["smoke"][0]["device"] == "cpu"


def test_table_names_every_finding_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORE_KERNELS_STRICT", "1")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= doctor.COLUMNS
    names = [re.split(r"\s{2,}", line)[0] for line in lines if not line.startswith(" ")]
    for name in ("score_kernels", "Python", "torch", "GPU", "Triton", "nvcc", "compiled module", "threads", "verdict"):
        assert names.count(name) == 1
    assert [name for name in names if name.startswith("backend")] == [f"backend {name}" for name in BACKENDS]
    assert "SCORE_KERNELS_STRICT=1" in "\n".join(lines)


@pytest.mark.parametrize("state", ["built", "not built", "broken"])
def test_compiled_module(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> object:
        assert name == "score_kernels._cuda"
        if state == "built":
            return SimpleNamespace(architectures=lambda: ["sm_80", "sm_90a"])
        raise ImportError("undefined symbol: x") if state == "broken" else ModuleNotFoundError(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=imported))
    expected = {"built": "for sm_80, sm_90a", "not built": "not built (docs/building.md", "broken": "broken: undefined"}
    assert doctor._describe_module().startswith(expected[state])


def test_wrong_result_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    break_blas(monkeypatch)
    assert main(["doctor"]) == 1
    assert "score_mlp on cpu is wrong: relative error 1.0e-04" in " ".join(capsys.readouterr().out.split())


def test_call_that_raises_is_a_problem_with_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCORE_KERNELS_SCRATCH_MB", "many")
    assert main(["doctor"]) == 1
    assert "SCORE_KERNELS_SCRATCH_MB: expected a positive number of MiB, got 'many'" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_broken_triton_is_noted_with_its_fix(error: str, tmp_path: Path) -> None:
    folder = fake(tmp_path, f"raise {error}('libtriton.so')", "triton")
    done = run(folder, "-m", "score_kernels", "doctor", "--json")
    report = json.loads(done.stdout)
    (note,) = report["notes"]
    assert note["what"] == f"Triton cannot be imported: {error}: libtriton.so"
    assert "pip uninstall triton" in note["fix"]
    assert report["backends"]["triton"] == note["what"]
    assert done.returncode == 0, done.stdout + done.stderr


def test_interpreter_makes_triton_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = doctor.examine()
    assert report["backends"]["triton"] is None
    assert "triton" in report["verdict"]


def test_triton_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from score_kernels import ops

    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert doctor.examine()["backends"]["triton"] == "triton is not installed: pip install 'triton>=3.6'"


def test_gpu_without_committed_results_is_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "VERIFIED", frozenset({("triton", 75), ("cuda", 90)}))
    devices = [{"capability": c} for c in ("9.0", "9.0", "7.5")]
    (note,) = doctor._unverified({"devices": devices}, {"triton": None, "cuda": "not built"})
    assert note["what"].endswith("the triton kernels: no hardware results are committed for compute capability 9.0")
    assert "make gpu-check" in note["fix"]
    (note,) = doctor._unverified({"devices": devices}, {"triton": "not installed", "cuda": None})
    assert note["what"].endswith("the cuda kernels: no hardware results are committed for compute capability 7.5")


def test_driver_without_a_torch_that_can_use_it_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "580.00")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.examine()
    assert report["works"]
    (note,) = report["notes"]
    assert "580.00" in note["what"]
    assert note["what"] in " ".join(doctor.render(report).split())


@pytest.mark.parametrize("module", ["score_kernels", "score_kernels.__main__", "score_kernels.doctor"])
def test_importing_it_imports_neither_torch_nor_triton(module: str) -> None:
    """Failure case 29: an import that needs a GPU, a driver, Triton or a compiler."""
    code = f"import sys, {module}; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = run(None, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_torch_minimum_is_the_one_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={'.'.join(map(str, doctor.TORCH_MINIMUM))}" in project["dependencies"]
