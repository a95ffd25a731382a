"""The memory that the design promises, measured: what is kept between forward and backward, and what backward allocates.

Live bytes are counted by following the storages of all tensors that operators return inside `blas`: deterministic, and free of
the allocator's rounding. Temporary memory inside one library call (a product's packed operand) is not seen.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from cases import SEQUENCES
from helpers_torch import call, equal_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from score_kernels import blas, ops, row_tiles, sdpa
from score_kernels.problem import SHAPES, extent
from score_kernels.row_tiles import scratch_row

FEATURES, HIDDEN = 24, 40
OPS = ["linear", "mlp", "attention", "transformer"]

# Rows of a sequence, which no tile parts.
TOKENS = 16

# Sums for the coefficients' gradients: some numbers for each iteration.
SMALL = 4096


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at a time in storages first seen inside the context, other than those of `given`."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.given:
                storage = x.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@contextmanager
def measured(monkeypatch, name):
    """Inside, calls of `blas.<name>` append (peak live bytes beside outputs, plan) to the list."""
    original, found = getattr(blas, name), []

    def run(problem, plan, *rest):
        tensors = [x for x in tree_leaves([list(vars(problem).values()), rest]) if isinstance(x, torch.Tensor)]
        tensors += [x for values in problem.parameters.values() for x in values]
        with LiveBytes(tensors) as bytes_:
            out = original(problem, plan, *rest)
        outputs = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(out)}
        found.append((bytes_.peak - sum(size for key, size in outputs.items() if key not in bytes_.given), plan))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(blas, name, run)
        yield found


def problem(rows, op="mlp", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = {"D": FEATURES, "H": HIDDEN}
    shapes = {
        name: tuple(extent(d, sizes) for d in dims)
        for name, dims in SHAPES[op].items()
        if "norm" not in name and not name.endswith("_gate")
    }
    given = {n: (torch.randn(s, generator=generator) * 0.2).to(dtype).requires_grad_() for n, s in shapes.items()}
    shape = (rows // TOKENS, TOKENS) if op in SEQUENCES else (rows,)
    return torch.randn(*shape, FEATURES, generator=generator).to(dtype).requires_grad_(), given


def backward_bytes(monkeypatch, rows, iterations, op="mlp", **options):
    """(bytes live beside the gradients, the plan) of one backward."""
    h, given = problem(rows, op)
    out = call(op, h, given, iterations=iterations, **options)
    with measured(monkeypatch, "backward") as found:
        out.sum().backward()
    (result,) = found
    return result


def tile_bytes(plan):
    """One tile of backward with everything that a row has: states, and the hidden features."""
    return plan.backward_rows * (FEATURES + HIDDEN) * 4


def checkpointed(monkeypatch):
    """Small tiles with every 8th state kept (every 2nd of few), where the planner prefers all states of smaller ones."""
    original = ops.plan_of

    def plan_of(p):
        interval = 2 if p.iterations < 16 else 8
        scratch = scratch_row(p.iterations, interval, FEATURES * 4, blas.kept(p) * 4) * 128
        return dataclasses.replace(original(p), rows=128, backward_rows=128, interval=interval, scratch_bytes=scratch)

    monkeypatch.setattr(ops, "plan_of", plan_of)


# The rows of at least one whole tile.
ROWS = {"planned": row_tiles.CPU_ROWS[1], "checkpointed": 128}


@pytest.mark.parametrize(
    ("tiles", "op", "solver"),
    [
        *((tiles, op, solver) for tiles in ROWS for op in ("linear", "mlp") for solver in ("euler", "heun")),
        *(("checkpointed", op, solver) for op in SEQUENCES for solver in ("euler", "heun")),
    ],
)
def test_backward_allocates_its_scratch_and_a_working_set_that_grows_with_neither_t_nor_rows(monkeypatch, tiles, op, solver):
    if tiles == "checkpointed":
        checkpointed(monkeypatch)
    options, rows = {"norm": "layernorm", "solver": solver, "op": op}, ROWS[tiles]
    bytes_4, plan_4 = backward_bytes(monkeypatch, rows, 4, **options)
    bytes_64, plan_64 = backward_bytes(monkeypatch, rows, 64, **options)
    working_4, working_64 = bytes_4 - plan_4.scratch_bytes, bytes_64 - plan_64.scratch_bytes
    # A dozen tiles of the gradient's intermediates, and the states of an iteration's stages.
    limit = {"euler": 15, "heun": 18}[solver] * tile_bytes(plan_64)
    assert working_64 <= limit, f"{working_64 / tile_bytes(plan_64):.1f} tiles"
    assert working_64 <= working_4 + SMALL
    more, _ = backward_bytes(monkeypatch, 4 * rows, 64, **options)
    assert more <= bytes_64 + SMALL


def test_backward_keeps_far_less_than_a_state_of_every_iteration(monkeypatch):
    rows = 2 * row_tiles.CPU_ROWS[1]
    found, _ = backward_bytes(monkeypatch, rows, 64)
    assert found < 64 * rows * FEATURES * 4 / 3


def test_the_count_sees_what_it_should():
    h = torch.ones(100)
    with LiveBytes([h]) as bytes_:
        a = h + 1
        b = h.view(10, 10)
        a = a + 1
        (h * 2).add_(1)
    assert bytes_.peak == 2 * 400
    del a, b


@pytest.mark.parametrize("op", OPS)
def test_forward_allocates_a_working_set_that_grows_with_neither_t_nor_rows(monkeypatch, op):
    peaks = {}
    most = row_tiles.CPU_ROWS[1]
    for rows, iterations in ((most, 4), (most, 64), (4 * most, 64)):
        h, given = problem(rows, op)
        with measured(monkeypatch, "forward") as found:
            call(op, h, given, iterations=iterations, norm="rmsnorm")
        peaks[rows, iterations], plan = found[0]
    assert max(peaks.values()) <= min(peaks.values()) + SMALL, peaks
    assert max(peaks.values()) <= 6 * plan.rows * (FEATURES + HIDDEN) * 4


def kept(op, iterations, **options):
    """The storages that autograd keeps for backward: bytes of those that are inputs, and of all others."""
    h, given = problem(512, op)
    inputs = {x.untyped_storage()._cdata for x in (h, *given.values())}
    storages = {}

    def pack(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call(op, h, given, iterations=iterations, norm="layernorm", x0=h, **options)
    result = out.untyped_storage()._cdata
    others = sum(s.nbytes() for key, s in storages.items() if key not in inputs and key != result)
    assert inputs <= storages.keys()
    return others


@pytest.mark.parametrize("options", [{}, {"solver": "rk4"}, {"grad_iterations": 2}], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_only_inputs_and_weights_are_kept_for_backward(op, options):
    """And the table of coefficients: five numbers for every stage."""
    stages = 4 if options.get("solver") == "rk4" else 1
    for iterations in (4, 64):
        assert kept(op, iterations, **options) <= iterations * stages * 5 * 4


def test_a_saved_trajectory_is_kept():
    """The other side of the measure: it sees the states where the caller asks to keep them."""
    for iterations in (4, 64):
        states = (iterations + 1) * 512 * FEATURES * 4
        assert states <= kept("mlp", iterations, save_trajectory=True) <= states + iterations * 20


def test_truncated_gradients_keep_states_of_the_last_iterations_only(monkeypatch):
    rows = row_tiles.CPU_ROWS[1]
    truncated, plan = backward_bytes(monkeypatch, rows, 64, grad_iterations=4)
    assert plan.iterations == 4
    assert truncated <= backward_bytes(monkeypatch, rows, 4)[0] + SMALL


def test_measuring_changes_nothing(monkeypatch):
    h, given = problem(300)
    plain = torch.autograd.grad(call("mlp", h, given).sum(), [h, *given.values()])
    with measured(monkeypatch, "backward") as found:
        equal_gradients(torch.autograd.grad(call("mlp", h, given).sum(), [h, *given.values()]), plain, rtol=0, atol=0)
    assert len(found) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_torch_s_kernel_keeps_no_scores_of_all_heads_beyond_the_budget(monkeypatch, causal):
    """As a GPU runs it: query rows in turn. All scores would be 16 times the budget."""
    monkeypatch.setenv("SCORE_KERNELS_SCRATCH_MB", "0.25")
    q, k, v, g = (torch.randn(1, 4, 512, 8) for _ in range(4))
    with LiveBytes([q, k, v, g]) as bytes_:
        out, lse = sdpa.chunked(q, k, v, None, causal, 0.3)
        found = sdpa.chunked_backward(g, q, k, v, out, lse, None, causal, 0.3)
    outputs = sum(x.untyped_storage().nbytes() for x in (out, lse, *found))
    # The budget, and products with all of q, k and v.
    assert bytes_.peak - outputs <= 2**18 + 3 * q.untyped_storage().nbytes()


@pytest.mark.parametrize("op", SEQUENCES)
@pytest.mark.parametrize("training", [False, True])
def test_attention_over_a_long_sequence_keeps_no_scores(monkeypatch, training, op):
    tokens = 2048
    _, given = problem(16, op)
    h = torch.randn(1, tokens, FEATURES, requires_grad=training)
    with measured(monkeypatch, "backward" if training else "forward") as found:
        out = call(op, h, given, causal=True)
        if training:
            out.sum().backward()
    assert found[0][0] <= 40 * tokens * FEATURES * 4 < tokens * tokens * 4
