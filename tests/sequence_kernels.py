"""The tests that the kernels of ops on sequences pass, on a CPU through Triton's interpreter and on hardware alike.

Values and gradients against the textbook oracle in float64, on the inputs as they are after rounding. What is allowed is a few
roundings of the operands. Several sequences share the rows of a program, and there are
several such groups, or one sequence has several tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import cases
import pytest
import torch
from cases import F64, LAYOUTS, assert_same_bits, build, cotangent, gradients, laid_out, planned
from kernels import KINKED, REFUSALS, error, flat, one_element_off, oracle_gradients, wide
from row_wise import COEFFICIENTS, EVERYTHING, seed_of

from score_kernels import autograd, kernel_tiles, ops, planner, reference
from score_kernels.problem import LEADING, SHAPES, Problem

# Gradients that are sums over rows cancel: these have more room.
SUMS = (
    "b_qkv", "b_out", "b1", "b2", "b_gate", "dt", "state_scale", "x0_scale",
    *(f"{half}norm_{name}" for half in ("", "attention_", "mlp_") for name in ("weight", "bias")),
)  # fmt: skip


@contextlib.contextmanager
def without(*kinds: str) -> Iterator[None]:
    """Inside, these have no tiles: a kind as "gated mlp", or as "gated mlp backward" its backward pass alone."""
    original = kernel_tiles.tiles

    def tiles(kind: str, *call: Any) -> tuple[Any, Any, str | None]:
        if kind in kinds:
            return None, None, f"{kind} does not fit"
        forward, backward, reason = original(kind, *call)
        return forward, None if f"{kind} backward" in kinds else backward, reason

    with mock.patch.object(kernel_tiles, "tiles", tiles), mock.patch.object(ops, "_plan", planner.plan):
        yield


class SequenceKernels:
    """op, some: its name, and names of parameters of which gradients are wanted alone. together: choices beside everything.
    device: torch's name. dtypes: of the inputs. eps: of the products' operands, by dtype. sizes: of the problems.
    launches: of backward, several of them, or one in which a program has several groups.
    exact: whether another layout or another set of wanted gradients, another kernel on hardware, keeps every bit.
    covered: the combinations of options, each of which comes in one dtype, by turns.
    """

    op = "attention"
    some: tuple[str, ...] = ("w_out", "norm_bias")
    together: tuple[dict, ...] = (
        {"solver": "rk4", "sets": "2 list", "layout": "batch", "mask": "of heads"},
        {"solver": "heun", "sets": "T stacked", "trajectory": "return", "grad_iterations": 1},
        {"sequences": "packed", "mask": "none", "order": "cyclic", "sets": "2 stacked"},
    )
    device: str
    dtypes: tuple[torch.dtype, ...]
    eps: dict[torch.dtype, float]
    sizes: dict[str, int]
    launches: tuple[dict[str, int], ...]
    exact: bool
    covered: list[dict]

    def pytest_generate_tests(self, metafunc):
        if "choices" in metafunc.fixturenames:
            metafunc.parametrize("choices", self.covered, ids=cases.label)
        elif "together" in metafunc.fixturenames:
            metafunc.parametrize("together", self.together, ids=cases.label)
        elif "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    def build(self, **choices):
        given = {**self.sizes, "device": self.device, "dtype": self.dtypes[0], **choices}
        return build(self.op, **{**EVERYTHING[self.op], **COEFFICIENTS, **given})

    def same(self, found, expected):
        if self.exact:
            assert_same_bits(found, expected)
        for name, b in expected.items():
            assert error(found[name], b.to(F64)) <= 16 * torch.finfo(b.dtype).eps, name

    def compare(self, case, launch=0):
        dtype = case.arguments["h"].dtype
        with planned(**self.launches[launch]), ops.observe_plans() as plans:
            try:
                found = gradients(case, "triton")
            except ValueError as refused:
                if self.device == "cpu" or not any(reason in str(refused) for reason in REFUSALS):
                    raise
                pytest.skip(str(refused))
        assert [p.backend for p in plans] == ["triton"], plans
        expected = oracle_gradients(wide(case), dtype)
        if dtype != torch.float32 and case.arguments.get("activation") in KINKED:
            expected = {"output": expected["output"]}
        for name, b in expected.items():
            like = case.leaves.get(name, found["output"])
            assert (found[name].shape, found[name].dtype) == (like.shape, like.dtype), name
            allowed = (16 if name.partition("[")[0] in SUMS else 8) * self.eps[dtype]
            assert error(found[name], b) <= allowed, f"{name}: {error(found[name], b):.2e}, {allowed:.2e}"

    def test_options_alone_and_in_pairs(self, choices):
        seed = seed_of(choices)
        dtype = self.dtypes[seed % len(self.dtypes)]
        sizes = {**self.sizes, "device": self.device, "dtype": dtype}
        self.compare(build(self.op, **sizes, seed=seed, **choices), seed % len(self.launches))

    def test_everything_at_once(self, together):
        for dtype in self.dtypes[: 1 if "solver" in together else None]:
            self.compare(self.build(dtype=dtype, **together), 1)

    def test_gradient_of_every_coefficient(self):
        """All five columns: dt reaches two of them only, so this takes the Function and its flat form."""
        case = self.build(solver="rk4", iterations=1)
        options, tensors = flat(case, "triton")
        parameters = sum(options.counts[: len(SHAPES[self.op])])
        given = [x.requires_grad_() for x in tensors[: LEADING + parameters] if x is not None]
        with planned(**self.launches[0]):
            out, _ = autograd.FUNCTIONS[self.op].apply(options, *tensors)
            found = torch.autograd.grad(out, given, cotangent(out))
        doubles = [None if x is None else x.detach().to(F64) for x in tensors[: LEADING + parameters]]
        wanted = [x.requires_grad_() for x in doubles if x is not None]
        plain, _ = reference.score(Problem.build(self.op, [*doubles, *tensors[LEADING + parameters :]], options))
        expected = torch.autograd.grad(plain, wanted, cotangent(out).to(F64))
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert error(a, b) <= 16 * self.eps[self.dtypes[0]], index

    def test_any_inputs_can_want_gradients(self):
        """The gradients of some inputs have the bits that they have among the gradients of all."""
        case = self.build(iterations=1)
        with planned(**self.launches[0]):
            full = gradients(case, "triton")
            for wanted in ([], ["h"], ["dt"], self.some, ["x0"]):
                found = gradients(case, "triton", wanted)
                self.same(found, {name: full[name] for name in found})

    @pytest.mark.parametrize(("tokens", "features", "heads"), [(1, 1, 1), (17, 6, 3), (33, 17, 1), (5, 48, 2)])
    def test_failure_case_10_sizes_of_no_power_of_two(self, tokens, features, heads, dtype):
        layout = {"layout": "vector"} if tokens > 5 else {}
        case = self.build(dtype=dtype, rows=tokens, features=features, heads=heads, mask="additive", **layout)
        self.compare(case)

    def test_failure_case_11_rows_with_nothing_to_attend_to(self, dtype):
        """F is b_out there, whichever mask it was (and what a transformer makes of it); all gradients are numbers."""
        case = self.build(dtype=dtype, layout="rows", causal=True, mask="padding", update="replace", solver="euler")
        case.arguments |= {"dt": None, "iterations": 1, "x0": None, "x0_scale": None, "state_scale": None}
        h = case.leaves["h"]
        padding = torch.zeros(h.shape[:-1], dtype=torch.bool, device=self.device)
        padding[0], padding[1, :2] = True, True
        allowed = torch.ones(3, 3, dtype=torch.bool, device=self.device)
        allowed[2] = False
        added = torch.zeros(3, 3, dtype=dtype, device=self.device).masked_fill(~allowed, -torch.inf)
        for mask in (None, allowed, added):
            case.arguments |= {"key_padding_mask": padding, "attn_mask": mask}
            found = gradients(case, "triton", [n for n in case.leaves if n not in ("x0", "x0_scale", "state_scale", "dt")])
            nothing = torch.zeros_like(padding)
            nothing[0], nothing[1, :2], nothing[:, 2] = True, True, mask is not None
            for g in found.values():
                assert g.abs().max().item() <= torch.finfo(g.dtype).max
            self.attends_to_nothing(case, found, nothing)

    def attends_to_nothing(self, case, found, nothing):
        """nothing: the rows with nothing to attend to, of which the first sequence is."""
        bias = case.leaves["b_out"]
        assert torch.equal(found["output"][nothing], bias.expand_as(found["output"][nothing]))
        assert not torch.equal(found["output"][~nothing], bias.expand_as(found["output"][~nothing]))
        assert not found["h"][0].any(), "a sequence of padding has no gradient"

    def test_failure_case_12_infinities_and_finite_sentinels(self, dtype):
        """-inf and sentinels in one mask, in one row, in all of a row."""
        for sentinel in (-1e4, torch.finfo(dtype).min):
            case = self.build(dtype=dtype, mask="none", causal=False, rows=9, iterations=1)
            mask = torch.zeros(3, 3)
            mask[0, 1:], mask[1], mask[2, :2] = sentinel, sentinel, -torch.inf
            case.arguments["attn_mask"] = mask.to(self.device, dtype)
            self.compare(case)

    def test_failure_case_05_and_06_layouts(self):
        """Misaligned, not contiguous: states, parameters and masks."""
        case = self.build(mask="of heads", iterations=1)
        with planned(**self.launches[0]):
            expected = gradients(case, "triton")
            for layout in (one_element_off, LAYOUTS["transposed"], LAYOUTS["part of a wider row"]):
                moved = laid_out(case, layout)
                for name in ("attn_mask", "rotary"):
                    given = case.arguments[name]
                    moved.arguments[name] = layout(given) if name == "attn_mask" else tuple(map(layout, given))
                self.same(gradients(moved, "triton"), expected)

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)], ids=str)
    def test_failure_case_09_zero_rows(self, shape):
        case = self.build(mask="none", rotary="none")
        for name in ("h", "x0"):
            case.leaves[name] = torch.empty(
                *shape, self.sizes["features"], dtype=self.dtypes[0], device=self.device, requires_grad=True
            )
            case.arguments[name] = case.leaves[name]
        found = gradients(case, "triton")
        assert found["output"].shape == (*shape, self.sizes["features"])
        for name, x in case.leaves.items():
            assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype), name
            assert not found[name].any(), name

    def test_failure_case_15_gradients_are_repeatable(self):
        case = self.build(solver="heun", iterations=1)
        with planned(**self.launches[0]):
            expected = gradients(case, "triton")
            # Memory of other content, as a training loop has it.
            torch.full((50000,), float("nan"), device=self.device)
            assert_same_bits(gradients(case, "triton"), expected)

    # NumPy, which the interpreter computes with, tells of NaN and infinity.
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
    @pytest.mark.parametrize(("norm", "bad"), [("none", float("nan")), ("none", float("inf")), ("layernorm", float("inf"))])
    def test_failure_case_18_nan_and_inf_stay_in_their_sequence(self, norm, bad):
        """Also where the sequence shares its rows with others."""
        sizes = {**self.sizes, "device": self.device, "dtype": self.dtypes[0]}
        case = build(self.op, **{**sizes, "iterations": 1}, norm=norm, dt="vector", state_scale="vector")
        with planned(**self.launches[0]):
            expected = gradients(case, "triton", ["h"])
            with torch.no_grad():
                case.leaves["h"][1, 1, 2] = case.leaves["h"][-1, -1, 2] = bad
            found = gradients(case, "triton", ["h"])
        others = [i for i in range(len(found["h"])) if i not in (1, len(found["h"]) - 1)]
        for name in expected:
            assert torch.equal(found[name][others], expected[name][others]), name
            assert not found[name][1].isfinite().all(), "hidden"
            assert not found[name][-1].isfinite().all(), "hidden"


class TransformerKernels(SequenceKernels):
    """Everything at once is with norms behind the halves, and with norms before them."""

    op = "transformer"
    some = ("w_out", "attention_norm_bias", "w2", "mlp_norm_weight")
    together = tuple(
        choices | {"placement": placement}
        for choices, placement in zip(
            (*SequenceKernels.together, {"sets": "2 list"}), ("pre", "post", "post", "pre"), strict=True
        )
    )

    def attends_to_nothing(self, case, found, nothing):
        """As with q, k and v of 0, which attend to nothing else."""
        with torch.no_grad():
            bare = cases.substitute(case, [torch.zeros_like(case.leaves[n]) for n in ("w_qkv", "b_qkv")], ["w_qkv", "b_qkv"])
            expected = cases.call(bare, "triton")
        assert torch.equal(found["output"][nothing], expected[nothing])
        assert not torch.equal(found["output"][~nothing], expected[~nothing])


class HalvesKernels(TransformerKernels):
    """A transformer whose halves are launches of their own, on tiles of two sequences, or on one tile."""

    launches = ({"rows": 8, "backward_rows": 8, "interval": 2}, {"rows": 1 << 10, "backward_rows": 1 << 10, "interval": 1})
    # Sums of the walk are the BLAS's, which go by the layout.
    exact = False

    @pytest.fixture(autouse=True)
    def by_halves(self):
        with without("transformer", "gated transformer"):
            yield
