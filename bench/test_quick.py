"""The quick suite for pytest-benchmark: `pytest bench/ --benchmark-only`, with its own tables, --benchmark-save and -compare.

The cases and providers of `python -m bench run --suite quick`, grouped by problem. Every provider is checked against float64
before it is timed: what is wrong fails. pytest-benchmark times one provider after the other, so the machine's drift is in the
ratios of its tables; `python -m bench run` pairs them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from score_kernels import ops

from .inputs import relative_error
from .precision import DTYPES
from .providers import PROVIDERS, Provider
from .suites import SUITES
from .targets import Absent, CaseBench, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 20
WARMUP = 2

SUITE = SUITES["quick"]
PROBLEMS = [Problem(case, mode, case.dtype) for case in SUITE.cases for mode in case.modes]


@functools.lru_cache(maxsize=1)
def on_device(problem: Problem) -> CaseBench:
    """Its providers come one after the other: they share the inputs and the float64 answer."""
    return problem.on(DEVICE)


@pytest.mark.parametrize("provider", [PROVIDERS[name] for name in SUITE.providers], ids=lambda provider: provider.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem).replace(" ", "-"))
def test_quick(problem: Problem, provider: Provider, benchmark: Any) -> None:
    torch.compiler.reset()  # a shape compiled before would make torch.compile take this one for dynamic
    bench = on_device(problem)
    try:
        step = bench.step(provider)
    except Absent as reason:
        pytest.skip(str(reason))
    with DTYPES[problem.dtype].products():
        with ops.observe_plans() as plans:
            results: Any = step.run(step.prepare())
        error = relative_error(results, bench.expected(provider))
        assert error <= bench.tolerance(provider), f"{provider.name} is wrong"
        del results
        benchmark.group = str(problem)
        benchmark.extra_info.update(rel_error=error, backend=plans[0].backend if plans else None)
        benchmark.pedantic(
            _finished, setup=lambda: ((step.run, step.prepare()), {}), rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1
        )  # fmt: skip


def _finished(run: Any, state: Any) -> None:
    """A GPU's call is over when the GPU is."""
    run(state)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
