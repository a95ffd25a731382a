"""The oracle: the formulas as they read, under ordinary autograd, on any device and dtype.

16-bit inputs are computed in float32 throughout, float64 in float64. Nothing here is tuned; all else is compared with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .problem import Options, Problem, without_autocast

Parameters = dict[str, Tensor | None]


def normalise(y: Tensor, p: Parameters, options: Options) -> Tensor:
    """layernorm: arXiv 1607.06450; rmsnorm: arXiv 1910.07467; both over the last dimension."""
    if options.norm == "none":
        return y
    if options.norm == "layernorm":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + options.eps)
    y = y if p["norm_weight"] is None else y * p["norm_weight"]
    return y if p["norm_bias"] is None else y + p["norm_bias"]


def linear(y: Tensor, p: Parameters, options: Options) -> Tensor:
    """F(y) = act(norm(y) W^T + b)"""
    return ACTIVATIONS[options.activation].forward(
        _product(normalise(y, p, options), p, "weight", "bias"), options.negative_slope
    )


def mlp(y: Tensor, p: Parameters, options: Options) -> Tensor:
    """F(y) = act(n W1^T + b1) W2^T + b2, gated: (act(n Wg^T + bg) * (n W1^T + b1)) W2^T + b2, with n = norm(y)"""
    act = ACTIVATIONS[options.activation].forward
    n = normalise(y, p, options)
    up = _product(n, p, "w1", "b1")
    gated = p["w_gate"] is not None
    u = act(_product(n, p, "w_gate", "b_gate"), options.negative_slope) * up if gated else act(up, options.negative_slope)
    return _product(u, p, "w2", "b2")


BLOCKS = {"linear": linear, "mlp": mlp}


def score(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """All iterations: the last state in the input's dtype, and all T + 1 states, h_0 first, as they were computed."""
    with without_autocast(problem.h.device.type):
        return _score(problem)


def _score(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    dtype, options = problem.compute_dtype, problem.options
    block = BLOCKS[problem.op]
    x0 = None if problem.x0 is None else problem.x0.to(dtype)
    sets: list[Parameters] = [
        {name: _to(problem.parameter(name, index), dtype) for name in problem.parameters} for index in range(problem.sets)
    ]
    h = problem.h.to(dtype)
    states = [h if problem.first_grad == 0 else h.detach()]
    for t in range(problem.iterations):
        if t == problem.first_grad and t > 0:
            h = h.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and t >= problem.first_grad):
            z = h if problem.state_scale is None else problem.state_scale[t] * h
            if x0 is not None:
                z = z + (x0 if problem.x0_scale is None else problem.x0_scale[t] * x0)
            y, total = z, torch.zeros_like(z)
            for p, q, v, w, e in (stage.unbind() for stage in problem.coefficients[t].unbind()):
                total = total + e * y
                y = p * z + q * y + v * total + w * block(y, sets[problem.set_at(t)], options)
            h = y
        states.append(h)
    return states[-1].to(problem.h.dtype, copy=problem.iterations == 0), states


def _product(x: Tensor, p: Parameters, weight: str, bias: str) -> Tensor:
    matrix = p[weight]
    assert matrix is not None
    return F.linear(x, matrix, p[bias])


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
