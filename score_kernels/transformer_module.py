"""`ScoreTransformer`: a transformer's layer as a module that holds its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_arguments import check_heads
from .attention_module import SequenceModule, self_attention
from .modules import ActivatedOptions
from .problem import SHAPES
from .tokens import ACTIVATION, describe
from .transformer_arguments import nested


class ScoreTransformer(SequenceModule):
    """T iterations of one shared transformer layer, attention and mlp, instead of a stack of T layers.

    Args:
        features, num_heads, hidden_features: D, its number of heads, a divisor of D, and H.
        norm_placement: "pre", on the input of each half, or "post", on its sum with that input.
        gated, activation: of the mlp, as for `ScoreMLP`.
        causal, scale, rotary, qk_norm: as for `ScoreAttention`.
        iterations, dt, learn_dt, layers, bias, norm, **options: as for `ScoreLinear`, `functional.score_transformer`. The norms
            of the halves are of one kind, each with its own parameters attention_norm_weight, mlp_norm_weight, ...

    `forward(h, *, x0=None, iterations=None, key_padding_mask=None, attn_mask=None, cu_seqlens=None, max_seqlen=None)` takes
    (..., N, D), or packed sequences (..., total, D), and returns the same shape.
    """

    op = "transformer"
    keywords = ActivatedOptions.__annotations__

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        norm_placement: str = "pre",
        gated: bool = False,
        causal: bool = False,
        scale: float | None = None,
        rotary: float | None = None,
        qk_norm: bool = False,
        iterations: int = 4,
        dt: float | Tensor | None = None,
        learn_dt: bool | str = False,
        layers: int = 1,
        bias: bool = True,
        activation: str = "gelu",
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ActivatedOptions],
    ) -> None:
        check_heads(features, num_heads, scale, rotary)
        own: dict[str, Any] = {
            "num_heads": num_heads, "norm_placement": norm_placement, "activation": activation, "causal": causal,
            "scale": scale, "rotary": rotary, "qk_norm": qk_norm,
        }  # fmt: skip
        sizes, absent = {"D": features, "H": hidden_features}, () if gated else ("w_gate", "b_gate")
        super().__init__(sizes, absent, iterations, dt, learn_dt, layers, bias, norm, own, device, dtype, options)

    @classmethod
    def from_encoder_layer(cls, layer: nn.TransformerEncoderLayer | Iterable[nn.Module], **options: Any) -> Self:
        """A module with a copy of the parameters of `layer`, on its device, in its dtype and mode.

        With `update="replace"` and one iteration it is the same function of h (..., N, D), batch first whatever the layer's
        `batch_first`, which says how its inputs are laid out and nothing else. `key_padding_mask` means the same as
        `src_key_padding_mask`; a bool `attn_mask` the opposite of `src_mask`.

        Args:
            layer: without active dropout: in eval mode, or made with dropout=0. Or several of them, as an `nn.ModuleList`,
                equal but for the values of their parameters: each is a parameter set, and there are as many iterations unless
                `options` say otherwise.
            **options: as for `ScoreTransformer`, less sizes, bias, norm, eps, norm_placement and activation, which are the
                layer's. With `layers` and one layer every set starts as a copy.

        Raises TypeError for what is no `nn.TransformerEncoderLayer` and for an option that is the layer's, ValueError for a
        layer that computes something else.
        """
        layers = [layer] if isinstance(layer, nn.Module) and not isinstance(layer, nn.ModuleList) else list(layer)
        read = [_read(found) for found in layers]
        if not read:
            raise ValueError("layer: expected one or more, got none")
        settings, first = read[0]
        for index, (other, _) in enumerate(read):
            if other != settings:
                raise ValueError(f"layer: expected layers with the same options, got {settings} and, in layer {index}, {other}")
        several = {"layers": len(read), "iterations": len(read)} if len(read) > 1 else {}
        if several and options.get("layers", len(read)) != len(read):
            raise ValueError(f"layers: expected {len(read)} sets, one for each layer that is given, got {options['layers']}")
        # One that the layer decides, given again, is an error of Python's.
        module = cls(**settings, **{"device": first["w1"].device, "dtype": first["w1"].dtype, **several, **options})
        with torch.no_grad():
            for name in first:
                parameters = [held[name] for _, held in read]
                getattr(module, name).copy_(parameters[0] if len(read) == 1 else torch.stack(parameters))
        return module.train(layers[0].training)

    def parameters_of_op(self) -> dict[str, Any]:
        return nested(super().parameters_of_op())


# What `nn.TransformerEncoderLayer` makes of the names that it takes.
_FUNCTIONS: dict[Callable[..., Tensor], str] = {F.relu: "relu", F.gelu: "gelu"}


def _read(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `ScoreTransformer` that make it this layer, and the layer's parameters by the op's names."""
    if not isinstance(layer, nn.TransformerEncoderLayer):
        raise TypeError(f"layer: expected an nn.TransformerEncoderLayer, or several, got {type(layer).__name__}")
    for name, dropout in (("dropout", layer.dropout), ("dropout1", layer.dropout1), ("dropout2", layer.dropout2)):
        if layer.training and dropout.p > 0:
            raise ValueError(f"layer: expected no active dropout, got {name} with p={dropout.p}; call layer.eval() first")
    norms = layer.norm1, layer.norm2
    if any(type(norm) is not nn.LayerNorm for norm in norms) or norms[0].eps != norms[1].eps:
        raise ValueError(f"layer: expected two nn.LayerNorm with the same eps, got norm1={norms[0]} and norm2={norms[1]}")
    held = self_attention("layer", layer.self_attn, dropout=layer.training)
    for half, norm in zip(("attention", "mlp"), norms, strict=True):
        held |= {f"{half}_norm_weight": norm.weight, f"{half}_norm_bias": norm.bias}
    for index, linear in enumerate((layer.linear1, layer.linear2), start=1):
        held |= {f"w{index}": linear.weight, f"b{index}": linear.bias}
    settings = {
        "features": layer.self_attn.embed_dim, "num_heads": layer.self_attn.num_heads,
        "hidden_features": layer.linear1.out_features, "bias": layer.linear1.bias is not None,
        "norm": "layernorm", "eps": norms[0].eps, "norm_placement": "pre" if layer.norm_first else "post",
        **_activation(layer.activation),
    }  # fmt: skip
    return settings, {name: held[name] for name in SHAPES["transformer"] if held.get(name) is not None}  # type: ignore[misc]


def _activation(activation: Any) -> dict[str, Any]:
    """The options of an activation, a function or a module."""
    if activation in _FUNCTIONS:
        return {"activation": _FUNCTIONS[activation]}
    token = describe(activation) if isinstance(activation, nn.Module) else None
    if token is None or isinstance(token, str) or token.kind != ACTIVATION:
        raise ValueError(
            "layer: expected an activation that this package has (torch.nn.functional.relu or gelu, nn.ReLU, nn.GELU, "
            f"nn.SiLU, ...), got {activation!r}"
        )
    name, slope = token.value
    return {"activation": name} if slope is None else {"activation": name, "negative_slope": slope}
