"""The parameters of a transformer's halves, as they are passed, and the check of what only a transformer takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import attention_arguments
from .arguments import Own, Parameter, check_options
from .plan import HALVES
from .problem import SHAPES, in_half


class AttentionParams(NamedTuple):
    """Parameters of attention and of its norm: shapes and sets as for `score_attention`."""

    w_qkv: Parameter
    b_qkv: Parameter | None
    w_out: Parameter
    b_out: Parameter | None
    norm_weight: Parameter | None = None
    norm_bias: Parameter | None = None


class MLPParams(NamedTuple):
    """Parameters of the mlp and of its norm: shapes and sets as for `score_mlp`; with `w_gate` it is gated."""

    w1: Parameter
    b1: Parameter | None
    w2: Parameter
    b2: Parameter | None
    w_gate: Parameter | None = None
    b_gate: Parameter | None = None
    norm_weight: Parameter | None = None
    norm_bias: Parameter | None = None


def flat(attention: AttentionParams, mlp: MLPParams) -> dict[str, Parameter | None]:
    """The parameters by their names in `SHAPES["transformer"]`."""
    for name, given, wanted in (("attention", attention, AttentionParams), ("mlp", mlp, MLPParams)):
        if not isinstance(given, wanted):
            fields = ", ".join(wanted._fields)
            raise TypeError(f"{name}: expected {wanted.__name__}({fields}), got {type(given).__name__}")
    halves = dict(zip(HALVES, (attention, mlp), strict=True))
    return {in_half(op, name): getattr(halves[op], name) for op in HALVES for name in SHAPES[op]}


def nested(parameters: Mapping[str, Any]) -> dict[str, AttentionParams | MLPParams]:
    """The arguments `attention` and `mlp` of parameters by their flat names: what `flat` undoes."""

    def half(op: str) -> dict[str, Any]:
        return {name: parameters.get(in_half(op, name)) for name in SHAPES[op]}

    return {"attention": AttentionParams(**half("attention")), "mlp": MLPParams(**half("mlp"))}


def check(h: Tensor, *, norm_placement: str = "pre", **heads: Any) -> Own:
    """The arguments of `score_transformer` beside its parameters, and their flat form. heads: those of attention."""
    check_options({"norm_placement": norm_placement})
    own = attention_arguments.check(h, **heads)
    return Own(own.inputs, {**own.options, "norm_placement": norm_placement})
