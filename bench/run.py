"""Measures targets: every provider is checked against float64 first, and only what is right is timed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from score_kernels import ops

from . import inputs, memory
from .cases import Case
from .launches import launched, occupied
from .measure import CallableError, Prepared, Rates, Summary, compare, graphed
from .precision import DTYPES
from .providers import Provider
from .targets import Absent, Problem, Row, Target

__all__ = ["BASELINE", "Problem", "Row", "Settings", "Target", "measure", "problems", "run"]

BASELINE = "eager"

# Told what happens next, and which share of the target's work was done since it was told last.
Tell = Callable[[str, float], object]

# From so many bytes of inputs and outputs on, a GPU's L2 cache is emptied before every call.
FLUSH_FROM_BYTES = 8 << 20

# What is filled in once it was measured.
MEASURED = (
    "plan", "ms_median", "ms_p20", "ms_p80", "samples", "compile_ms", "tflops", "roofline", "peak_memory_mb", "rel_error",
    "tolerance", "speedup_vs_eager", "registers", "spills",
)  # fmt: skip


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


def measure(target: Target, providers: Sequence[Provider], settings: Settings, tell: Tell) -> list[Row]:
    """One row for each provider. Nothing that a provider raises ends the run: it becomes the `error` of its row."""
    rows = {provider.name: _blank(target, provider) for provider in providers}
    torch.compiler.reset()  # a shape compiled before would make torch.compile take this one for dynamic
    precision = DTYPES[target.dtype]
    if reason := precision.absent(settings.device):
        for row in rows.values():
            _stop(row, "absent", reason)
        return list(rows.values())
    share = 1 / (len(providers) * (2 if settings.memory else 1) + settings.rounds)
    with precision.products():
        steps = _checked(target, providers, rows, settings, tell, share)
        _time(target, steps, rows, settings, tell, share)
    return list(rows.values())


def run(targets: Iterable[Target], providers: Sequence[Provider], settings: Settings, tell: Tell) -> Iterator[list[Row]]:
    """Measures one target after the other and yields its rows as soon as they are there."""
    for target in targets:
        yield measure(target, providers, settings, tell)


def memory_step(target: Target, provider: str, device: str) -> Callable[[], object]:
    """What a child process measures the peak memory of: one whole step, forward included, on tensors that are already there."""
    prepare, step = target.on(device).step(target.provider(provider))

    def whole() -> object:
        with DTYPES[target.dtype].products():
            return step(prepare())

    return whole


def _checked(
    target: Target, providers: Sequence[Provider], rows: dict[str, Row], settings: Settings, tell: Tell, share: float
) -> dict[str, Prepared]:
    """The steps of the providers that are right; the rows of the others say what they are instead."""
    bench = target.on(settings.device)
    steps: dict[str, Prepared] = {}
    for provider in providers:
        row = rows[provider.name]
        with _failures(row):
            tell(f"{target}: checking {provider.name}", 0)
            step = bench.step(provider)
            _check(row, provider, step, bench.expected(provider), bench.tolerance(provider))
            tell(str(target), share)
            if row["status"] != "ok":
                continue
            if settings.memory:
                tell(f"{target}: peak memory of {provider.name}", 0)
                row["peak_memory_mb"] = memory.peak_in_child("bench.run:memory_step", target, provider.name, settings.device)
                tell(str(target), share)
            steps[provider.name] = graphed(step) if target.graph and settings.device.startswith("cuda") else step
    return steps


def _time(
    target: Target, steps: dict[str, Prepared], rows: dict[str, Row], settings: Settings, tell: Tell, share: float
) -> None:
    """Fills the rows of the steps with their times; whoever raises meanwhile is left out and the others start again."""

    def on_round(done: int) -> None:
        tell(f"{target}: timing, round {done} of {settings.rounds}", share)

    while steps:
        # What fits in the cache with room to spare is warm in use too, and there the launches are what counts.
        flush = max(rows[name]["bytes"] for name in steps) >= FLUSH_FROM_BYTES
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


def _blank(target: Target, provider: Provider) -> Row:
    key = f"{target.name}/{target.mode}/{target.dtype}/{provider.name}"
    names = {"key": key, "case": target.name, "provider": provider.name, "mode": target.mode, "dtype": target.dtype}
    return {**names, **target.row(provider), "status": "ok", "error": None, **dict.fromkeys(MEASURED)}


def _check(row: Row, provider: Provider, step: Prepared, expected: list[Tensor], tolerance: float) -> None:
    """The first call: its plan, its time where it compiles, what its kernels occupy, and its error against float64."""
    start = time.perf_counter()
    with ops.observe_plans() as plans, _no_compile_cache(), launched() as kernels:
        results = step.run(step.prepare())
    if provider.compiles:
        row["compile_ms"] = (time.perf_counter() - start) * 1e3
    row["plan"] = asdict(plans[0]) if plans else None
    row["registers"], row["spills"] = occupied(kernels if plans else ())
    assert isinstance(results, list)
    error = inputs.relative_error(results, expected)
    row["tolerance"] = tolerance
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
    except Absent as reason:
        _stop(row, "absent", str(reason))
    except Exception as error:
        _stop(row, "failed", _text(error))


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"
