"""The CUDA kernels' own code, on a CPU: tests/cuda/emulation.cpp as a library, calls of it, and the compiled module made of it.

What is emulated is csrc/forward.cuh, csrc/backward.cuh, the blocks and the packing of weights, instantiated as they are for the
GPU. The library is built once for each state of the sources; it needs a C++20 compiler and CUDA's headers, no GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from contextlib import contextmanager
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from unittest import mock

import pytest
import torch
from row_wise import ROW_WISE, split

from score_kernels import arguments, cuda, ops
from score_kernels.activations import ACTIVATIONS
from score_kernels.machine import Machine
from score_kernels.problem import NORMS, SHAPES, Problem

ROOT = Path(__file__).parents[1]
COMPILED = [ROOT / "tests/cuda/emulation.cpp", ROOT / "csrc/kernels.cpp"]
SOURCES = [*COMPILED, *(path for folder in ("csrc", "tests/cuda") for path in sorted((ROOT / folder).glob("*.*h")))]

# The order of the enum in csrc/params.h.
DTYPES = (torch.float16, torch.bfloat16)

# (columns, chunk) of the kernels. sm_90 has (64, 64), (128, 64), and of the last two the first for linear, the second for mlp;
# sm_80 has (64, 64) and (128, 32). The backward pass has the first two, which for gated mlp stand for chunks of 32.
SIZES = ((64, 64), (128, 64), (128, 32), (256, 64), (256, 32))

OPS = tuple(ROW_WISE)


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("op", "dtype", "features", "hidden", "sets", "columns", "chunk")),
        *((name, c_bool) for name in ("gated", "norm_float32")),
        *((name, c_void_p) for name in ("table", "packed")),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        *((name, c_int) for name in ("features", "hidden", "iterations", "sets", "first")),
        ("cyclic", c_bool),
        *((name, c_int) for name in ("norm", "activation")),
        *((name, c_float) for name in ("negative_slope", "eps")),
        *((name, c_void_p) for name in ("x0", "coefficients", "state_scale", "x0_scale", "packed")),
    ]


class Forward(Call):
    _fields_ = [(name, c_void_p) for name in ("h", "out", "states")]


class Backward(Call):
    _fields_ = [
        *((name, c_int64) for name in ("states_rows", "grad_rows")),
        *((name, c_void_p) for name in ("states", "grad_out", "grad_states", "grad_h", "grad_x0", "scalars", "ring")),
        ("blocks", c_int),
        ("partials", c_void_p),
    ]


def cuda_headers():
    """CUDA's include folder, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    homes += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_bf16.h").exists()), None)


@functools.cache
def library():
    include = cuda_headers()
    if include is None:
        pytest.skip("CUDA's headers are not installed")
    state = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    found = ROOT / "build" / "emulation" / f"{state}.so"
    found.parent.mkdir(parents=True, exist_ok=True)
    # Processes that want it at the same time wait for the first.
    with (found.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            made = found.with_suffix(".made")
            options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{include}", f"-I{ROOT / 'csrc'}"]
            subprocess.run(["g++", *options, *COMPILED, "-o", made], check=True)
            made.replace(found)
    return ctypes.CDLL(found)


def problem_of(case):
    checked = arguments.check(case.op, **split(case.op, {**case.arguments, "backend": "reference"}))
    return Problem.build(case.op, [None if x is None else x.detach() for x in checked.tensors], checked.options)


def run(function, p, size, params, **given):
    """Calls `function` of the library. size: (columns, chunk); params: Forward or Backward; given: its own fields.

    Tensors are passed as they are: it is the caller's part that they lie as csrc/params.h says.
    """
    columns = ("weight", "bias", "norm_weight", "norm_bias") if p.op == "linear" else tuple(SHAPES["mlp"])
    assert tuple(p.parameters) == columns
    norm_float32 = any(x.dtype != p.h.dtype for name in ("norm_weight", "norm_bias") for x in p.parameters[name])
    parameters = {name: [x.contiguous() for x in sets] for name, sets in p.parameters.items()}
    addresses = [[sets[i % len(sets)].data_ptr() if sets else 0 for sets in parameters.values()] for i in range(p.sets)]
    table, options = torch.tensor(addresses), p.options
    leading = {name: getattr(p, name) for name in ("x0", "coefficients", "state_scale", "x0_scale")}
    given |= {name: x.contiguous() for name, x in leading.items() if x is not None}
    pack = Pack(
        OPS.index(p.op), DTYPES.index(p.h.dtype), p.features, p.hidden, p.sets, *size, p.gated, norm_float32, table.data_ptr()
    )
    call = params(
        rows=p.h.numel() // p.features, features=p.features, hidden=p.hidden, iterations=p.iterations, sets=p.sets,
        cyclic=options.order == "cyclic", norm=NORMS.index(options.norm),
        activation=list(ACTIVATIONS).index(options.activation), negative_slope=options.negative_slope, eps=options.eps,
        **{name: x.data_ptr() if isinstance(x, torch.Tensor) else x for name, x in given.items()},
    )  # fmt: skip
    broken = function(ctypes.byref(pack), ctypes.byref(call))
    assert not broken, "the ring of weights was not kept to its rules"


class Module:
    """What score_kernels/cuda.py takes for score_kernels._cuda, computing on tensors of the CPU.

    sizes: (columns, chunk) of the kernels that it has, of both dtypes and all blocks and activations. accumulates: those of
    backward, too, that keep the gradients of mlp's weights. calls: their arguments.
    """

    def __init__(self, *sizes, accumulates=True):
        self.calls = []
        self._kernels = [
            {
                "direction": direction, "op": op, "arch": 90, "dtype": dtype, "columns": columns, "gated": gated,
                "family": "all", "chunk": chunk, "rows": 64, "threads": 128, "shared": 0, "stages": 1,
                "accumulates": kept,
            }
            for direction in ("forward", "backward")
            for op, gated in (("linear", False), ("mlp", False), ("mlp", True))
            for dtype in ("float16", "bfloat16")
            for columns, chunk in sizes
            for kept in ((False, True) if accumulates and (direction, op, gated) == ("backward", "mlp", False) else (False,))
            if direction == "forward" or columns <= 128
        ]  # fmt: skip

    def architectures(self):
        return ["sm_90a"]

    def kernels(self):
        return [dict(kernel) for kernel in self._kernels]

    def family(self, *, activation):
        assert activation in ACTIVATIONS
        return "all"

    def packed_bytes(self, *, kernel, features, hidden, sets):
        assert 1 <= features <= self._kernels[kernel]["columns"]
        return 128 * sets

    def forward(self, **given):
        self._run(Forward, given)

    def backward(self, **given):
        # What it has to write: NaN until then.
        for name, size in (("ring", 2), ("grad_h", 2), ("grad_x0", 4)):
            if given[name] is not None:
                ctypes.memset(given[name][0], 0xFF, given[name][1] * size)
        self._run(Backward, given)

    def _run(self, params, given):
        self.calls.append(dict(given))
        k = self._kernels[given["kernel"]]
        direction = params.__name__.lower()
        assert k["direction"] == direction
        names = {"norm": NORMS, "activation": list(ACTIVATIONS)}
        pack = Pack(
            OPS.index(k["op"]), ("float16", "bfloat16").index(k["dtype"]), given["features"], given["hidden"], given["sets"],
            k["columns"], k["chunk"], k["gated"], given["norm_float32"], given["table"][0],
        )  # fmt: skip
        call = params(cyclic=given["order"] == "cyclic")
        for name, kind in (*Call._fields_, *params._fields_):
            value = given.get(name)
            if name in names:
                setattr(call, name, names[name].index(value))
            elif kind is c_void_p:
                setattr(call, name, None if value is None or name == "packed" else value[0])
            elif name != "cyclic":
                setattr(call, name, value)
        broken = getattr(library(), direction)(ctypes.byref(pack), ctypes.byref(call))
        assert not broken, "the ring of weights was not kept to its rules"


@contextmanager
def compiled(*sizes, accumulates=True):
    """Inside, a call on the CPU is planned as on a GPU that has these kernels, and no Triton."""
    module = Module(*sizes, accumulates=accumulates)
    with mock.patch.object(cuda, "module", return_value=module), mock.patch.object(cuda, "_place", return_value=(3, 77)):
        kernels, reason = cuda.kernels.__wrapped__(90)
        machine = Machine("cuda", 90, 132, 232448, cuda=reason, kernels=kernels, triton="for a test's reason")
        with mock.patch.object(ops, "machine_of", return_value=machine):
            yield module
