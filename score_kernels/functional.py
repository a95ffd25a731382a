"""The public ops: `score_linear`, `score_mlp`, `score_attention` and `score_transformer`.

All run `h <- (1 - dt) h + dt F(h)` T times with one shared F (SCORE, arXiv 2603.10544), or one of its variants:

    z = state_scale_t h + x0_scale_t x0            (z = h, or h + x0, when the scales are not given)
    h <- z + dt_t k(z)                             k(y) = F(y) - y ("contractive") or F(y) ("residual"), by the solver
    h <- F(z)                                      "replace": an ordinary stack of layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from . import arguments, attention_arguments, autograd, ops, reference, transformer_arguments
from .arguments import Own, Parameter
from .ops import operator
from .problem import LEADING, Problem, is_norm
from .transformer_arguments import AttentionParams, MLPParams

__all__ = ["AttentionParams", "MLPParams", "score_attention", "score_linear", "score_mlp", "score_transformer"]


class Common(TypedDict, total=False):
    """The keyword arguments that every op takes; see `score_mlp`."""

    dt: float | Tensor | None
    norm: str | None
    norm_weight: Parameter | None
    norm_bias: Parameter | None
    eps: float
    update: str
    solver: str
    order: str
    x0: Tensor | None
    x0_scale: float | Tensor | None
    state_scale: float | Tensor | None
    grad_iterations: int | None
    return_trajectory: bool
    save_trajectory: bool
    out: Tensor | None
    backend: str


class Activated(Common, total=False):
    """The keyword arguments of an op with an activation."""

    activation: str
    negative_slope: float


def score_linear(
    h: Tensor, weight: Parameter, bias: Parameter | None = None, *, iterations: int, **common: Unpack[Activated]
) -> Tensor:
    """T iterations of F(y) = act(norm(y) W^T + b), D -> D.

    Args:
        h: state (..., D), float16, bfloat16, float32 or float64.
        weight: (D, D), in `nn.Linear` layout; bias: (D,).
        iterations, **common: as for `score_mlp`; `activation` defaults to "relu".

    Returns the state (..., D) after T iterations, or all T + 1 states (T+1, ..., D) with `return_trajectory`.
    Raises ValueError or TypeError before anything runs; the message names the argument, what was expected and what came.
    """
    arguments.check_keywords("score_linear", common, Activated.__annotations__)
    return _score("linear", h, {"weight": weight, "bias": bias}, iterations, {"activation": "relu", **common})


def score_mlp(
    h: Tensor,
    w1: Parameter,
    b1: Parameter | None,
    w2: Parameter,
    b2: Parameter | None,
    *,
    iterations: int,
    w_gate: Parameter | None = None,
    b_gate: Parameter | None = None,
    **common: Unpack[Activated],
) -> Tensor:
    """T iterations of F(y) = act(n W1^T + b1) W2^T + b2 with n = norm(y), D -> H -> D.

    With `w_gate`, F(y) = (act(n Wg^T + bg) * (n W1^T + b1)) W2^T + b2 (SwiGLU, GEGLU, ReGLU; arXiv 2002.05202).

    Every weight, bias and norm parameter is one tensor, or L of them (a leading L, or a list): iteration t uses set
    floor(t L / T) (`order="consecutive"`) or t mod L (`"cyclic"`). A parameter given once belongs to every set.

    Args:
        h: state (..., D), float16, bfloat16, float32 or float64.
        w1, w_gate: (H, D); b1, b_gate: (H,); w2: (D, H); b2: (D,). `nn.Linear` layout, h's dtype.
        iterations: T >= 0; 0 returns a copy of h.
        dt: a number, or a tensor of shape () or (T,), differentiable. None: 0.5 contractive, 1 residual.
        activation: one of `activations.ACTIVATIONS`, default "gelu" (exact). negative_slope: of leaky_relu.
        norm: None, "layernorm" or "rmsnorm", over D, with eps; norm_weight, norm_bias: (D,), h's dtype or float32.
        update: "contractive", "residual" or "replace". solver: one of `stages.SOLVERS`, default "euler".
        x0: injected state, shape and dtype of h. x0_scale, state_scale: numbers, or tensors () or (T,), differentiable.
            When F has an inner residual, F(y) = y + branch(y), the contractive update is h + dt branch(h): the decay cancels.
        grad_iterations: k: the state is detached before the last k iterations, so h gets zero gradient when k < T.
        return_trajectory: return all states, h_0 first, differentiable.
        save_trajectory: keep every state for backward instead of recomputing it: faster, T x M x D more memory.
        out: inference only: where to write the result; may be h itself.
        backend: "auto", or one of `available_backends()`.

    Returns the state (..., D) after T iterations, or all T + 1 states (T+1, ..., D) with `return_trajectory`.
    Raises ValueError or TypeError before anything runs; the message names the argument, what was expected and what came.
    """
    arguments.check_keywords("score_mlp", common, Activated.__annotations__)
    parameters = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_gate": w_gate, "b_gate": b_gate}
    return _score("mlp", h, parameters, iterations, {"activation": "gelu", **common})


def score_attention(
    h: Tensor,
    w_qkv: Parameter,
    b_qkv: Parameter | None,
    w_out: Parameter,
    b_out: Parameter | None,
    *,
    iterations: int,
    num_heads: int,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: float | tuple[Tensor, Tensor] | None = None,
    qk_norm: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **common: Unpack[Common],
) -> Tensor:
    """T iterations of F(y) = concat_heads(softmax(scale q k^T + mask) v) Wo^T + bo with q, k, v = norm(y) Wqkv^T + bqkv.

    Heads have d = D / num_heads features. A row with nothing to attend to gets 0 from attention, so that F = bo there.
    Masks, rotary tables and offsets have no gradient: one that requires grad is refused.

    Args:
        h: state (..., N, D), sequences of N rows; with `cu_seqlens` packed ones, (..., total, D). float16 to float64.
        w_qkv: (3D, D), the rows of q, of k, of v, as `in_proj_weight` of `nn.MultiheadAttention`; b_qkv: (3D,);
            w_out: (D, D); b_out: (D,). `nn.Linear` layout, h's dtype; one tensor or L of them, as for `score_mlp`.
        iterations: T >= 0; 0 returns a copy of h.
        causal: row i attends to rows 0 to i.
        key_padding_mask: bool (..., N), broadcastable to h's leading dimensions: True marks padding, which no row attends
            to, as in `nn.MultiheadAttention`. The rows themselves are updated like all others.
        attn_mask: broadcastable to (..., num_heads, N, N): bool, True takes part, or added to the scores, in h's dtype or
            float32, as in `scaled_dot_product_attention` (the opposite of `nn.MultiheadAttention`'s bool). All masks apply.
        scale: of the scores, a number. None: 1 / sqrt(d).
        rotary: (cos, sin), tables (P, R) with P >= N positions and R <= d / 2 angles, h's dtype or float32: features i and
            R + i of every head of q and k are turned by angle i of their row's position. Or a number, the base: angle i of
            position p is p base^(-2i / d), for all d features.
        qk_norm: q and k of every head are divided by their root mean square (with eps), before `rotary`.
        cu_seqlens: int32 or int64 (S + 1,), offsets 0 to total that cut the rows into S sequences; some may be empty. The
            values are read on the host. Positions count from a sequence's start. Not together with the masks.
        max_seqlen: at least the longest of them; None: found from `cu_seqlens`.
        **common: as for `score_mlp`.

    Returns the state (..., D) after T iterations, or all T + 1 states (T+1, ..., D) with `return_trajectory`.
    Raises ValueError or TypeError before anything runs; the message names the argument, what was expected and what came.
    Under torch.compile the values of `cu_seqlens` are checked when the graph runs.
    """
    arguments.check_keywords("score_attention", common, Common.__annotations__)
    parameters = {"w_qkv": w_qkv, "b_qkv": b_qkv, "w_out": w_out, "b_out": b_out}
    own = partial(
        attention_arguments.check,
        num_heads=num_heads,
        causal=causal,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        scale=scale,
        rotary=rotary,
        qk_norm=qk_norm,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    return _score("attention", h, parameters, iterations, common, own)


def score_transformer(
    h: Tensor,
    attention: AttentionParams,
    mlp: MLPParams,
    *,
    iterations: int,
    num_heads: int,
    norm_placement: str = "pre",
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: float | tuple[Tensor, Tensor] | None = None,
    qk_norm: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **common: Unpack[Activated],
) -> Tensor:
    """T iterations of a transformer's layer, F(y) = a + mlp(a) with a = y + attention(y), each half as its own op has it.

    One update goes around the whole layer; `update="replace"` is an ordinary stack of layers. With norms before the halves
    F(y) = y + branch(y), so the contractive update is h + dt branch(h): the decay cancels.

    Args:
        h: state (..., N, D), or packed (..., total, D), as for `score_attention`.
        attention: `AttentionParams(w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias)`, as for `score_attention`.
        mlp: `MLPParams(w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias)`, as for `score_mlp`. Sets: the same L in both.
        norm_placement: of the halves' norms, both of kind `norm`. "pre": F(y) = a + mlp(norm(a)), a = y + attention(norm(y));
            "post": F(y) = norm(a + mlp(a)), a = norm(y + attention(y)), as TRM and `nn.TransformerEncoderLayer` have it.
        num_heads, causal, masks, scale, rotary, qk_norm, cu_seqlens, max_seqlen: as for `score_attention`.
        iterations, **common: as for `score_mlp`, less norm_weight and norm_bias, which are in `attention` and `mlp`;
            `activation` is the mlp's, "gelu" by default.

    Returns the state (..., D) after T iterations, or all T + 1 states (T+1, ..., D) with `return_trajectory`.
    Raises ValueError or TypeError before anything runs; the message names the argument, what was expected and what came: of the
    norms' parameters as attention_norm_weight, mlp_norm_weight.
    """
    arguments.check_keywords("score_transformer", common, [name for name in Activated.__annotations__ if not is_norm(name)])
    own = partial(
        transformer_arguments.check,
        norm_placement=norm_placement,
        num_heads=num_heads,
        causal=causal,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        scale=scale,
        rotary=rotary,
        qk_norm=qk_norm,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    parameters = transformer_arguments.flat(attention, mlp)
    return _score("transformer", h, parameters, iterations, {"activation": "gelu", **common}, own)


def _score(
    op: str,
    h: Tensor,
    parameters: Mapping[str, Parameter | None],
    iterations: int,
    common: Common | Activated,
    own: Callable[[Tensor], Own] | None = None,
) -> Tensor:
    call = arguments.check(op, h, parameters, iterations, **common, own=own)
    if common.get("backend") == "reference":
        return _reference(op, call)
    tensors, options = call.tensors, call.options
    if call.out is not None:
        operator(f"{op}_")(call.out, *tensors[:LEADING], list(tensors[LEADING:]), *options.of(op))
        return call.out
    last, trajectory = autograd.score(op, options, tensors)
    return trajectory.to(last.dtype) if call.return_trajectory else last


def _reference(op: str, call: arguments.Call) -> Tensor:
    problem = Problem.build(op, call.tensors, call.options)
    if not torch.compiler.is_compiling():
        ops.note(ops.plan_of(problem))
    last, states = reference.score(problem)
    if call.out is not None:
        return call.out.copy_(last)
    return torch.stack(states).to(last.dtype) if call.return_trajectory else last
