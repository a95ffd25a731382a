"""The public ops: `score_linear` and `score_mlp`.

Both run `h <- (1 - dt) h + dt F(h)` T times with one shared F (SCORE, arXiv 2603.10544), or one of its variants:

    z = state_scale_t h + x0_scale_t x0            (z = h, or h + x0, when the scales are not given)
    h <- z + dt_t k(z)                             k(y) = F(y) - y ("contractive") or F(y) ("residual"), by the solver
    h <- F(z)                                      "replace": an ordinary stack of layers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from . import arguments, autograd, ops, reference
from .arguments import Parameter
from .ops import operator
from .problem import LEADING, Problem

__all__ = ["score_linear", "score_mlp"]


class Common(TypedDict, total=False):
    """The keyword arguments that every op takes; see `score_mlp`."""

    dt: float | Tensor | None
    activation: str
    negative_slope: float
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


_KEYWORDS = frozenset(Common.__annotations__)


def score_linear(
    h: Tensor, weight: Parameter, bias: Parameter | None = None, *, iterations: int, **common: Unpack[Common]
) -> Tensor:
    """T iterations of F(y) = act(norm(y) W^T + b), D -> D.

    Args:
        h: state (..., D), float16, bfloat16, float32 or float64.
        weight: (D, D), in `nn.Linear` layout; bias: (D,).
        iterations, **common: as for `score_mlp`; `activation` defaults to "relu".

    Returns the state (..., D) after T iterations, or all T + 1 states (T+1, ..., D) with `return_trajectory`.
    Raises ValueError or TypeError before anything runs; the message names the argument, what was expected and what came.
    """
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
    **common: Unpack[Common],
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
    parameters = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_gate": w_gate, "b_gate": b_gate}
    return _score("mlp", h, parameters, iterations, {"activation": "gelu", **common})


def _score(op: str, h: Tensor, parameters: Mapping[str, Parameter | None], iterations: int, common: Common) -> Tensor:
    arguments.check_keywords(f"score_{op}", common, _KEYWORDS)
    call = arguments.check(op, h, parameters, iterations, **common)
    if common.get("backend") == "reference":
        return _reference(op, call)
    tensors, options = call.tensors, call.options
    if call.out is not None:
        operator(f"{op}_")(call.out, *tensors[:LEADING], list(tensors[LEADING:]), *options)
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
