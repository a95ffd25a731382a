"""The planner is a pure function: tiles, the scratch bound, which backend and why not another, with no device and no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers_torch import D, H, call, draw, parameters
from stacks import layers

import score_kernels as sk
from score_kernels import functional as SF
from score_kernels import kernel_tiles, ops, planner, row_tiles
from score_kernels.machine import INTERPRETER, Kernel, Machine
from score_kernels.machine import VERIFIED as VERIFIED_HERE
from score_kernels.planner import plan
from score_kernels.row_tiles import scratch_tiles
from score_kernels.triton_kernels import configs
from score_kernels.triton_kernels.configs import BACKWARD, FORWARD, Tile

CALL = {
    "op": "mlp",
    "features": 64,
    "hidden": 128,
    "gated": False,
    "activation": "relu",
    "iterations": 8,
    "dtype": "float32",
    "itemsize": 4,
    "machine": Machine(),
    "scratch_budget": 64 << 20,
}

ATTENTION = {"op": "attention", "dtype": "bfloat16", "hidden": 256, "tokens": 48, "heads": 2}

# Compute capability, multiprocessors, bytes of shared memory that one program may have, of one device for each.
GPUS = {
    arch: Machine("cuda", arch, multiprocessors, shared, tf32=True, triton=None)
    for arch, multiprocessors, shared in (
        (80, 108, 166912), (86, 84, 101376), (89, 128, 101376), (90, 132, 232448), (100, 148, 232448), (120, 188, 101376),
    )
}  # fmt: skip
MACHINES = {"cpu": Machine(), "cuda": GPUS[90]}

VERIFIED = {arch: dataclasses.replace(machine, verified=frozenset({("triton", arch)})) for arch, machine in GPUS.items()}

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
        low, high = row_tiles.CPU_ROWS if p.device == "cpu" else row_tiles.GPU_ROWS
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


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 48, 64, 257, 1000, 8192, 100_000])
def test_no_tile_parts_a_sequence(tokens, iterations, device):
    p = plan(**{**CALL, "iterations": iterations, "machine": MACHINES[device]}, tokens=tokens)
    assert p.rows % tokens == p.backward_rows % tokens == 0
    assert tokens <= p.backward_rows <= p.rows
    # More than one sequence only within the limits of other ops.
    alone = plan(**{**CALL, "iterations": iterations, "machine": MACHINES[device]})
    assert p.rows <= max(alone.rows, tokens)
    assert p.scratch_bytes <= max(CALL["scratch_budget"], scratch_tiles(iterations, p.interval) * tokens * 64 * 4)


def test_long_sequences_are_walked_twice():
    """Where all states of one sequence take more than the budget."""
    assert plan(**{**CALL, "iterations": 64}, tokens=64).interval == 1
    assert plan(**{**CALL, "iterations": 64}, tokens=8192).interval == 8


@pytest.mark.parametrize("op", ["attention", "transformer"])
def test_no_cuda_kernel_computes_sequences_yet(op):
    call = {**CALL, **ATTENTION, "op": op, "scratch_budget": 512 << 20}
    found = plan(**{**call, "machine": VERIFIED[90]})
    assert (found.backend, found.backward) == ("triton", "triton")
    assert dict(found.skipped) == {"cuda": f"no CUDA kernel computes {op} yet"}
    for machine in (INTERPRETER, GPUS[90], Machine()):
        with pytest.raises(ValueError, match=f"cannot run this call: no CUDA kernel computes {op} yet"):
            plan(**{**call, "machine": machine}, backend="cuda")


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
        "cuda": "it needs a GPU",
        "triton": "no hardware results are committed for compute capability 9.0; backend='triton' selects it",
    }
    # What was asked for by name skips nothing.
    assert plan(**{**CALL, "machine": GPUS[90]}, backend="blas").skipped == ()
    for name in planner.FUSED:
        with pytest.raises(ValueError, match=f"backend='{name}' cannot run this call: it needs a GPU"):
            plan(**CALL, backend=name)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, blas, triton, cuda, got 'mkl'"):
        plan(**CALL, backend="mkl")


@pytest.mark.parametrize("op", ["attention", "transformer"])
@pytest.mark.parametrize("arch", GPUS)
def test_groups_of_sequences(arch, op):
    """A sequence fits in its group, short ones share it; scratch of both passes is within the budget, or it is blas."""
    call = {**CALL, **ATTENTION, "op": op, "machine": GPUS[arch]}
    for tokens, features, rows in ((1, 64, 64), (48, 64, 64), (64, 64, 64), (65, 128, 128), (128, 128, 128)):
        for budget in (1 << 10, 64 << 20, 512 << 20):
            changed = {"tokens": tokens, "features": features, "heads": features // 32, "scratch_budget": budget}
            p = plan(**{**call, **changed}, backend="triton")
            assert p.forward_tile.rows == rows >= tokens
            assert p.forward_tile.shared <= GPUS[arch].shared_memory
            forward = p.forward_programs * kernel_tiles._scratch(p.forward_tile, features, kernel_tiles.FORWARD_SLOTS)
            assert p.forward_programs == 1 or forward <= budget
            if p.by_halves(backward=True):
                assert (op, dict(p.skipped)["one launch in backward"][:9]) == ("transformer", "backward ")
                assert any(of.backward_tile for _, of in p.halves)
                assert p.scratch_bytes <= budget
            elif p.backward == "triton":
                assert p.backward_tile.rows == rows
                assert p.scratch_bytes <= budget
                assert p.chunk_rows % rows == 0 < p.chunk_rows
            else:
                assert dict(p.skipped)["triton in backward"].startswith("backward ")
    text = str(plan(**{**call, "scratch_budget": 512 << 20}, backend="triton"))
    assert "one launch, groups of 64 rows, " in text
    assert "heads of 32 features" in text
    assert ("hidden features" in text) == (op == "transformer")


TRANSFORMER = {**CALL, **ATTENTION, "op": "transformer", "machine": GPUS[90], "scratch_budget": 512 << 20}


@pytest.mark.parametrize(
    ("changes", "halves"),
    [
        ({"features": 256, "heads": 1, "hidden": 1024}, {"mlp": "forward"}),
        (
            {"features": 256, "heads": 8, "hidden": 1024, "gated": True, "machine": GPUS[100]},
            {"attention": "forward", "mlp": "forward"},
        ),
        ({"tokens": 129}, {"mlp": "both"}),
        ({"features": 128, "tokens": 129, "gated": True, "machine": GPUS[80]}, {"mlp": "forward"}),
    ],
    ids=str,
)
def test_a_transformer_that_does_not_fit_in_one_launch_goes_by_halves(changes, halves):
    """Backward as well, if a half has a kernel of that."""
    p = plan(**{**TRANSFORMER, **changes}, backend="triton")
    assert {op: "both" if of.backward_tile else "forward" for op, of in p.halves} == halves
    assert all((of.iterations, of.backend) == (1, "triton") for _, of in p.halves)
    assert (p.backend, p.by_halves(backward=False), "one launch" in dict(p.skipped)) == ("triton", True, True)
    assert (p.backward, p.by_halves(backward=True)) == (("triton", True) if "both" in halves.values() else ("blas", False))
    assert "two halves an iteration: attention" in str(p)


@pytest.mark.parametrize("arch", [80, 100])
def test_backward_alone_goes_by_halves(arch):
    p = plan(**{**TRANSFORMER, "machine": GPUS[arch]}, backend="triton")
    assert (p.by_halves(backward=False), p.by_halves(backward=True)) == (False, True)
    assert dict(p.skipped) == {
        "one launch in backward": "backward of D = 64 with heads of 32 features does not fit in registers"
    }
    assert re.search(r"^forward +one launch.*\nbackward .* two halves an iteration: attention in .*; mlp in ", str(p), re.M)


@pytest.mark.parametrize("tokens", [48, 129])
def test_halves_and_the_walk_share_the_scratch(tokens):
    """A walk keeps what the attention of blas would compute again; a kernel's keeps nothing."""
    call = {**TRANSFORMER, "machine": GPUS[80], "tokens": tokens, "kept": 300}
    p = plan(**call, backend="triton")
    walk = p.backward_rows * row_tiles.scratch_row(8, p.interval, 4 * 64, 4 * (300 if tokens > 128 else 0))
    assert p.scratch_bytes == walk + max(of.scratch_bytes for _, of in p.halves)
    assert p.scratch_bytes <= call["scratch_budget"]


def test_auto_takes_halves_on_verified_hardware_only():
    call = {**TRANSFORMER, "tokens": 129}
    assert (plan(**call).backend, plan(**call).halves) == ("blas", ())
    p = plan(**{**call, "machine": VERIFIED[90]})
    assert (p.backend, [op for op, _ in p.halves]) == ("triton", ["mlp"])
    assert p.halves == plan(**call, backend="triton").halves


@pytest.mark.parametrize("arch", GPUS)
def test_a_place_without_a_tile_takes_that_of_the_next_wider_one(arch):
    """In D and in features of a head; not in rows of a group, which both passes share."""
    call = {**CALL, **ATTENTION, "machine": GPUS[arch], "backend": "triton", "scratch_budget": 512 << 20}
    own = {heads: plan(**{**call, "features": 64, "heads": heads}).forward_tile for heads in (2, 4)}
    assert {heads: tile.features for heads, tile in own.items()} == {2: 32, 4: 16}
    for features, heads, of in ((16, 1, 4), (33, 3, 4), (5, 5, 4), (20, 1, 2), (64, 3, 2), (40, 2, 2)):
        assert plan(**{**call, "features": features // heads * heads, "heads": heads}).forward_tile == own[of]
    # Operands of 32 bits: half of the features of a head in what a tile is for in 16 bits.
    assert plan(**{**call, "features": 32, "heads": 2, "dtype": "float32"}).forward_tile == own[2]._replace(features=16)
    wide = plan(**{**call, "features": 128, "heads": 4}).forward_tile
    assert wide.rows == own[2].rows
    assert plan(**{**call, "features": 128, "heads": 8}).forward_tile == wide


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 129}, r"N = 129 is longer than the sequences of its kernels \(128 at most\)"),
        ({"features": 512}, "D = 512 with heads of 256 features does not fit in registers for N = 48"),
        ({"dtype": "float64"}, "float64 is computed by blas"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["attention", "transformer"])
def test_sequences_that_triton_refuses(op, changes, reason):
    # Of a longer sequence the mlp fits.
    changes = {"op": op, **changes, **({"features": 512} if op == "transformer" and "tokens" in changes else {})}
    with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: {reason}"):
        plan(**{**CALL, **ATTENTION, "machine": GPUS[90], **changes}, backend="triton")


def test_planning_needs_no_torch():
    code = (
        "import sys, json; sys.modules['torch'] = None; from score_kernels.planner import plan;"
        "from score_kernels.planner import Machine; import dataclasses; given = json.loads(sys.argv[1]);"
        "given['machine'] = Machine(**given['machine'], verified=frozenset({('triton', 90)}));"
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
    assert found.blocks == ("0 (ScoreLinear)", "2 (ScoreMLP)")
    assert str(found) == f"0 (ScoreLinear)\n{found[0]}\n\n2 (ScoreMLP)\n{found[1]}"
    assert not sk.explain(torch.nn.Linear(D, D), draw(5, D))
    assert str(sk.explain(torch.nn.Linear(D, D), draw(5, D))) == "no score_kernels op was called"


def test_explain_names_the_innermost_block_and_leaves_no_hook():
    class Own(torch.nn.Module):
        def forward(self, x):
            return call("linear", self.inner(x), parameters("linear"))

    model = torch.nn.Sequential(Own(), torch.nn.Sequential(*layers(3, D), torch.nn.Linear(D, 3)))
    sk.convert(model)
    model[0].inner = sk.ScoreLinear(D)
    found = sk.explain(model, draw(5, D))
    assert found.blocks == ("0.inner (ScoreLinear)", "0 (Own)", "the model (FusedSequential)")
    assert not any(module._forward_hooks for module in model.modules())
    assert sk.explain(sk.ScoreLinear(D), draw(5, D)).blocks == ("the model (ScoreLinear)",)
    assert sk.explain(lambda x: model(x), draw(5, D)).blocks == ("", "", "")
    with pytest.raises(ValueError, match="expected"):
        sk.explain(model, draw(5, D + 1))
    assert not any(module._forward_hooks for module in model.modules())


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
    assert not VERIFIED_HERE, "an architecture needs committed results"
    assert plan(**given).backend == "blas"
    assert plan(**given, backend="triton").backend == "triton"
    assert plan(**{**given, "machine": VERIFIED[90]}).backend == "triton"
    other = dataclasses.replace(GPUS[90], verified=frozenset({("triton", 80), ("triton", 100), ("cuda", 90)}))
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
            # Of each stage: x, g, w u and dz in 16 bits, its input, 5 scalars, again in float64 while they are summed; of an
            # iteration, 2 scales; h_T.
            stage = (2 * 64 + 2 * 128) * 2 + 64 * 4 + 5 * (4 + 8)
            row = iterations * (stages * stage + 2 * (4 + 8)) + 64 * 4
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


def cuda_kernels(arch: int, shared: int = 100_000, directions=("forward",)):
    """As csrc/ has them: two dtypes, two widths, ungated and gated mlp."""
    sizes = itertools.product(directions, ("float16", "bfloat16"), (64, 128), (False, True))
    return tuple(
        Kernel(index, direction, "mlp", arch, dtype, columns, gated, ("relu", "gelu"), 64, 128, 384, shared, 4)
        for index, (direction, dtype, columns, gated) in enumerate(sizes)
    )


def cuda_machine(verified=(("cuda", 90), ("triton", 90)), **changes):
    return dataclasses.replace(
        GPUS[90], **{"cuda": None, "kernels": cuda_kernels(90), "verified": frozenset(verified), **changes}
    )


@pytest.mark.parametrize("features", [1, 63, 64, 65, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_cuda_has_the_narrowest_kernel(features, gated):
    given = triton_call(("gated mlp" if gated else "mlp", 1), features, cuda_machine(), activation="gelu")
    for backend in ("auto", "cuda"):
        found = plan(**given, backend=backend)
        assert (found.backend, found.skipped) == ("cuda", found.skipped)
        kernel = found.kernel
        assert (kernel.dtype, kernel.columns, kernel.gated) == ("bfloat16", 64 if features <= 64 else 128, gated)
        # Backward is Triton's, with the tiles of a call that is Triton's altogether.
        of_triton = plan(**given, backend="triton")
        assert of_triton.kernel is None
        assert dataclasses.replace(found, backend="triton", kernel=None, skipped=of_triton.skipped) == of_triton
        assert dict(found.skipped)["cuda in backward"].endswith("that runs backward here")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"machine": cuda_machine(cuda="for a test's reason")}, "for a test's reason"),
        ({"stages": 2}, "its kernels are for one stage: Euler's, or replace"),
        ({"activation": "silu"}, "it has no kernel of mlp with silu that runs forward here"),
        ({"op": "linear", "hidden": 64}, "it has no kernel of linear with relu that runs forward here"),
        ({"dtype": "float32"}, "its kernels are for bfloat16 and float16, not for float32"),
        ({"features": 129}, r"D = 129 is wider than its kernels \(128 at most\)"),
        (
            {"machine": cuda_machine(kernels=cuda_kernels(90, 300_000))},
            "it needs 300000 bytes of shared memory, this device has 232448",
        ),
    ],
    ids=["machine", "stages", "activation", "op", "dtype", "width", "shared memory"],
)
def test_cuda_refuses_with_the_reason(changes, reason):
    given = triton_call(("mlp", 1), 64, cuda_machine())
    assert plan(**given, backend="cuda").backend == "cuda"
    with pytest.raises(ValueError, match=f"backend='cuda' cannot run this call: {reason}"):
        plan(**{**given, **changes}, backend="cuda")
    fallback = plan(**{**given, **changes})
    assert fallback.backend == "triton"
    assert [name for name, _ in fallback.skipped if name in planner.FUSED] == ["cuda"]
    assert re.fullmatch(reason, dict(fallback.skipped)["cuda"])


def test_auto_takes_what_is_verified():
    expected = {(): "blas", ("triton",): "triton", ("cuda",): "cuda", ("cuda", "triton"): "cuda"}
    for verified, backend in expected.items():
        machine = cuda_machine(verified=[(name, 90) for name in verified])
        found = plan(**triton_call(("mlp", 1), 64, machine))
        assert found.backend == backend
        assert found.backward == ("triton" if "triton" in verified else "blas")
        assert plan(**triton_call(("mlp", 1), 64, machine), backend="cuda").backward == "triton"
    assert "not triton in backward  no hardware results" in str(
        plan(**triton_call(("mlp", 1), 64, cuda_machine([("cuda", 90)])))
    )


def test_a_cuda_plan_prints_as_a_table():
    found = plan(**triton_call(("mlp", 1), 64, cuda_machine()))
    lines = dict(line.split("  ", 1) for line in str(found).splitlines())
    assert list(lines) == ["op", "backend", "device", "forward", "backward", "scratch", "not cuda in backward"]
    blocks = "blocks of 128 rows x 64 hidden features, 384 threads, 98 KiB shared, compiled for sm_90"
    assert lines["forward"].strip() == f"one launch, {blocks}"
    assert lines["backward"].endswith("programs (triton)")
    alone = plan(**triton_call(("mlp", 1), 64, cuda_machine(triton="not installed")))
    assert (alone.backend, alone.backward) == ("cuda", "blas")
    assert dict(alone.skipped)["triton in backward"] == "not installed"


BOTH = cuda_kernels(90, directions=("forward", "backward"))


@pytest.mark.parametrize("iterations", [1, 8, 64])
def test_cuda_s_backward_stays_within_the_scratch_budget_and_uses_it(iterations):
    for budget in (1 << 16, 4 << 20, 512 << 20):
        given = triton_call(("mlp", 1), 100, cuda_machine(kernels=BOTH), iterations=iterations)
        found = plan(**{**given, "scratch_budget": budget})
        assert (found.backend, found.kernel.direction) == ("cuda", "forward")
        # By hand: the parts of a weight gradient; of a row x, g, w u and dz in 16 bits and 7 scalars in each iteration, once
        # more in float64 while they are summed, its states, and dL/dx0.
        fixed, row = found.parts * 100 * 200 * 4, iterations * ((2 * 100 + 2 * 200) * 2 + 7 * 12) + (iterations + 2) * 100 * 4
        if budget < fixed + 128 * row:
            assert found.backward != "cuda"
            assert (
                dict(found.skipped)["cuda in backward"] == f"not even one block of rows has its scratch within {budget} bytes"
            )
            continue
        assert (found.backward, found.backward_kernel.direction, found.backward_kernel.columns) == ("cuda", "backward", 128)
        assert found.chunk_rows % 128 == 0
        assert found.scratch_bytes == fixed + found.chunk_rows * row
        assert found.scratch_bytes <= budget < found.scratch_bytes + 128 * row
    assert f"backward  {found.chunk_rows} rows a launch, blocks of 128 rows" in str(found)


# Those that accumulate the gradients of the weights stand last, so that it is not their place in the list that has them chosen.
ACCUMULATING = (
    *BOTH,
    *(dataclasses.replace(k, accumulates=True, index=len(BOTH)) for k in BOTH if k.direction == "backward" and not k.gated),
)


@pytest.mark.parametrize(
    ("features", "hidden", "changes", "accumulates"),
    [
        (64, 64, {}, True),
        (1, 1, {}, True),
        (65, 128, {}, True),
        (128, 65, {}, True),
        (64, 65, {}, False),
        (128, 64, {}, False),
        (128, 129, {}, False),
        (64, 64, {"sets": 2}, False),
        (64, 64, {"gated": True}, False),
    ],
)
def test_one_set_of_weights_as_wide_as_the_features_needs_no_ring(features, hidden, changes, accumulates):
    machine = cuda_machine(kernels=ACCUMULATING)
    call = {**triton_call(("mlp", 1), features, machine), "hidden": hidden, "scratch_budget": 512 << 20, **changes}
    found = plan(**call)
    kernel = found.backward_kernel
    assert (kernel.accumulates, kernel.columns) == (accumulates, 64 if features <= 64 else 128)
    assert ("weight gradients in registers" in str(found)) == accumulates
    if accumulates:
        # By hand: two products and four parts of their sums for each multiprocessor; of a row 7 scalars, the states, dL/dx0.
        fixed, steps = 132 * 2 * (kernel.columns + 4) * kernel.columns * 4, call["iterations"]
        row = steps * 7 * 12 + (steps + 2) * features * 4
        assert found.programs == 132
        assert found.scratch_bytes == fixed + found.chunk_rows * row
        assert found.scratch_bytes <= call["scratch_budget"] < found.scratch_bytes + 128 * row
