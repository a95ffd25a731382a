"""The mathematics of a call in its textbook form, written apart from the package and slowly: what the package is compared with.

Nothing here comes from score_kernels. `score` takes the arguments of the public functions (lists or stacks of parameters, dt as
number or tensor ...) and works in the dtype of `h`, which the tests make float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: k_i = k(z + dt sum_j a_ij k_j), h = z + dt sum_i b_i k_i; `order` of its error."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(((),), (1,), 1),
    "midpoint": Tableau(((), (1 / 2,)), (0, 1), 2),
    "heun": Tableau(((), (1,)), (1 / 2, 1 / 2), 2),
    "rk4": Tableau(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
    "ralston": Tableau(((), (2 / 3,)), (1 / 4, 3 / 4), 2),
}

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda a, slope: a,
    "relu": lambda a, slope: F.relu(a),
    "relu2": lambda a, slope: F.relu(a) ** 2,
    "leaky_relu": lambda a, slope: F.leaky_relu(a, negative_slope=slope),
    "gelu": lambda a, slope: F.gelu(a),
    "gelu_tanh": lambda a, slope: F.gelu(a, approximate="tanh"),
    "silu": lambda a, slope: F.silu(a),
    "tanh": lambda a, slope: F.tanh(a),
    "sigmoid": lambda a, slope: F.sigmoid(a),
}

DEFAULT_DT = {"contractive": 0.5, "residual": 1.0}


def score(
    op: str,
    h: Tensor,
    *,
    iterations: int,
    dt: float | Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    norm: str | None = None,
    eps: float = 1e-5,
    update: str = "contractive",
    solver: str = "euler",
    order: str = "consecutive",
    x0: Tensor | None = None,
    x0_scale: float | Tensor | None = None,
    state_scale: float | Tensor | None = None,
    grad_iterations: int | None = None,
    return_trajectory: bool = False,
    save_trajectory: bool = False,
    norm_placement: str = "pre",
    **parameters: Tensor | list[Tensor] | None,
) -> Tensor:
    """h_T (..., D), or (h_0, ..., h_T) stacked. `save_trajectory` changes no number."""
    heads = {name: parameters.pop(name) for name in ATTENTION if name in parameters}
    sets = [len(value) for name, value in parameters.items() if has_sets(name, value)]
    count = max(sets, default=1)

    def block(y: Tensor, t: int) -> Tensor:
        index = (t * count) // iterations if order == "consecutive" else t % count
        p = {name: value[index] if has_sets(name, value) else only(value) for name, value in parameters.items()}

        def normed(y: Tensor, of: str = "") -> Tensor:
            return normalise(y, norm, p.get(f"{of}norm_weight"), p.get(f"{of}norm_bias"), eps)

        def attend(n: Tensor) -> Tensor:
            return attention(n, p, eps=eps, **heads)

        def feed_forward(n: Tensor) -> Tensor:
            return mlp(n, p, lambda a: ACTIVATIONS[activation](a, negative_slope))

        if op == "transformer" and norm_placement == "pre":
            y = y + attend(normed(y, "attention_"))
            return y + feed_forward(normed(y, "mlp_"))
        if op == "transformer":
            y = normed(y + attend(y), "attention_")
            return normed(y + feed_forward(y), "mlp_")
        n = normed(y)
        if op == "linear":
            return ACTIVATIONS[activation](F.linear(n, p["weight"], p.get("bias")), negative_slope)
        return attend(n) if op == "attention" else feed_forward(n)

    first = 0 if grad_iterations is None else max(0, iterations - grad_iterations)
    states = [h]
    for t in range(iterations):
        h = h.detach() if t == first and t > 0 else h
        with torch.set_grad_enabled(t >= first):
            z = h if state_scale is None else at(state_scale, t) * h
            if x0 is not None:
                z = z + (x0 if x0_scale is None else at(x0_scale, t) * x0)
            if update == "replace":
                h = block(z, t)
            else:
                h = runge_kutta(
                    TABLEAUS[solver],
                    lambda y, t=t: block(y, t) - y if update == "contractive" else block(y, t),
                    z,
                    DEFAULT_DT[update] if dt is None else at(dt, t),
                )
        states.append(h)
    if first > 0:
        states[0] = states[0].detach()
    return torch.stack(states) if return_trajectory else h.clone()


def runge_kutta(tableau: Tableau, k: Callable[[Tensor], Tensor], z: Tensor, dt: float | Tensor) -> Tensor:
    slopes: list[Tensor] = []
    for row in tableau.a:
        slopes.append(k(z + dt * sum(a * slope for a, slope in zip(row, slopes, strict=True))))
    return z + dt * sum(b * slope for b, slope in zip(tableau.b, slopes, strict=True))


def mlp(n: Tensor, p: dict[str, Tensor | None], act: Callable[[Tensor], Tensor]) -> Tensor:
    u = F.linear(n, p["w1"], p.get("b1"))
    u = act(u) if p.get("w_gate") is None else act(F.linear(n, p["w_gate"], p.get("b_gate"))) * u
    return F.linear(u, p["w2"], p.get("b2"))


# The arguments that only attention, and a transformer with it, takes.
ATTENTION = (
    "num_heads", "causal", "key_padding_mask", "attn_mask", "scale", "rotary", "qk_norm", "cu_seqlens", "max_seqlen",
)  # fmt: skip


def attention(
    n: Tensor,
    p: dict[str, Tensor | None],
    *,
    eps: float,
    num_heads: int,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: float | tuple[Tensor, Tensor] | None = None,
    qk_norm: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Head by head, and packed sequences one by one."""
    if cu_seqlens is not None:
        same = {"eps": eps, "num_heads": num_heads, "causal": causal, "scale": scale, "rotary": rotary, "qk_norm": qk_norm}
        return torch.cat([attention(x, p, **same) for x in n.split(cu_seqlens.diff().tolist(), dim=-2)], dim=-2)
    tokens, features = n.shape[-2], n.shape[-1] // num_heads
    allowed = torch.ones(*n.shape[:-2], num_heads, tokens, tokens, dtype=torch.bool, device=n.device)
    added = torch.zeros((), dtype=n.dtype, device=n.device)
    if causal:
        allowed = allowed.tril()
    if key_padding_mask is not None:
        allowed = allowed & ~key_padding_mask[..., None, None, :]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        allowed = allowed & (attn_mask != -torch.inf)
        # Less the largest that takes part, which changes no weight: in floating point a -1e30 in all of a row hides the scores.
        added = torch.where(allowed, attn_mask, -torch.inf)
        added = torch.where(allowed, added - added.amax(-1, keepdim=True), 0)
    bias = p.get("b_qkv")
    outs = []
    for head in range(num_heads):
        rows = [slice(i * n.shape[-1] + head * features, i * n.shape[-1] + (head + 1) * features) for i in range(3)]
        q, k, v = (F.linear(n, p["w_qkv"][r], None if bias is None else bias[r]) for r in rows)
        if qk_norm:
            q, k = (F.rms_norm(x, (features,), eps=eps) for x in (q, k))
        if rotary is not None:
            q, k = (rotated(x, rotary) for x in (q, k))
        scores = (q @ k.mT) * (1 / features**0.5 if scale is None else scale)
        of_head = allowed[..., head, :, :]
        scores = scores + (added if added.dim() == 0 else added[..., head, :, :])
        some = of_head.any(-1, keepdim=True)
        weights = torch.softmax(torch.where(of_head | ~some, scores, -torch.inf), -1)
        outs.append(torch.where(some, weights @ v, 0))
    return F.linear(torch.cat(outs, -1), p["w_out"], p.get("b_out"))


def rotated(x: Tensor, rotary: float | tuple[Tensor, Tensor]) -> Tensor:
    """Every position's features i and R + i, as a complex number, times exp(i angle)."""
    tokens, features = x.shape[-2:]
    if isinstance(rotary, tuple):
        turn = torch.complex(*(table[:tokens].to(x.dtype) for table in rotary))
    else:
        powers = torch.arange(features // 2, dtype=x.dtype) * 2 / features
        angles = torch.arange(tokens, dtype=x.dtype)[:, None] / rotary**powers
        turn = torch.exp(1j * angles).to(x.device)
    width = turn.shape[-1]
    turned = torch.complex(x[..., :width], x[..., width : 2 * width]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * width :]], -1)


def normalise(y: Tensor, norm: str | None, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    features = (y.shape[-1],)
    if norm is not None:
        y = F.layer_norm(y, features, eps=eps) if norm == "layernorm" else F.rms_norm(y, features, eps=eps)
    # Not given to layer_norm, whose second gradient in torch fails with a bias and no gain.
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


def has_sets(name: str, value: Tensor | list[Tensor] | None) -> bool:
    """Whether a parameter comes as several sets: a matrix with a leading L, a vector with a leading L, or a list."""
    if isinstance(value, Tensor):
        return value.dim() == (3 if name.startswith("w") else 2)
    return value is not None and len(value) > 1


def only(value: Tensor | list[Tensor] | None) -> Tensor | None:
    return value[0] if isinstance(value, list) else value


def at(value: float | Tensor, t: int) -> float | Tensor:
    """Entry t of a number for each iteration, or the number for all of them."""
    return value if isinstance(value, float) or value.dim() == 0 else value[t]
