"""The tests that every op passes: `class TestMLP(RowWise): op = "mlp"`.

Values and gradients in float64 against the textbook oracle, for `reference` and for `blas`, whose tiles are made so small that
every problem has several of them, the last one ragged.
"""

from __future__ import annotations

import importlib
import zlib
from functools import partial
from itertools import combinations

import cases
import oracle
import pytest
import torch
from cases import assert_close, assert_same_bits, build, gradients, planned

from score_kernels import arguments, attention_arguments, autograd, ops, reference, row_tiles, transformer_arguments
from score_kernels.problem import LEADING, SHAPES, Problem

BACKENDS = ("reference", "blas")

# All inputs that an op can have; with it, every tile of state and every gradient of the backward pass is in use.
EVERYTHING = {
    "linear": {"norm": "layernorm gain bias"},
    "mlp": {"norm": "layernorm gain bias", "gate": "gate bias"},
    "attention": {
        "norm": "layernorm gain bias", "mask": "padding additive", "causal": True, "rotary": "tables", "qk_norm": True,
    },
    "transformer": {
        "norm": "layernorm gain bias", "gate": "gate bias", "mask": "padding additive", "causal": True, "rotary": "tables",
        "qk_norm": True, "placement": "post",
    },
}  # fmt: skip
# The ops that there are kernels for.
ROW_WISE = ("linear", "mlp")
COEFFICIENTS = {"dt": "vector", "x0": "vector", "state_scale": "vector"}
# Who checks what only an op takes.
OWN = {"attention": attention_arguments.check, "transformer": transformer_arguments.check}


class RowWise:
    """alone: every option on its own too, which tells what fails; each value is in the pairs as well."""

    op: str
    alone = True

    def pytest_generate_tests(self, metafunc):
        if "choices" in metafunc.fixturenames:
            cover = [*(cases.single(self.op) if self.alone else ()), *cases.pairwise(self.op)]
            metafunc.parametrize("choices", cover, ids=cases.label)

    def everything(self, **choices):
        return build(self.op, **{**EVERYTHING[self.op], **COEFFICIENTS, **choices})

    def test_options_alone_and_in_pairs(self, choices):
        case = build(self.op, seed=seed_of(choices), **choices)
        expected = gradients(case, "oracle")
        reference = gradients(case, "reference")
        assert_close(reference, expected)
        with planned(rows=4, backward_rows=3, interval=2):
            blas = gradients(case, "blas")
        assert_close(blas, expected)
        assert_close(blas, reference)

    def test_second_gradients_of_options_alone_and_in_pairs(self, choices):
        case = build(self.op, rows=4, features=3, hidden=4, iterations=4, seed=seed_of(choices), **choices)
        expected = cases.second_gradients(case, "oracle")
        with planned(rows=2, backward_rows=2, interval=2):
            assert_close(cases.second_gradients(case, "blas"), expected)

    def test_several_tiles_as_planned(self):
        case = self.everything(rows=2 * row_tiles.CPU_ROWS[1] + 3, features=3, hidden=5, iterations=9)
        with ops.observe_plans() as plans:
            found = gradients(case, "blas")
        assert plans
        assert plans[0].backward_rows <= plans[0].rows < case.arguments["h"][..., 0].numel()
        assert_close(found, gradients(case, "oracle"))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("trajectory", ["none", "return", "save"])
    def test_no_iterations(self, backend, trajectory):
        case = self.everything(iterations=0, trajectory=trajectory)
        found = gradients(case, backend)
        assert_close(found, gradients(case, "oracle"))
        h = case.arguments["h"].detach()
        assert torch.equal(found["output"], h[None] if trajectory == "return" else h)
        assert found["output"].data_ptr() != h.data_ptr()

    def test_any_inputs_can_want_gradients(self):
        """The gradients of some inputs have the bits that they have among the gradients of all."""
        for dtype in (torch.float64, torch.float32):
            case = self.everything(dtype=dtype, rows=9, iterations=3)
            names = list(case.leaves)
            with planned(rows=4, backward_rows=4, interval=2):
                full = gradients(case, "blas")
                few = (0, 1, len(names) - 1) if len(names) > 16 else (0, 1, 2, len(names) - 2, len(names) - 1)
                sizes = range(len(names) + 1) if len(names) <= 8 else few
                for wanted in (subset for size in sizes for subset in combinations(names, size)):
                    found = gradients(case, "blas", wanted)
                    assert found.keys() == {"output", *wanted}
                    assert_same_bits(found, {name: full[name] for name in found})

    def test_gradients_accumulate_in_leaves_that_want_them_only(self):
        case = self.everything()
        case.arguments["h"].requires_grad_(False)
        cases.call(case, "blas").sum().backward()
        assert case.arguments["h"].grad is None
        assert all(x.grad is not None for name, x in case.leaves.items() if name != "h")

    @pytest.mark.parametrize("solver", cases.OPTIONS["solver"])
    @pytest.mark.parametrize("extra", [{}, {"trajectory": "return"}, {"trajectory": "save"}, {"sets": "2 list"}], ids=str)
    def test_gradcheck(self, solver, extra):
        case = self.everything(rows=3, features=2, hidden=3, iterations=3, solver=solver, activation="silu", **extra)
        names = list(case.leaves)
        with planned(rows=2, backward_rows=2, interval=2):
            assert torch.autograd.gradcheck(
                lambda *xs: cases.call(cases.substitute(case, xs, names), "blas"), list(case.leaves.values())
            )

    @pytest.mark.parametrize("extra", [{}, {"solver": "heun"}, {"trajectory": "return"}, {"norm": "rmsnorm gain"}], ids=str)
    def test_gradgradcheck(self, extra):
        case = self.everything(rows=2, features=2, hidden=2, iterations=2, activation="tanh", **extra)
        names = [name for name in case.leaves if name in ("h", "x0", "weight", "w1", "w2", "w_gate", "w_qkv", "dt")]
        assert torch.autograd.gradgradcheck(
            lambda *xs: cases.call(cases.substitute(case, xs, names), "blas"), [case.leaves[n] for n in names]
        )

    @pytest.mark.parametrize("solver", cases.OPTIONS["solver"])
    def test_gradient_of_every_coefficient(self, solver):
        """All five columns: dt reaches two of them only, so this takes the Function and its flat form."""
        case = self.everything(solver=solver)
        call = arguments.check(self.op, **split(self.op, case.arguments))
        tensors = [None if x is None else x.detach() for x in call.tensors]
        parameters = sum(call.options.counts[: len(SHAPES[self.op])])
        given = [x.requires_grad_() for x in tensors[: LEADING + parameters] if x is not None]
        with planned(rows=4, backward_rows=4, interval=2):
            out, _ = autograd.FUNCTIONS[self.op].apply(call.options, *tensors)
            found = torch.autograd.grad(out, given, cases.cotangent(out))
        plain, _ = reference.score(Problem.build(self.op, tensors, call.options))
        expected = torch.autograd.grad(plain, given, cases.cotangent(out))
        assert_close(dict(enumerate(found)), dict(enumerate(expected)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("grad_iterations", [None, 5])
    def test_checkpoints_do_not_change_gradients(self, dtype, grad_iterations):
        """Whatever states backward keeps or walks again, they are the same ones: equal bits at equal tiles."""
        case = self.everything(iterations=10, solver="heun", dtype=dtype, grad_iterations=grad_iterations)
        with planned(rows=4, backward_rows=4, interval=1):
            expected = gradients(case, "blas")
        for interval in range(2, 12):
            with planned(rows=4, backward_rows=4, interval=interval):
                assert_same_bits(gradients(case, "blas"), expected)

    @pytest.mark.parametrize("grad_iterations", [None, 1, 5])
    @pytest.mark.parametrize("interval", [1, 3, 4, 20])
    @pytest.mark.parametrize("backward_rows", [1, 5, 16])
    def test_every_way_through_backward(self, backward_rows, interval, grad_iterations):
        case = self.everything(iterations=10, solver="rk4", grad_iterations=grad_iterations, trajectory="return")
        # A gradient of the trajectory with recomputation, as when the caller's graph drops the saved states.
        with planned(rows=16, backward_rows=backward_rows, interval=interval):
            assert_close(gradients(case, "blas"), gradients(case, "oracle"))
            case.arguments["return_trajectory"] = False
            assert_close(gradients(case, "blas"), gradients(case, "oracle"))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_saved_trajectory_gives_the_same_bits(self, dtype):
        # Every tile starts on a cache line: a dot product (torch.dot) sums in another order where one does not.
        sizes = {"rows": 20, "features": 8, "iterations": 7}
        kept, walked = (self.everything(dtype=dtype, trajectory=t, **sizes) for t in ("save", "none"))
        with planned(rows=8, backward_rows=8, interval=3):
            assert_same_bits(gradients(kept, "blas"), gradients(walked, "blas"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_saved_trajectory_of_16_bits(self, dtype):
        """States are saved in the input's dtype: the gradients differ by their rounding."""
        kept, walked = (self.everything(dtype=dtype, iterations=7, trajectory=t) for t in ("save", "none"))
        eps = torch.finfo(dtype).eps
        with planned(rows=4, backward_rows=4, interval=3):
            expected = gradients(walked, "blas")
            for name, found in gradients(kept, "blas").items():
                a, b = found.double(), expected[name].double()
                assert (a - b).norm() <= 8 * eps * b.norm(), name


def random_shapes(op, examples=80):
    """A class's `test_random_shapes`: one test function for each op, as hypothesis wants it."""

    # Imported here: tests of hardware take this module's data, and run where there is no hypothesis.
    hypothesis = importlib.import_module("hypothesis")
    st = importlib.import_module("hypothesis.strategies")

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(data=st.data())
    def test(self, data):
        choices = data.draw(st.sampled_from(cases.pairwise(op)), "choices")
        sizes = {"rows": (0, 70), "features": (1, 37), "hidden": (1, 41), "iterations": (0, 9), "seed": (0, 99)}
        case = build(op, **{n: data.draw(st.integers(*limits), n) for n, limits in sizes.items()}, **choices)
        tiles = {"rows": (1, 40), "backward_rows": (1, 40), "interval": (1, 4)}
        expected = gradients(case, "oracle")
        with planned(**{n: data.draw(st.integers(*limits), f"plan.{n}") for n, limits in tiles.items()}):
            for backend in BACKENDS:
                assert_close(gradients(case, backend), expected)

    return test


def split(op, given):
    """Arguments of a public function as `arguments.check` takes them: weights and biases in one mapping."""
    inside = {name: given[name] for name in SHAPES[op] if name in given and not name.startswith("norm_")}
    rest = {name: value for name, value in given.items() if name not in inside}
    if op in OWN:
        rest["own"] = partial(OWN[op], **{n: rest.pop(n) for n in (*oracle.ATTENTION, "norm_placement") if n in rest})
    return {"parameters": inside, **rest}


def seed_of(choices):
    return zlib.crc32(cases.label(choices).encode()) % 1000
