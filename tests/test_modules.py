"""ScoreLinear and ScoreMLP as modules of a PyTorch model: state, copies, dtypes, shapes, learned dt, initial values."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import SEQUENCES
from helpers_torch import D, H, draw
from torch import nn

import score_kernels as sk
from score_kernels import functional as SF

KINDS = {
    "linear": lambda **options: sk.ScoreLinear(D, **options),
    "mlp": lambda **options: sk.ScoreMLP(D, H, **options),
    "gated": lambda **options: sk.ScoreMLP(D, H, gated=True, **options),
    "attention": lambda **options: sk.ScoreAttention(D, 2, causal=True, rotary=10.0, **options),
    "transformer": lambda **options: sk.ScoreTransformer(D, 2, H, gated=True, causal=True, **options),
}
ROW_WISE = [kind for kind in KINDS if kind not in SEQUENCES]
OPTIONS = {
    "plain": {},
    "layers, layernorm": {"layers": 2, "norm": "layernorm"},
    "learned dt, rmsnorm": {"learn_dt": "per_iteration", "norm": "rmsnorm", "dt": 0.3},
    "tensors": {"dt": torch.tensor(0.3), "x0_scale": nn.Parameter(torch.tensor(0.2)), "state_scale": torch.full((4,), 0.9)},
    "no bias": {"bias": False, "norm": "layernorm", "solver": "heun"},
}
every_module = pytest.mark.parametrize(("kind", "options"), [(k, o) for k in KINDS for o in OPTIONS])


def build(kind, options, **extra):
    torch.manual_seed(0)
    return KINDS[kind](**copy.deepcopy(OPTIONS.get(options, {})), **extra)


@every_module
def test_state_dict_round_trip(kind, options):
    torch.manual_seed(1)
    module, other = build(kind, options), build(kind, options)
    with torch.no_grad():
        for x in module.state_dict().values():
            x.add_(0.1)
    assert not torch.equal(module(draw(5, D)), other(draw(5, D)))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(draw(5, D)), other(draw(5, D)))
    x0 = draw(5, D, seed=1)
    assert torch.equal(module(draw(5, D), x0=x0), other(draw(5, D), x0=x0))


@every_module
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(kind, options, copier):
    module = build(kind, options)
    other = copier(module)
    expected = module(draw(5, D)).detach()
    assert torch.equal(other(draw(5, D)), expected)
    assert repr(other) == repr(module)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in module.named_parameters()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert torch.equal(module(draw(5, D)), expected)
    other.reset_parameters()


def test_state_dict_names():
    assert list(sk.ScoreLinear(D).state_dict()) == ["weight", "bias"]
    assert list(sk.ScoreLinear(D, bias=False, norm="layernorm").state_dict()) == ["weight", "norm_weight"]
    names = ["w1", "b1", "w2", "b2", "w_gate", "b_gate", "norm_weight", "norm_bias", "dt_logit"]
    assert list(sk.ScoreMLP(D, H, gated=True, norm="layernorm", learn_dt="scalar").state_dict()) == names
    names = ["w_qkv", "b_qkv", "w_out", "b_out"]
    assert list(sk.ScoreAttention(D, 2).state_dict()) == names
    assert list(sk.ScoreTransformer(D, 2, H).state_dict()) == [*names, "w1", "b1", "w2", "b2"]
    names = ["w_qkv", "w_out", "attention_norm_weight", "w1", "w2", "w_gate", "mlp_norm_weight"]
    assert list(sk.ScoreTransformer(D, 2, H, gated=True, norm="layernorm", bias=False).state_dict()) == names
    assert list(sk.ScoreMLP(D, H, gated=True, norm="rmsnorm", bias=False).state_dict()) == ["w1", "w2", "w_gate", "norm_weight"]
    assert list(sk.ScoreLinear(D, dt=torch.tensor(0.3), norm="none").state_dict()) == ["weight", "bias", "fixed_dt"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_module
def test_dtype(kind, options, dtype):
    module = build(kind, options).to(dtype)
    out = module(draw(5, D, dtype=dtype), x0=draw(5, D, dtype=dtype, seed=1))
    assert out.dtype == dtype
    out.square().sum().backward()
    # A learned dt stays float32 beside 16-bit weights.
    for name, p in module.named_parameters():
        assert p.grad.dtype == (torch.promote_types(dtype, torch.float32) if name == "dt_logit" else dtype), name
        assert p.grad.isfinite().all(), name
    created = build(kind, options, dtype=dtype)
    assert {n: p.dtype for n, p in created.named_parameters() if n not in ("dt_logit", "x0_scale")} == {
        n: p.dtype for n, p in module.named_parameters() if n not in ("dt_logit", "x0_scale")
    }


@pytest.mark.parametrize("learn_dt", ["scalar", "per_iteration"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_learned_dt_stays_inside_0_and_1(learn_dt, dtype):
    module = sk.ScoreLinear(D, learn_dt=learn_dt, iterations=3).to(dtype)
    for logit in (-1e4, -30.0, 0.0, 30.0, 1e4):
        with torch.no_grad():
            module.dt_logit.fill_(logit)
        assert module.dt.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((module.dt > 0) & (module.dt < 1)).all()
        assert module(draw(2, D, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("start", [None, 0.05, 0.3, 0.999])
@pytest.mark.parametrize("learn_dt", ["scalar", "per_iteration"])
def test_learned_dt_starts_at_dt(learn_dt, start):
    shape = () if learn_dt == "scalar" else (3,)
    module = sk.ScoreLinear(D, learn_dt=learn_dt, iterations=3, dt=start)
    torch.testing.assert_close(module.dt, torch.full(shape, 0.5 if start is None else start), rtol=1e-6, atol=1e-6)
    assert isinstance(module.dt_logit, nn.Parameter)
    assert module.dt_logit.dtype == torch.float32
    with torch.no_grad():
        module.dt_logit.add_(1.0)
    module.reset_parameters()
    torch.testing.assert_close(module.dt, torch.full(shape, 0.5 if start is None else start), rtol=1e-6, atol=1e-6)


def test_learned_dt_starts_at_a_dt_for_each_iteration():
    start = torch.tensor([0.1, 0.5, 0.8])
    module = sk.ScoreMLP(D, H, learn_dt="per_iteration", iterations=3, dt=start)
    torch.testing.assert_close(module.dt, start)


@pytest.mark.parametrize("learn_dt", ["scalar", "per_iteration"])
def test_learned_dt_learns(learn_dt):
    """SGD finds the dt that made the targets, everything else being known."""
    torch.manual_seed(0)
    module = sk.ScoreLinear(D, learn_dt=learn_dt, iterations=3, activation="tanh", dt=0.5)
    x = draw(64, D, scale=1.0)
    wanted = torch.tensor(0.8) if learn_dt == "scalar" else torch.tensor([0.8, 0.3, 0.6])
    with torch.no_grad():
        module.weight.mul_(3)
        target = SF.score_linear(x, module.weight, module.bias, iterations=3, activation="tanh", dt=wanted)
    optimizer = torch.optim.SGD([module.dt_logit], lr=0.3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (module(x) - target).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert learn_dt == "per_iteration" or abs(module.dt - wanted) < 0.02


@every_module
def test_meta_device_then_empty_then_reset(kind, options):
    """The way in which large models are made: no memory until the device is known."""
    module = build(kind, options).to("meta")
    assert repr(module) == repr(build(kind, options))
    out = module(torch.empty(5, D, device="meta"))
    assert (out.device.type, out.shape) == ("meta", (5, D))
    if options == "tensors":  # tensors given as arguments are state, which to_empty leaves undefined
        return
    module.to_empty(device="cpu")
    with torch.no_grad():
        for x in module.parameters():
            x.fill_(float("nan"))
    torch.manual_seed(0)
    module.reset_parameters()
    expected = build(kind, options)
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in module.state_dict().items())
    assert torch.equal(module(draw(5, D)), expected(draw(5, D)))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != "tensors"])
def test_created_on_the_meta_device(options):
    with torch.device("meta"):
        implicit = build("mlp", options)
    for module in (implicit, build("mlp", options, device="meta")):
        assert {x.device.type for x in module.state_dict().values()} == {"meta"}
        torch.manual_seed(0)
        module.to_empty(device="cpu").reset_parameters()
        assert torch.equal(module(draw(5, D)), build("mlp", options)(draw(5, D)))


def test_parameters_given_as_arguments_are_kept_where_they_are():
    dt = nn.Parameter(torch.tensor(0.3))
    assert sk.ScoreLinear(D, dt=dt).fixed_dt is dt
    module = sk.ScoreLinear(D, dt=dt, device="meta")
    assert isinstance(module.fixed_dt, nn.Parameter)
    assert module.fixed_dt.device.type == "meta"
    assert "fixed_dt" in dict(sk.ScoreLinear(D, dt=torch.tensor(0.3)).named_buffers())


def test_extra_repr():
    assert repr(sk.ScoreLinear(D)) == "ScoreLinear(8, iterations=4, activation='relu')"
    assert (
        repr(sk.ScoreMLP(D, H, gated=True, bias=False, iterations=6, layers=2, dt=0.25, norm="rmsnorm", solver="heun"))
        == "ScoreMLP(8, 12, iterations=6, layers=2, dt=0.25, bias=False, gated=True, "
        "activation='gelu', norm='rmsnorm', solver='heun')"
    )
    assert (
        repr(sk.ScoreAttention(D, 2, causal=True, rotary=10.0, scale=0.5, norm="rmsnorm"))
        == "ScoreAttention(8, iterations=4, num_heads=2, causal=True, scale=0.5, rotary=10.0, norm='rmsnorm')"
    )
    assert "learn_dt='scalar'" in repr(sk.ScoreLinear(D, learn_dt="scalar"))
    assert "dt=tensor(4,)" in repr(sk.ScoreLinear(D, dt=torch.full((4,), 0.5)))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("kind", "options"), [(k, o) for k in ROW_WISE for o in OPTIONS])
def test_leading_dimensions(kind, options, shape):
    module = build(kind, options)
    h = draw(*shape, D)
    out = module(h)
    assert out.shape == h.shape
    torch.testing.assert_close(out.reshape(-1, D), module(h.reshape(-1, D)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ROW_WISE)
def test_module_is_the_functional_op(kind):
    module = build(kind, "layers, layernorm", update="residual", dt=0.4, order="cyclic", negative_slope=0.3)
    x, x0 = draw(5, D), draw(5, D, seed=1)
    function = SF.score_linear if kind == "linear" else SF.score_mlp
    given = dict(module.named_parameters())
    options = {"norm": "layernorm", "update": "residual", "dt": 0.4, "order": "cyclic", "activation": module.activation}
    assert torch.equal(module(x, x0=x0), function(x, **given, iterations=4, x0=x0, **options))
    assert torch.equal(module(x, iterations=6), function(x, **given, iterations=6, **options))


def test_defaults_are_the_functional_ones():
    linear, mlp = sk.ScoreLinear(D), sk.ScoreMLP(D, H)
    x = draw(5, D)
    assert torch.equal(linear(x), SF.score_linear(x, linear.weight, linear.bias, iterations=4))
    assert torch.equal(mlp(x), SF.score_mlp(x, mlp.w1, mlp.b1, mlp.w2, mlp.b2, iterations=4))


def test_injection_uses_its_scales_only_with_x0():
    module = build("linear", "tensors")
    x, x0 = draw(5, D), draw(5, D, seed=1)
    options = {"iterations": 4, "dt": module.fixed_dt, "state_scale": module.state_scale}
    assert torch.equal(module(x), SF.score_linear(x, module.weight, module.bias, **options))
    injected = SF.score_linear(x, module.weight, module.bias, x0=x0, x0_scale=module.x0_scale, **options)
    assert torch.equal(module(x, x0=x0), injected)
    module(x, x0=x0).sum().backward()
    assert module.x0_scale.grad.abs() > 0


def test_depth_at_call():
    """Another depth works where the parameters say what to do there, and is refused where they do not."""
    shared = sk.ScoreLinear(D, learn_dt="scalar")
    assert torch.equal(shared(draw(5, D), iterations=0), draw(5, D))
    assert not torch.equal(shared(draw(5, D), iterations=9), shared(draw(5, D)))
    sets = sk.ScoreLinear(D, layers=3, iterations=6)
    sets(draw(5, D), iterations=3)
    with pytest.raises(ValueError, match=r"expected at most one set for each of the 2 iterations, got L = 3"):
        sets(draw(5, D), iterations=2)
    each = sk.ScoreLinear(D, learn_dt="per_iteration", iterations=3)
    with pytest.raises(ValueError, match=r"dt: expected shape \(\) or \(T,\) = \(5,\), got \(3,\)"):
        each(draw(5, D), iterations=5)


@pytest.mark.parametrize("layers", [1, 3])
def test_initial_values_are_those_of_linear_layers(layers):
    """Uniform within 1 / sqrt(fan_in), weight and bias, as `nn.Linear`."""
    torch.manual_seed(0)
    features, hidden = 64, 256
    module = sk.ScoreMLP(features, hidden, gated=True, layers=layers, norm="layernorm")
    assert {n: tuple(p.shape[-2:]) for n, p in module.named_parameters() if n.startswith("w")} == {
        "w1": (hidden, features), "w2": (features, hidden), "w_gate": (hidden, features),
    }  # fmt: skip
    for name, fan_in in {
        "w1": features,
        "w_gate": features,
        "b1": features,
        "b_gate": features,
        "w2": hidden,
        "b2": hidden,
    }.items():
        x = getattr(module, name)
        linear = nn.Linear(fan_in, x.numel() // fan_in if name.startswith("w") else x.numel())
        like = linear.weight if name.startswith("w") else linear.bias
        bound = 1 / math.sqrt(fan_in)
        assert 0.9 * bound < x.abs().max() <= bound, name
        assert abs(x.std() / like.std() - 1) < 0.2, name
        assert abs(x.mean()) < 0.25 * bound, name
    assert torch.equal(module.norm_weight, torch.ones_like(module.norm_weight))
    assert torch.equal(module.norm_bias, torch.zeros_like(module.norm_bias))
    if layers > 1:
        assert not torch.equal(module.w1[0], module.w1[1])


def test_replace_is_a_stack_of_linear_layers():
    """The same numbers as nn.Sequential of Linear and ReLU, and the same gradients."""
    torch.manual_seed(0)
    depth = 5
    stack = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(D, D), nn.ReLU())))
    module = sk.ScoreLinear(D, iterations=depth, layers=depth, update="replace", activation="relu")
    linears = [layer for layer in stack if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for i, layer in enumerate(linears):
            module.weight[i].copy_(layer.weight)
            module.bias[i].copy_(layer.bias)
    x = draw(50, D, scale=1.0)
    torch.testing.assert_close(module(x), stack(x), rtol=1e-6, atol=1e-6)
    module(x).square().sum().backward()
    stack(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, torch.stack([layer.weight.grad for layer in linears]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.bias.grad, torch.stack([layer.bias.grad for layer in linears]), rtol=1e-5, atol=1e-6)


def test_modules_train():
    """A few steps of Adam on everything reduce a loss; every parameter takes part."""
    torch.manual_seed(0)
    module = sk.ScoreMLP(D, H, gated=True, norm="layernorm", learn_dt="per_iteration", layers=2)
    before = copy.deepcopy(module.state_dict())
    x, target = draw(32, D, scale=1.0), draw(32, D, seed=1, scale=1.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(x, before[name]) for name, x in module.state_dict().items())
