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
from score_kernels.planner import INTERPRETER, Machine, plan, scratch_tiles
from score_kernels.triton_kernels import configs
from score_kernels.triton_kernels.configs import BACKWARD, FORWARD, Tile

CALL = {
    "op": "mlp",
    "features": 64,
    "hidden": 128,
    "gated": False,
    "iterations": 8,
    "dtype": "float32",
    "itemsize": 4,
    "machine": Machine(),
    "scratch_budget": 64 << 20,
}

# Compute capability, multiprocessors, bytes of shared memory that one program may have, of one device for each.
GPUS = {
    arch: Machine("cuda", arch, multiprocessors, shared, tf32=True, triton=None)
    for arch, multiprocessors, shared in (
        (80, 108, 166912), (86, 84, 101376), (89, 128, 101376), (90, 132, 232448), (100, 148, 232448), (120, 188, 101376),
    )
}  # fmt: skip
MACHINES = {"cpu": Machine(), "cuda": GPUS[90]}

VERIFIED = {arch: dataclasses.replace(machine, verified=frozenset({arch})) for arch, machine in GPUS.items()}

ITERATIONS = (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 63, 64, 65, 100, 256, 1000)
SIZES = [(1, 1), (5, 7), (64, 64), (64, 256), (256, 256), (128, 512), (512, 2048), (1024, 4096), (4096, 16384)]
PLANS = [
    plan(
        **{
            **CALL,
            "features": features,
            "hidden": hidden,
            "iterations": t,
            "gated": gated,
            "itemsize": size,
            "machine": machine,
        }
    )
    for features, hidden in SIZES
    for t in ITERATIONS
    for gated in (False, True)
    for size in (4, 8)
    for machine in MACHINES.values()
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
    for machine in MACHINES.values():
        rows = [plan(**{**CALL, "features": d, "hidden": h, "machine": machine}).rows for d, h in SIZES]
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
    for name in ("reference", "blas"):
        assert plan(**CALL, backend=name).backend == name
    assert plan(**{**CALL, "machine": INTERPRETER}, backend="triton").backend == "triton"
    on_gpu = plan(**{**CALL, "machine": GPUS[90]})
    assert (on_gpu.backend, on_gpu.backward) == ("blas", "blas")
    assert dict(on_gpu.skipped) == {
        "cuda": "no op calls the CUDA kernels yet",
        "triton": "no hardware results are committed for compute capability 9.0; backend='triton' selects it",
    }
    # What was asked for by name skips nothing.
    assert plan(**{**CALL, "machine": GPUS[90]}, backend="blas").skipped == ()
    for name in planner.MISSING:
        with pytest.raises(
            ValueError,
            match=f"backend='{name}': no op calls the .* kernels yet; available: reference, blas, triton",
        ):
            plan(**CALL, backend=name)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, blas, triton, got 'mkl'"):
        plan(**CALL, backend="mkl")


def test_planning_needs_no_torch():
    code = (
        "import sys, json; sys.modules['torch'] = None; from score_kernels.planner import plan;"
        "from score_kernels.planner import Machine; import dataclasses; given = json.loads(sys.argv[1]);"
        "given['machine'] = Machine(**given['machine'], verified=frozenset({90}));"
        "print(json.dumps(dataclasses.asdict(plan(**given))))"
    )
    machine = dataclasses.asdict(GPUS[90])
    del machine["verified"]
    command = [sys.executable, "-c", code, json.dumps({**CALL, "machine": machine})]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    expected = plan(**{**CALL, "machine": VERIFIED[90]})
    assert expected.backend == "triton"
    assert found == json.loads(json.dumps(dataclasses.asdict(expected)))


def test_a_plan_prints_as_a_table():
    lines = str(plan(**{**CALL, "machine": GPUS[90], "iterations": 300})).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "op", "backend", "device", "forward", "backward", "scratch", "not cuda", "not triton",
    ]  # fmt: skip
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1, "one column"
    assert "300 iterations" in str(lines)
    assert lines[-1].endswith("backend='triton' selects it")


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


@pytest.mark.usefixtures("plain_machine")
def test_available_backends():
    assert sk.available_backends() == ["reference", "blas"]
    for backend in sk.available_backends():
        call("linear", draw(5, D), parameters("linear"), backend=backend)


def test_available_backends_with_the_interpreter():
    assert sk.available_backends() == ["reference", "blas", "triton"]
    (found,) = sk.explain(call, "linear", draw(5, D), parameters("linear"), backend="triton")
    assert (found.backend, found.device, found.skipped) == ("triton", "cpu", ())
    # Which is for checking: nobody gets it without asking for it.
    (found,) = sk.explain(call, "linear", draw(5, D), parameters("linear"))
    assert found.backend == "blas"


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


def test_a_fallback_of_backward_is_told_by_backward(monkeypatch):
    """Who only infers has nothing to do with it, strict or not."""
    original = ops.plan_of
    skipped = ((f"triton{planner.IN_BACKWARD}", "of a test's reason"),)
    monkeypatch.setattr(ops, "plan_of", lambda p: dataclasses.replace(original(p), skipped=skipped))
    monkeypatch.setattr(ops, "_announced", set())
    monkeypatch.setenv("SCORE_KERNELS_STRICT", "1")
    out = call("linear", draw(5, D).requires_grad_(), parameters("linear"))
    with pytest.raises(RuntimeError, match="backward of score_linear runs on 'blas', not on 'triton': of a test's reason"):
        out.sum().backward()
    monkeypatch.delenv("SCORE_KERNELS_STRICT")
    out = call("linear", draw(5, D).requires_grad_(), parameters("linear"))
    with pytest.warns(UserWarning, match="backward of score_linear runs on 'blas'"):
        out.sum().backward()


@pytest.mark.parametrize("device", MACHINES)
def test_scratch_stays_within_its_byte_budget(device):
    for budget in (1 << 20, 16 << 20, 64 << 20, 512 << 20):
        for features, hidden in SIZES:
            for iterations in ITERATIONS:
                changes = {"features": features, "hidden": hidden, "iterations": iterations, "scratch_budget": budget}
                p = plan(**{**CALL, **changes, "machine": MACHINES[device]})
                assert p.scratch_bytes <= budget, p


# The Triton kernels: every tile of the table, on every architecture.

KINDS = sorted({kind for table in FORWARD.values() for kind in table})
WIDTHS = (16, 32, 64, 128, 256, 512)
# The first and the last D that a width of the table serves.
SERVED = [(features, width) for width in WIDTHS for features in (1 if width == 16 else width // 2 + 1, width)]


def triton_call(kind, features, machine, **changes):
    op, state_tiles = kind
    given = {"op": op.removeprefix("gated "), "gated": op.startswith("gated"), "features": features, "hidden": 2 * features}
    return {**CALL, "dtype": "bfloat16", **given, "state_tiles": state_tiles, "machine": machine, **changes}


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_triton_has_the_tiles_of_the_table_or_a_reason(kind, arch):
    family = configs.family(arch)
    forward, backward = FORWARD[family][kind], BACKWARD[family][kind[0]]
    for features, width in SERVED:
        given = triton_call(kind, features, VERIFIED[arch])
        if width not in forward:
            reason = f"D = {features} does not fit in registers with this block and solver ({max(forward)} at most)"
        elif forward[width].shared > GPUS[arch].shared_memory:
            reason = f"it needs {forward[width].shared} bytes of shared memory, this device has {GPUS[arch].shared_memory}"
        else:
            for backend in ("triton", "auto"):
                found = plan(**given, backend=backend)
                assert (found.backend, found.forward_tile) == ("triton", forward[width])
                assert found.backward == ("triton" if found.backward_tile else "blas")
                assert found.backward_tile in (backward.get(width), None)
            continue
        with pytest.raises(ValueError, match="backend='triton' cannot run this call: ") as error:
            plan(**given, backend="triton")
        assert str(error.value).endswith(reason)
        fallback = plan(**given)
        assert (fallback.backend, fallback.backward) == ("blas", "blas")
        assert dict(fallback.skipped)["triton"] == reason


@pytest.mark.parametrize("family", FORWARD)
def test_every_width_of_the_table_has_a_backward_plan(family):
    """Nothing in the table is out of a plan's reach."""
    machine = VERIFIED[family]
    for kind, widths in FORWARD[family].items():
        for width in widths:
            found = plan(**triton_call(kind, width, machine, scratch_budget=512 << 20))
            assert found.backward_tile == BACKWARD[family][kind[0]].get(width)


def test_families_of_architectures():
    assert {arch: configs.family(arch) for arch in GPUS} == {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 120: 80}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64", "itemsize": 8}, "float64 is computed by blas"),
        ({"dtype": "float32", "machine": dataclasses.replace(VERIFIED[90], tf32=False)}, "full float32 is computed by blas"),
        ({"machine": dataclasses.replace(VERIFIED[90], triton="for a test's reason")}, "for a test's reason"),
        ({"features": 4096}, r"D = 4096 does not fit in registers with this block and solver \(\d+ at most\)"),
    ],
    ids=["float64", "float32", "machine", "features"],
)
def test_triton_refuses_with_the_reason(changes, reason):
    given = triton_call(("mlp", 1), 64, VERIFIED[90])
    assert plan(**given).backend == "triton"
    with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: {reason}"):
        plan(**{**given, **changes}, backend="triton")
    fallback = plan(**{**given, **changes})
    assert fallback.backend == "blas"
    assert dict(fallback.skipped).keys() == {"cuda", "triton"}


def test_tf32_is_for_those_who_allow_it():
    given = triton_call(("mlp", 1), 64, VERIFIED[90], dtype="float32")
    assert plan(**given).backend == "triton"


def test_auto_takes_triton_on_verified_architectures_only():
    given = triton_call(("mlp", 1), 64, GPUS[90])
    assert not planner.VERIFIED, "an architecture needs committed results"
    assert plan(**given).backend == "blas"
    assert plan(**given, backend="triton").backend == "triton"
    assert plan(**{**given, "machine": VERIFIED[90]}).backend == "triton"
    other = dataclasses.replace(GPUS[90], verified=frozenset({80, 100}))
    assert plan(**{**given, "machine": other}).backend == "blas"
    assert "capability 9.0" in dict(plan(**{**given, "machine": other}).skipped)["triton"]


def with_tiles(monkeypatch, forward, backward):
    monkeypatch.setitem(FORWARD, 90, {("mlp", 1): {64: forward}})
    monkeypatch.setitem(BACKWARD, 90, {"mlp": {64: backward} if backward else {}})


def test_failure_case_20_shared_memory_is_checked_before_the_launch(monkeypatch):
    small, large = Tile(64, 32, 4, 2, 60000), Tile(64, 64, 4, 2, 80000)
    shared = {size: dataclasses.replace(VERIFIED[90], shared_memory=size) for size in (59999, 60000, 79999, 80000)}
    given = triton_call(("mlp", 1), 64, None)
    with_tiles(monkeypatch, small, large)
    for size, machine in shared.items():
        call_ = {**given, "machine": machine}
        if size < 60000:
            with pytest.raises(ValueError, match="it needs 60000 bytes of shared memory, this device has 59999"):
                plan(**call_, backend="triton")
            assert plan(**call_).backend == "blas"
            continue
        for backend in ("triton", "auto"):
            found = plan(**call_, backend=backend)
            assert (found.backend, found.forward_tile) == ("triton", small)
            # The two passes are planned apart: backward may be another backend's.
            assert (found.backward, found.backward_tile) == (("triton", large) if size >= 80000 else ("blas", None))
            assert ("triton in backward" in dict(found.skipped)) == (size < 80000)


def test_a_backward_that_does_not_fit_is_anothers(monkeypatch):
    with_tiles(monkeypatch, Tile(64, 64, 4, 2, 1000), None)
    found = plan(**triton_call(("mlp", 1), 64, VERIFIED[90]))
    assert (found.backend, found.backward, found.backward_tile) == ("triton", "blas", None)
    assert dict(found.skipped)["triton in backward"] == "backward of D = 64 does not fit in registers"
    assert found.scratch_bytes <= CALL["scratch_budget"]
    assert [line.split("  ")[0] for line in str(found).splitlines()] == [
        "op", "backend", "device", "forward", "backward", "scratch", "not cuda", "not triton in backward",
    ]  # fmt: skip


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_triton_stays_within_the_scratch_budget_and_uses_it(iterations, stages):
    """What backward may allocate grows with the rows of a launch: they are as many as the budget has place for."""
    for budget in (1 << 20, 16 << 20, 64 << 20, 512 << 20):
        for machine in (VERIFIED[90], INTERPRETER):
            given = triton_call(("mlp", 1), 64, machine, iterations=iterations, stages=stages, scratch_budget=budget)
            found = plan(**given, backend="triton")
            assert found.scratch_bytes <= budget
            if found.backward == "blas":
                # Not even one tile of rows beside what the programs need.
                assert "scratch" in dict(found.skipped)["triton in backward"]
                assert budget < 512 << 20
                continue
            tile = found.backward_tile.rows
            assert found.programs >= 1
            assert found.chunk_rows >= tile
            assert found.chunk_rows % tile == 0
            # By hand: g, dL/dx0, dL/dz, dL/dS, dL/dx of each program; the parts of a weight gradient, before they are added.
            fixed = found.programs * 5 * tile * 64 * 4 + found.parts * 64 * 128 * 4
            # Of each stage: x, g, w u and dz in 16 bits, its input, 5 scalars; of an iteration, 2 scales; h_T.
            stage = (2 * 64 + 2 * 128) * 2 + 64 * 4 + 5 * 4
            row = iterations * (stages * stage + 2 * 4) + 64 * 4
            assert found.scratch_bytes == fixed + found.chunk_rows * row
            assert fixed + (found.chunk_rows + tile) * row > budget


def test_a_triton_plan_prints_as_a_table():
    found = plan(**triton_call(("mlp", 1), 64, VERIFIED[90]))
    lines = dict(line.split("  ", 1) for line in str(found).splitlines())
    assert list(lines) == ["op", "backend", "device", "forward", "backward", "scratch", "not cuda"]
    tile = found.forward_tile
    assert f"tiles of {tile.rows} rows x {tile.hidden} hidden features, {tile.warps} warps" in lines["forward"]
    assert f"{found.chunk_rows} rows a launch" in lines["backward"]
    assert f"{found.programs} programs" in lines["backward"]
