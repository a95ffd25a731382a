"""Timing and memory of the benchmark harness: interleaved, paired, and of the call alone."""

from __future__ import annotations

import time

import pytest
import torch

from bench import memory
from bench.measure import CallableError, Prepared, Summary, _cuda_ms, compare, paired_ratio, rates


def test_rates_are_of_a_product_and_of_a_copy(monkeypatch):
    size, results = 64, {}

    def two_milliseconds(callables, rounds, *, device):
        results.update({name: run() for name, run in callables.items()})
        return dict.fromkeys(callables, Summary([2.0], 2.0, 2.0, 2.0))

    monkeypatch.setattr("bench.measure.compare", two_milliseconds)
    found = rates("cpu", size)
    assert results["product"].shape == (size, size)
    assert {x.dtype for x in results.values()} == {torch.bfloat16}
    # 2 operations per multiply-add; every byte of the copy is read and written.
    assert found.tflops == pytest.approx(2 * size**3 / 2e-3 / 1e12)
    assert found.gb_per_s == pytest.approx(2 * 2 * results["copy"].numel() / 2e-3 / 1e9)


def test_memory_is_that_of_one_call():
    assert memory.peak_in_child("functools:partial", torch.ones, 16_000_000) == pytest.approx(64, abs=2)


def test_memory_excludes_what_is_there_before():
    there = torch.ones(16_000_000)
    assert memory.peak_in_child("functools:partial", torch.sum, there) < 2


def test_memory_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"functools:no_such.*AttributeError.*no_such"):
        memory.peak_in_child("functools:no_such")


def test_paired_ratio_cancels_what_both_share():
    generator = torch.Generator().manual_seed(1)
    drift = 1 + torch.rand(40, generator=generator, dtype=torch.float64)
    noise = 1 + 0.02 * torch.randn(40, generator=generator, dtype=torch.float64)
    median, low, high = paired_ratio((1.5 * drift * noise).tolist(), drift.tolist())
    assert low <= median <= high
    assert median == pytest.approx(1.5, abs=0.02)
    assert high - low < 0.04
    assert paired_ratio([3.0, 3.0], [2.0, 2.0]) == (1.5, 1.5, 1.5)


def test_confidence_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(100):
        noise = torch.exp(0.1 * torch.randn(20, generator=generator, dtype=torch.float64))
        interval = paired_ratio(noise.tolist(), [1.0] * 20)
        covered += interval.low <= 1.0 <= interval.high
    assert 85 <= covered <= 100


def test_compare_interleaves_and_times_only_the_run():
    calls: list[str] = []

    def prepare() -> str:
        time.sleep(0.25)
        return "state"

    def prepared(state: str) -> None:
        assert state == "state"
        calls.append("b")
        time.sleep(0.004)

    def plain() -> None:
        calls.append("a")
        time.sleep(0.008)

    done: list[int] = []
    times = compare({"a": plain, "b": Prepared(prepare, prepared)}, 4, baseline="a", warmup=1, on_round=done.append)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert done == [1, 2, 3, 4]
    assert 4 <= times["b"].median_ms < 200
    assert times["a"].speedup == (1, 1, 1)
    assert times["b"].speedup.median == pytest.approx(
        torch.tensor([a / b for a, b in zip(times["a"].samples_ms, times["b"].samples_ms, strict=True)]).quantile(0.5).item()
    )


def test_gpu_clock_flushes_before_it_starts_and_stops_after_the_run(monkeypatch):
    """The order of things on the stream, with recorded events in place of a GPU's."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("tick")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    step = Prepared(lambda: order.append("prepare"), lambda _: order.append("run"))
    assert _cuda_ms(step, 2, lambda: order.append("flush")) == 3.0
    assert order == 2 * ["prepare", "flush", "tick", "run", "tick"] + ["wait"]


def test_compare_errors():
    with pytest.raises(ValueError, match="rounds: expected 1 or more, got 0"):
        compare({"a": lambda: None}, 0)
    with pytest.raises(ValueError, match="baseline: expected one of a, got 'b'"):
        compare({"a": lambda: None}, 1, baseline="b")
    with pytest.raises(CallableError, match="b raised") as caught:
        compare({"a": lambda: None, "b": lambda: 1 / 0}, 1)
    assert caught.value.name == "b"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
