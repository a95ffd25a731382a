"""What works on this machine, what does not and how to mend it: also where torch is missing or broken.

`examine` collects plain data, the object of `--json`; `render` lays it out for people. Whatever a probe raises is reported:
a doctor that crashes is no help.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import __version__
from .machine import VERIFIED
from .planner import BACKENDS, FUSED

Facts = dict[str, Any]

# The oldest torch that the package works with, as pyproject.toml asks for it.
TORCH_MINIMUM = (2, 11)

# The smoke comparison: rows, features, hidden features, iterations; and the relative error that float32 may show there.
SMOKE_SIZES = (256, 64, 96, 8)
SMOKE_LIMIT = 2e-6
SMOKE_FIX = "mend what the message names; if it names nothing of yours, report it together with this output"

COLUMNS = 100
ABSENT = "absent"


def run(as_json: bool = False, verify: bool = False) -> int:
    """Prints the report; 0, or 1 when the package cannot work here, or a kernel that `verify` compares is not right."""
    report = examine()
    if verify and report["works"]:
        from . import verification

        report["verification"] = verification.run(lambda text: print(text, file=sys.stderr))
    print(json.dumps(report, indent=2) if as_json else render(report))
    return 0 if report["works"] and report.get("verification", {"passed": True})["passed"] else 1


def examine() -> Facts:
    """The report as plain data. `problems` keep the package from working; they and the less serious `notes` carry their fix."""
    problems: list[Facts] = []
    torch, torch_facts = _torch(problems)
    cuda, triton = _cuda(torch), _triton()
    backends = _backends(torch, cuda, triton, problems)
    smoke = [] if torch is None or problems else _smoke(cuda, problems)
    report = {
        "score_kernels": {"version": __version__, "location": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch_facts,
        "cuda": cuda,
        "triton": triton,
        "nvcc": _tool("nvcc", os.environ.get("CUDA_HOME", "")),
        "cxx": _tool(os.environ.get("CXX") or "c++"),
        "backends": backends,
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SCORE_KERNELS_")},
        "threads": {"torch": torch_facts.pop("threads"), "cpus": os.cpu_count()},
        "smoke": smoke,
        "problems": problems,
        "notes": [*_notes(torch_facts, cuda, triton), *_unverified(cuda, backends)],
        "works": not problems,
    }
    return {**report, "verdict": _verdict(report)}


def render(report: Facts) -> str:
    """The report as an aligned table of plain text."""
    torch, cuda, threads = report["torch"], report["cuda"], report["threads"]
    package = report["score_kernels"]
    rows = [
        ("score_kernels", f"{package['version']} in {package['location']}"),
        ("Python", f"{report['python']} on {report['platform']}"),
        ("torch", torch["version"] or torch["error"]),
        ("GPU", _describe_cuda(cuda)),
        ("Triton", report["triton"]["version"] or f"{report['triton']['error']} (not required)"),
        ("nvcc", _describe_tool(report["nvcc"], "not required")),
        ("C++ compiler", _describe_tool(report["cxx"], "only torch.compile needs one")),
        ("compiled module", _describe_module()),
        *((f"backend {name}", reason or "available") for name, reason in report["backends"].items()),
        *(("switch", f"{name}={value}") for name, value in report["switches"].items()),
        ("threads", f"torch uses {threads['torch'] or 'an unknown number'}, {threads['cpus']} CPUs"),
        *((f"smoke {s['backend']}", f"{s['device']}, float32 against float64: {_describe_smoke(s)}") for s in report["smoke"]),
        *(
            pair
            for kind in ("problem", "note")
            for found in report[f"{kind}s"]
            for pair in ((kind, found["what"]), ("fix", found["fix"]))
        ),
        *(("verify", text) for text in report.get("verification", {"says": []})["says"]),
        ("verdict", report["verdict"]),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        textwrap.fill(value, COLUMNS, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width) for name, value in rows
    )


def _torch(problems: list[Facts]) -> tuple[ModuleType | None, Facts]:
    """torch, or None and a problem when it cannot be imported or is no usable torch."""
    try:
        torch = importlib.import_module("torch")
        version = str(torch.__version__)
        facts = {"version": version, "cuda_build": torch.version.cuda, "threads": torch.get_num_threads(), "error": None}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # A broken installation raises anything: ImportError, OSError for a shared library, AttributeError, SystemExit ...
        fix = (
            "install it: pip install torch (https://pytorch.org/get-started/locally has the command for each system)"
            if isinstance(error, ModuleNotFoundError) and error.name == "torch"
            else "reinstall it: pip install --force-reinstall torch; and let no file or folder of your own be named torch"
        )
        problems.append({"what": f"torch cannot be imported: {_describe(error)}", "fix": fix})
        return None, {"version": None, "cuda_build": None, "threads": None, "error": f"cannot be imported: {_describe(error)}"}
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_MINIMUM:
        oldest = ".".join(str(n) for n in TORCH_MINIMUM)
        problems.append({"what": f"torch {version} is too old", "fix": f"pip install --upgrade 'torch>={oldest}'"})
    return torch, facts


def _cuda(torch: ModuleType | None) -> Facts:
    facts: Facts = {"available": False, "devices": [], "driver": _driver(), "error": None}
    if torch is None:
        return facts
    try:
        facts["available"] = bool(torch.cuda.is_available())
        for index in range(torch.cuda.device_count() if facts["available"] else 0):
            device = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {"name": device.name, "capability": f"{device.major}.{device.minor}", "memory_mb": device.total_memory // 10**6}
            )
    except Exception as error:
        facts["error"] = _describe(error)
    return facts


def _driver() -> str | None:
    """The NVIDIA driver's version, one line for all GPUs."""
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines[0].strip() if lines else None


def _triton() -> Facts:
    try:
        return {"version": str(importlib.import_module("triton").__version__), "error": None}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return {"version": None, "error": ABSENT if absent else f"cannot be imported: {_describe(error)}"}


def _tool(name: str, home: str = "") -> Facts:
    """Where a compiler is, and the line of `--version` that has its number; `home`: its CUDA_HOME, searched first."""
    path = (shutil.which(str(Path(home) / "bin" / name)) if home else None) or shutil.which(name)
    lines = _output(path, "--version") if path else []
    return {"path": path, "version": next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), None)}


def _output(*command: str) -> Sequence[str]:
    """The lines that a command prints; none if it does not exist, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _backends(torch: ModuleType | None, cuda: Facts, triton: Facts, problems: list[Facts]) -> dict[str, str | None]:
    """Every backend; None: available, else the reason why it is not."""
    if torch is None:
        return dict.fromkeys(BACKENDS, "torch cannot be imported")
    return {**dict.fromkeys(BACKENDS), **_fused(torch, cuda, triton, problems)}


def _fused(torch: ModuleType, cuda: Facts, triton: Facts, problems: list[Facts]) -> dict[str, str | None]:
    """Why the fused kernels of each backend cannot run here, or None."""
    found: dict[str, str | None] = dict.fromkeys(FUSED, "torch has to be mended first")
    if not problems:
        try:
            from .ops import machine_of

            machine = machine_of(torch.device("cuda" if cuda["available"] else "cpu"))
            found = {name: getattr(machine, name) for name in FUSED}
        except Exception as error:
            found = dict.fromkeys(FUSED, _describe(error))
    if triton["error"] not in (None, ABSENT):
        found["triton"] = f"Triton {triton['error']}"
    return found


def _smoke(cuda: Facts, problems: list[Facts]) -> list[Facts]:
    """score_mlp by `blas` in float32 against the reference in float64, result and gradients, on every kind of device here."""
    found = []
    for device in ("cpu", "cuda") if cuda["available"] else ("cpu",):
        facts: Facts = {
            "backend": "blas",
            "device": device,
            "forward_error": None,
            "gradient_error": None,
            "limit": SMOKE_LIMIT,
        }
        try:
            facts["forward_error"], facts["gradient_error"] = _smoke_errors(device)
        except Exception as error:
            problems.append({"what": f"score_mlp raised on {device}: {_describe(error)}", "fix": SMOKE_FIX})
        else:
            if not max(facts["forward_error"], facts["gradient_error"]) <= SMOKE_LIMIT:
                what = f"score_mlp on {device} is wrong: {_describe_smoke(facts)}"
                problems.append({"what": what, "fix": SMOKE_FIX})
        found.append(facts)
    return found


def _smoke_errors(device: str) -> tuple[float, float]:
    import torch

    from .functional import score_mlp

    rows, features, hidden, iterations = SMOKE_SIZES
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, features), (hidden, features), (hidden,), (features, hidden), (features,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5 for shape in shapes]

    def result(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        h, *parameters = leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = score_mlp(h, *parameters, iterations=iterations, norm="layernorm", backend=backend)
        return [out.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), leaves)])]

    pairs = zip(result("blas", torch.float32), result("reference", torch.float64), strict=True)
    forward, gradient = (float((ours.double() - exact).norm() / exact.norm()) for ours, exact in pairs)
    return forward, gradient


def _notes(torch: Facts, cuda: Facts, triton: Facts) -> list[Facts]:
    notes = []
    if triton["error"] not in (None, ABSENT):
        fix = "pip install --force-reinstall triton; or pip uninstall triton, which is not required: torch may trip over it too"
        notes.append({"what": f"Triton {triton['error']}", "fix": fix})
    if cuda["driver"] and torch["version"] and not cuda["available"]:
        why = cuda["error"] or ("its build is for CPUs only" if torch["cuda_build"] is None else "no device is visible to it")
        fix = (
            "install a CUDA build of torch that this driver supports (https://pytorch.org/get-started/locally), "
            "or check CUDA_VISIBLE_DEVICES"
        )
        notes.append({"what": f"there is an NVIDIA driver ({cuda['driver']}), but torch cannot use a GPU: {why}", "fix": fix})
    return notes


def _unverified(cuda: Facts, backends: dict[str, str | None]) -> list[Facts]:
    """The fused kernels that run on a GPU here, and that `auto` does not choose."""
    why = "auto does not choose the {} kernels: no hardware results are committed for compute capability {}"
    fix = "backend='{}' chooses them; `make gpu-check OUT=dir` in a source checkout makes such results"
    return [
        {"what": why.format(name, capability), "fix": fix.format(name)}
        for name in FUSED
        for capability in dict.fromkeys(device["capability"] for device in cuda["devices"])
        if backends[name] is None and (name, int(capability.replace(".", ""))) not in VERIFIED
    ]


def _verdict(report: Facts) -> str:
    if not report["works"]:
        count = len(report["problems"])
        return f"score_kernels cannot work here: {count} problem{'s' if count > 1 else ''} to mend first"
    available = ", ".join(name for name, reason in report["backends"].items() if reason is None)
    devices = " and ".join("the GPU" if s["device"] == "cuda" else "the CPU" for s in report["smoke"])
    return f"score_kernels works on {devices} (backends: {available})"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _describe_cuda(cuda: Facts) -> str:
    driver = f", driver {cuda['driver']}" if cuda["driver"] else ""
    devices = ", ".join(f"{d['name']} (compute capability {d['capability']}, {d['memory_mb']} MB)" for d in cuda["devices"])
    return (devices or cuda["error"] or "none that torch can use") + driver


def _describe_module() -> str:
    try:
        module = importlib.import_module("score_kernels._cuda")
    except ModuleNotFoundError:
        return "not built (docs/building.md says how)"
    except ImportError as error:
        return f"broken: {error}"
    return f"for {', '.join(module.architectures())}"


def _describe_tool(tool: Facts, why: str) -> str:
    return f"{tool['path']} ({tool['version'] or 'version unknown'})" if tool["path"] else f"not found ({why})"


def _describe_smoke(smoke: Facts) -> str:
    if smoke["forward_error"] is None:
        return "raised"
    return (
        f"relative error {smoke['forward_error']:.1e} of the result, {smoke['gradient_error']:.1e} of the gradients "
        f"(at most {smoke['limit']:.0e})"
    )
