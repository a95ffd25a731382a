"""The CUDA forward kernels' own code, on a CPU: tests/cuda/emulation.cpp, against the oracle in float64 and the eager loop.

What is emulated is csrc/forward.cuh, the blocks and the packing of weights, instantiated as they are for the GPU. The library
is built once for each state of the sources; it needs a C++20 compiler and CUDA's headers, no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import cases
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import LAYOUTS, build, call
from kernels import error, one_element_off, wide
from numerics import BLOCKS, REPLACE_BOUND, eager_of, found_by, reference_of, rms_errors
from row_wise import COEFFICIENTS, EVERYTHING, seed_of, split

from score_kernels import arguments
from score_kernels.activations import ACTIVATIONS
from score_kernels.problem import NORMS, SHAPES, Problem

ROOT = Path(__file__).parents[1]
COMPILED = [ROOT / "tests/cuda/emulation.cpp", ROOT / "csrc/kernels.cpp"]
SOURCES = [*COMPILED, *sorted((ROOT / "csrc").glob("*.cuh")), *sorted((ROOT / "csrc").glob("*.h"))]

# The order of the enum in csrc/params.h.
DTYPES = (torch.float16, torch.bfloat16)

# (columns, chunk) of the kernels: sm_90 has the first and the second, sm_80 the first and the third.
SIZES = ((64, 64), (128, 64), (128, 32))

OPS = tuple(EVERYTHING)
both_ops = pytest.mark.parametrize("op", OPS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def cuda_headers():
    """CUDA's include folder, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def emulate():
    include = cuda_headers()
    if include is None:
        pytest.skip("CUDA's headers are not installed")
    state = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    library = ROOT / "build" / "emulation" / f"{state}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{include}", f"-I{ROOT / 'csrc'}", *COMPILED]
        subprocess.run([*command, "-o", made], check=True)
        made.replace(library)
    return ctypes.CDLL(library).emulate


def forward(emulate, case, size, *, in_place=False):
    """h_T, or all states where the case asks for a trajectory, of a kernel of this size."""
    checked = arguments.check(case.op, **split(case.op, {**case.arguments, "backend": "reference"}))
    p = Problem.build(case.op, [None if x is None else x.detach() for x in checked.tensors], checked.options)
    options, columns = (
        p.options,
        ("weight", "bias", "norm_weight", "norm_bias") if case.op == "linear" else tuple(SHAPES["mlp"]),
    )
    assert tuple(p.parameters) == columns
    norm_float32 = any(x.dtype != p.h.dtype for name in ("norm_weight", "norm_bias") for x in p.parameters[name])
    parameters = {name: [x.contiguous() for x in given] for name, given in p.parameters.items()}
    table = [[given[i % len(given)].data_ptr() if given else 0 for given in parameters.values()] for i in range(p.sets)]
    h, x0 = (None if x is None else x.contiguous() for x in (p.h, p.x0))
    out = h if in_place else torch.full_like(h, float("nan"))
    states = torch.full((p.iterations + 1, *h.shape), float("nan")) if options.trajectory else None
    keep = [
        torch.tensor(table),
        p.coefficients.contiguous(),
        *(None if s is None else s.contiguous() for s in (p.state_scale, p.x0_scale)),
    ]
    pointers = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (h, x0, out, states, *keep[1:], keep[0])]
    broken = emulate(
        OPS.index(case.op), DTYPES.index(h.dtype), *size, p.gated, norm_float32, NORMS.index(options.norm),
        list(ACTIVATIONS).index(options.activation), options.order == "cyclic", ctypes.c_int64(h.numel() // p.features),
        p.features, p.hidden, p.iterations, p.sets, ctypes.c_float(options.negative_slope), ctypes.c_float(options.eps),
        *pointers,
    )  # fmt: skip
    assert not broken, "the ring of weights was not kept to its rules"
    return out if states is None else states


def compare(emulate, case, size, room=4):
    found, dtype = forward(emulate, case, size), case.leaves["h"].dtype
    expected = call(wide(case), "oracle").detach()
    assert found.shape == expected.shape
    eps = torch.finfo(dtype).eps
    # Where the loop in plain PyTorch rounds as much, as without any contraction, that is the measure.
    allowed = max(room * eps, 2 * error(call(case, "oracle").detach(), expected))
    assert error(found, expected) <= allowed, (error(found, expected), allowed)


def options_of(op):
    """Those that the forward pass of Euler has, each alone and in pairs, none twice."""
    found = {}
    for given in (*cases.single(op), *cases.pairwise(op)):
        kept = {"trajectory": "return" if given.get("trajectory", "none") != "none" else "none"}
        choices = {**given, **kept, "solver": "euler", "grad_iterations": None}
        if cases.legal(choices):
            found[cases.label(choices)] = choices
    return list(found.values())


OPTIONS = [(op, choices) for op in OPS for choices in options_of(op)]


@both_dtypes
@pytest.mark.parametrize(("op", "choices"), OPTIONS, ids=[f"{op}-{cases.label(c)}" for op, c in OPTIONS])
def test_options(emulate, op, choices, dtype):
    """Every option alone and every pair of options, on problems with a ragged tile and padded features."""
    case = build(op, rows=21, features=38, hidden=70, iterations=4, dtype=dtype, seed=seed_of(choices), **choices)
    compare(emulate, case, SIZES[0])


@both_ops
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sizes_and_activations(emulate, op, size, activation):
    for dtype, features in zip(DTYPES, (size[0], size[0] - 3), strict=True):
        choices = {**EVERYTHING[op], **COEFFICIENTS, "activation": activation}
        compare(emulate, build(op, rows=18, features=features, hidden=150, iterations=3, dtype=dtype, **choices), size)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_random_shapes(emulate, data):
    op, size = data.draw(st.sampled_from(OPS)), data.draw(st.sampled_from(SIZES))
    choices = data.draw(st.sampled_from(options_of(op)))
    sizes = {"rows": (1, 150), "features": (1, size[0]), "hidden": (1, 140), "iterations": (1, 7), "seed": (0, 99)}
    drawn = {n: data.draw(st.integers(*limits), n) for n, limits in sizes.items()}
    compare(emulate, build(op, **drawn, dtype=data.draw(st.sampled_from(DTYPES)), **choices), size)


@pytest.mark.parametrize("block", BLOCKS)
@both_dtypes
@pytest.mark.parametrize("update", ["contractive", "replace"])
def test_error_against_the_eager_loop(emulate, block, update, dtype):
    """Section 5's rule, for the result: an error of at most that of the loop in the input's dtype."""
    op, choices, gain = BLOCKS[block]
    for iterations in (1, 4, 16):
        sizes = {"rows": 64, "features": 64, "hidden": 64, "iterations": iterations}
        gain = 0.3 if update == "replace" else gain
        problems = [build(op, **sizes, **choices, dtype=dtype, update=update, gain=gain, seed=seed) for seed in range(20)]
        for case in problems:
            case.arguments["dt"] = None if update == "replace" else 0.4
        expected = reference_of(problems, gradients=False)
        ours = rms_errors([{"output": forward(emulate, case, SIZES[0])} for case in problems], expected)["output"]
        theirs = rms_errors([found_by(eager_of, case, gradients=False) for case in problems], expected)["output"]
        assert ours <= (REPLACE_BOUND if update == "replace" else 1.0) * theirs, (iterations, ours, theirs)


@both_ops
def test_failure_case_05_and_06_misaligned_and_non_contiguous(emulate, op):
    case = build(op, rows=11, features=38, hidden=40, dtype=torch.float16, **EVERYTHING[op])
    expected = forward(emulate, case, SIZES[0])
    for layout in (one_element_off, *LAYOUTS.values()):
        assert torch.equal(forward(emulate, cases.laid_out(case, layout), SIZES[0]), expected)


@both_ops
def test_in_place(emulate, op):
    case = build(op, rows=70, features=64, hidden=64, dtype=torch.bfloat16, **EVERYTHING[op])
    expected = forward(emulate, case, SIZES[0])
    assert torch.equal(forward(emulate, case, SIZES[0], in_place=True), expected)


@both_ops
def test_failure_case_13_state_beyond_fp16(emulate, op):
    case = build(op, rows=9, features=24, hidden=24, iterations=4, dtype=torch.float16, norm="layernorm gain bias", dt="float")
    case.arguments["state_scale"] = torch.tensor([1e6, 1e-6, 1e6, 1e-6])
    other = wide(case)
    other.arguments["state_scale"] = case.arguments["state_scale"].double()
    assert error(forward(emulate, case, SIZES[0]), call(other, "oracle").detach()) <= 4 * torch.finfo(torch.float16).eps


@both_ops
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_failure_case_18_nan_and_inf_stay_in_their_row(emulate, op, bad, activation):
    case = build(op, rows=19, features=38, hidden=40, iterations=2, dtype=torch.bfloat16, activation=activation)
    expected = forward(emulate, case, SIZES[0]).clone()
    with torch.no_grad():
        case.leaves["h"][5, 2] = case.leaves["h"][-1, 2] = bad
    found = forward(emulate, case, SIZES[0])
    others = [row for row in range(19) if row not in (5, 18)]
    assert torch.equal(found[others], expected[others])
    assert not found[5].isfinite().all()
    assert not found[-1].isfinite().all()
