"""The Triton kernels in Triton's interpreter, which runs the same program one tile after another on the CPU.

Not bfloat16: the interpreter's products of it are wrong. Nor tf32, which it computes in full float32.
"""

from __future__ import annotations

import threading

import pytest
import torch
from cases import F64, assert_same_bits, build, call, gradients, laid_out, planned
from kernels import Kernels, both_ops, error, one_element_off, random_shapes
from row_wise import EVERYTHING
from triton.runtime import interpreter

from score_kernels import pointers
from score_kernels.triton_kernels import launch, ring
from score_kernels.triton_kernels.configs import INTERPRETED

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


@both_ops
def test_only_gradients_that_need_a_product_take_one(op, monkeypatch):
    """Biases, the norm's too, need sums over rows; its gain needs the products of the layers that it stands before."""
    multiplied, product = [], ring._product
    monkeypatch.setattr(ring, "_product", lambda *given: (multiplied.append(given), product(*given))[1])
    case = build(op, **{**EVERYTHING[op], "sets": "1"}, dtype=torch.float32)
    products = {"weight": 1} if op == "linear" else {"w1": 1, "w2": 1, "w_gate": 1}
    products |= {"norm_weight": 1 if op == "linear" else 2}
    for name in case.leaves:
        multiplied.clear()
        gradients(case, "triton", [name])
        assert len(multiplied) == products.get(name, 0), name


@both_ops
def test_failure_case_27_the_table_of_a_graph_is_made_without_a_copy(op, monkeypatch):
    """What capture asks for, on any device: the same table, in memory of its own each time."""
    rows, device = ((0, 2**47 + 16, 48), (2**63 - 1, 0, 1)), torch.device("cpu")
    copied, case = pointers._table(rows, device), build(op, **EVERYTHING[op], dtype=torch.float32)
    expected, copies = gradients(case, "triton"), pointers._copied.cache_info()
    monkeypatch.setattr(pointers, "capturing", lambda device: True)
    first, second = (pointers._table(rows, device) for _ in range(2))
    assert torch.equal(first, copied)
    assert len({x.data_ptr() for x in (copied, first, second)}) == 3
    assert_same_bits(gradients(case, "triton"), expected)
    assert pointers._copied.cache_info() == copies


def test_failure_case_27_the_table_that_is_kept_is_made_on_a_thread_of_its_own(monkeypatch):
    """Before torch.compile records a graph it gives the graph's memory to its thread, and refuses what is still alive there."""
    threads, made = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **named: (threads.append(threading.get_ident()), made(*a, **named))[1])
    pointers._table(((1, 2, 3),), torch.device("cpu"))
    assert threads
    assert threading.get_ident() not in threads


@both_ops
def test_a_tile_of_64_rows(op):
    """Hopper's tiles take a way of their own through scratch, which the interpreter's small ones do not."""
    sizes = {"rows": 67, "features": 17, "hidden": 33, "iterations": 1}
    case = build(op, **EVERYTHING[op], **sizes, solver="rk4", dt="vector", dtype=torch.float32)
    with planned(chunk_rows=1 << 10, programs=1):
        expected = gradients(case, "triton")
    with planned(chunk_rows=1 << 10, programs=1, backward_tile=INTERPRETED._replace(rows=64)):
        found = gradients(case, "triton")
    for name, x in expected.items():
        assert error(found[name], x.to(F64)) <= 16 * torch.finfo(torch.float32).eps, name


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
        seen, original = [], pointers._table
        monkeypatch.setattr(pointers, "_table", lambda rows, device: (seen.append(rows), original(rows, device))[1])
        case = laid_out(self.everything(op, dtype=dtype, sets=sets, iterations=4), one_element_off)
        addresses = {x.data_ptr() for x in case.leaves.values()}
        assert any(address % launch.ALIGNMENT for address in addresses)
        gradients(case, "triton")
        assert len(seen) >= 2, "forward and backward"
        assert [address for rows in seen for row in rows for address in row if address % launch.ALIGNMENT] == []
        with torch.no_grad():
            assert torch.equal(call(case, "triton"), call(laid_out(case, torch.clone), "triton"))
