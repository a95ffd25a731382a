"""What else one picks for blocks with attention: `nn.TransformerEncoderLayer` in a loop, and torch's FlexAttention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from score_kernels.problem import INPUTS

from .cases import Case
from .inputs import Forward
from .peers import EPS, Parts, eager, loop

# The activations that the layer has a name for.
NAMED = ("relu", "gelu")


class EncoderLoop(nn.Module):
    """The case's iterations of `nn.TransformerEncoderLayer`, one for each parameter set.

    In eval mode, with nothing to drop: where no gradient is wanted torch may take its fused path.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        options: dict[str, Any] = {"activation": case.activation, "layer_norm_eps": EPS, "bias": case.bias}
        options |= {"dropout": 0.0, "batch_first": True, "norm_first": case.norm_placement == "pre"}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(case.features, case.heads, case.hidden, **options) for _ in range(case.sets)
        )
        mask = nn.Transformer.generate_square_subsequent_mask(case.tokens) if case.causal else None
        self.register_buffer("mask", mask, persistent=False)
        self.eval()

    def forward(self, h: Tensor) -> Tensor:
        blocks = [functools.partial(layer, src_mask=self.mask, is_causal=self.case.causal) for layer in self.layers]
        return loop(self.case, blocks, h)


def no_encoder_layer(case: Case, mode: str) -> str | None:
    """Why the case is no loop of `nn.TransformerEncoderLayer`, or None."""
    if case.op != "transformer":
        return "it is a transformer's layer, the case is not"
    if case.norm != "layernorm" or case.gated or case.activation not in NAMED:
        return f"it has layernorm, no gate, and {' or '.join(NAMED)}"
    return None


def no_flex_attention(case: Case, mode: str) -> str | None:
    """Why FlexAttention has nothing to do in the case, or None."""
    return None if case.op in INPUTS else "the case has no attention"


def flex(case: Case) -> Forward:
    """The plain loop with FlexAttention in the place of SDPA, compiled, as it has to be."""
    return torch.compile(flexible(case))


def flexible(case: Case) -> Forward:
    return eager(case, Parts(heads=_flex))


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _causal(case.tokens, q.device) if case.causal else None
    result = flex_attention(q, k, v, block_mask=mask)
    assert isinstance(result, Tensor)
    return result


@functools.cache
def _causal(tokens: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)
