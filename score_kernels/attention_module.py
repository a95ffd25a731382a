"""`ScoreAttention`: attention as a module that holds its parameters."""

from __future__ import annotations

from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from .attention_arguments import check_heads
from .modules import ModuleOptions, ScoreModule


class SequenceModule(ScoreModule):
    """A module of an op on sequences: masks and packed sequences come with each call."""

    def forward(
        self,
        h: Tensor,
        *,
        x0: Tensor | None = None,
        iterations: int | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """h (..., N, D) -> (..., N, D). Masks and packed sequences: as for `functional.score_attention`."""
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        return self.call(h, x0, iterations, **masks, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


class ScoreAttention(SequenceModule):
    """T iterations of one shared multi-head attention, D -> D, instead of a stack of T layers.

    Args:
        features, num_heads: D, and its number of heads, a divisor of D.
        causal: row i attends to rows 0 to i.
        scale: of the scores, a number; None: 1 / sqrt(D / num_heads).
        rotary: base of a rotary embedding, as 10000.0, or None for no embedding.
        qk_norm: q and k of every head are divided by their root mean square.
        iterations, dt, learn_dt, layers, bias, norm, **options: as for `ScoreLinear`, `functional.score_attention`.

    `forward(h, *, x0=None, iterations=None, key_padding_mask=None, attn_mask=None, cu_seqlens=None, max_seqlen=None)` takes
    (..., N, D), or packed sequences (..., total, D), and returns the same shape.
    """

    op = "attention"

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        causal: bool = False,
        scale: float | None = None,
        rotary: float | None = None,
        qk_norm: bool = False,
        iterations: int = 4,
        dt: float | Tensor | None = None,
        learn_dt: bool | str = False,
        layers: int = 1,
        bias: bool = True,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        check_heads(features, num_heads, scale, rotary)
        own = {"num_heads": num_heads, "causal": causal, "scale": scale, "rotary": rotary, "qk_norm": qk_norm}
        super().__init__({"D": features}, (), iterations, dt, learn_dt, layers, bias, norm, own, device, dtype, options)

    @classmethod
    def from_multihead_attention(cls, attention: nn.MultiheadAttention, **options: object) -> Self:
        """A module with a copy of the parameters of `attention`, on its device, in its dtype and mode.

        With `update="replace"` and one iteration it is the same function of h (..., N, D) as self-attention, batch first:
        `attention(h, h, h, need_weights=False)[0]`. `key_padding_mask` means the same; a bool `attn_mask` the opposite.

        Args:
            attention: with keys and values of `embed_dim` features, and no `bias_k`, `add_zero_attn` or dropout.
            **options: as for `ScoreAttention`, less its sizes and `bias`. With `layers` every set starts as a copy.

        Raises TypeError for what is no `nn.MultiheadAttention` and for an option that is its own, ValueError for one that
        computes something else.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"attention: expected an nn.MultiheadAttention, got {type(attention).__name__}")
        held = self_attention("attention", attention, dropout=True)
        weight = attention.in_proj_weight
        # A bias that is given too is an error of Python's: the layer decides it.
        given: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, **options}
        module = cls(attention.embed_dim, attention.num_heads, bias=held["b_qkv"] is not None, **given)
        with torch.no_grad():
            for name, parameter in held.items():
                if parameter is not None:
                    getattr(module, name).copy_(parameter)
        return module.train(attention.training)


def self_attention(name: str, attention: nn.MultiheadAttention, *, dropout: bool) -> dict[str, Tensor | None]:
    """The weights and biases of `attention` by the op's names. dropout: whether to refuse it.

    Raises ValueError, about the argument `name`, for one that computes something else.
    """
    reasons = {
        f"kdim={attention.kdim} and vdim={attention.vdim}": not attention._qkv_same_embed_dim,
        "add_bias_kv=True": attention.bias_k is not None,
        "add_zero_attn=True": attention.add_zero_attn,
        f"dropout={attention.dropout}": dropout and attention.dropout > 0,
    }
    for reason, refused in reasons.items():
        if refused:
            raise ValueError(f"{name}: expected self-attention without extra keys and dropout, got {reason}")
    out = attention.out_proj
    return {"w_qkv": attention.in_proj_weight, "b_qkv": attention.in_proj_bias, "w_out": out.weight, "b_out": out.bias}
