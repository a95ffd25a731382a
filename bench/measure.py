"""Timing: interleaved rounds, so that callables are compared as paired ratios that share the machine's drift.

times = compare({"eager": f, "ours": g}, rounds=20, baseline="eager")
times["ours"].median_ms, times["ours"].speedup      # speedup: Interval(median, low, high)
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

# A sample lasts at least this long: shorter calls are repeated within it.
SAMPLE_MS = 2.0
MAX_REPEATS = 500

# Larger than any GPU's L2 cache: writing as much evicts what the last call left there.
FLUSH_BYTES = 256 << 20

RESAMPLES = 2000
CONFIDENCE = 0.95


class Prepared(NamedTuple):
    """A callable with set-up that is not timed: `run(prepare())`, only `run` between the clock's ticks."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


class Interval(NamedTuple):
    """A median and its bootstrap confidence interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Times of one callable, in milliseconds a call; speedup: the baseline's time over this one's, paired round by round."""

    samples_ms: list[float]
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup: Interval | None = None


class CallableError(RuntimeError):
    """A callable raised while it was timed: `name` says which, `__cause__` what."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} raised while it was timed")
        self.name = name


def compare(
    callables: Mapping[str, Callable[[], object] | Prepared],
    rounds: int = 20,
    *,
    baseline: str | None = None,
    warmup: int = 2,
    device: str = "cpu",
    flush: bool = False,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, Summary]:
    """Times the callables in turns: every round runs each of them once, in an order that rotates from round to round.

    rounds: samples of each. baseline: the callable that `speedup` refers to; None: no speedups. warmup: untimed calls of each
    beforehand. device: "cpu" uses the wall clock, "cuda" events of the current stream. flush: empty a GPU's L2 cache before
    every call, so that inputs come from memory; the next launches queue up meanwhile, which hides some of their cost.
    on_round: called with the number of rounds done.
    Raises CallableError when a callable raises, ValueError for fewer than 1 round or an unknown baseline.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected 1 or more, got {rounds}")
    if baseline is not None and baseline not in callables:
        raise ValueError(f"baseline: expected one of {', '.join(callables)}, got {baseline!r}")
    steps = {name: f if isinstance(f, Prepared) else _plain(f) for name, f in callables.items()}
    clock = partial(_cuda_ms, flush=_flusher(device, flush)) if device.startswith("cuda") else _wall_ms
    repeats = {}
    for name, step in steps.items():
        with _named(name):
            times = [clock(step, 1) for _ in range(max(warmup, 1))]
        repeats[name] = min(max(math.ceil(SAMPLE_MS / max(times[-1], 1e-6)), 1), MAX_REPEATS)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for done in range(rounds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            with _named(name), _no_collection():
                samples[name].append(clock(steps[name], repeats[name]))
        if on_round is not None:
            on_round(done + 1)
    return {name: _summary(times, samples.get(baseline or "")) for name, times in samples.items()}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """The median of the paired ratios, with a bootstrap percentile interval of that median (fixed seed)."""
    ratios = torch.tensor(numerator, dtype=torch.float64) / torch.tensor(denominator, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)).tolist()
    return Interval(ratios.quantile(0.5).item(), low, high)


def _summary(samples: list[float], baseline: list[float] | None) -> Summary:
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return Summary(samples, median, p20, p80, None if baseline is None else paired_ratio(baseline, samples))


def _plain(f: Callable[[], object]) -> Prepared:
    return Prepared(lambda: None, lambda _: f())


def _wall_ms(step: Prepared, repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        state = step.prepare()
        start = time.perf_counter()
        result = step.run(state)
        total += time.perf_counter() - start
        # What a call leaves behind is freed between samples, not inside the next one.
        del state, result
    return total / repeats * 1e3


def _flusher(device: str, wanted: bool) -> Callable[[], object]:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_ if wanted else lambda: None


def _cuda_ms(step: Prepared, repeats: int, flush: Callable[[], object]) -> float:
    pairs = []
    for _ in range(repeats):
        state = step.prepare()
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step.run(state)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / repeats


def graphed(step: Prepared) -> Prepared:
    """The step as the replay of a CUDA graph, captured here from what the step was prepared with."""
    state = step.prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run(state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(state)
    return _plain(graph.replay)


class Rates(NamedTuple):
    """What a GPU reaches in the run: products of bfloat16 in TFLOP/s, copies in GB/s (read and written bytes)."""

    tflops: float
    gb_per_s: float

    def bound_ms(self, flops: int, traffic: int) -> float:
        """The time that these operations and these bytes take at least."""
        return max(flops / self.tflops * 1e-9, traffic / self.gb_per_s * 1e-6)


def rates(device: str, size: int = 8192, rounds: int = 10) -> Rates:
    """Rates of a product of two (size, size) matrices and of a copy of 8 matrices, on this device."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.zeros(8, size, size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times = compare({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, device=device)
    moved = 2 * source.nbytes
    return Rates(2 * size**3 / times["product"].median_ms * 1e-9, moved / times["copy"].median_ms * 1e-6)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallableError(name) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, whose runs would fall on whichever callable is timed at the moment."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
