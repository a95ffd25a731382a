"""The Triton kernels in Triton's interpreter, which runs the same program one tile after another on the CPU.

Not bfloat16: the interpreter's products of it are wrong. Nor tf32, which it computes in full float32.
"""

from __future__ import annotations

import pytest
import torch
from cases import build, call, gradients, laid_out
from kernels import Kernels, both_ops, one_element_off, random_shapes
from triton.runtime import interpreter

from score_kernels.triton_kernels import launch, ring

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same tests on this machine's GPU")


@both_ops
def test_failure_case_01_rows_past_2_31_elements(op, monkeypatch):
    """The last rows of a state of more than 2^31 elements, of which nobody touches the others, are those of a small one."""
    features = 64
    first, rows = 2**31 // features, 2**31 // features + 5
    case = build(op, rows=5, features=features, hidden=16, iterations=2, dtype=torch.float16, x0="vector")
    with torch.no_grad():
        expected = call(case, "triton")
        large = {name: torch.empty(rows, features, dtype=torch.float16) for name in ("h", "x0")}
        for name, x in large.items():
            x[first:] = case.leaves[name]
        # The interpreter would go through two million programs before the last one.
        monkeypatch.setattr(interpreter, "range", lambda n: range(max(n - 1, 0), n), raising=False)
        case.arguments |= large
        assert torch.equal(call(case, "triton")[first:], expected)


@pytest.mark.parametrize("rows", [1, 255, 512, 1024, 1030])
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_a_product_in_parts_has_all_its_rows(rows, parts):
    left, right = torch.randn(rows, 3), torch.randn(rows, 5)
    found = ring._product(left, right, parts)
    torch.testing.assert_close(found.double(), left.double().T @ right.double(), rtol=1e-4, atol=1e-4)


class TestInterpreter(Kernels):
    device = "cpu"
    dtypes = (torch.float32, torch.float16)
    eps = {dtype: torch.finfo(dtype).eps for dtype in dtypes}
    sizes = {"rows": 19, "features": 5, "hidden": 19, "iterations": 3}
    launches = ({"chunk_rows": 16, "programs": 1}, {"chunk_rows": 32, "programs": 1})
    exact = True
    blocks = ("linear", "mlp layernorm")
    accuracy = {"rows": 16, "features": 256, "hidden": 64}
    depths = (4,)
    test_random_shapes = random_shapes(40)

    @both_ops
    @pytest.mark.parametrize("sets", ["1", "2 stacked", "3 list", "T stacked"])
    def test_failure_case_05_addresses_in_the_table_are_aligned(self, op, sets, dtype, monkeypatch):
        """The compiler takes them for granted, which the interpreter would not notice."""
        seen, original = [], launch._pointers
        monkeypatch.setattr(launch, "_pointers", lambda rows, device: (seen.append(rows), original(rows, device))[1])
        case = laid_out(self.everything(op, dtype=dtype, sets=sets, iterations=4), one_element_off)
        addresses = {x.data_ptr() for x in case.leaves.values()}
        assert any(address % launch.ALIGNMENT for address in addresses)
        gradients(case, "triton")
        assert len(seen) >= 2, "forward and backward"
        assert all(address % launch.ALIGNMENT == 0 for rows in seen for row in rows for address in row)
        with torch.no_grad():
            assert torch.equal(call(case, "triton"), call(laid_out(case, torch.clone), "triton"))
