"""The oracle: the formulas as they read, under ordinary autograd, on any device and dtype.

16-bit inputs are computed in float32 throughout, float64 in float64. Nothing here is tuned; all else is compared with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .plan import HALVES
from .problem import SHAPES, Options, Problem, in_half, without_autocast

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


def attention(y: Tensor, p: Parameters, options: Options) -> Tensor:
    """F(y) = concat_heads(softmax(scale q k^T + mask) v) Wo^T + bo with q, k, v = norm(y) Wqkv^T + bqkv"""
    qkv = _product(normalise(y, p, options), p, "w_qkv", "b_qkv")
    if p["cu_seqlens"] is None:
        return _product(_attend(qkv, p["key_padding_mask"], p, options), p, "w_out", "b_out")
    starts, stops = p["cu_seqlens"][:-1], p["cu_seqlens"][1:]
    total = y.shape[-2]
    rows = starts[:, None] + torch.arange(min(options.max_seqlen or total, total), device=y.device)
    padding = rows >= stops[:, None]
    sequences = qkv[..., rows.clamp(max=total - 1), :].masked_fill(padding[..., None], 0)
    u = _attend(sequences, padding, p, options)
    row = torch.arange(total, device=y.device)
    sequence = torch.searchsorted(stops, row, right=True)
    return _product(u[..., sequence, row - starts[sequence], :], p, "w_out", "b_out")


def _attend(qkv: Tensor, padding: Tensor | None, p: Parameters, options: Options) -> Tensor:
    """(..., N, 3D) -> (..., N, D); a row with nothing to attend to gives 0."""
    if qkv.shape[-2] == 0:
        return qkv[..., : qkv.shape[-1] // 3]
    q, k, v = qkv.unflatten(-1, (3, options.num_heads, -1)).movedim(-2, -4).unbind(-2)
    if options.qk_norm:
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + options.eps) for x in (q, k))
    if p["rotary_cos"] is not None and p["rotary_sin"] is not None:
        cos, sin = (x[: q.shape[-2]].to(q.dtype) for x in (p["rotary_cos"], p["rotary_sin"]))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    mask = q.new_zeros(q.shape[-2], q.shape[-2])
    if p["attn_mask"] is not None:
        given = p["attn_mask"]
        mask = mask + given if given.is_floating_point() else mask.masked_fill(~given, -torch.inf)
    if padding is not None:
        mask = mask.masked_fill(padding[..., None, None, :], -torch.inf)
    if options.causal:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
    # Less its largest value, which changes no weight: a sentinel as -1e9 in all of a row would swallow the scores.
    largest = mask.amax(-1, keepdim=True)
    nothing = largest == -torch.inf
    scores = options.scale * q @ k.mT + (mask - largest).masked_fill(nothing, 0)
    weights = torch.softmax(scores, -1).masked_fill(nothing, 0)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864): the pair (i, R + i) of features by the angles of its position; cos, sin (N, R)."""
    width = cos.shape[-1]
    a, b, rest = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def transformer(y: Tensor, p: Parameters, options: Options) -> Tensor:
    """F(z) = y + mlp(y) with y = z + attention(z), or "post": F(z) = norm(y + mlp(y)) with y = norm(z + attention(z))"""
    for op in HALVES:
        half = p | {name: p[in_half(op, name)] for name in SHAPES[op]}
        if options.norm_placement == "pre":
            y = y + BLOCKS[op](y, half, options)
        else:
            y = normalise(y + BLOCKS[op](y, half, options._replace(norm="none")), half, options)
    return y


BLOCKS = {"linear": linear, "mlp": mlp, "attention": attention, "transformer": transformer}


def score(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """All iterations: the last state in the input's dtype, and all T + 1 states, h_0 first, as they were computed."""
    with without_autocast(problem.h.device.type):
        return _score(problem)


def _score(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    dtype, options = problem.compute_dtype, problem.options
    block = BLOCKS[problem.op]
    x0 = None if problem.x0 is None else problem.x0.to(dtype)
    sets: list[Parameters] = [
        {name: _to(problem.parameter(name, index), dtype) for name in problem.parameters} | problem.inputs
        for index in range(problem.sets)
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
