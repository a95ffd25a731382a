"""The Triton kernels of transformer in Triton's interpreter. Not bfloat16, nor tf32: see test_triton.py."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import build, call
from kernels import flat, wide
from row_wise import COEFFICIENTS, EVERYTHING
from sequence_kernels import TransformerKernels

from score_kernels import ops
from score_kernels.problem import Problem
from score_kernels.triton_kernels import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same tests on this machine's GPU")


class TestInterpreter(TransformerKernels):
    device = "cpu"
    dtypes = (torch.float32, torch.float16)
    eps = {dtype: torch.finfo(dtype).eps for dtype in dtypes}
    # Hidden features in two chunks, the last of them ragged.
    sizes = {"rows": 12, "features": 8, "hidden": 19, "iterations": 2}
    launches = ({"chunk_rows": 16, "programs": 1}, {"chunk_rows": 1 << 10, "programs": 1})
    exact = True
    # A part, for they are slow here; test_gpu.py has all of them.
    covered = cases.pairwise("transformer")[::20]


def test_the_decay_cancels_with_norms_before_the_halves():
    """F(h) = h + branch(h), and (1 - dt) + dt is exactly 1 though 1 - dt is rounded: T steps do not drift."""
    case = build("transformer", rows=3, iterations=16, dtype=torch.float32, dt="float", norm="rmsnorm", gain=1e-6, bias="none")
    case.arguments["dt"] = 1 / 3
    with torch.no_grad():
        expected = call(wide(case), "reference")
        drift = (call(case, "triton") - expected).norm() / expected.norm()
    assert drift <= torch.finfo(torch.float32).eps / 4, drift.item()


@pytest.mark.parametrize("choices", [{}, {"placement": "pre"}, {"gate": "none", "solver": "rk4"}], ids=cases.label)
def test_backward_has_the_scratch_that_the_plan_says(choices):
    given = {**EVERYTHING["transformer"], **COEFFICIENTS, **choices}
    case = build("transformer", rows=30000, hidden=40, dtype=torch.float16, **given)
    options, tensors = flat(case, "triton")
    problem = Problem.build("transformer", tensors, options)
    plan = ops.plan_of(problem)
    made = launch.Backward(problem, plan, None, None, None, [True] * len(tensors))
    assert made.rows == plan.chunk_rows
    scratch = launch._scratch(made.h, made.programs, made.static)
    taken = sum(x.nbytes for x in (scratch, made.walked, made.scalars, *(ring.records for ring in made.rings.values())))
    assert plan.scratch_bytes / 2 < taken <= plan.scratch_bytes
