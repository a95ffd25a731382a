"""Under torch.compile(fullgraph=True): the values and gradients of eager mode, one graph, and few recompiles."""

from __future__ import annotations

import pytest
import torch
from cases import SEQUENCES
from helpers_torch import D, H, call, draw, equal_gradients, parameters
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import score_kernels as sk


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """The compiled function, and the counter of the graphs that were compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def values_and_gradients(function, *arguments):
    out = function(*arguments)
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=9, dtype=out.dtype))]


def same_as_eager(function, *arguments, backend="aot_eager"):
    expected = values_and_gradients(function, *arguments)
    run, counter = compiled(function, backend)
    equal_gradients(values_and_gradients(run, *arguments), expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def state(*shape):
    return draw(*(shape or (6, D)), seed=5).requires_grad_()


OPTIONS = {
    "plain": {},
    "norm": {"norm": "layernorm", "norm_weight": draw(D), "norm_bias": draw(D)},
    "solver": {"solver": "rk4", "norm": "rmsnorm"},
    "replace": {"update": "replace"},
    "trajectory": {"return_trajectory": True},
    "saved trajectory": {"save_trajectory": True},
    "truncated": {"grad_iterations": 2},
    "no iterations": {"iterations": 0},
    "numbers": {"dt": 0.3, "state_scale": 0.9},
    "reference": {"backend": "reference", "norm": "layernorm"},
}


# Attention's own: masks, a rotary embedding, packed sequences whose longest is told or found when the graph runs.
OFFSETS = torch.tensor([0, 2, 2, 6])
ATTENTION = {
    "masks": {"key_padding_mask": draw(6) > 0.4, "attn_mask": draw(2, 6, 6), "causal": True},
    "rotary": {"rotary": 10.0, "qk_norm": True, "scale": 0.3},
    "packed": {"cu_seqlens": OFFSETS, "rotary": (draw(6, 2), draw(6, 2))},
    "packed, longest given": {"cu_seqlens": OFFSETS, "max_seqlen": 4, "causal": True},
    "packed, reference": {"cu_seqlens": OFFSETS, "backend": "reference"},
}


@pytest.mark.parametrize(
    ("op", "options"), [*(("attention", name) for name in ATTENTION), ("transformer", "masks"), ("transformer", "packed")]
)
def test_options_of_attention(op, options):
    given = parameters(op, grad=True)
    same_as_eager(lambda h, given: call(op, h, given, **ATTENTION[options]), state(), given)


def test_offsets_are_checked_when_the_graph_runs():
    given = parameters("attention")
    run, _ = compiled(lambda h, offsets: call("attention", h, given, cu_seqlens=offsets))
    torch.testing.assert_close(run(draw(6, D), OFFSETS), call("attention", draw(6, D), given, cu_seqlens=OFFSETS))
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to the number of rows, 6"):
        run(draw(6, D), OFFSETS + 1)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        *((op, name) for op in ("linear", "mlp") for name in OPTIONS),
        *((op, name) for op in SEQUENCES for name in ("trajectory", "truncated")),
        *(("transformer", name) for name in ("norm", "replace", "reference")),
    ],
)
def test_options(op, options):
    given = parameters(op, grad=True)
    same_as_eager(lambda h, given: call(op, h, given, **OPTIONS[options]), state(), given)


@pytest.mark.parametrize("op", ["linear", "mlp", "attention", "transformer"])
def test_learned_coefficients_and_injection(op):
    """A learned dt, x0 = h, learned scales: all of them inputs of the graph that want gradients."""

    def run(h, given, logit, scales):
        return call(op, h, given, dt=torch.sigmoid(logit), x0=h, x0_scale=scales[0], state_scale=scales[1])

    scales = [torch.tensor(0.2, requires_grad=True), torch.full((3,), 0.9, requires_grad=True)]
    same_as_eager(run, state(2, 3, D), parameters(op, grad=True), draw(3).requires_grad_(), scales)


def test_lists_and_stacks_of_sets():
    given = parameters("mlp", gated=True, grad=True)
    given["w1"] = [draw(H, D, seed=seed).requires_grad_() for seed in (1, 2)]
    given["b2"] = draw(2, D, seed=3).requires_grad_()
    same_as_eager(lambda h, given: call("mlp", h, given, order="cyclic", iterations=4), state(), given)


MODULES = {
    "linear": lambda: sk.ScoreLinear(D, layers=2, learn_dt="per_iteration", norm="rmsnorm"),
    "mlp": lambda: sk.ScoreMLP(D, H, learn_dt="scalar", norm="layernorm", solver="heun"),
    "gated": lambda: sk.ScoreMLP(D, H, gated=True, activation="silu", dt=torch.tensor(0.3)),
    "attention": lambda: sk.ScoreAttention(D, 2, causal=True, rotary=10.0, learn_dt="scalar", norm="rmsnorm"),
    "transformer": lambda: sk.ScoreTransformer(D, 2, H, layers=2, norm_placement="post", norm="layernorm", rotary=10.0),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    module = MODULES[name]()
    x = state(2, 3, D)

    def gradients(function):
        module.zero_grad()
        x.grad = None
        out = function(x, x0=x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in module.parameters())]

    expected = gradients(module)
    run, counter = compiled(module)
    equal_gradients(gradients(run), expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_inductor():
    """Fused with what is around it, forward and backward."""
    given = parameters("mlp", gated=True, grad=True)

    def run(h, given, logit):
        last = call("mlp", (h * 2).tanh(), given, dt=torch.sigmoid(logit), norm="layernorm", x0=h)
        return torch.relu(last) + h

    same_as_eager(run, state(), given, torch.zeros((), requires_grad=True), backend="inductor")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out(backend):
    """In place under no_grad: the graph functionalises it, and the caller sees the write."""
    given = parameters("linear")

    @torch.no_grad()
    def run(h, out):
        call("linear", h, given, out=out)
        call("linear", out, given, out=out)
        return out + 1

    h = state().detach()
    expected = call("linear", h, given, iterations=6)
    run, counter = compiled(run, backend)
    out = torch.zeros_like(h)
    torch.testing.assert_close(run(h, out), expected + 1)
    torch.testing.assert_close(out, expected)
    assert counter.frame_count == 1


def test_out_refuses_inputs_that_require_grad():
    """The same refusal as in eager mode, while the graph is traced."""
    given = parameters("linear", grad=True)
    run, _ = compiled(lambda h: call("linear", h, given, out=torch.empty_like(h)))
    with pytest.raises(Exception, match="out: expected no input that requires grad"):
        run(state())


def test_bad_input_is_named_while_tracing():
    run, _ = compiled(lambda h, given: call("mlp", h, given))
    with pytest.raises(Exception, match="w2: expected shape"):
        run(state(), {**parameters("mlp"), "w2": draw(D, H + 1)})


@pytest.mark.parametrize("truncated", [False, True])
def test_changing_iterations_recompiles_once(truncated):
    given = parameters("mlp", grad=True)

    def function(h, given, iterations):
        return call("mlp", h, given, iterations=iterations, grad_iterations=iterations - 1 if truncated else None)

    run, counter = compiled(function)
    for iterations in (3, 5, 8, 4):
        arguments = (state(), given, iterations)
        equal_gradients(values_and_gradients(run, *arguments), values_and_gradients(function, *arguments))
    assert counter.frame_count <= 2


def test_autocast():
    module = sk.ScoreMLP(D, H, norm="layernorm")

    def run(h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(h)

    expected = values_and_gradients(run, state())
    assert expected[0].dtype == torch.bfloat16
    function, counter = compiled(run)
    equal_gradients(values_and_gradients(function, state()), expected)
    assert counter.frame_count == 1


def test_export():
    """torch.export keeps the operator in the graph, with dynamic rows."""
    module = sk.ScoreMLP(D, H, learn_dt="scalar")
    program = torch.export.export(module, (draw(5, D),), dynamic_shapes={"h": {0: torch.export.Dim("rows")}})
    assert torch.ops.score_kernels.mlp.default in {node.target for node in program.graph.nodes}
    for rows in (3, 50):
        torch.testing.assert_close(program.module()(draw(rows, D)), module(draw(rows, D)))
