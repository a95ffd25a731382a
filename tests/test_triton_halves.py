"""A transformer by its halves, in Triton's interpreter. On hardware test_gpu.py runs all tests of the other kernels on them."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from cases import build, planned
from kernels import flat, wide
from row_wise import COEFFICIENTS, EVERYTHING
from sequence_kernels import HalvesKernels, without

import score_kernels as sk
from score_kernels import ops, row_tiles, settings
from score_kernels.problem import Problem
from score_kernels.triton_kernels import launch
from score_kernels.triton_kernels.attention_configs import LONGEST

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same tests on this machine's GPU")


class Halves(HalvesKernels):
    device = "cpu"
    dtypes = (torch.float32, torch.float16)
    eps = {dtype: torch.finfo(dtype).eps for dtype in dtypes}
    sizes = {"rows": 12, "features": 8, "hidden": 19, "iterations": 2}


KERNELS = Halves()
WHOLE = ("transformer", "gated transformer")
# Of the tests of a whole transformer those that reach the walk, the tiles and what passes between the launches.
CHOICES = [*Halves.together[1:], {**Halves.together[0], "solver": "midpoint"}, *cases.pairwise("transformer")[7::80]]


@pytest.mark.parametrize("at", range(len(CHOICES)), ids=lambda at: cases.label(CHOICES[at]))
def test_by_halves(at):
    beside = {**EVERYTHING["transformer"], **COEFFICIENTS} if at < len(Halves.together) else {}
    case = build("transformer", dtype=Halves.dtypes[at % 2], **{**Halves.sizes, **beside, **CHOICES[at]})
    with without(*WHOLE):
        KERNELS.compare(case, at // 2 % 2)


def test_sequences_of_packed_tiles_and_those_that_no_tile_parts():
    for rows in (1, 5, 8):
        case = KERNELS.build(sequences="packed", mask="none", iterations=1, rows=14)
        with without(*WHOLE), planned(rows=rows, backward_rows=rows):
            KERNELS.compare(case, 1)


@pytest.mark.filterwarnings("ignore:backward of score_transformer runs on 'blas':UserWarning")
@pytest.mark.parametrize(
    ("absent", "launched"),
    [
        ((*WHOLE, "gated mlp"), {"attention"}),
        ((*WHOLE, "attention"), {"mlp"}),
        ((*WHOLE, "attention backward"), {"attention", "mlp"}),
        ((*WHOLE, "attention backward", "gated mlp backward"), {"attention", "mlp"}),
        (("gated transformer backward",), {"transformer", "attention", "mlp"}),
    ],
    ids=lambda names: " ".join(names).replace("transformer gated transformer", "no launch") if isinstance(names, tuple) else "",
)
def test_blas_has_the_half_that_no_kernel_is_for(absent, launched, monkeypatch):
    """And the pass, where it is for neither. What fits in one launch is one."""
    seen = set()
    for name in ("forward", "Backward"):
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda problem, *given, f=original: seen.add(problem.op) or f(problem, *given))
    case = KERNELS.build(dtype=torch.float16)
    with without(*absent):
        KERNELS.compare(case)
    assert seen == launched


def test_the_state_is_not_rounded_between_the_halves():
    """Small steps of a large state: rounded to float16 after each of them, half of the change would be lost."""
    case = build("transformer", rows=3, features=8, hidden=8, iterations=32, dtype=torch.float16, norm="rmsnorm", dt="float")
    case.arguments["dt"] = 2.0**-9
    with torch.no_grad(), without(*WHOLE):
        change = cases.call(case, "triton").float() - case.leaves["h"]
        expected = cases.call(wide(case), "reference") - case.leaves["h"]
    assert ((change - expected).norm() / expected.norm()).item() < 0.1


def test_backward_has_the_scratch_that_the_plan_says():
    case = build("transformer", rows=30000, hidden=40, dtype=torch.float16, **{**EVERYTHING["transformer"], **COEFFICIENTS})
    options, tensors = flat(case, "triton")
    problem = Problem.build("transformer", tensors, options)
    with without(*WHOLE):
        plan = ops.plan_of(problem)
    walk = row_tiles.scratch_row(plan.iterations, plan.interval, problem.features * 4, 0) * plan.backward_rows
    assert plan.scratch_bytes == walk + max(of.scratch_bytes for _, of in plan.halves)
    assert plan.scratch_bytes <= settings.scratch_budget("cpu")


def test_it_is_told():
    case = build("transformer", rows=LONGEST + 1, layout="vector", dtype=torch.float16, iterations=1)
    with torch.no_grad():
        said = str(sk.explain(cases.call, case, "triton"))
    for line in (
        r"forward +tiles of \d+ rows, two halves an iteration: attention by blas; mlp in tiles of 16 rows x 16 hidden features",
        r"backward +tiles of .* two halves an iteration: attention by blas; mlp in tiles",
        rf"not one launch +N = {LONGEST + 1} is longer than the sequences of its kernels \({LONGEST} at most\)",
    ):
        assert re.search(line, said), said
