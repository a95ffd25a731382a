"""How accuracy is measured: against float64, beside the same loop in plain PyTorch, over random problems.

The error of a tensor is norm(x - reference) / norm(reference); the reference is the textbook oracle in float64 on the inputs as
they are after rounding.
"""

from __future__ import annotations

import oracle
import torch
import torch.nn.functional as F
from cases import F64, cotangent

# name: op, choices and gain of `cases.build`
BLOCKS = {
    "linear": ("linear", {"activation": "tanh"}, 1.0),
    "linear rmsnorm": ("linear", {"activation": "silu", "norm": "rmsnorm gain"}, 1.0),
    "mlp": ("mlp", {"activation": "gelu"}, 1.0),
    "mlp layernorm": ("mlp", {"activation": "gelu_tanh", "norm": "layernorm gain bias"}, 1.0),
    "mlp relu": ("mlp", {"activation": "relu", "norm": "rmsnorm gain"}, 1.0),
    "attention": ("attention", {"norm": "rmsnorm gain", "causal": True, "qk_norm": True, "layout": "vector"}, 1.0),
    "transformer": (
        "transformer",
        {"activation": "silu", "norm": "rmsnorm gain", "gate": "gate", "causal": True, "layout": "vector"},
        0.7,
    ),
    "transformer post": (
        "transformer",
        {"norm": "layernorm gain bias", "placement": "post", "layout": "vector"},
        0.7,
    ),
    "gated rmsnorm": ("mlp", {"activation": "silu", "norm": "rmsnorm gain", "gate": "gate bias"}, 0.7),
}

# Ours over eager's error of the result, where 16-bit layers replace the state: both round it as often.
REPLACE_BOUND = 1.02


def eager(
    op, h, *, iterations, dt, update, norm, eps, activation="identity", negative_slope=0, num_heads=1, causal=False,
    qk_norm=False, norm_placement="pre", **p,
):  # fmt: skip
    """What one writes without this package: every operation in the dtype of h."""

    def act(a):
        return oracle.ACTIVATIONS[activation](a, negative_slope)

    def normed(y, of=""):
        gain, bias = p.get(f"{of}norm_weight"), p.get(f"{of}norm_bias")
        if norm is None:
            return y
        return F.rms_norm(y, y.shape[-1:], gain, eps) if norm == "rmsnorm" else F.layer_norm(y, y.shape[-1:], gain, bias, eps)

    def attend(n):
        qkv = F.linear(n, p["w_qkv"], p["b_qkv"])
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(-3, -2) for x in qkv.chunk(3, -1))
        if qk_norm:
            q, k = (F.rms_norm(x, (x.shape[-1],), eps=eps) for x in (q, k))
        u = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
        return F.linear(u.transpose(-3, -2).flatten(-2), p["w_out"], p["b_out"])

    def feed_forward(n):
        u, gate = F.linear(n, p["w1"], p["b1"]), p.get("w_gate")
        return F.linear(act(u) if gate is None else act(F.linear(n, gate, p.get("b_gate"))) * u, p["w2"], p["b2"])

    def transformer(y):
        if norm_placement == "pre":
            y = y + attend(normed(y, "attention_"))
            return y + feed_forward(normed(y, "mlp_"))
        y = normed(y + attend(y), "attention_")
        return normed(y + feed_forward(y), "mlp_")

    block = {
        "linear": lambda y: act(F.linear(normed(y), p["weight"], p["bias"])),
        "mlp": lambda y: feed_forward(normed(y)),
        "attention": lambda y: attend(normed(y)),
        "transformer": transformer,
    }[op]
    for _ in range(iterations):
        f = block(h)
        h = f if update == "replace" else torch.lerp(h, f, dt) if update == "contractive" else torch.add(h, f, alpha=dt)
    return h


EAGER_TAKES = (
    "iterations", "dt", "update", "activation", "negative_slope", "norm", "eps", "num_heads", "causal", "qk_norm",
    "norm_placement",
)  # fmt: skip


def eager_of(case):
    options = {name: case.arguments[name] for name in EAGER_TAKES if name in case.arguments}
    return eager(case.op, **case.leaves, **options)


def reference_of(problems, gradients=True):
    """Results and gradients of all problems in float64, as one batch."""
    first = problems[0]
    leaves = {name: torch.stack([c.leaves[name].detach().to(F64) for c in problems]).requires_grad_() for name in first.leaves}
    options = {name: value for name, value in first.arguments.items() if name not in leaves}
    out = torch.vmap(lambda p: oracle.score(first.op, **p, **options))(leaves)
    if not gradients:
        return {"output": out.detach()}
    given = cotangent(first.leaves["h"]).to(F64).expand_as(out)
    found = torch.autograd.grad(out, list(leaves.values()), given)
    return {"output": out.detach(), **dict(zip(leaves, found, strict=True))}


def found_by(run, case, gradients=True):
    """The same for one problem, by `run(case)` and autograd."""
    out = run(case)
    if not gradients:
        return {"output": out.detach()}
    found = torch.autograd.grad(out, list(case.leaves.values()), cotangent(out))
    return {"output": out.detach(), **dict(zip(case.leaves, found, strict=True))}


def rms_errors(found, expected):
    """{name: RMS over the problems of their relative errors}"""
    errors = {}
    for name, b in expected.items():
        a = torch.stack([f[name] for f in found]).to(F64)
        per_problem = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
        errors[name] = per_problem.square().mean().sqrt().item()
    return errors
