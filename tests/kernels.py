"""The tests that the fused kernels of the row-wise ops pass, on a CPU through Triton's interpreter and on hardware alike.

`class TestInterpreter(Kernels): device, dtypes = "cpu", ...`. Values and gradients of the op against the textbook oracle in
float64, on the inputs as they are after rounding. What is allowed is a few times the error of the same oracle in the input's
dtype, the loop that one would write without this package, or a few roundings where that loop is exact by chance.
Every problem has several tiles and a ragged last one.
"""

from __future__ import annotations

import math
import random

import cases
import oracle
import pytest
import torch
from cases import F64, LAYOUTS, assert_same_bits, build, call, cotangent, gradients, laid_out, planned
from numerics import BLOCKS, REPLACE_BOUND, eager_of, found_by, reference_of, rms_errors
from row_wise import COEFFICIENTS, EVERYTHING, ROW_WISE, seed_of, split

from score_kernels import arguments, autograd, ops, reference
from score_kernels.problem import Problem

# Gradients that are sums over rows: they cancel, and eager may be right by chance, so these have more room.
SUMS = ("bias", "b1", "b2", "b_gate", "norm_weight", "norm_bias", "dt", "state_scale", "x0_scale")
SEEDS = 20
both_ops = pytest.mark.parametrize("op", ROW_WISE)

# What the planner says of problems that kernels do not take on hardware.
REFUSALS = ("does not fit in registers", "its kernels are for", "is wider than its kernels")

# Where roundings are large, one that takes a preactivation over the kink changes a gradient by a whole term: chance.
KINKED = ("relu", "leaky_relu")


def wide(case):
    """The same problem in float64, from the rounded inputs."""
    names = list(case.leaves)
    leaves = [case.leaves[name].detach().to(F64).requires_grad_() for name in names]
    new = cases.substitute(case, leaves, names)
    new.leaves = dict(zip(names, leaves, strict=True))
    return new


def oracle_gradients(case, like):
    """The oracle's output and gradients, for the cotangent that `gradients` gives to an output of the dtype `like`."""
    out = call(case, "oracle")
    given = cotangent(out.to(like)).to(out.dtype)
    found = torch.autograd.grad(out, list(case.leaves.values()), given, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(case.leaves, found, strict=True))}


def error(found, expected):
    """Relative to the expected tensor's norm, or to 1 where little is left of it."""
    return ((found.to(F64) - expected).norm() / max(expected.norm().item(), 1.0)).item()


def one_element_off(x):
    """Contiguous, at an address that vector loads must not be used on."""
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def flat(case, backend):
    """Options and tensors of the backend's call, as the Function of the op takes them."""
    checked = arguments.check(case.op, **split(case.op, {**case.arguments, "backend": backend}))
    return checked.options, [None if x is None else x.detach() for x in checked.tensors]


class Kernels:
    """device: torch's name. dtypes: of the inputs. eps: of the products' operands, by dtype. sizes: of the problems.
    launches: of backward, several of them, or one in which a program has several tiles; the last tile must be ragged.
    exact: whether another layout or another set of wanted gradients, another kernel on hardware, keeps every bit.
    blocks, accuracy, depths: names, sizes and iterations of the problems that are compared with the eager loop.
    always: options that all problems of `everything` have, whatever they ask for.
    """

    backend = "triton"
    always: dict[str, str] = {}
    device: str
    dtypes: tuple[torch.dtype, ...]
    eps: dict[torch.dtype, float]
    sizes: dict[str, int]
    launches: tuple[dict[str, int], ...]
    exact: bool
    blocks: tuple[str, ...]
    accuracy: dict[str, int]
    depths: tuple[int, ...]

    def pytest_generate_tests(self, metafunc):
        names = metafunc.fixturenames
        if "choices" in names:
            singles = [(op, choices, self.dtypes[0]) for op in ROW_WISE for choices in cases.single(op)]
            # The interpreter is slow: pairs take the dtypes in turns there.
            step = len(self.dtypes) if self.device == "cpu" else 1
            pairs = [
                (op, choices, dtype)
                for op in ROW_WISE
                for i, choices in enumerate(cases.pairwise(op))
                for dtype in self.dtypes[i % step :: step]
            ]
            ids = [f"{op}-{dtype}-{cases.label(choices)}" for op, choices, dtype in (*singles, *pairs)]
            metafunc.parametrize(("op", "choices", "dtype"), [*singles, *pairs], ids=ids)
        elif "dtype" in names:
            metafunc.parametrize("dtype", self.dtypes, ids=str)
        if "block" in names:
            metafunc.parametrize("block", self.blocks)

    def everything(self, op, **choices):
        sizes = {"device": self.device, **self.sizes}
        return build(op, **{**sizes, **EVERYTHING[op], **COEFFICIENTS, **choices, **self.always})

    def same(self, found, expected):
        if self.exact:
            assert_same_bits(found, expected)
        for name, b in expected.items():
            assert error(found[name], b.to(F64)) <= 16 * torch.finfo(b.dtype).eps, name

    def compare(self, case, dtype, launches=None):
        """Output and gradients of the kernels against float64, and how far the eager loop is from it."""
        with planned(**(launches or self.launches[0])), ops.observe_plans() as plans:
            try:
                found = gradients(case, self.backend)
            except ValueError as refused:
                if self.device == "cpu" or not any(reason in str(refused) for reason in REFUSALS):
                    raise
                pytest.skip(str(refused))
        assert [p.backend for p in plans] == [self.backend], plans
        expected = oracle_gradients(wide(case), dtype)
        eager = oracle_gradients(case, dtype)
        names = list(expected)
        if dtype != torch.float32 and case.arguments["activation"] in KINKED:
            names = ["output"]
        for name in names:
            assert (found[name].shape, found[name].dtype) == (eager[name].shape, eager[name].dtype), name
            times = 16 if name.partition("[")[0] in SUMS else 4
            allowed = times * max(error(eager[name], expected[name]), self.eps[dtype])
            assert error(found[name], expected[name]) <= allowed, (
                f"{name}: {error(found[name], expected[name]):.2e}, {allowed:.2e}"
            )

    def test_options_alone_and_in_pairs(self, op, choices, dtype):
        seed = seed_of(choices)
        case = build(op, **self.sizes, device=self.device, dtype=dtype, seed=seed, **choices)
        self.compare(case, dtype, self.launches[seed % 2])

    @both_ops
    @pytest.mark.parametrize("order", ["consecutive", "cyclic"])
    def test_any_depth_with_any_sets(self, op, order, dtype):
        for iterations, sets in ((1, "T list"), (4, "2 stacked"), (7, "3 list"), (5, "T stacked")):
            case = self.everything(op, dtype=dtype, iterations=iterations, sets=sets, order=order)
            self.compare(case, dtype, self.launches[iterations % 2])

    @both_ops
    @pytest.mark.parametrize("activation", KINKED)
    def test_derivative_at_a_kink(self, op, activation):
        """PyTorch's, at preactivations of exactly 0, which random problems do not have."""
        case = build(op, **self.sizes, device=self.device, dtype=torch.float32, activation=activation, bias="none")
        with torch.no_grad():
            case.leaves["h"].zero_()
        self.compare(case, torch.float32)

    @both_ops
    def test_gradient_of_every_coefficient(self, op, dtype):
        """All five columns: dt reaches two of them only, so this takes the Function and its flat form."""
        for solver in cases.OPTIONS["solver"]:
            options, tensors = flat(self.everything(op, solver=solver, dtype=dtype, iterations=2), self.backend)
            tensors = [None if x is None else x.requires_grad_() for x in tensors]
            given = [x for x in tensors if x is not None]
            with planned(**self.launches[0]):
                out, _ = autograd.FUNCTIONS[op].apply(options, *tensors)
                found = torch.autograd.grad(out, given, cotangent(out))
            doubles = [None if x is None else x.detach().to(F64).requires_grad_() for x in tensors]
            plain, _ = reference.score(Problem.build(op, doubles, options))
            wanted = [x for x in doubles if x is not None]
            expected = torch.autograd.grad(plain, wanted, cotangent(out).to(F64))
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert error(a, b) <= 16 * self.eps[dtype], (solver, index)

    @both_ops
    def test_any_inputs_can_want_gradients(self, op):
        """The gradients of some inputs have the bits that they have among the gradients of all."""
        case = self.everything(op, dtype=self.dtypes[0], iterations=2)
        names = list(case.leaves)
        with planned(**self.launches[0]):
            full = gradients(case, self.backend)
            for wanted in ([], *([name] for name in names), names[1:], ["h", "x0"]):
                found = gradients(case, self.backend, wanted)
                assert found.keys() == {"output", *wanted}
                self.same(found, {name: full[name] for name in found})

    @both_ops
    @pytest.mark.parametrize("trajectory", ["none", "return"])
    def test_rows_of_a_launch_and_programs_change_no_state_gradient(self, op, trajectory):
        """Rows are independent: what goes in another launch or program has the same bits, sums over rows differ by rounding."""
        dtype = self.dtypes[0]
        case = self.everything(op, dtype=dtype, rows=67, trajectory=trajectory, solver="heun", iterations=2)
        with planned(chunk_rows=1 << 20, programs=1):
            expected = gradients(case, self.backend)
        for chunk_rows, programs in ((16, 7), (48, 2)):
            with planned(chunk_rows=chunk_rows, programs=programs):
                found = gradients(case, self.backend)
            assert_same_bits(found, {name: expected[name] for name in ("output", "h", "x0")})
            for name, b in expected.items():
                assert error(found[name], b.to(F64)) <= 16 * torch.finfo(dtype).eps, name

    @both_ops
    def test_saved_trajectory_gives_the_same_bits(self, op, dtype):
        kept, walked = (self.everything(op, dtype=dtype, trajectory=t, grad_iterations=2) for t in ("save", "none"))
        with planned(**self.launches[0]):
            self.same(gradients(kept, self.backend), gradients(walked, self.backend))

    @both_ops
    def test_in_place_and_into_any_layout(self, op, dtype):
        case = self.everything(op, dtype=dtype)
        with torch.no_grad():
            expected = call(case, self.backend)
            for layout in LAYOUTS.values():
                case.arguments["out"] = written = layout(torch.zeros_like(expected))
                assert call(case, self.backend) is written
                assert torch.equal(written, expected)
            case.arguments["out"] = case.arguments["h"]
            assert call(case, self.backend) is case.leaves["h"]
            assert torch.equal(case.leaves["h"], expected)

    def test_norm_parameters_may_be_float32_beside_16_bit_weights(self):
        """Either of them, or both, or only those of some sets."""
        dtype = torch.float16
        for changed in (("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias"), ("norm_weight[1]",)):
            case = self.everything("mlp", dtype=dtype, sets="3 list" if "[1]" in changed[0] else "1")
            new = [case.leaves[name].detach().float().requires_grad_() for name in changed]
            mixed = cases.substitute(case, new, changed)
            mixed.leaves = {**case.leaves, **dict(zip(changed, new, strict=True))}
            with planned(**self.launches[0]):
                found, plain = gradients(mixed, self.backend), gradients(case, self.backend)
            for name, b in plain.items():
                assert found[name].dtype == mixed.leaves.get(name, b).dtype
                assert error(found[name], b.to(F64)) <= 4 * self.eps[dtype], name

    # Section 5's rule: problems large enough for statistics, against the eager loop.

    @pytest.mark.parametrize("update", ["contractive", "replace"])
    def test_error_of_result_and_gradients_against_the_eager_loop(self, block, update, dtype):
        op, choices, gain = BLOCKS[block]
        gain = 0.3 if update == "replace" else gain
        given = {**self.accuracy, **choices, "device": self.device, "dtype": dtype, "update": update, "gain": gain}
        for iterations in self.depths:
            problems = [build(op, **given, iterations=iterations, seed=seed) for seed in range(SEEDS)]
            for case in problems:
                case.arguments["dt"] = None if update == "replace" else 0.4
            expected = reference_of(problems)
            ours = rms_errors([found_by(lambda c: call(c, self.backend), case) for case in problems], expected)
            theirs = rms_errors([found_by(eager_of, case) for case in problems], expected)
            result, gradient = (4.0, 4.0) if dtype == torch.float32 else (REPLACE_BOUND if update == "replace" else 1.0, 1.5)
            for name, found in ours.items():
                if theirs[name] > 0.25:
                    assert (name, iterations >= 16) == ("h", True), f"{name}: eager has no digit, take other problems"
                    continue
                allowed = (result if name == "output" else gradient) * theirs[name]
                assert found <= allowed, f"{name}: RMS error {found:.3e}, eager {theirs[name]:.3e}, allowed {allowed:.3e}"

    # Failure cases: the number is the row of the project's list.

    @both_ops
    def test_failure_case_05_misaligned_views(self, op, dtype):
        """Inputs, and parameters whose addresses go through a table: sets of odd sizes in one tensor are never aligned."""
        for choices in ({}, {"sets": "3 list"}, {"sets": "2 stacked"}):
            case = self.everything(op, dtype=dtype, **choices)
            with planned(**self.launches[0]):
                self.same(gradients(laid_out(case, one_element_off), self.backend), gradients(case, self.backend))

    @both_ops
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_failure_case_06_non_contiguous(self, op, layout):
        for choices in ({"layout": "rows"}, {"layout": "batch", "sets": "2 list", "trajectory": "return"}):
            case = self.everything(op, dtype=self.dtypes[0], iterations=2, **choices)
            moved = laid_out(case, LAYOUTS[layout])
            with planned(**self.launches[0]):
                self.same(gradients(moved, self.backend), gradients(case, self.backend))

    @both_ops
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_failure_case_06_non_contiguous_in_the_flat_form(self, op, layout):
        """Coefficients and scales as well, which the public functions hand over contiguous."""
        options, tensors = flat(self.everything(op, dtype=self.dtypes[0], solver="rk4", iterations=2), self.backend)
        moved = [None if x is None else LAYOUTS[layout](x) for x in tensors]
        (expected, _), (found, _) = (autograd.FUNCTIONS[op].apply(options, *xs) for xs in (tensors, moved))
        self.same({"output": found}, {"output": expected})

    @both_ops
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_failure_case_06_non_contiguous_grad_output(self, op, layout):
        case = self.everything(op, dtype=self.dtypes[0], iterations=2)
        leaves = list(case.leaves.values())
        with planned(**self.launches[0]):
            out = call(case, self.backend)
            expected = torch.autograd.grad(out, leaves, cotangent(out), retain_graph=True)
            found = torch.autograd.grad(out, leaves, LAYOUTS[layout](cotangent(out)))
        assert_same_bits(dict(enumerate(found)), dict(enumerate(expected)))

    @both_ops
    @pytest.mark.parametrize("trajectory", ["none", "return", "save"])
    def test_failure_case_07_grad_output_of_stride_zero(self, op, trajectory):
        case = self.everything(op, dtype=self.dtypes[0], iterations=2, trajectory=trajectory)
        leaves = list(case.leaves.values())
        with planned(**self.launches[0]):
            out = call(case, self.backend)
            expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
            found = torch.autograd.grad(out.sum(), leaves)
        assert_same_bits(dict(enumerate(found)), dict(enumerate(expected)))

    @both_ops
    @pytest.mark.parametrize("trajectory", ["none", "return", "save"])
    def test_failure_case_09_zero_rows(self, op, trajectory, dtype):
        for shape in ((0, self.sizes["features"]), (3, 0, self.sizes["features"])):
            case = self.everything(op, rows=0, dtype=dtype, trajectory=trajectory)
            for name in ("h", "x0"):
                case.leaves[name] = torch.empty(shape, dtype=dtype, device=self.device, requires_grad=True)
                case.arguments[name] = case.leaves[name]
            found = gradients(case, self.backend)
            assert found["output"].shape == ((1 + self.sizes["iterations"], *shape) if trajectory == "return" else shape)
            for name, x in case.leaves.items():
                assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype), name
                assert not found[name].any(), name

    @both_ops
    @pytest.mark.parametrize("trajectory", ["none", "return", "save"])
    def test_failure_case_09_zero_iterations(self, op, trajectory, dtype):
        case = self.everything(op, iterations=0, dtype=dtype, trajectory=trajectory)
        with planned(**self.launches[0]):
            found = gradients(case, self.backend)
        h = case.leaves["h"]
        assert torch.equal(found["output"], h[None] if trajectory == "return" else h)
        assert torch.equal(found["h"][None] if trajectory == "return" else found["h"], cotangent(found["output"]))
        assert not any(found[name].any() for name in case.leaves if name != "h")
        with torch.no_grad():
            assert call(case, self.backend).data_ptr() != h.data_ptr()

    @both_ops
    @pytest.mark.parametrize(("rows", "features", "hidden"), [(1, 1, 1), (17, 1, 33), (16, 33, 1), (33, 17, 31), (15, 40, 7)])
    def test_failure_case_10_sizes_of_no_power_of_two(self, op, rows, features, hidden, dtype):
        sizes = {"rows": rows, "features": features, "hidden": hidden, "iterations": 2}
        # sigmoid(0) is not 0: a padding that is not masked would be seen.
        self.compare(self.everything(op, dtype=dtype, activation="sigmoid", **sizes), dtype)

    @both_ops
    def test_failure_case_13_state_beyond_fp16(self, op):
        """The state reaches 10^6 between two iterations and comes back: float32 inside, in both directions."""
        sizes = {"rows": self.sizes["rows"], "features": 24, "hidden": 24, "iterations": 4, "device": self.device}
        case = build(op, **sizes, dtype=torch.float16, norm="layernorm gain bias", dt="float")
        case.arguments["state_scale"] = torch.tensor([1e6, 1e-6, 1e6, 1e-6], device=self.device)
        other = wide(case)
        other.arguments["state_scale"] = case.arguments["state_scale"].double()
        expected = oracle_gradients(other, torch.float16)
        with planned(**self.launches[0]):
            found = gradients(case, self.backend)
        for name, b in expected.items():
            assert error(found[name], b) <= 16 * torch.finfo(torch.float16).eps, name

    @both_ops
    def test_failure_case_13_sums_beyond_fp16(self, op):
        """Partial sums of 10^7 that cancel: fp16 would have inf - inf."""
        d = 64
        case = build(op, rows=4, features=d, hidden=d, iterations=1, dtype=torch.float16, activation="identity", bias="none")
        signs = torch.tensor([400.0, -400.0], dtype=torch.float16).repeat_interleave(d // 2).expand(d, d).contiguous()
        case.arguments |= {"weight": signs} if op == "linear" else {"w1": signs, "w2": torch.eye(d).half()}
        case.arguments |= {"h": torch.full((4, d), 400.0, dtype=torch.float16), "dt": 0.5}
        case.arguments = {n: x.to(self.device) if isinstance(x, torch.Tensor) else x for n, x in case.arguments.items()}
        assert torch.equal(call(case, self.backend), case.arguments["h"] / 2)

    @both_ops
    def test_failure_case_15_gradients_are_repeatable(self, op, dtype):
        case = self.everything(op, dtype=dtype, solver="rk4", iterations=2)
        with planned(**self.launches[0]):
            expected = gradients(case, self.backend)
            for size in (1, 50000):
                # Memory of other content, as a training loop has it.
                torch.full((size,), float("nan"), device=self.device)
                assert_same_bits(gradients(case, self.backend), expected)

    @both_ops
    # NumPy, which the interpreter computes with, tells of NaN and infinity.
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize(
        ("norm", "activation"),
        [*(("none", name) for name in oracle.ACTIVATIONS), ("layernorm bias", "gelu"), ("rmsnorm", "relu")],
    )
    def test_failure_case_18_nan_and_inf_stay_in_their_row(self, op, bad, norm, activation):
        """Also where the row shares its tile, and where it is the last one, beside rows that are not there."""
        sizes = {**self.sizes, "iterations": 2, "device": self.device, "dtype": self.dtypes[0]}
        case = build(op, **sizes, norm=norm, activation=activation, dt="vector", state_scale="vector")
        rows = case.leaves["h"].shape[0]
        with planned(**self.launches[0]):
            expected = gradients(case, self.backend, ["h"])
            with torch.no_grad():
                case.leaves["h"][5, 2] = case.leaves["h"][-1, 2] = bad
            found = gradients(case, self.backend, ["h"])
        others = [row for row in range(rows) if row not in (5, rows - 1)]
        for name in expected:
            assert torch.equal(found[name][others], expected[name][others]), name
        for row in (5, rows - 1):
            finite = found["output"][row].isfinite().sum().item()
            # F of a NaN is NaN in every column, whatever the activation.
            assert finite <= (0 if math.isnan(bad) else found["output"].shape[1] - 1), "hidden"


def random_shapes(examples):
    """A class's `test_random_shapes`: drawn without hypothesis, which a machine with a GPU need not have."""

    @pytest.mark.parametrize("seed", range(examples))
    def test(self, seed):
        draw = random.Random(seed)
        op = draw.choice(ROW_WISE)
        choices = draw.choice(cases.pairwise(op))
        dtype = draw.choice(self.dtypes)
        sizes = {"rows": (0, 50), "features": (1, 40), "hidden": (1, 40), "iterations": (0, 9)}
        drawn = {name: draw.randint(*limits) for name, limits in sizes.items()}
        launches = {"chunk_rows": 16 * draw.randint(1, 4), "programs": draw.randint(1, 3)}
        self.compare(build(op, **drawn, seed=seed, dtype=dtype, device=self.device, **choices), dtype, launches)

    return test
