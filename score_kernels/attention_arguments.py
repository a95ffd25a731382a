"""Checks what only attention takes: heads, masks, rotary embedding, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Own, check_like
from .problem import compute_dtype, readable, sequence_lengths


def check(
    h: Tensor,
    *,
    num_heads: int,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: float | tuple[Tensor, Tensor] | None = None,
    qk_norm: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Own:
    """The arguments of `score_attention` for the state h, and their flat form; the defaults are the public ones."""
    if h.dim() < 2:
        raise ValueError(f"h: expected shape (..., N, D), sequences of N rows, got {tuple(h.shape)}")
    features = head_features(h.shape[-1], num_heads)
    for name, value in (("causal", causal), ("qk_norm", qk_norm)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    scale = check_scale(scale, features)
    if cu_seqlens is not None:
        max_seqlen = _packed(h, cu_seqlens, max_seqlen, key_padding_mask, attn_mask)
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen: expected cu_seqlens to be given with it, got cu_seqlens=None and {max_seqlen=}")
    if key_padding_mask is not None:
        _untrained("key_padding_mask", key_padding_mask, h, (torch.bool,))
        _broadcasts("key_padding_mask", key_padding_mask, "(..., N)", h.shape[:-1])
    if attn_mask is not None:
        _untrained("attn_mask", attn_mask, h, (torch.bool, h.dtype, compute_dtype(h.dtype)))
        _broadcasts("attn_mask", attn_mask, "(..., num_heads, N, N)", (*h.shape[:-2], num_heads, h.shape[-2], h.shape[-2]))
    cos, sin = _rotary(h, rotary, features, max_seqlen or h.shape[-2])
    return Own(
        {
            "key_padding_mask": key_padding_mask,
            "attn_mask": attn_mask,
            "rotary_cos": cos,
            "rotary_sin": sin,
            "cu_seqlens": cu_seqlens,
        },
        {"num_heads": num_heads, "causal": causal, "scale": scale, "qk_norm": qk_norm, "max_seqlen": max_seqlen or 0},
    )


def head_features(features: int, num_heads: int) -> int:
    """d, the features of a head."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the number of features, {features}, got {num_heads}")
    return features // num_heads


def check_heads(features: int, num_heads: int, scale: float | None, rotary: float | None) -> None:
    """What a module of so many features holds for its calls. rotary: a base."""
    width = head_features(features, num_heads)
    check_scale(scale, width)
    if rotary is not None:
        check_base(rotary, width)


def check_scale(scale: float | None, features: int) -> float:
    if scale is None:
        return float(features**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"scale: expected a number, or None for 1 / sqrt(d), got {type(scale).__name__}")
    return float(scale)


def check_base(base: float | torch.SymFloat, features: int) -> None:
    """The base of a rotary embedding of heads of so many features."""
    if isinstance(base, bool) or not isinstance(base, int | float | torch.SymFloat):
        raise TypeError(f"rotary: expected a number, the base, got {type(base).__name__}")
    if not base > 0 or features % 2:
        raise ValueError(
            f"rotary: expected a base above 0 and heads of an even number of features, got {base} and d = {features}"
        )


def _packed(
    h: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> int:
    """max_seqlen; 0 where it was not given and cannot be read."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens, packed sequences attend within themselves; got a mask")
    _untrained("cu_seqlens", cu_seqlens, h, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (S + 1,), the offsets of S sequences, got {tuple(cu_seqlens.shape)}")
    if max_seqlen is not None:
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
            raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
        if max_seqlen < 1:
            raise ValueError(f"max_seqlen: expected 1 or more, got {max_seqlen}")
    if not readable(cu_seqlens):
        return max_seqlen or 0
    longest = max(sequence_lengths(cu_seqlens, h.shape[-2], max_seqlen or 0), default=0)
    return max_seqlen or longest


def _rotary(h: Tensor, rotary: object, features: int, positions: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin of every position's angles, in the dtype that they are used in."""
    if rotary is None:
        return None, None
    dtype = compute_dtype(h.dtype)
    if isinstance(rotary, int | float | torch.SymFloat) and not isinstance(rotary, bool):
        check_base(rotary, features)
        return tables(float(rotary), positions, features, dtype, h.device)
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"rotary: expected a number, the base, or two tensors (cos, sin), got {type(rotary).__name__}")
    for name, x in zip(("rotary cos", "rotary sin"), rotary, strict=True):
        _untrained(name, x, h, (h.dtype, dtype))
        if x.dim() != 2 or x.shape[0] < positions or not 1 <= x.shape[1] <= features // 2 or x.shape != rotary[0].shape:
            raise ValueError(
                f"{name}: expected shape (P, R), equal for both, with P >= {positions} positions and R <= d / 2 = "
                f"{features // 2} angles, each once; got {tuple(x.shape)}"
            )
    return rotary[0].to(dtype), rotary[1].to(dtype)


def tables(base: float, positions: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of p base^(-2i / d), (positions, d / 2)."""
    powers = torch.arange(0, features, 2, dtype=torch.float64, device=device) / -features
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * base**powers
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _untrained(name: str, x: Tensor, h: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    check_like(name, x, h, dtypes)
    if x.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require grad, it has no gradient here; pass {name}.detach()")


def _broadcasts(name: str, x: Tensor, text: str, shape: Sequence[int]) -> None:
    fits = x.dim() <= len(shape) and all(
        size in (1, full) for size, full in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {text} = {tuple(shape)}, got {tuple(x.shape)}")
