"""Made-up results for the commands that read them: noise as a shared machine has it, and rows that are not ok."""

from __future__ import annotations

import json
import math
import random

from bench.resultfile import Result

ENVIRONMENT = {
    "gpu": None, "driver": None, "cuda": None, "torch": "2.13.0", "triton": None, "cpu": "a CPU", "threads": 2,
    "git_sha": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00", "rates": None,
}  # fmt: skip
PARAMS = {"L": 1, "solver": "euler", "norm": "layernorm", "activation": "gelu"}
PLAN = {"op": "mlp", "backend": "blas", "backward": "blas", "rows": 512, "scratch_bytes": 1 << 20, "skipped": []}


def noisy(seed: object, ms: float = 10.0, rounds: int = 20, spread: float = 0.03) -> list[float]:
    """Times around `ms`: lognormal noise, a drift of the machine by as much, and now and then something else that ran."""
    draw = random.Random(str(seed))
    phase = draw.uniform(0, 2 * math.pi)
    return [
        ms
        * math.exp(draw.gauss(0, spread) + spread * math.sin(phase + 3 * i / rounds))
        * (draw.uniform(1.2, 3) if draw.random() < 0.05 else 1)
        for i in range(rounds)
    ]


def row(case="mlp-a", provider="blas", samples=(10.0,) * 7, mode="forward", dtype="float32", ours=("blas",), **changes):
    median = sorted(samples)[len(samples) // 2]
    return {
        "key": f"{case}/{mode}/{dtype}/{provider}", "op": "mlp", "case": case, "provider": provider, "mode": mode,
        "dtype": dtype, "rows": 1024, "features": 64, "hidden": 64, "iterations": 8, "params": PARAMS,
        "plan": PLAN if provider in ours else None, "status": "ok", "error": None, "ms_median": median, "ms_p20": min(samples),
        "ms_p80": max(samples), "samples": list(samples), "compile_ms": None, "tflops": 2e9 / median * 1e-9, "roofline": None,
        "peak_memory_mb": None, "rel_error": 1e-6, "tolerance": 2e-6, "speedup_vs_eager": None, "flops": 2 * 10**9,
        "bytes": 10**7, **changes,
    }  # fmt: skip


def broken(status="wrong", error="relative error 1.0", **about):
    """A row without times."""
    times = ("plan", "ms_median", "ms_p20", "ms_p80", "samples", "tflops", "rel_error", "tolerance")
    return {**row(**about), **dict.fromkeys(times), "status": status, "error": error}


def result(*rows, name="made-up", **environment) -> Result:
    return Result(name, {**ENVIRONMENT, **environment}, list(rows))


def written(path, made: Result) -> str:
    path.write_text(json.dumps({"environment": made.environment, "rows": made.rows}))
    return str(path)
