"""The accuracy that is promised: against the same loop in plain PyTorch, in the input's dtype, over 20 random problems.

The error of a tensor is norm(x - reference) / norm(reference); the reference is the textbook oracle in float64 on the inputs as
they are after rounding. A 16-bit result is at least as accurate as the eager loop's, which rounds the state T times.
"""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import F64, build, call, cotangent

SEEDS = 20
ROWS = FEATURES = 64

# name: op, choices and gain of `cases.build`
BLOCKS = {
    "linear": ("linear", {"activation": "tanh"}, 1.0),
    "linear rmsnorm": ("linear", {"activation": "silu", "norm": "rmsnorm gain"}, 1.0),
    "mlp": ("mlp", {"activation": "gelu"}, 1.0),
    "mlp layernorm": ("mlp", {"activation": "gelu_tanh", "norm": "layernorm gain bias"}, 1.0),
    "mlp relu": ("mlp", {"activation": "relu", "norm": "rmsnorm gain"}, 1.0),
    "gated rmsnorm": ("mlp", {"activation": "silu", "norm": "rmsnorm gain", "gate": "gate bias"}, 0.7),
}

# A rounding error that takes a preactivation over the kink changes a gradient by a whole term: chance, not accuracy.
KINKED = ("mlp relu",)

COMBINATIONS = [
    *((block, update) for block in BLOCKS for update in ("contractive", "replace")),
    *((block, "residual") for block in ("linear rmsnorm", "mlp")),
]

# Ours over eager's: the bound on the result's error, then on every gradient's. fp32: rounding is as good as it gets for both.
BOUNDS = {
    torch.float16: (1.0, 1.5),
    torch.bfloat16: (1.0, 1.5),
    torch.float32: (4.0, 4.0),
}
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


@pytest.mark.parametrize("iterations", [1, 4, 16, 64])
@pytest.mark.parametrize(("block", "update"), COMBINATIONS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_error_of_result_and_gradients_against_the_eager_loop(dtype, block, update, iterations):
    op, choices, gain = BLOCKS[block]
    sizes = {"rows": ROWS, "features": FEATURES, "hidden": FEATURES, "iterations": iterations}
    # Well conditioned at every depth: an ordinary stack of one random layer is chaotic at gain 1, and a residual one grows.
    gain = 0.3 if update == "replace" else gain
    problems = [build(op, **sizes, dtype=dtype, seed=seed, update=update, gain=gain, **choices) for seed in range(SEEDS)]
    for case in problems:
        case.arguments["dt"] = {"replace": None, "contractive": 0.4, "residual": 1 / iterations}[update]
    gradients = block not in KINKED
    expected = reference_of(problems, gradients)
    ours = rms_errors([found_by(lambda c: call(c, "blas"), case, gradients) for case in problems], expected)
    theirs = rms_errors([found_by(eager_of, case, gradients) for case in problems], expected)
    result, gradient = BOUNDS[dtype]
    if update == "replace" and dtype != torch.float32:
        result = REPLACE_BOUND
    for name, error in ours.items():
        if theirs[name] > 0.25:
            # The gradient of h_0 vanishes with depth, below what 16 bits can hold; every other one has a digit to compare.
            assert name == "h", f"{name}: eager has no digit ({theirs[name]:.1e}), take other problems"
            assert iterations >= 16, f"{name}: eager has no digit ({theirs[name]:.1e}), take other problems"
            continue
        bound = (result if name == "output" else gradient) * theirs[name]
        assert error <= bound, f"{name}: RMS error {error:.3e}, eager {theirs[name]:.3e}, allowed {bound:.3e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_error_of_small_problems_in_eps(block, dtype):
    """Too small for statistics against eager: a rounding of the result and of each product's operands."""
    op, choices, _ = BLOCKS[block]
    sizes = {"rows": 3, "features": 5, "hidden": 7}
    for iterations in (1, 4):
        problems = [build(op, **sizes, iterations=iterations, dtype=dtype, seed=seed, **choices) for seed in range(SEEDS)]
        found = [found_by(lambda c: call(c, "blas"), case, gradients=False) for case in problems]
        error = rms_errors(found, reference_of(problems, gradients=False))["output"]
        assert error <= 4 * torch.finfo(dtype).eps
