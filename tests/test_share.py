"""`share`: a stack becomes a SCORE model with one block for each run of equal blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from stacks import Residual, close, layers, mlp
from torch import nn

import score_kernels as sk
from score_kernels import functional as SF


def stack(dtype=torch.float64):
    """A head, six layers, four MLPs with a residual each, a tail."""
    torch.manual_seed(0)
    blocks = [*layers(6, 16, nn.SiLU, nn.RMSNorm), *(Residual(mlp(16, 24)) for _ in range(4))]
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), *blocks, nn.Linear(16, 3)).to(dtype)


X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_one_block_for_each_run():
    model = stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = sk.share(model)
    assert [type(module) for module in twin] == [nn.Linear, nn.ReLU, sk.ScoreLinear, sk.ScoreMLP, nn.Linear]
    assert (twin[2].iterations, twin[3].iterations) == (6, 4)
    assert twin(X).shape == (9, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_the_update_is_contractive():
    """By hand: h <- (h + F(h)) / 2, and of residual blocks h <- h + block(h) / 2, with the first block's parameters."""
    model = stack()
    h = model[:2](X)
    for _ in range(6):
        h = (h + model[2:5](h)) / 2
    for _ in range(4):
        h = h + model[20].block(h) / 2
    close(sk.share(model)(X), model[-1](h), 1e-12)


@pytest.mark.parametrize(
    "block",
    [lambda: layers(1, 16, nn.Tanh), lambda: layers(1, 16, lambda: nn.LeakyReLU(0.3), nn.LayerNorm, bias=False),
     lambda: layers(1, 16, nn.Identity, lambda d: nn.LayerNorm(d, eps=0.1, elementwise_affine=False)),
     lambda: [mlp(16, 24, nn.ReLU, lambda d: nn.LayerNorm(d, bias=False))], lambda: [mlp(16, 24, nn.GELU, nn.RMSNorm)],
     lambda: [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16, bias=False))],
     lambda: [Residual(mlp(16, 24))]],
)  # fmt: skip
def test_with_dt_1_the_twin_of_equal_layers_is_the_stack(block):
    torch.manual_seed(0)
    modules = block()
    model = nn.Sequential(*(copy.deepcopy(module) for _ in range(4) for module in modules)).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    for init in ("first", "mean"):
        twin = sk.share(model, dt=1.0, init=init)
        close(twin(x), model(x), 1e-12)
        # What the blocks do not have, the twin does not have either.
        assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters()) / 4


def test_first_and_mean():
    model = stack()
    first, mean = sk.share(model), sk.share(model, init="mean")
    assert torch.equal(first[2].weight, model[3].weight)
    assert torch.equal(first[3].b1, model[20].block[1].bias)
    linears = [module for module in model[2:20] if isinstance(module, nn.Linear)]
    close(mean[2].weight, sum(linear.weight for linear in linears) / 6, 1e-12)
    close(mean[3].norm_bias + 1, sum(module.block[0].bias for module in model[20:24]) / 4 + 1, 1e-12)
    close(mean[3].w2, sum(module.block[3].weight for module in model[20:24]) / 4, 1e-12)
    assert torch.equal(mean[0].weight, model[0].weight)


@pytest.mark.parametrize("dt", [0.2, torch.linspace(0.1, 0.4, 5)])
def test_dt(dt):
    torch.manual_seed(0)
    model = nn.Sequential(*layers(5, 16))
    x = torch.randn(9, 16)
    expected = SF.score_linear(x, model[0].weight, model[0].bias, iterations=5, dt=dt)
    assert torch.equal(sk.share(model, dt=dt)(x), expected)
    assert torch.equal(sk.share(model)(x), SF.score_linear(x, model[0].weight, model[0].bias, iterations=5, dt=0.5))


def test_report():
    twin = sk.share(nn.Sequential(nn.Linear(5, 16), *layers(6, 16), nn.Linear(16, 1)))
    ends = 5 * 16 + 16 + 16 + 1
    assert twin.report.parameters_before == ends + 6 * (16 * 16 + 16)
    assert twin.report.parameters_after == ends + 16 * 16 + 16
    assert twin.report.runs == ("6 x linear 16 -> 16, relu",)
    assert str(twin.report) == "6 x linear 16 -> 16, relu: 1745 parameters before, 385 after"
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert other.report == twin.report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_mode_and_fused_stacks(dtype):
    """A converted stack has the same twin; dtype and mode are the stack's."""
    model = stack(dtype).eval()
    twin = sk.share(model)
    sk.convert(model)
    again = sk.share(model)
    assert repr(again) == repr(twin)
    assert again.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(again(X.to(dtype)), twin(X.to(dtype)))
    assert {p.dtype for p in twin.parameters()} == {dtype}
    assert not any(module.training for module in twin.modules())
    model.train()[-1].eval()
    assert [module.training for module in sk.share(model)] == [True] * 4 + [False]


def test_nested_stacks_and_ties():
    """Nested Sequentials are looked through; what is tied outside the runs is tied in the twin."""
    torch.manual_seed(0)
    end = nn.Linear(16, 16)
    model = nn.Sequential(end, nn.Softplus(), nn.Sequential(*layers(2, 16)), nn.Sequential(*layers(2, 16)), nn.Softplus(), end)
    twin = sk.share(model)
    assert twin[2].iterations == 4
    assert twin[0] is twin[4]
    assert twin[0] is not end


def test_the_twin_trains_alone():
    model = stack(torch.float32)
    x, before = X.float(), model(X.float())
    twin = sk.share(model)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (twin(x) - before.detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in twin.parameters())
    assert torch.equal(model(x), before)


def test_single_blocks_are_copied():
    """One MLP alone is fused by `convert`, but there is nothing to share in it."""
    torch.manual_seed(0)
    model = nn.Sequential(mlp(16, 24), nn.Tanh(), *layers(3, 16))
    assert [type(module) for module in sk.share(model)][-2:] == [nn.Tanh, sk.ScoreLinear]
    assert len(sk.share(model)) == 6


def test_errors():
    model = nn.Sequential(*layers(3, 16))
    with pytest.raises(
        TypeError, match=r"stack: expected an nn\.Sequential, got Linear; pass the part of the model that is one"
    ):
        sk.share(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="init: expected one of first, mean, got 'last'"):
        sk.share(model, init="last")
    with pytest.raises(ValueError, match=r"dt: expected shape \(\) or \(T,\) = \(3,\), got \(2,\)"):
        sk.share(model, dt=torch.ones(2))(torch.randn(2, 16))
    with pytest.raises(ValueError, match="stack: expected two or more equal blocks one after the other, got none"):
        sk.share(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float64"):
        sk.share(nn.Sequential(*layers(1, 16)).double() + model)
    dropping = nn.Sequential(*(m for _ in range(3) for m in (*layers(1, 16), nn.Dropout(0.1))))
    with pytest.raises(ValueError, match=r"got none; no part of one: 2: active dropout, p=0\.1, 5: active dropout"):
        sk.share(dropping)
