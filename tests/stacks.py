"""Models with stacks of blocks, as the tests of `convert` and `share` use them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import score_kernels as sk


def layers(depth, features, act=nn.ReLU, norm=None, bias=True):
    """[norm] Linear(D, D) act, `depth` times."""
    norms = [] if norm is None else [norm]
    return [m for _ in range(depth) for m in (*(n(features) for n in norms), nn.Linear(features, features, bias=bias), act())]


def mlp(features, hidden, act=nn.GELU, norm=nn.LayerNorm):
    return nn.Sequential(norm(features), nn.Linear(features, hidden), act(), nn.Linear(hidden, features))


class Residual(nn.Module):
    """x + block(x), as transformers' feed-forward halves and ResMLPs have it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class MixerBlock(nn.Module):
    """MLP-Mixer (arXiv 2105.01601): one MLP over the tokens, one over the channels."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.token_mixing = nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
        self.channel_mixing = mlp(channels, 24)

    def forward(self, x):
        x = x + self.token_mixing(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(x)


class Towers(nn.Module):
    """A recommender: a tower for the user and one for the item, with ends that are not square."""

    def __init__(self):
        super().__init__()
        self.user = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), *layers(3, 16), nn.Linear(16, 8))
        self.item = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), *layers(4, 16, nn.SiLU), nn.Linear(16, 8))

    def forward(self, x):
        return (self.user(x) * self.item(x.flip(-1))).sum(-1)


# name: (model, shape of its input, what is fused as op and number of blocks)
MODELS = {
    "12 layers": (lambda: nn.Sequential(*layers(12, 16)), (9, 16), [("linear", 12)]),
    "normed, without bias": (
        lambda: nn.Sequential(*layers(4, 16, nn.Tanh, nn.RMSNorm, bias=False)), (2, 9, 16), [("linear", 4)],
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(5, 16), *layers(2, 16)), *(nn.Sequential(*layers(1, 16)) for _ in range(2)),
        ),
        (9, 5), [("linear", 4)],
    ),
    "mixer": (
        lambda: nn.Sequential(nn.Linear(5, 16), *(MixerBlock(6, 16) for _ in range(2)), nn.Linear(16, 3)),
        (4, 6, 5), [("mlp", 1)] * 4,
    ),
    "towers": (Towers, (9, 12), [("linear", 3), ("linear", 4)]),
    "residual": (
        lambda: nn.Sequential(*(Residual(mlp(16, 24)) for _ in range(3)), *(Residual(nn.Linear(16, 16)) for _ in range(2))),
        (9, 16), [("mlp", 3), ("linear", 2)],
    ),
    "mlps": (lambda: nn.Sequential(*(mlp(16, 24, nn.LeakyReLU, nn.RMSNorm) for _ in range(3))), (9, 16), [("mlp", 3)]),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def score_mlp():
    return sk.ScoreMLP(16, 24, norm="layernorm", learn_dt="scalar", layers=2)


def converted():
    stack = nn.Sequential(*layers(3, 16, nn.SiLU, nn.RMSNorm))
    sk.convert(stack)
    return stack


# Bodies (..., 16) -> (..., 16) of a model that has ends of its own, and what is fused of them.
BODIES = {"ScoreMLP": (score_mlp, [("mlp", 4)]), "converted": (converted, [("linear", 3)])}
every_body = pytest.mark.parametrize("name", BODIES)


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model, shape, _ = MODELS[name]
    return model().to(dtype), torch.randn(shape, dtype=dtype)


def fused(model, x):
    """What one forward computes in fused calls: op and number of blocks of each."""
    return [(plan.op, plan.iterations) for plan in sk.explain(model, x)]


def gradients(model, x, call=None):
    model.zero_grad()
    (model if call is None else call)(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(a, b, tolerance):
    assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)
