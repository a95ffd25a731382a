"""The compiled module's face: what test_build.py asks of it over a runtime that only looks like CUDA's, asked of the real one.

It needs the module in the package and no GPU: `make cuda` builds it and then runs this.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_build import (  # noqa: F401
    given,
    test_no_rows_launch_nothing,
    test_the_families_are_those_of_the_package,
    test_the_stub_is_what_the_module_has,
    test_unknown_arguments_raise,
    test_wrong_arguments_raise_and_name_themselves,
)

import score_kernels


@pytest.fixture(scope="module")
def face():
    if not list(Path(score_kernels.__file__).parent.glob("_cuda.*.so")):
        pytest.skip("the module is not built: make cuda")
    from score_kernels import _cuda

    return _cuda


def test_what_was_built_is_listed(face):
    kernels = face.kernels()
    assert {k["arch"] for k in kernels} == {90 if name == "sm_90a" else 80 for name in face.architectures()}
    for k in kernels:
        assert (k["columns"] % 64, k["columns"] % k["chunk"], k["rows"] % 64, k["threads"] % 128) == (0, 0, 0, 0)


def test_the_size_of_packed_weights(face):
    """16 bits for each weight, D and H padded, then vectors of float32, in units of 128 bytes; sets follow each other."""
    for index, k in enumerate(face.kernels()):
        columns, chunk, linear = k["columns"], k["chunk"], k["op"] == "linear"
        features = columns - 3
        # Those that accumulate are for one width, and one set.
        same, sets = linear or k["accumulates"], 1 if k["accumulates"] else 5
        hidden = features if same else 3 * chunk + 1
        width = columns if same else 4 * chunk
        weights, vectors = (1, 2) if linear else (2 + k["gated"], 3)
        size = 2 * weights * width * columns + 4 * (width * (1 + k["gated"]) + columns * vectors)
        found = face.packed_bytes(kernel=index, features=features, hidden=hidden, sets=sets)
        assert found == sets * -(-size // 128) * 128, k


def test_what_cuda_says_no_to_raises(face, given):  # noqa: F811
    """No driver, no GPU, or none of this number: in any case nothing is launched."""
    with pytest.raises(RuntimeError, match=r"^CUDA: ."):
        face.forward(**{**given[0], "device": 1 << 20})
