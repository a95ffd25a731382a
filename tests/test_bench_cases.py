"""The benchmark's cases and providers: every one builds, computes what float64 does, and counts the work that it says."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_rows import TIMES, TINY, peer, rows_of
from torch.utils.flop_counter import FlopCounterMode

from bench import attention_peers, environment, inputs, layout, peers
from bench.cases import MODES, Case
from bench.flops import flops, traffic
from bench.precision import DTYPES, Precision
from bench.providers import PROVIDERS, eager
from bench.suites import SUITES, family
from bench.targets import Absent, Problem
from score_kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("plain_machine")

CASES = {case.name: case for suite in SUITES.values() for case in suite.cases}

# Those of a CPU, without the ones that take seconds to compile.
PLAIN = [provider for provider in PROVIDERS.values() if not provider.compiles]


def errors_of(case: Case, mode: str, dtype: str, providers=PLAIN):
    """The error of every provider that takes the case, in its tolerance, and the reasons of the others."""
    bench, errors, reasons = Problem(case, mode, dtype).on("cpu"), {}, {}
    for provider in providers:
        try:
            step = bench.step(provider)
        except Absent as reason:
            reasons[provider.name] = str(reason)
        else:
            error = inputs.relative_error(step.run(step.prepare()), bench.expected(provider))
            errors[provider.name] = error / bench.tolerance(provider)
    return errors, reasons


def test_case_names_are_unique():
    assert len(CASES) == sum(len(suite.cases) for suite in SUITES.values())


def test_family_is_the_product_of_its_lists():
    cases = family("{op}-{features}x{hidden}-{solver}", "here", [(1, 2), (3, 4)], rows=5, iterations=6, solver=["euler", "rk4"])
    assert [case.name for case in cases] == ["mlp-1x2-euler", "mlp-1x2-rk4", "mlp-3x4-euler", "mlp-3x4-rk4"]
    assert cases[1] == Case("mlp-1x2-rk4", "mlp", 5, 1, 2, 6, "here", solver="rk4")


def test_every_case_is_right_on_eight_rows_by_every_provider():
    """Cases that differ in rows alone are one here."""
    ran = set()
    small = [replace(case, rows=8, tokens=min(case.tokens, 4)) for case in CASES.values()]
    for case in {replace(case, name="", source="", modes=(), graph=False): case for case in small}.values():
        errors, reasons = errors_of(case, "forward", case.dtype)
        assert {"eager", "reference", "blas", "auto"} <= set(errors), (case.name, reasons)
        assert reasons.keys() >= {"checkpoint", "liger", "triton", "cuda"}, case.name
        assert max(errors.values()) <= 1, (case.name, errors)
        ran |= set(errors)
    assert ran >= {"torchdiffeq", "stack"}


ATTENTION = {"op": "attention", "hidden": 16, "activation": "identity", "heads": 2, "tokens": 8}
TRANSFORMER = {"op": "transformer", "heads": 2, "tokens": 8}
# TRM's block.
POST = {**TRANSFORMER, "norm_placement": "post", "norm": "rmsnorm", "gated": True, "bias": False, "activation": "silu"}

# Changes to a case, and the peers that refuse it.
VARIANTS = [
    ({"op": "linear", "activation": "leaky_relu", "norm": None, "hidden": 16}, set()),
    ({"gated": True, "norm": "rmsnorm", "bias": False, "activation": "silu"}, set()),
    ({**ATTENTION, "causal": True, "bias": False, "norm": "rmsnorm"}, {"stack"}),
    ({**ATTENTION, "solver": "heun", "dt": 0.25, "sets": 2, "iterations": 5}, {"stack", "torchdiffeq"}),
    ({**TRANSFORMER, "causal": True}, {"stack"}),
    ({**POST, "update": "replace", "dt": None, "sets": 2, "order": "cyclic", "grad_iterations": 2}, {"stack", "torchdiffeq"}),
    ({"solver": "midpoint"}, {"stack"}),
    ({"solver": "heun", "dt": 0.25}, {"stack"}),
    ({"solver": "ralston", "dt": 0.25}, {"stack", "torchdiffeq"}),
    ({"solver": "rk4", "update": "residual", "dt": None}, {"stack", "torchdiffeq"}),
    ({"update": "residual", "dt": 0.3}, set()),
    ({"update": "residual", "sets": 2, "iterations": 5}, {"torchdiffeq"}),
    ({"update": "replace", "dt": None, "sets": 3}, {"torchdiffeq"}),
    ({"sets": 2, "order": "cyclic", "iterations": 5}, {"torchdiffeq"}),
    ({"sets": 3, "iterations": 6, "grad_iterations": 2}, {"stack", "torchdiffeq"}),
    ({"grad_iterations": 5}, set()),
]


@pytest.mark.parametrize(("change", "refusing"), VARIANTS, ids=lambda v: str(sorted(v) if isinstance(v, set) else v))
def test_providers_compute_the_same_as_float64_reference(change, refusing):
    case = replace(TINY, **change)
    providers = [PROVIDERS[name] for name in ("eager", "checkpoint", "stack", "torchdiffeq", "blas")]
    for mode in MODES:
        given = inputs.make(case, mode, torch.float64, "cpu")
        counts = {"forward": 1, "backward": 1 + len(case.shapes), "training": 2 + len(case.shapes)}
        assert len(inputs.reference(case, given, mode)) == counts[mode]
        errors, reasons = errors_of(case, mode, "float64", providers)
        assert set(reasons) == refusing | ({"checkpoint"} if mode == "forward" else set())
        assert max(errors.values()) <= 1, errors


def test_no_gradient_reaches_what_comes_before_grad_iterations():
    case = replace(TINY, sets=3, iterations=6, grad_iterations=2)
    for run in (eager(case), inputs.ours(case, "blas")):
        step = inputs.step(run, inputs.make(case, "backward", torch.float64, "cpu"), "backward")
        grad_h, *grads = step.run(step.prepare())
        assert not grad_h.any()
        assert all(not grad[:2].any() and grad[2].any() for grad in grads)


def test_error_where_the_reference_is_zero_is_that_of_the_result():
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert inputs.relative_error([one, zero], [one, zero]) == 0
    assert inputs.relative_error([one, 0.5 * one], [one, zero]) == 1
    assert math.isnan(inputs.relative_error([one * math.inf], [one]))


def test_stack_is_a_sequential_of_unshared_layers():
    stack = peers.stack(peers.stack_of(replace(TINY, activation="relu")))
    layer = ["LayerNorm", "Linear", "ReLU", "Linear"]
    assert [type(module).__name__ for module in stack] == 3 * layer
    assert len(list(stack.parameters())) == 3 * len(TINY.shapes)
    gated = peers.stack(peers.stack_of(replace(TINY, gated=True, norm=None, bias=False, iterations=1)))
    assert [type(module).__name__ for module in gated] == ["GatedUnit", "Linear"]
    assert [name for name, _ in gated.named_parameters()] == ["0.gate.weight", "0.up.weight", "1.weight"]


STACKS = [
    {"op": "linear", "hidden": 16, "norm": None},
    {"op": "linear", "hidden": 16, "norm": "rmsnorm", "bias": False},
    {"gated": True, "iterations": 1},
    *({"activation": activation} for activation in ACTIVATIONS),
]


@pytest.mark.parametrize("change", STACKS, ids=str)
def test_stack_computes_what_the_reference_does_with_a_set_for_each_layer(change):
    """Every gradient of every layer is that of the set with which iteration t of the reference replaces the state."""
    for mode in MODES:
        errors, _ = errors_of(replace(TINY, **change), mode, "float64", [PROVIDERS["stack"]])
        assert errors["stack"] <= 1, mode


def without_bias(case: Case):
    stack = peers.stack(case)
    for linear in (module for module in stack if isinstance(module, torch.nn.Linear)):
        linear.register_forward_hook(lambda module, _, out: out - module.bias)
    return stack


def with_the_last_layer_first(case: Case):
    stack = peers.stack(case)
    layers = list(stack)
    stack.forward = lambda h: torch.nn.Sequential(*layers[-4:], *layers[:-4])(h)
    return stack


def one_layer_fewer(case: Case):
    stack = peers.stack(case)
    stack.forward = lambda h: torch.nn.Sequential(*list(stack)[:-4])(h)
    return stack


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_stack_that_is_wrong_is_not_timed(dtype):
    stack = PROVIDERS["stack"]
    wrong = (without_bias, with_the_last_layer_first, one_layer_fewer)
    rows = rows_of(stack, *(replace(stack, name=build.__name__, build=build) for build in wrong), dtype=dtype)
    assert {name: row["status"] for name, row in rows.items()} == {"stack": "ok"} | {b.__name__: "wrong" for b in wrong}
    assert (rows["stack"]["params"]["L"], rows["stack"]["params"]["update"]) == (3, "replace")
    assert "what SCORE replaces" in layout.results(environment.environment("cpu"), [rows["stack"]]).lines[0].cells[3]


def test_deep_stacks_are_left_out():
    assert "no gradients" in str(peers.no_stack(replace(TINY, iterations=17), "forward"))
    assert peers.no_stack(replace(TINY, iterations=16), "forward") is None
    for rough in ({"activation": "relu"}, {"activation": "relu2"}, {"gated": True}):
        assert "9 layers of" in str(peers.no_stack(replace(TINY, iterations=9, **rough), "forward"))
        assert peers.no_stack(replace(TINY, iterations=8, **rough), "forward") is None


def test_checkpointing_computes_again():
    given = inputs.make(TINY, "training", torch.float32, "cpu")
    step = inputs.step(peers.checkpointed(TINY), given, "training")
    with FlopCounterMode(display=False) as counter:
        step.run(step.prepare())
    assert counter.get_total_flops() > flops(TINY, "training")


def test_torchdiffeq_is_used_where_it_has_the_same_method():
    for solver in ("euler", "midpoint", "heun"):
        assert peers.no_ode(replace(TINY, solver=solver), "forward") is None
    assert "3/8 rule" in str(peers.no_ode(replace(TINY, solver="rk4"), "forward"))
    # Its rk4 is really another method: close to ours, and not the same.
    case = replace(TINY, solver="rk4", dt=1.0)
    given = inputs.make(case, "forward", torch.float64, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.ODE_METHODS, "rk4", "rk4")
        step = inputs.step(peers.ode(case), given, "forward")
        error = inputs.relative_error(step.run(step.prepare()), inputs.reference(case, given, "forward"))
    assert 1e-9 < error < 1e-1


def test_liger_takes_the_place_of_the_gate(monkeypatch):
    calls = []

    class LigerSiLUMulFunction:
        @staticmethod
        def apply(a, b):
            calls.append(a.shape)
            return F.silu(a) * b

    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", SimpleNamespace(LigerSiLUMulFunction=LigerSiLUMulFunction))
    case = replace(TINY, gated=True, activation="silu")
    assert peers.no_swiglu(case, "training") is None
    given = inputs.make(case, "training", torch.float64, "cpu")
    step = inputs.step(peers.liger(case), given, "training")
    assert inputs.relative_error(step.run(step.prepare()), inputs.reference(case, given, "training")) < 1e-13
    assert calls == 3 * [(48, 24)]
    for change in ({"gated": False}, {"activation": "gelu"}, {"op": "linear"}):
        assert "SwiGLU" in str(peers.no_swiglu(replace(case, **change), "training"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        {}, {"causal": True, "bias": False, "activation": "relu"},
        {"norm_placement": "post", "update": "residual", "solver": "heun"},
        {"norm_placement": "post", "update": "replace", "dt": None, "sets": 2, "order": "cyclic", "grad_iterations": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_of_torch_s_encoder_layer_is_the_case(mode, change):
    errors, _ = errors_of(replace(TINY, **TRANSFORMER, **change), mode, "float64", [PROVIDERS["encoder_layer"]])
    assert errors["encoder_layer"] <= 1


def test_cases_that_are_no_encoder_layer():
    for change in ({**POST}, {**TRANSFORMER, "activation": "silu"}, {**TRANSFORMER, "norm": None}, ATTENTION, {}):
        assert attention_peers.no_encoder_layer(replace(TINY, **change), "forward"), change
    assert attention_peers.no_encoder_layer(replace(TINY, **TRANSFORMER), "forward") is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("change", [ATTENTION, {**TRANSFORMER, "causal": True}, POST], ids=["attention", "causal", "post"])
def test_flex_attention_takes_the_place_of_sdpa(change):
    case = replace(TINY, **change)
    given = inputs.make(case, "forward", torch.float64, "cpu")
    step = inputs.step(attention_peers.flexible(case), given, "forward")
    assert inputs.relative_error(step.run(step.prepare()), inputs.reference(case, given, "forward")) < 1e-13
    provider = PROVIDERS["flex_attention"]
    assert provider.refuses(case, "forward", torch.float32, "cpu") is None
    assert provider.refuses(case, "training", torch.float32, "cpu") == "its backward needs a GPU"
    assert provider.refuses(case, "training", torch.float32, "cuda") is None
    assert provider.refuses(TINY, "forward", torch.float32, "cuda") == "the case has no attention"


def test_absent_providers_say_why():
    names = ("eager", "checkpoint", "torch_compile_graphs", "liger", "cuda", "triton")
    rows = rows_of(*(PROVIDERS[name] for name in names))
    reasons = {name: row["error"] for name, row in rows.items()}
    assert reasons == {
        "eager": None,
        "checkpoint": "it saves memory between forward and backward: without backward it is eager",
        "torch_compile_graphs": "it needs a GPU",
        "liger": "liger_kernel not installed: pip install liger-kernel",
        "cuda": "it needs a GPU",
        "triton": "it needs a GPU",
    }
    assert all(row[key] is None for row in rows.values() if row["status"] == "absent" for key in TIMES)
    limits = PROVIDERS["torch_compile_graphs"].limits
    assert limits(TINY, "forward") is None
    assert "cannot be captured" in str(limits(replace(TINY, graph=True), "forward"))


def test_graphs_begin_a_step_with_every_call(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: (told.append(mode), function)[1])
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append("begin"))
    run = peers.compiled_graphs(TINY)
    given = inputs.make(TINY, "forward", torch.float32, "cpu")
    for _ in range(2):
        run(given.h, given.parameters)
    assert told == ["max-autotune", "begin", "begin"]


def test_tf32_is_absent_on_a_cpu_and_set_on_a_gpu(monkeypatch):
    seen = []

    def build(case):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        forward = eager(case)

        def recorded(h, parameters):
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return forward(h, parameters)

        return recorded

    row = rows_of(peer("seen", build), dtype="tf32")["seen"]
    assert (row["status"], row["error"]) == ("absent", "tf32 is a format of GPUs: here it would be float32, measured twice")
    assert seen == []
    monkeypatch.setattr(Precision, "absent", lambda self, device: None)
    for dtype, wanted in (("tf32", True), ("float32", False)):
        seen.clear()
        row = rows_of(peer("seen", build), dtype=dtype)["seen"]
        assert (row["status"], row["dtype"]) == ("ok", dtype)
        assert len(seen) > 5
        assert set(seen) == {wanted}
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert inputs.tolerance(DTYPES["tf32"].eps, "forward") == inputs.tolerance(DTYPES["float16"].eps, "forward")


def one_iteration_fewer(case: Case):
    first = slice(case.iterations - 1)
    run = eager(replace(case, iterations=first.stop, sets=first.stop))
    return lambda h, p: run(h, {name: x[first] if first.stop > 1 else x[0] for name, x in p.items()})


def sets_in_reverse(case: Case):
    return lambda h, p: eager(case)(h, {name: x.flip(0) for name, x in p.items()})


def without_b2(case: Case):
    return lambda h, p: eager(case)(h, {name: x for name, x in p.items() if name != "b2"})


REPLACING = replace(TINY, rows=256, features=64, hidden=64, update="replace", dt=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "change",
    [
        *({"activation": activation, "norm": "rmsnorm"} for activation in ("gelu", "relu", "relu2", "silu")),
        {"activation": "leaky_relu", "norm": None},
        {"activation": "silu", "norm": "rmsnorm", "gated": True},
    ],
    ids=str,
)
def test_layers_that_replace_their_state_have_a_tolerance_that_tells_right_from_wrong(change, dtype):
    """The plain loop is within it at every depth that a stack is measured at; one that lacks something is out of it."""
    for iterations in (1, 2, 4, 8):
        case = replace(REPLACING, iterations=iterations, sets=iterations, **change)
        right, _ = errors_of(case, "forward", dtype, [PROVIDERS["eager"], PROVIDERS["blas"]])
        assert max(right.values()) <= 1, iterations
        if iterations > 1:
            wrong = [peer("fewer", one_iteration_fewer), peer("other", sets_in_reverse), peer("bias", without_b2)]
            found, _ = errors_of(case, "forward", dtype, wrong)
            assert min(found.values()) > 1, (iterations, found)


def test_reference_in_parts_is_the_reference(monkeypatch):
    for case in (TINY, replace(TINY, **ATTENTION)):
        given = inputs.make(case, "training", torch.float32, "cpu")
        monkeypatch.setattr(inputs, "REFERENCE_ROWS", 1024)
        whole = inputs.reference(case, given, "training")
        for rows in (7, 17):
            monkeypatch.setattr(inputs, "REFERENCE_ROWS", rows)
            assert inputs.relative_error(inputs.reference(case, given, "training"), whole) < 1e-13


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [change for change, _ in VARIANTS if "tokens" not in change], ids=str)
def test_flops_are_what_torch_counts(change, mode):
    case = replace(TINY, **change)
    step = inputs.step(eager(case), inputs.make(case, mode, torch.float32, "cpu"), mode)
    state = step.prepare()
    with FlopCounterMode(display=False) as counter:
        step.run(state)
    assert flops(case, mode) == counter.get_total_flops()


def test_flops_of_every_kind_of_case_by_hand():
    """2 per multiply-add, times rows x D x H, products, iterations and stages; backward twice for each product it reaches."""
    by_hand = {
        "linear-leaky": ("forward", 2 * 4096 * 128 * 128 * 1 * 8),
        "launch-64-m32-t3": ("training", 3 * 2 * 32 * 64 * 64 * 2 * 3),
        "square-1024-t16": ("backward", 2 * 2 * 262144 * 1024 * 1024 * 2 * 16),
        "wide-768x3072-t4": ("forward", 2 * 262144 * 768 * 3072 * 2 * 4),
        "esol-m1024-heun": ("forward", 2 * 1024 * 128 * 128 * 2 * 4 * 2),
        "esol-m1024-rk4": ("forward", 2 * 1024 * 128 * 128 * 2 * 4 * 4),
        "attention-64-tokens": ("training", 3 * 2 * 4096 * (4 * 128 * 128 + 2 * 64 * 128) * 8),
        "attention-causal": ("forward", 2 * 8 * (256 * 4 * 384 * 384 + 2 * (256 * 257 // 2) * 384) * 6),
        "transformer-molecules": ("forward", 2 * 2048 * (4 * 128 * 128 + 2 * 16 * 128 + 2 * 128 * 128) * 4),
        "transformer-trm-m97": ("training", 2 * 97 * (4 * 512 * 512 + 2 * 97 * 512 + 3 * 512 * 1536) * (21 + 2 * 7)),
        "nanogpt-char": ("training", 3 * 2 * 16384 * 384 * 1536 * 2 * 6),
        "language-t4": ("forward", 2 * 32768 * 256 * 1024 * 2 * 4),
        "trm-m97": ("training", 2 * 97 * 512 * 1536 * 3 * (21 + 2 * 7)),
    }
    assert {name: (mode, flops(CASES[name], mode)) for name, (mode, _) in by_hand.items()} == by_hand
    stack = Problem(CASES["esol-m1024-euler"], "forward", "float32").row(PROVIDERS["stack"])
    assert stack["flops"] == 2 * 1024 * 128 * 128 * 2 * 4
    assert stack["bytes"] == 4 * (2 * 1024 * 128 + 4 * (2 * 128 * 128 + 4 * 128))


def test_traffic_is_inputs_and_outputs_once():
    case = replace(TINY, norm=None, sets=2)
    state, weights = 48 * 16, 2 * (2 * 16 * 24 + 16 + 24)
    assert traffic(case, "forward", 2) == 2 * (2 * state + weights)
    assert traffic(case, "backward", 4) == 4 * (3 * state + 2 * weights)
    assert traffic(case, "training", 4) == 4 * (5 * state + 3 * weights)
    # Two gated sets without biases, with a gain; h gets no gradient.
    state, weights = 97 * 512, 2 * (3 * 512 * 1536 + 512)
    assert traffic(CASES["trm-m97"], "training", 2) == 2 * (4 * state + 3 * weights)
