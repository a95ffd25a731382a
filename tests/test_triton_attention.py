"""The Triton kernels of attention in Triton's interpreter. Not bfloat16, nor tf32: see test_triton.py."""

from __future__ import annotations

import weakref

import cases
import pytest
import torch
from cases import F64, build, call, gradients, planned
from kernels import error
from row_wise import COEFFICIENTS, EVERYTHING
from sequence_kernels import SequenceKernels, without
from triton.runtime import interpreter

from score_kernels import problem
from score_kernels.problem import sequence_lengths
from score_kernels.triton_kernels import groups, launch
from score_kernels.triton_kernels.attention_configs import interpreted

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same tests on this machine's GPU")


class TestInterpreter(SequenceKernels):
    device = "cpu"
    dtypes = (torch.float32, torch.float16)
    eps = {dtype: torch.finfo(dtype).eps for dtype in dtypes}
    sizes = {"rows": 18, "features": 8, "iterations": 2}
    launches = ({"chunk_rows": 16, "programs": 1}, {"chunk_rows": 1 << 10, "programs": 1})
    exact = True
    # A part, for they are slow here; test_gpu.py has all of them.
    covered = cases.pairwise("attention")[::8]


def test_failure_case_01_rows_past_2_31_elements(monkeypatch, tmp_path):
    """The last sequence of more than 2^31 elements, of which nobody touches the others, is that of a small state."""
    features, tokens = 64, 16
    first, sequences = 2**31 // features // tokens, 2**31 // features // tokens + 2
    case = build("attention", rows=6, features=features, iterations=1, dtype=torch.float16, mask="none")
    with torch.no_grad():
        case.arguments["h"] = torch.randn(2, tokens, features).half()
        expected = call(case, "triton")
        h = torch.empty(sequences, tokens, features, dtype=torch.float16)
        h[first:] = case.arguments["h"]
        case.arguments["h"] = h

        def scratch(like, programs, static):
            """Of all programs, most of which do not run: a file with holes."""
            size = programs * static.slots * static.rows * static.columns
            return torch.from_file(str(tmp_path / "scratch"), shared=True, size=size, dtype=torch.float32)

        monkeypatch.setattr(launch, "_scratch", scratch)
        monkeypatch.setattr(interpreter, "range", lambda *n: range(*n) if len(n) > 1 else range(n[0] - 1, n[0]), raising=False)
        with planned(forward_programs=1 << 30):
            assert torch.equal(call(case, "triton")[-1], expected[-1])


def test_groups_hold_as_many_sequences_as_have_room():
    assert groups.packed_bounds([3, 0, 5, 9, 8, 16, 0, 1], 16) == [0, 8, 17, 25, 41, 42]
    assert groups.packed_bounds([0, 0], 16) == [0]


@pytest.mark.parametrize("op", ["attention", "transformer"])
def test_heads_that_are_narrower_than_their_tile(op):
    """As where the table has no place of their own."""
    sizes = {"rows": 17, "features": 6, "heads": 3, "iterations": 2, "layout": "vector"}
    case = build(op, **{**EVERYTHING[op], **COEFFICIENTS, **sizes}, dtype=torch.float32)
    expected = gradients(case, "triton")
    tile = interpreted(17, 20, op == "transformer")
    assert tile.features == 32
    with planned(forward_tile=tile, backward_tile=tile):
        found = gradients(case, "triton")
    for name, x in expected.items():
        assert error(found[name], x.to(F64)) <= 16 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("op", ["attention", "transformer"])
def test_offsets_of_packed_sequences_are_read_once_a_pass(op, monkeypatch):
    """Each time a GPU would be waited for."""
    read = []
    monkeypatch.setattr(problem, "sequence_lengths", lambda *given: (read.append(given), sequence_lengths(*given))[1])
    case = build(op, rows=9, features=8, iterations=3, sequences="packed", dtype=torch.float32)
    gradients(case, "triton")
    assert len(read) == 2
    with without("transformer"), planned(rows=4, backward_rows=4):
        gradients(case, "triton")
    assert len(read) == 4


@pytest.mark.parametrize("op", ["attention", "transformer"])
def test_scratch_of_forward_and_backward_is_never_there_at_once(op, monkeypatch):
    """As the planner counts it."""
    original, made = launch._scratch, []

    def scratch(*given):
        assert not any(earlier() is not None for earlier in made)
        found = original(*given)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(launch, "_scratch", scratch)
    case = build(op, rows=6, features=8, iterations=1, dtype=torch.float32)
    with planned(chunk_rows=16, programs=1):
        gradients(case, "triton")
    assert len(made) == 3
