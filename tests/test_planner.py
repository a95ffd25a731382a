"""The planner is a pure function: tiles, the scratch bound, which backend and why not another, with no device and no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from helpers_torch import D, H, call, draw, parameters

import score_kernels as sk
from score_kernels import functional as SF
from score_kernels import ops, planner
from score_kernels.planner import plan, scratch_tiles

CALL = {
    "op": "mlp",
    "features": 64,
    "hidden": 128,
    "gated": False,
    "iterations": 8,
    "dtype": "float32",
    "itemsize": 4,
    "device": "cpu",
    "scratch_budget": 64 << 20,
}

ITERATIONS = (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100, 256, 1000)
SIZES = [(1, 1), (5, 7), (64, 64), (64, 256), (256, 256), (128, 512), (512, 2048), (1024, 4096), (4096, 16384)]
PLANS = [
    plan(
        **{**CALL, "features": features, "hidden": hidden, "iterations": t, "gated": gated, "itemsize": size, "device": device}
    )
    for features, hidden in SIZES
    for t in ITERATIONS
    for gated in (False, True)
    for size in (4, 8)
    for device in ("cpu", "cuda")
]


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def test_rows_are_powers_of_two_within_their_limits():
    for p in PLANS:
        low, high = planner.CPU_ROWS if p.device == "cpu" else planner.GPU_ROWS
        assert is_power_of_two(p.rows), p
        assert is_power_of_two(p.backward_rows), p
        assert p.backward_rows <= p.rows <= high, p
        assert p.rows >= low, p


def test_a_larger_problem_has_no_larger_tiles():
    for device in ("cpu", "cuda"):
        rows = [plan(**{**CALL, "features": d, "hidden": h, "device": device}).rows for d, h in SIZES]
        assert rows == sorted(rows, reverse=True)
        assert rows[0] > rows[-1]
    assert plan(**{**CALL, "gated": True}).rows < plan(**CALL).rows


def test_backward_keeps_no_more_states_than_two_ceil_sqrt_t_forward_tiles():
    for p in PLANS:
        kept = scratch_tiles(p.iterations, p.interval) * p.backward_rows
        assert kept <= 2 * math.ceil(math.sqrt(p.iterations)) * p.rows, p


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_scratch_bytes_are_the_states_that_are_kept(iterations):
    p = plan(**{**CALL, "iterations": iterations})
    assert p.scratch_bytes == scratch_tiles(iterations, p.interval) * p.backward_rows * CALL["features"] * CALL["itemsize"]


@pytest.mark.parametrize("interval", range(1, 12))
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_scratch_tiles_count_checkpoints_and_one_segment(iterations, interval):
    """A walk by hand: every interval-th state, and while a segment is reversed its states but the first."""
    starts = range(0, iterations, interval)
    most = max((i + 1 + min(interval, iterations - start) - 1 for i, start in enumerate(starts)), default=0)
    assert most <= scratch_tiles(iterations, interval) <= most + interval


def test_equal_calls_have_equal_plans():
    assert plan(**CALL) == plan(**CALL)
    assert hash(plan(**CALL)) == hash(plan(**CALL))


def test_backends_and_reasons():
    assert (plan(**CALL).backend, plan(**CALL).skipped) == ("blas", ())
    for name in planner.BACKENDS:
        assert plan(**CALL, backend=name).backend == name
    on_gpu = plan(**{**CALL, "device": "cuda"})
    assert on_gpu.backend == "blas"
    assert dict(on_gpu.skipped) == {
        "cuda": "the CUDA kernels are not part of this version",
        "triton": "the Triton kernels are not part of this version",
    }
    # What was asked for by name skips nothing.
    assert plan(**{**CALL, "device": "cuda"}, backend="blas").skipped == ()
    for name in planner.MISSING:
        with pytest.raises(
            ValueError, match=f"backend='{name}': the .* kernels are not part of this version; available: reference"
        ):
            plan(**CALL, backend=name)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, blas, got 'mkl'"):
        plan(**CALL, backend="mkl")


def test_planning_needs_no_torch():
    code = (
        "import sys, json; sys.modules['torch'] = None; from score_kernels.planner import plan;"
        "import dataclasses; print(json.dumps(dataclasses.asdict(plan(**json.loads(sys.argv[1])))))"
    )
    command = [sys.executable, "-c", code, json.dumps(CALL)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert found == {**dataclasses.asdict(plan(**CALL)), "skipped": []}


def test_a_plan_prints_as_a_table():
    lines = str(plan(**{**CALL, "device": "cuda", "iterations": 300})).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "op", "backend", "device", "forward", "backward", "scratch", "not cuda", "not triton",
    ]  # fmt: skip
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1, "one column"
    assert "300 iterations" in str(lines)
    assert lines[-1].endswith("the Triton kernels are not part of this version")


def test_explain_tells_the_plans_of_all_calls_in_order():
    model = torch.nn.Sequential(sk.ScoreLinear(D), torch.nn.Linear(D, D), sk.ScoreMLP(D, H, iterations=9))
    found = sk.explain(model, draw(5, D))
    assert [(p.op, p.backend, p.device, p.dtype, p.iterations) for p in found] == [
        ("linear", "blas", "cpu", "float32", 4), ("mlp", "blas", "cpu", "float32", 9),
    ]  # fmt: skip
    assert str(found) == "\n\n".join(str(p) for p in found)
    assert not sk.explain(torch.nn.Linear(D, D), draw(5, D))
    assert str(sk.explain(torch.nn.Linear(D, D), draw(5, D))) == "no score_kernels op was called"


def test_explain_of_a_function_with_its_arguments():
    given = parameters("mlp", dtype=torch.bfloat16)
    h = draw(5, D, dtype=torch.bfloat16)
    (found,) = sk.explain(SF.score_mlp, h, **given, iterations=6, grad_iterations=2)
    assert (found.dtype, found.iterations) == ("bfloat16", 2)
    (reference,) = sk.explain(SF.score_mlp, h, **given, iterations=6, backend="reference")
    assert reference.backend == "reference"
    assert "tiles" not in str(reference)


def test_explain_does_not_outlive_its_call():
    given = parameters("linear")
    with ops.observe_plans() as outer:
        call("linear", draw(5, D), given)
        sk.explain(lambda: call("linear", draw(5, D), given))
    assert len(outer) == 2
    with pytest.raises(ValueError, match="iterations"):
        sk.explain(call, "linear", draw(5, D), given, iterations=-1)
    call("linear", draw(5, D), given)
    assert len(outer) == 2


def test_available_backends():
    assert sk.available_backends() == ["reference", "blas"]
    for backend in sk.available_backends():
        call("linear", draw(5, D), parameters("linear"), backend=backend)


def test_explain_is_the_function_whatever_was_imported_before():
    assert sk.available_backends()
    assert callable(sk.explain)
    assert callable(sk.functional.score_mlp)
    assert sk.autograd.ScoreLinearFunction is sk.autograd.FUNCTIONS["linear"]


@pytest.fixture
def skipping(monkeypatch):
    """As on a GPU: `auto` passed over a kernel."""
    original = ops.plan_of
    monkeypatch.setattr(ops, "plan_of", lambda p: dataclasses.replace(original(p), skipped=(("triton", "of a test's reason"),)))
    monkeypatch.setattr(ops, "_announced", set())


@pytest.mark.usefixtures("skipping")
def test_falling_back_warns_once_for_each_reason():
    given = parameters("linear")
    with pytest.warns(UserWarning, match="score_linear runs on 'blas', not on 'triton': of a test's reason"):
        call("linear", draw(5, D), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("linear", draw(5, D), given)


@pytest.mark.usefixtures("skipping")
def test_falling_back_is_an_error_where_it_must_not_happen(monkeypatch):
    monkeypatch.setenv("SCORE_KERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"score_linear runs on 'blas', not on 'triton': .*SCORE_KERNELS_STRICT=1"):
        call("linear", draw(5, D), parameters("linear"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scratch_stays_within_its_byte_budget(device):
    for budget in (1 << 20, 16 << 20, 64 << 20, 512 << 20):
        for features, hidden in SIZES:
            for iterations in ITERATIONS:
                changes = {"features": features, "hidden": hidden, "iterations": iterations, "scratch_budget": budget}
                p = plan(**{**CALL, **changes, "device": device})
                assert p.scratch_bytes <= budget, p
