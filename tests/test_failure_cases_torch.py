"""Bugs that users of comparable kernels hit between the kernels and PyTorch; the number of a test is the row of the list."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers_torch import D, H, call, draw, equal_gradients, flat, parameters
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import score_kernels as sk
from score_kernels.ops import operator

F64 = torch.float64
OPS = ("linear", "mlp", "attention", "transformer")
WEIGHT = {"linear": "weight", "mlp": "w1", "attention": "w_qkv", "transformer": "w_out"}
every_op = pytest.mark.parametrize("op", OPS)
FROM_AUTOGRAD = "one of the variables needed for gradient computation has been modified by an inplace operation"


def problem(op, dtype=F64, rows=6):
    """h and the parameters, all of them wanting gradients."""
    return draw(rows, D, dtype=dtype).requires_grad_(), parameters(op, dtype=dtype, grad=True)


def loss(op, h, given, **options):
    return call(op, h, given, **options).square().sum()


# 8: in-place writes that bypass version counters


@every_op
@pytest.mark.parametrize("backend", ["blas", "reference"])
@pytest.mark.parametrize("trajectory", [{}, {"return_trajectory": True}, {"save_trajectory": True}], ids=str)
def test_failure_case_08_inputs_are_never_written(op, backend, trajectory):
    h, given = problem(op)
    inputs = [h, *given.values()]
    before = [(x.detach().clone(), x._version) for x in inputs]
    loss(op, h, given, x0=h, norm="layernorm", backend=backend, solver="rk4", **trajectory).backward()
    for x, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version


@every_op
@pytest.mark.parametrize("which", ["h", "first weight"])
def test_failure_case_08_a_later_write_to_a_saved_input_raises(op, which):
    h, given = problem(op)
    state = h * 1
    found = loss(op, state, given)
    with torch.no_grad():
        (state if which == "h" else next(iter(given.values()))).add_(1)
    with pytest.raises(RuntimeError, match=FROM_AUTOGRAD):
        found.backward()


@every_op
@pytest.mark.parametrize("backend", ["blas", "reference"])
def test_failure_case_08_writing_out_over_a_tensor_saved_upstream_raises(op, backend):
    h, weight = draw(6, D), draw(6, D, seed=1).requires_grad_()
    upstream = (weight * h).sum()
    with torch.no_grad():
        assert call(op, h, parameters(op), out=h, backend=backend) is h
    with pytest.raises(RuntimeError, match=FROM_AUTOGRAD):
        upstream.backward()


@every_op
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["rows", "transposed"])
def test_failure_case_08_out_may_be_the_state_itself(op, layout):
    h, given = layout(draw(700, D)), parameters(op)
    expected = call(op, h, given, x0=h)
    assert call(op, h, given, x0=h, out=h) is h
    torch.testing.assert_close(h, expected)


@every_op
def test_failure_case_08_changing_a_result_in_place_is_noticed(op):
    """The last state is no saved tensor and may be changed; the trajectory is one, and may not."""
    h, given = problem(op)
    last = call(op, h, given, save_trajectory=True)
    expected = torch.autograd.grad(last.sum(), h, retain_graph=True)
    equal_gradients(torch.autograd.grad(last.mul_(1).sum(), h), expected)
    states = call(op, h, given, return_trajectory=True)
    with pytest.raises(RuntimeError, match="inplace"):
        states.mul_(2).sum().backward()


# 14: autocast

# oneDNN's linear operator, which `blas` calls for float32, is not one that autocast casts; the one beside it is.
each_library = pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "BLAS"], indirect=True)


@pytest.fixture
def onednn(request, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["blas", "reference"])
@pytest.mark.parametrize("kind", OPS)
@each_library
@pytest.mark.usefixtures("onednn")
def test_failure_case_14_autocast_is_the_cast_call(kind, backend, dtype):
    """Outputs in autocast's dtype, gradients in the master weights', both those of a call with all inputs cast by hand."""
    options = {"norm": "layernorm", "learn_dt": "scalar", "backend": backend}
    module = {
        "linear": lambda: sk.ScoreLinear(D, **options),
        "mlp": lambda: sk.ScoreMLP(D, H, gated=True, **options),
        "attention": lambda: sk.ScoreAttention(D, 2, causal=True, rotary=10.0, qk_norm=True, **options),
        "transformer": lambda: sk.ScoreTransformer(D, 2, H, norm_placement="post", causal=True, **options),
    }[kind]()
    x = draw(6, D).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = module(x, x0=x)
    assert out.dtype == dtype
    grad = draw(6, D, seed=7, dtype=dtype)
    leaves = [x, *module.parameters()]
    # Outside the context, as training loops do: in the dtypes of forward.
    found = torch.autograd.grad(out, leaves, grad)
    assert [g.dtype for g in found] == [torch.float32] * len(leaves)

    cast = {n: p if "norm" in n or n == "dt_logit" else p.to(dtype) for n, p in module.named_parameters()}
    expected = torch.func.functional_call(module, cast, (x.to(dtype),), {"x0": x.to(dtype)})
    assert torch.equal(out, expected)
    equal_gradients(found, torch.autograd.grad(expected, leaves, grad), rtol=0, atol=0)


@every_op
@each_library
@pytest.mark.usefixtures("onednn")
def test_failure_case_14_backward_inside_autocast_is_backward_outside(op):
    """`<op>_backward` runs in the dtype of forward wherever it is called."""
    h, given = problem(op, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(op, h, given)
        inside = torch.autograd.grad(found, [h, *given.values()], retain_graph=True)
    equal_gradients(inside, torch.autograd.grad(found, [h, *given.values()]), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["blas", "reference"])
def test_failure_case_14_autocast_leaves_float64_and_double_backward_alone(backend):
    h, given = problem("mlp")

    def second():
        first = torch.autograd.grad(loss("mlp", h, given, backend=backend), h, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [h, *given.values()])

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal_gradients(second(), expected, rtol=0, atol=0)


def test_failure_case_14_double_backward_inside_autocast_is_in_the_dtype_of_forward():
    """Backward under autocast must not round float32 to 16 bits; its products would be."""
    h, given = problem("mlp", torch.float32)
    first = torch.autograd.grad(loss("mlp", h, given), h, create_graph=True)[0].square().sum()
    expected = torch.autograd.grad(first, h, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal_gradients(torch.autograd.grad(first, h), expected, rtol=0, atol=0)


# 21: recompiles


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", [*OPS, "module"])
def test_failure_case_21_any_number_of_rows_recompiles_once(kind, grad):
    torch._dynamo.reset()
    if kind == "module":
        function = sk.ScoreMLP(D, H, norm="layernorm", learn_dt="scalar", layers=2).requires_grad_(grad)
    else:
        given = parameters(kind, grad=grad)

        def function(h):
            return call(kind, h, given, norm="rmsnorm", x0=h, dt=0.3)

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (6, 9, 33, 5, 257, 64):
        h = draw(rows, D).requires_grad_(grad)
        out = run(h)
        torch.testing.assert_close(out, function(h))
        if grad:
            equal_gradients(torch.autograd.grad(out.sum(), h), torch.autograd.grad(function(h).sum(), h), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


# 22: fake tensors; opcheck with every utility is in test_ops.py


@pytest.mark.parametrize("permutation", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
@every_op
def test_failure_case_22_fake_results_have_the_real_shapes_and_strides(op, permutation):
    shape = [0, 0, 0]
    for size, axis in zip((4, 3, D), permutation, strict=True):
        shape[axis] = size
    h = draw(*shape).permute(permutation)
    assert h.shape == (4, 3, D)
    for options in ({}, {"return_trajectory": True}, {"iterations": 0, "return_trajectory": True}):
        arguments = flat(op, h, parameters(op), **options)
        real = operator(op)(*arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = operator(op)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.storage_offset()) == (b.shape, b.stride(), b.dtype, b.storage_offset())


@every_op
def test_failure_case_22_gradients_have_the_layout_that_the_fake_ones_have(op):
    h = draw(D, 6).t()
    inputs = flat(op, h, {n: p.t().contiguous().t() if p.dim() == 2 else p for n, p in parameters(op).items()})
    tensors, options = inputs[:6], inputs[6:]
    needs = [x is not None for x in (*tensors[:5], *tensors[5])]
    arguments = (draw(6, D), None, None, *tensors, needs, *options)
    real = operator(f"{op}_backward")(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = operator(f"{op}_backward")(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    assert [(x.shape, x.stride(), x.dtype) for x in real] == [(x.shape, x.stride(), x.dtype) for x in fake]
    assert all(x.is_contiguous() for x in real)


# 23: graph breaks; all options are in test_compile.py


@pytest.mark.parametrize("kind", [*OPS, "ScoreLinear", "ScoreMLP", "ScoreAttention", "ScoreTransformer"])
def test_failure_case_23_one_graph_forward_and_backward(kind):
    torch._dynamo.reset()
    modules = {
        "ScoreLinear": lambda: sk.ScoreLinear(D, learn_dt="scalar"),
        "ScoreMLP": lambda: sk.ScoreMLP(D, H, norm="rmsnorm"),
        "ScoreAttention": lambda: sk.ScoreAttention(D, 2, causal=True, rotary=10.0),
        "ScoreTransformer": lambda: sk.ScoreTransformer(D, 2, H, norm="layernorm", causal=True, learn_dt="scalar"),
    }
    given = parameters(kind, grad=True) if kind in OPS else {}
    function = modules[kind]() if kind in modules else lambda h: call(kind, h, given)
    h = draw(6, D).requires_grad_()
    explanation = torch._dynamo.explain(function)(h)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(h)
    equal_gradients(torch.autograd.grad(out.sum(), h), torch.autograd.grad(function(h).sum(), h), rtol=1e-5, atol=1e-6)


# 24: double backward


@pytest.mark.parametrize("solver", ["euler", "heun"])
@every_op
def test_failure_case_24_gradgradcheck(op, solver):
    h, given = problem(op, rows=2)
    # Of a transformer a bias of each half: it has 500 numbers, of which test_transformer.py has fewer.
    names = [name for name in given if op != "transformer" or name in ("b_out", "b2")]

    def run(h, dt, *values):
        changed = {**given, **dict(zip(names, values, strict=True))}
        return call(op, h, changed, dt=dt, activation="silu", norm="rmsnorm", solver=solver, iterations=2)

    dt = torch.tensor([0.3, 0.6], dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run, (h, dt, *(given[name] for name in names)))


@every_op
def test_failure_case_24_gradient_penalty_is_that_of_plain_autograd(op):
    """Third derivatives too: nothing in the way back is cut off."""
    found = {}
    for backend in ("blas", "reference"):
        h, given = problem(op)
        first = torch.autograd.grad(loss(op, h, given, activation="tanh", backend=backend), h, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), h, create_graph=True)[0]
        third = torch.autograd.grad(second.square().sum(), [h, *given.values()])
        found[backend] = [first, second, *third]
    for a, b in zip(found["blas"], found["reference"], strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@every_op
def test_failure_case_24_under_compile_it_raises_and_is_not_silently_wrong(op):
    torch._dynamo.reset()
    h, given = problem(op)
    run = torch.compile(lambda h: loss(op, h, given), fullgraph=True, backend="aot_eager")
    first = torch.autograd.grad(run(h), h, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.sum().backward()


# 26: retain_graph, backward twice, inputs that want no gradient


@every_op
def test_failure_case_26_retain_graph(op):
    h, given = problem(op)
    found = loss(op, h, given)
    first = torch.autograd.grad(found, [h, *given.values()], retain_graph=True)
    equal_gradients(torch.autograd.grad(found, [h, *given.values()]), first, rtol=0, atol=0)


@every_op
def test_failure_case_26_backward_twice_raises(op):
    h, given = problem(op)
    found = loss(op, h, given)
    found.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found.backward()


@every_op
def test_failure_case_26_only_what_wants_a_gradient_gets_one(op):
    """Each input alone, only the weights, only the state: the same numbers as with all of them, and None for the others."""
    h, given = problem(op)
    inputs = [h, *given.values()]
    expected = torch.autograd.grad(loss(op, h, given, norm="layernorm"), inputs)
    alone = [[i] for i in range(len(inputs))]
    for wanted in (*alone, range(1, len(inputs))):
        for i, x in enumerate(inputs):
            x.grad = None
            x.requires_grad_(i in wanted)
        loss(op, h, given, norm="layernorm").backward()
        for i, x in enumerate(inputs):
            if i in wanted:
                torch.testing.assert_close(x.grad, expected[i])
            else:
                assert x.grad is None


@every_op
def test_failure_case_26_nothing_wants_a_gradient(op):
    h, given = draw(6, D), parameters(op)
    assert not call(op, h, given).requires_grad
    with torch.no_grad():
        assert not call(op, *problem(op)).requires_grad
    with torch.inference_mode():
        found = call(op, h, given)
        assert found.is_inference()
        assert torch.equal(call(op, h.clone(), given, out=torch.empty_like(h)), found)


@every_op
def test_failure_case_26_a_result_that_is_not_used_has_no_gradient(op):
    """Autograd hands None to backward for it."""
    h, given = problem(op)
    states = call(op, h, given, return_trajectory=True)
    expected = call(op, h, given, iterations=3)
    equal_gradients(torch.autograd.grad(states[-1].sum(), h, retain_graph=True), torch.autograd.grad(expected.sum(), h))
    equal_gradients(torch.autograd.grad(states[0].sum(), h), (torch.ones_like(h),))


@every_op
def test_failure_case_26_a_tensor_given_twice_gets_both_gradients(op):
    """x0 = h; one weight in a list twice: first and second derivatives."""
    name = WEIGHT[op]
    found = {}
    for backend in ("blas", "reference"):
        h, given = problem(op)
        weight = given[name]
        given[name] = [weight, weight]
        first = torch.autograd.grad(loss(op, h, given, x0=h, backend=backend), [h, weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [h, weight])
        found[backend] = [*first, *second]
    equal_gradients(found["blas"], found["reference"])


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_failure_case_26_activation_checkpointing(op, reentrant):
    h, given = problem(op)
    expected = torch.autograd.grad(loss(op, h, given), [h, *given.values()])
    checkpoint(lambda h: loss(op, h, given), h, use_reentrant=reentrant).backward()
    equal_gradients([h.grad, *(p.grad for p in given.values())], expected, rtol=0, atol=0)


@every_op
def test_failure_case_26_hooks_of_saved_tensors(op):
    """save_on_cpu and its like pack and unpack what is kept, which is the inputs."""
    h, given = problem(op)
    expected = torch.autograd.grad(loss(op, h, given), h)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        found = loss(op, h, given)
    equal_gradients(torch.autograd.grad(found, h), expected, rtol=0, atol=0)


# 28: torch.func over ops and modules


@every_op
def test_failure_case_28_grad_and_vjp(op):
    h, given = problem(op)
    names = list(given)
    plain = [x.detach() for x in (h, *given.values())]

    def run(h, *values):
        return loss(op, h, dict(zip(names, values, strict=True)))

    expected = torch.autograd.grad(loss(op, h, given), [h, *given.values()])
    everything = tuple(range(len(plain)))
    equal_gradients(torch.func.grad(run, everything)(*plain), expected)
    equal_gradients(torch.func.vjp(run, *plain)[1](torch.ones((), dtype=F64)), expected)


@every_op
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("batched", ["h", "x0", "both", "middle", "weight", "dt"])
def test_failure_case_28_vmap(op, batched, trajectory):
    given, h, x0 = parameters(op, dtype=F64), draw(6, D, dtype=F64), draw(6, D, dtype=F64, seed=1)
    name = WEIGHT[op]
    shape = {"weight": given[name].shape, "dt": (3,)}.get(batched, h.shape)
    batch = draw(4, *shape, dtype=F64, seed=2)

    def run(x):
        changes = {
            "h": lambda: {"h": x}, "middle": lambda: {"h": x}, "x0": lambda: {"x0": x}, "both": lambda: {"h": x, "x0": x},
            "weight": lambda: {name: x}, "dt": lambda: {"dt": x},
        }[batched]()  # fmt: skip
        options = {"h": h, "x0": x0, "return_trajectory": trajectory, **given, **changes}
        return call(op, options.pop("h"), {}, **options)

    expected = torch.stack([run(x) for x in batch])
    dim = 1 if batched == "middle" else 0
    torch.testing.assert_close(torch.func.vmap(run, in_dims=dim)(batch.movedim(0, dim)), expected)
    jacobian = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(batch)
    torch.testing.assert_close(jacobian, torch.stack([torch.func.grad(lambda x: run(x).square().sum())(x) for x in batch]))


@every_op
def test_failure_case_28_jacobians_and_hessians(op):
    h, given = draw(2, D, dtype=F64)[:, :], parameters(op, dtype=F64)
    for backend in ("auto", "blas"):

        def run(h, backend=backend):
            return call(op, h, given, activation="tanh", backend=backend)

        def plain(h):
            return call(op, h, given, activation="tanh", backend="reference")

        torch.testing.assert_close(torch.func.jacrev(run)(h), torch.func.jacrev(plain)(h))
        hessian = torch.func.jacrev(torch.func.jacrev(lambda h, run=run: run(h).sum()))(h)
        torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(lambda h: plain(h).sum()))(h))


@pytest.mark.parametrize(
    "module",
    [
        lambda: sk.ScoreLinear(D, norm="rmsnorm"),
        lambda: sk.ScoreMLP(D, H, learn_dt="scalar"),
        lambda: sk.ScoreAttention(D, 2, rotary=10.0),
    ],
)
def test_failure_case_28_gradients_of_each_sample_over_a_module(module):
    module = module().double()
    shape = (5, 3, D) if isinstance(module, sk.ScoreAttention) else (5, D)
    weights, samples = dict(module.named_parameters()), draw(*shape, dtype=F64)

    def sample_loss(weights, x):
        return torch.func.functional_call(module, weights, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0))(weights, samples)
    for i, x in enumerate(samples):
        expected = torch.autograd.grad(module(x).square().sum(), list(weights.values()))
        equal_gradients([found[name][i] for name in weights], expected)


def test_failure_case_28_an_ensemble_of_modules():
    modules = [sk.ScoreMLP(D, H, norm="layernorm", learn_dt="scalar").double() for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(modules)
    x = draw(5, D, dtype=F64)
    found = torch.func.vmap(lambda w, b: torch.func.functional_call(modules[0], (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(found, torch.stack([module(x) for module in modules]))


# 29: imports without a GPU, without Triton, without a compiler


TRY = """
    import sys
    import score_kernels
    assert "torch" not in sys.modules and "triton" not in sys.modules
    import torch
    module = score_kernels.ScoreMLP(8, 12, norm="layernorm", learn_dt="scalar")
    x = torch.ones(5, 8, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert score_kernels.available_backends() == ["reference", "blas"]
    print(score_kernels.explain(module, x))
"""


def run_python(code, *options, **environment):
    user = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    changed = {**user, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1", **environment}
    finished = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)], env=changed, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"CUDA_VISIBLE_DEVICES": ""}),
        ("import sys; sys.modules['triton'] = None", {}),
        # No program can be found: no compiler, no driver's tools.
        ("", {"PATH": "", "CC": "/nonexistent", "CXX": "/nonexistent"}),
    ],
    ids=["no GPU", "no Triton", "no compiler"],
)
def test_failure_case_29_import_and_training(before, environment):
    code = before + textwrap.dedent(TRY.replace('and "triton" not in sys.modules', 'and not sys.modules.get("triton")'))
    assert "backend   blas" in run_python(code, **environment)


def test_failure_case_29_the_message_of_a_missing_backend():
    with pytest.raises(ValueError, match="backend='cuda' cannot run this call: it needs a GPU"):
        sk.ScoreLinear(D, backend="cuda")(torch.randn(3, D))


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("", "it needs a GPU"),
        ("import sys; sys.modules['triton'] = None", "triton is not installed: pip install 'triton>=3.6'"),
    ],
    ids=["no GPU", "no Triton"],
)
def test_failure_case_29_the_message_of_triton_where_it_cannot_run(before, reason):
    code = """
        import torch, score_kernels
        try:
            score_kernels.ScoreLinear(8, backend="triton")(torch.ones(5, 8))
        except ValueError as error:
            print(error)
    """
    told = run_python(before + textwrap.dedent(code), CUDA_VISIBLE_DEVICES="")
    assert told == f"backend='triton' cannot run this call: {reason}\n"


def test_failure_case_29_a_model_with_score_modules_is_like_any_other():
    """In a Sequential with ordinary layers, from float32 to bfloat16 and back, trained and frozen."""
    model = nn.Sequential(nn.Linear(4, D), sk.ScoreMLP(D, H, learn_dt="scalar"), nn.Linear(D, 2))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        model(draw(5, 4, dtype=dtype)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
