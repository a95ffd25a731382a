"""Precision as PyTorch's users set it: autocast with and without a GradScaler, float32 products, deterministic algorithms."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import eager
from stacks import BODIES, every_body
from torch import nn

import score_kernels as sk
from score_kernels import ops
from score_kernels.machine import Machine

STEPS = 20


class Loop(nn.Module):
    """What one writes without this package, with the parameters of a ScoreMLP."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, h):
        s = self.score
        given = {name: getattr(s, name) for name in ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias")}
        options = {"iterations": s.iterations, "dt": s.dt, "update": "contractive", "activation": s.activation, "norm": s.norm}
        return eager("mlp", h, negative_slope=0.01, eps=1e-5, **options, **given)


def model(plain):
    torch.manual_seed(0)
    body = sk.ScoreMLP(16, 24, norm="layernorm", dt=0.3)
    return nn.Sequential(nn.Linear(5, 16), Loop(body) if plain else body, nn.Linear(16, 1))


def train(model, dtype, scaler):
    """The losses of some steps, and how many of them the scaler left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, left_out = [], 0
    for step in range(STEPS):
        x = torch.randn(64, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
            assert out.dtype == dtype
            loss = (out.float() - x[:, :1].sin()).square().mean()
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        left_out += scaler.get_scale() < before
        losses.append(loss.item())
    return losses, left_out


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 2.0**14), (torch.bfloat16, None)], ids=str)
def test_autocast_trains_as_the_plain_loop_does(dtype, scale):
    """float16 with a GradScaler and clipped gradients, bfloat16 without a scaler."""
    scaler = [torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None) for _ in range(2)]
    (found, _), (expected, _) = (train(model(plain), dtype, scaler[plain]) for plain in (False, True))
    assert found[-1] < 0.5 * found[0]
    assert found == pytest.approx(expected, rel=0.05)


def test_a_gradient_that_overflows_is_left_out():
    """inf comes out of a block where it goes in, and the scaler sees it: no other layer is there to show it."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses, left_out = train(sk.ScoreMLP(5, 24, norm="layernorm"), torch.float16, scaler)
    assert 0 < left_out < STEPS
    assert losses[-1] < losses[0]


# How one says how exact float32 products have to be, by two older interfaces and the newer one; whether that allows tf32.
SETTINGS = {
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
    "fp32_precision": (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
    "ieee": (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False),
}


@pytest.fixture
def settings_restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("settings_restored")
@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")
@pytest.mark.parametrize("order", list(itertools.permutations(SETTINGS, 2)), ids=" then ".join)
def test_settings_of_float32_products_in_any_order(order, monkeypatch):
    """The last one is what the planner hears of a GPU. (Of PyTorch's own getters two raise after some of these pairs.)"""
    monkeypatch.setattr(ops, "_gpu", lambda index, tf32, no_triton: Machine("cuda", 90, tf32=tf32))
    body = model(plain=False)
    for name in order:
        setting, tf32 = SETTINGS[name]
        setting()
        assert ops.machine_of(torch.device("cuda", 0)).tf32 == tf32
        body(torch.randn(7, 5)).sum().backward()


@every_body
def test_deterministic_algorithms(name):
    body, found = BODIES[name][0](), []
    try:
        torch.use_deterministic_algorithms(True)
        for _ in range(2):
            h = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            out = body(h)
            found.append([out, *torch.autograd.grad(out.square().sum(), [h, *body.parameters()])])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
