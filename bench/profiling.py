"""`python -m bench profile CASE`: where the time of a few calls goes, by torch.profiler, and the command for Nsight Compute."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from .cases import MODES, Case
from .layout import Line, Sheet
from .measure import Prepared
from .precision import DTYPES
from .providers import PROVIDERS, Provider
from .suites import SUITES, select
from .targets import Absent, Problem

# The range that the profiled calls are in: what tells them from compiling and warming up in a trace.
RANGE = "bench"

WARMUP = 3
TOP = 15

# What our operators and the ranges of their backends are called.
OURS = "score_kernels::"

# What Nsight Compute looks at of a provider that is a backend with kernels of its own; of others: every kernel.
KERNELS = "regex:forward_kernel|backward_kernel"


def profiled(problem: Problem, provider: Provider, device: str, calls: int) -> torch.profiler.profile:
    """The profile of so many calls, after some that are not in it. Raises targets.Absent where the provider cannot run."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    with _warm(problem, provider, device) as step, torch.profiler.profile(activities=activities) as profile:
        _call(step, device, calls)
    return profile


def bare(problem: Problem, provider: Provider, device: str, calls: int) -> None:
    """The same calls with no profiler of torch's, which would be in the way of NVIDIA's; with NVTX ranges on a GPU.

    NVIDIA's profilers are told when to begin and to end: a filter by ranges would leave out the kernels of backward, which
    autograd launches in a thread of its own.
    """
    on_gpu = device.startswith("cuda")
    with _warm(problem, provider, device) as step, torch.autograd.profiler.emit_nvtx() if on_gpu else nullcontext():
        _call(step, device, calls, torch.cuda.profiler.profile if on_gpu else nullcontext)


def sheet(title: str, profile: torch.profiler.profile, calls: int) -> Sheet:
    """This package's ops, then the operations that take most of the time themselves; in milliseconds of a call."""
    events = [event for event in profile.key_averages() if event.key != RANGE]
    on_gpu = any(event.self_device_time_total for event in events)
    own, whole = ("self_device_time_total", "device_time_total") if on_gpu else ("self_cpu_time_total", "cpu_time_total")
    # On a GPU a range has the time of the kernels in it for its own.
    total = sum(getattr(event, own) for event in events if not (on_gpu and event.is_user_annotation)) or 1
    unit = "GPU ms" if on_gpu else "CPU ms"
    columns = ("operation", "calls", f"{unit}, all", f"{unit}, own", "own share")
    table = Sheet(title, columns, columns[1:])
    events.sort(key=lambda event: (not event.key.startswith(OURS), -getattr(event, own)))
    for event in events[:TOP]:
        times = (f"{getattr(event, name) / calls / 1e3:.3f}" for name in (whole, own))
        table.lines.append(Line((event.key, f"{event.count / calls:g}", *times, f"{getattr(event, own) / total:.1%}")))
    return table


def ncu(problem: Problem, provider: Provider) -> str:
    """The command that has NVIDIA Nsight Compute look at the kernels of one call, from where `bare` tells it to begin."""
    kernels = ("--kernel-name", KERNELS) if provider.kernel else ()
    what = ("--provider", provider.name, "--mode", problem.mode, "--dtype", problem.dtype, "--device", "cuda")
    profiler = ("ncu", "--set", "full", "--nvtx", "--profile-from-start", "off", *kernels, "--export", name(problem, provider))
    return shlex.join((*profiler, "python", "-m", "bench", "profile", problem.name, *what, "--calls", "1", "--bare"))


def name(problem: Problem, provider: Provider) -> str:
    return f"{problem.name}-{problem.mode}-{problem.dtype}-{provider.name}"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command = commands.add_parser("profile", help="where the time of a case goes, and the command for Nsight Compute")
    command.add_argument("case", metavar="CASE", help="its name: `list` has them")
    command.add_argument("--provider", action="append", default=[], choices=PROVIDERS, help="default: the suite's; repeatable")
    command.add_argument("--mode", action="append", default=[], choices=MODES, help="default: the case's; repeatable")
    command.add_argument("--dtype", choices=DTYPES, help="default: the case's")
    command.add_argument("--calls", type=int, default=3, metavar="N", help="how many are profiled (default: 3)")
    command.add_argument("--trace", type=Path, metavar="DIR", help="write a trace of each provider, for Perfetto or Chrome")
    command.add_argument("--bare", action="store_true", help="only make the calls: for a profiler that is not torch's")
    command.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")
    command.set_defaults(execute=execute)


def execute(options: argparse.Namespace, show: Callable[[Sheet], object]) -> int:
    if options.calls < 1:
        raise ValueError(f"--calls: expected 1 or more, got {options.calls}")
    case = _case(options.case)
    providers = options.provider or next(suite.providers for suite in SUITES.values() if case in suite.cases)
    for mode in options.mode or case.modes:
        problem = Problem(case, mode, options.dtype or case.dtype)
        for provider in (PROVIDERS[name] for name in providers):
            try:
                if options.bare:
                    bare(problem, provider, options.device, options.calls)
                else:
                    _show(problem, provider, options, show)
            except Absent as reason:
                print(f"\n{problem}, {provider.name}: absent, {reason}")
    return 0


def _show(problem: Problem, provider: Provider, options: argparse.Namespace, show: Callable[[Sheet], object]) -> None:
    profile = profiled(problem, provider, options.device, options.calls)
    show(sheet(f"{problem}, {provider.name}: {options.calls} calls on {options.device}", profile, options.calls))
    if options.trace:
        options.trace.mkdir(parents=True, exist_ok=True)
        path = options.trace / f"{name(problem, provider)}.json"
        profile.export_chrome_trace(str(path))
        print(f"trace: {path}")
    needs = "" if options.device == "cuda" else " (it needs an NVIDIA GPU, and this is a CPU)"
    print(f"each kernel in detail, by NVIDIA Nsight Compute{needs}:\n  {ncu(problem, provider)}")


def _case(name: str) -> Case:
    """Cases that two suites share are one."""
    cases = dict.fromkeys(select(None, [name]))
    if len(cases) > 1:
        raise ValueError(f"CASE: expected the name of one case, got {name!r}, which is {', '.join(c.name for c in cases)}")
    return next(iter(cases))


@contextmanager
def _warm(problem: Problem, provider: Provider, device: str) -> Iterator[Prepared]:
    """The step, compiled and warm; inside, products are of the problem's precision."""
    precision = DTYPES[problem.dtype]
    if reason := precision.absent(device):
        raise Absent(reason)
    with precision.products():
        step = problem.on(device).step(provider)
        for _ in range(WARMUP):
            step.run(step.prepare())
        yield step


def _call(step: Prepared, device: str, calls: int, watched: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
    """watched: what only the calls are in, not their set-up."""
    on_gpu = device.startswith("cuda")
    for _ in range(calls):
        state = step.prepare()
        with ExitStack() as ranges:
            ranges.enter_context(watched())
            ranges.enter_context(record_function(RANGE))
            if on_gpu:
                ranges.enter_context(torch.cuda.nvtx.range(RANGE))
            step.run(state)
            if on_gpu:
                torch.cuda.synchronize()
