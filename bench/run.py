"""Measures cases: every provider is checked against float64 first, and only what is right is timed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops

from . import inputs, memory
from .cases import Case
from .flops import flops, traffic
from .measure import CallableError, Prepared, Rates, Summary, compare, graphed
from .providers import PROVIDERS, Provider

BASELINE = "eager"

# One row of a result file; `schema.json` describes it.
Row = dict[str, Any]

# Told what happens next, and which share of the problem's work was done since it was told last.
Tell = Callable[[str, float], object]

# What setting up and checking one provider costs, in the operations that the same time would have computed.
SETUP_FLOPS = 2e11

# From so many bytes of inputs and outputs on, a GPU's L2 cache is emptied before every call.
FLUSH_FROM_BYTES = 8 << 20


@dataclass(frozen=True)
class Problem:
    """One case in one mode and dtype: what its providers are compared on."""

    case: Case
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.case.name} {self.mode} {self.dtype}"

    def work(self, providers: int, rounds: int) -> float:
        """How long it takes, roughly, relative to other problems."""
        return providers * (SETUP_FLOPS + (rounds + 4) * flops(self.case, self.mode))


@dataclass(frozen=True)
class Settings:
    """rounds: samples of each provider. memory: measure peak memory in child processes. device: "cpu" or "cuda".

    rates: what `roofline` refers to; None: it stays empty.
    """

    rounds: int = 20
    memory: bool = False
    device: str = "cpu"
    rates: Rates | None = None


def problems(cases: Sequence[Case], modes: Sequence[str], dtypes: Sequence[str]) -> list[Problem]:
    """Every case in these modes and dtypes; none given: in the case's own."""
    return [
        Problem(case, mode, dtype) for case in cases for mode in modes or case.modes for dtype in dtypes or (case.dtype,)
    ]  # fmt: skip


def measure(problem: Problem, providers: Sequence[Provider], settings: Settings, tell: Tell) -> list[Row]:
    """One row for each provider. Nothing that a provider raises ends the run: it becomes the `error` of its row."""
    on_gpu = settings.device.startswith("cuda")
    share = 1 / (1 + len(providers) * (2 if settings.memory else 1) + settings.rounds)
    rows = {provider.name: _blank(problem, provider) for provider in providers}
    dtype = getattr(torch, problem.dtype)
    torch.compiler.reset()  # a shape compiled before would make torch.compile take this one for dynamic
    tell(f"{problem}: float64 reference", 0)
    try:
        given = inputs.make(problem.case, problem.mode, dtype, settings.device)
        expected = inputs.reference(problem.case, given, problem.mode)
    except Exception as error:
        for row in rows.values():
            _stop(row, "failed", f"the float64 reference raised {_text(error)}")
        return list(rows.values())
    tell(str(problem), share)

    steps: dict[str, Prepared] = {}
    for provider in providers:
        row = rows[provider.name]
        with _failures(row):
            device = settings.device
            if reason := provider.absent(device) or provider.refuses(problem.case, dtype, device):
                _stop(row, "absent", reason)
                continue
            tell(f"{problem}: checking {provider.name}", 0)
            step = inputs.step(provider.build(problem.case), given, problem.mode)
            _check(row, provider, step, expected, inputs.tolerance(dtype, problem.mode))
            tell(str(problem), share)
            if row["status"] != "ok":
                continue
            if settings.memory:
                tell(f"{problem}: peak memory of {provider.name}", 0)
                row["peak_memory_mb"] = memory.peak_in_child("bench.run:memory_step", problem, provider.name, settings.device)
                tell(str(problem), share)
            steps[provider.name] = graphed(step) if problem.case.graph and on_gpu else step
    del expected
    # What fits in the cache with room to spare is warm in use too, and there the launches are what counts.
    flush = traffic(problem.case, problem.mode, dtype.itemsize) >= FLUSH_FROM_BYTES

    def on_round(done: int) -> None:
        tell(f"{problem}: timing, round {done} of {settings.rounds}", share)

    while steps:
        try:
            baseline = BASELINE if BASELINE in steps else None
            times = compare(
                steps, settings.rounds, baseline=baseline, device=settings.device, flush=flush, on_round=on_round
            )  # fmt: skip
        except CallableError as error:
            del steps[error.name]
            _stop(rows[error.name], "failed", f"raised while it was timed: {_text(error.__cause__)}")
        else:
            for name, summary in times.items():
                _fill(rows[name], summary, settings.rates)
            break
    return list(rows.values())


def run(targets: Iterable[Problem], providers: Sequence[Provider], settings: Settings, tell: Tell) -> Iterator[list[Row]]:
    """Measures one problem after the other and yields its rows as soon as they are there."""
    for problem in targets:
        yield measure(problem, providers, settings, tell)


def memory_step(problem: Problem, provider: str, device: str) -> Callable[[], object]:
    """What a child process measures the peak memory of: one whole step, forward included, on tensors that are already there."""
    given = inputs.make(problem.case, problem.mode, getattr(torch, problem.dtype), device)
    prepare, step = inputs.step(PROVIDERS[provider].build(problem.case), given, problem.mode)
    return lambda: step(prepare())


def _blank(problem: Problem, provider: Provider) -> Row:
    case, mode, dtype = problem.case, problem.mode, problem.dtype
    return {
        "key": f"{case.name}/{mode}/{dtype}/{provider.name}",
        "op": case.op,
        "case": case.name,
        "provider": provider.name,
        "mode": mode,
        "dtype": dtype,
        "rows": case.rows,
        "features": case.features,
        "hidden": case.hidden,
        "iterations": case.iterations,
        "params": case.params,
        "plan": None,
        "status": "ok",
        "error": None,
        "ms_median": None,
        "ms_p20": None,
        "ms_p80": None,
        "samples": None,
        "compile_ms": None,
        "tflops": None,
        "roofline": None,
        "peak_memory_mb": None,
        "rel_error": None,
        "speedup_vs_eager": None,
        "flops": flops(case, mode),
        "bytes": traffic(case, mode, getattr(torch, dtype).itemsize),
    }


def _check(row: Row, provider: Provider, step: Prepared, expected: list[Tensor], tolerance: float) -> None:
    """The first call: its plan, its time where it compiles, and its error against float64."""
    start = time.perf_counter()
    with ops.observe_plans() as plans, _no_compile_cache():
        results = step.run(step.prepare())
    if provider.compiles:
        row["compile_ms"] = (time.perf_counter() - start) * 1e3
    row["plan"] = asdict(plans[0]) if plans else None
    assert isinstance(results, list)
    error = inputs.relative_error(results, expected)
    row["rel_error"] = error if math.isfinite(error) else None
    if not error <= tolerance:
        what = f"relative error {error:.2e}" if math.isfinite(error) else "a result that is not finite"
        _stop(row, "wrong", f"{what}, expected at most {tolerance:.2e} against float64")


def _fill(row: Row, summary: Summary, rates: Rates | None) -> None:
    # The rate of products was measured in 16 bits.
    bound_ms = rates.bound_ms(row["flops"], row["bytes"]) if rates and row["dtype"] in ("bfloat16", "float16") else None
    row.update(
        ms_median=summary.median_ms,
        ms_p20=summary.p20_ms,
        ms_p80=summary.p80_ms,
        samples=summary.samples_ms,
        tflops=row["flops"] / summary.median_ms * 1e-9,
        roofline=None if bound_ms is None else bound_ms / summary.median_ms,
        speedup_vs_eager=None if summary.speedup is None else summary.speedup._asdict(),
    )


def _stop(row: Row, status: str, error: str) -> None:
    row.update(status=status, error=error, compile_ms=None)


@contextmanager
def _no_compile_cache() -> Iterator[None]:
    """Whatever compiles in here does so from nothing, whether or not an earlier run left it in torch's caches."""
    with warnings.catch_warnings(), torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


@contextmanager
def _failures(row: Row) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _stop(row, "failed", _text(error))


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
