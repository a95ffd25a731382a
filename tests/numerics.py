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
    "gated rmsnorm": ("mlp", {"activation": "silu", "norm": "rmsnorm gain", "gate": "gate bias"}, 0.7),
}

# Ours over eager's error of the result, where 16-bit layers replace the state: both round it as often.
REPLACE_BOUND = 1.02


def eager(op, h, *, iterations, dt, update, activation, negative_slope, norm, eps, **p):
    """What one writes without this package: every operation in the dtype of h."""
    act = oracle.ACTIVATIONS[activation]
    for _ in range(iterations):
        n = h
        if norm == "layernorm":
            n = F.layer_norm(h, (h.shape[-1],), p.get("norm_weight"), p.get("norm_bias"), eps)
        elif norm == "rmsnorm":
            n = F.rms_norm(h, (h.shape[-1],), p.get("norm_weight"), eps)
        if op == "linear":
            f = act(F.linear(n, p["weight"], p["bias"]), negative_slope)
        else:
            u = F.linear(n, p["w1"], p["b1"])
            gate = p.get("w_gate")
            u = act(u, negative_slope) if gate is None else act(F.linear(n, gate, p["b_gate"]), negative_slope) * u
            f = F.linear(u, p["w2"], p["b2"])
        h = f if update == "replace" else torch.lerp(h, f, dt) if update == "contractive" else torch.add(h, f, alpha=dt)
    return h


EAGER_TAKES = ("iterations", "dt", "update", "activation", "negative_slope", "norm", "eps")


def eager_of(case):
    options = {name: case.arguments[name] for name in EAGER_TAKES}
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
