"""Bad input raises before anything runs, and the message names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from cases import SEQUENCES, public
from helpers_torch import D, H, call, draw, flat, parameters

import score_kernels as sk
from score_kernels import functional as SF
from score_kernels import problem
from score_kernels.ops import operator
from score_kernels.problem import LEADING

META = torch.device("meta")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def state(**kwargs):
    return draw(5, D, **kwargs)


def complaint(error, function, *args, **kwargs):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error, repr(caught.value)
    return str(caught.value)


def changed(op="mlp", gated=False, **changes):
    """The call with some of its arguments changed; `h` among them."""
    given = {"h": state(), **parameters(op, gated=gated), **changes}
    return lambda: call(op, given.pop("h"), {}, **given)


# Arguments that are changed, the error, and what its message says: the argument, the expected, the given.
BAD = {
    # The state.
    "h list": ({"h": [1.0]}, TypeError, ("h: expected a tensor", "got list")),
    "h None": ({"h": None}, TypeError, ("h: expected a tensor", "got NoneType")),
    "h int": ({"h": torch.ones(5, D, dtype=torch.int64)}, TypeError, ("h: expected a floating-point tensor", "torch.int64")),
    "h complex": ({"h": torch.ones(5, D) + 0j}, TypeError, ("h: expected a floating-point tensor", "torch.complex64")),
    "h scalar": ({"h": torch.tensor(1.0)}, ValueError, ("h: expected shape (..., D)", "got ()")),
    "h no features": ({"h": torch.ones(5, 0)}, ValueError, ("h: expected shape (..., D) with D >= 1", "got (5, 0)")),
    "h last dimension": (
        {"h": draw(5, D + 1)}, ValueError,
        ("w1: expected shape (H, D) = (12, 9)", "last dimension 9", "got (12, 8)"),
    ),
    # Weights: shapes that do not chain, layouts, types.
    "w1 transposed": ({"w1": draw(D, H)}, ValueError, ("w1: expected shape (H, D) = (8, 8)", "got (8, 12)")),
    "w1 vector": ({"w1": draw(D)}, ValueError, ("w1: expected shape (H, D)", "got (8,)")),
    "w1 4 dimensions": ({"w1": draw(1, 1, H, D)}, ValueError, ("w1: expected shape (H, D)", "leading L", "got (1, 1, 12, 8)")),
    "w1 None": ({"w1": None}, TypeError, ("w1: expected a tensor or a list of tensors", "got None")),
    "w2 None": ({"w2": None}, TypeError, ("w2: expected a tensor or a list of tensors", "got None")),
    "w1 number": ({"w1": 1.0}, TypeError, ("w1: expected a tensor or a list of tensors", "got float")),
    "w1 list of numbers": ({"w1": [1.0]}, TypeError, ("w1: expected a tensor", "got float")),
    "w1 empty list": ({"w1": []}, ValueError, ("w1: expected at least one tensor", "got an empty list")),
    "w2 does not chain": ({"w2": draw(D, H + 1)}, ValueError, ("w2: expected shape (D, H) = (8, 12)", "got (8, 13)")),
    "b1 does not chain": ({"b1": draw(D)}, ValueError, ("b1: expected shape (H) = (12,)", "got (8,)")),
    "b2 does not chain": ({"b2": draw(H)}, ValueError, ("b2: expected shape (D) = (8,)", "got (12,)")),
    "w_gate does not chain": (
        {"w_gate": draw(H + 1, D)}, ValueError,
        ("w_gate: expected shape (H, D) = (12, 8)", "got (13, 8)"),
    ),
    "b_gate does not chain": (
        {"w_gate": draw(H, D), "b_gate": draw(D)}, ValueError, ("b_gate: expected shape (H) = (12,)", "got (8,)"),
    ),
    "b_gate alone": ({"b_gate": draw(H)}, ValueError, ("b_gate: expected w_gate to be given", "got w_gate=None")),
    "shapes in a list": (
        {"w1": [draw(H, D), draw(H + 1, D)]}, ValueError,
        ("w1: expected shape (H, D) = (12, 8)", "got (13, 8)"),
    ),
    # Parameter sets.
    "L > T": (
        {"w1": draw(4, H, D)}, ValueError,
        ("parameter sets: expected at most one set for each of the 3 iterations", "L = 4"),
    ),
    "L unequal": (
        {"w1": draw(2, H, D), "w2": [draw(D, H)] * 3}, ValueError,
        ("parameter sets: expected the same number L", "'w1': 2", "'w2': 3"),
    ),
    # Devices.
    "w1 device": ({"w1": draw(H, D).to(META)}, ValueError, ("w1: expected a tensor on cpu", "got one on meta")),
    "h device": ({"h": state().to(META)}, ValueError, ("w1: expected a tensor on meta", "got one on cpu")),
    "x0 device": ({"x0": state().to(META)}, ValueError, ("x0: expected a tensor on cpu", "got one on meta")),
    "dt device": ({"dt": torch.tensor(0.5, device=META)}, ValueError, ("dt: expected a tensor on cpu", "got one on meta")),
    "state_scale device": (
        {"state_scale": torch.tensor(0.5, device=META)}, ValueError,
        ("state_scale: expected a tensor on cpu", "got one on meta"),
    ),
    "norm_weight device": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(D, device=META)}, ValueError,
        ("norm_weight: expected a tensor on cpu", "got one on meta"),
    ),
    "out device": ({"out": state().to(META)}, ValueError, ("out: expected a tensor on cpu", "got one on meta")),
    # Dtypes.
    "w1 dtype": (
        {"w1": draw(H, D, dtype=BF16)}, TypeError,
        ("w1: expected dtype torch.float32", "got torch.bfloat16", "convert"),
    ),
    "h dtype": ({"h": state(dtype=F16)}, TypeError, ("w1: expected dtype torch.float16", "got torch.float32")),
    "b2 dtype": ({"b2": draw(D, dtype=F64)}, TypeError, ("b2: expected dtype torch.float32", "got torch.float64")),
    "x0 dtype": ({"x0": state(dtype=F64)}, TypeError, ("x0: expected dtype torch.float32", "got torch.float64")),
    "out dtype": ({"out": state(dtype=F64)}, TypeError, ("out: expected dtype torch.float32", "got torch.float64")),
    "norm_weight dtype": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(D, dtype=F16)}, TypeError,
        ("norm_weight: expected dtype torch.float32", "got torch.float16"),
    ),
    "dt int tensor": ({"dt": torch.tensor(1)}, TypeError, ("dt: expected a floating-point tensor", "got torch.int64")),
    # Iterations, dt, scales.
    "iterations negative": ({"iterations": -1}, ValueError, ("iterations: expected 0 or more", "got -1")),
    "iterations float": ({"iterations": 3.0}, TypeError, ("iterations: expected an int", "got float")),
    "iterations bool": ({"iterations": True}, TypeError, ("iterations: expected an int", "got bool")),
    "iterations tensor": ({"iterations": torch.tensor(3)}, TypeError, ("iterations: expected an int", "got Tensor")),
    "dt length": ({"dt": torch.ones(4)}, ValueError, ("dt: expected shape () or (T,) = (3,)", "got (4,)")),
    "dt matrix": ({"dt": torch.ones(3, 1)}, ValueError, ("dt: expected shape () or (T,) = (3,)", "got (3, 1)")),
    "dt text": ({"dt": "0.5"}, TypeError, ("dt: expected a number or a tensor", "got str")),
    "dt list": ({"dt": [0.5, 0.5, 0.5]}, TypeError, ("dt: expected a number or a tensor", "got list")),
    "dt bool": ({"dt": True}, TypeError, ("dt: expected a number or a tensor", "got bool")),
    "dt with replace": (
        {"update": "replace", "dt": 0.5}, ValueError,
        ('update="replace"', "without dt or solver", "got dt=0.5"),
    ),
    "solver with replace": ({"update": "replace", "solver": "rk4"}, ValueError, ('update="replace"', "got solver='rk4'")),
    "state_scale length": (
        {"state_scale": torch.ones(2)}, ValueError, ("state_scale: expected shape () or (T,) = (3,)", "got (2,)"),
    ),
    "state_scale text": ({"state_scale": "1"}, TypeError, ("state_scale: expected a number or a tensor", "got str")),
    "x0_scale length": (
        {"x0": state(), "x0_scale": torch.ones(2)}, ValueError, ("x0_scale: expected shape () or (T,) = (3,)", "got (2,)"),
    ),
    "x0_scale alone": ({"x0_scale": 0.5}, ValueError, ("x0_scale: expected x0 to be given", "got x0=None")),
    "x0 shape": ({"x0": draw(4, D)}, ValueError, ("x0: expected the shape of h, (5, 8)", "got (4, 8)")),
    "x0 number": ({"x0": 1.0}, TypeError, ("x0: expected a tensor", "got float")),
    "grad_iterations 0": ({"grad_iterations": 0}, ValueError, ("grad_iterations: expected 1 or more", "got 0")),
    "grad_iterations negative": ({"grad_iterations": -2}, ValueError, ("grad_iterations: expected 1 or more", "got -2")),
    "grad_iterations float": ({"grad_iterations": 1.5}, TypeError, ("grad_iterations: expected an int", "got float")),
    "grad_iterations bool": ({"grad_iterations": True}, TypeError, ("grad_iterations: expected an int", "got bool")),
    # Names.
    "activation": ({"activation": "swish"}, ValueError, ("activation: expected one of", "silu", "got 'swish'")),
    "activation function": ({"activation": torch.relu}, ValueError, ("activation: expected one of", "got <built-in")),
    "norm": ({"norm": "batchnorm"}, ValueError, ("norm: expected one of none, layernorm, rmsnorm", "got 'batchnorm'")),
    "update": ({"update": "euler"}, ValueError, ("update: expected one of contractive, residual, replace", "got 'euler'")),
    "solver": ({"solver": "dopri5"}, ValueError, ("solver: expected one of euler, midpoint, heun", "got 'dopri5'")),
    "order": ({"order": "random"}, ValueError, ("order: expected one of consecutive, cyclic", "got 'random'")),
    "backend": ({"backend": "mkl"}, ValueError, ("backend: expected one of auto, reference, blas", "got 'mkl'")),
    "backend list": ({"backend": ["blas"]}, ValueError, ("backend: expected one of auto, reference, blas", "got ['blas']")),
    "backend triton": ({"backend": "triton"}, ValueError, ("backend='triton' cannot run this call", "it needs a GPU")),
    "backend cuda": ({"backend": "cuda"}, ValueError, ("backend='cuda' cannot run this call", "it needs a GPU")),
    # The norm.
    "norm_weight alone": (
        {"norm_weight": torch.ones(D)}, ValueError,
        ("norm_weight: expected norm to be layernorm or rmsnorm", "got norm='none'"),
    ),
    "norm_bias alone": (
        {"norm_bias": torch.ones(D)}, ValueError,
        ("norm_bias: expected norm to be layernorm", "got norm='none'"),
    ),
    "norm_bias of rmsnorm": (
        {"norm": "rmsnorm", "norm_bias": torch.ones(D)}, ValueError,
        ("norm_bias: expected norm to be layernorm", "got norm='rmsnorm'"),
    ),
    "norm_weight shape": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(H)}, ValueError, ("norm_weight: expected shape (D) = (8,)", "got (12,)"),
    ),
    "eps negative": ({"norm": "rmsnorm", "eps": -1e-5}, ValueError, ("eps: expected 0 or more", "got -1e-05")),
    "eps nan": ({"norm": "rmsnorm", "eps": float("nan")}, ValueError, ("eps: expected 0 or more", "got nan")),
    "eps text": ({"eps": "1e-5"}, TypeError, ("eps: expected a number", "got str")),
    "negative_slope None": ({"negative_slope": None}, TypeError, ("negative_slope: expected a number", "got NoneType")),
    # out.
    "out list": ({"out": [1.0]}, TypeError, ("out: expected a tensor", "got list")),
    "out shape": ({"out": draw(4, D)}, ValueError, ("out: expected the shape of h, (5, 8)", "got (4, 8)")),
    "out with trajectory": (
        {"out": state(), "return_trajectory": True}, ValueError, ("out: expected return_trajectory=False", "got True"),
    ),
    "out expanded": (
        {"out": draw(1, D).expand(5, D)}, ValueError,
        ("out: expected memory of its own", "got an expanded tensor, strides (0, 1)"),
    ),
    # Keywords.
    "unexpected": (
        {"dropout": 0.1}, TypeError,
        ("score_mlp() got an unexpected keyword argument 'dropout'", "grad_iterations"),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case):
    changes, error, parts = BAD[case]
    message = complaint(error, changed(**changes))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"weight": draw(D, H)}, ValueError, ("weight: expected shape (D, D) = (8, 8)", "got (8, 12)")),
        ({"weight": None}, TypeError, ("weight: expected a tensor or a list of tensors", "got None")),
        ({"bias": draw(H)}, ValueError, ("bias: expected shape (D) = (8,)", "got (12,)")),
        ({"h": draw(5, H)}, ValueError, ("weight: expected shape (D, D) = (12, 12)", "got (8, 8)")),
        ({"w_gate": draw(H, D)}, TypeError, ("score_linear() got an unexpected keyword argument 'w_gate'",)),
        ({"iterations": -3}, ValueError, ("iterations: expected 0 or more", "got -3")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_of_linear(changes, error, parts):
    message = complaint(error, changed("linear", **changes))
    for part in parts:
        assert part in message, message


META_MASK = torch.ones(5, dtype=torch.bool, device=META)
OFFSETS = torch.tensor([0, 2, 5])
TABLES = (torch.ones(5, 2), torch.ones(5, 2))

BAD_ATTENTION = {
    "h vector": ({"h": draw(D)}, ValueError, ("h: expected shape (..., N, D), sequences of N rows", "got (8,)")),
    "w_qkv of q alone": ({"w_qkv": draw(D, D)}, ValueError, ("w_qkv: expected shape (3D, D) = (24, 8)", "got (8, 8)")),
    "b_qkv of q alone": ({"b_qkv": draw(D)}, ValueError, ("b_qkv: expected shape (3D) = (24,)", "got (8,)")),
    "w_out": ({"w_out": draw(D, H)}, ValueError, ("w_out: expected shape (D, D) = (8, 8)", "got (8, 12)")),
    "w_qkv None": ({"w_qkv": None}, TypeError, ("w_qkv: expected a tensor or a list of tensors", "got None")),
    "num_heads": ({"num_heads": 3}, ValueError, ("num_heads: expected a divisor of the number of features, 8", "got 3")),
    "num_heads 0": ({"num_heads": 0}, ValueError, ("num_heads: expected a divisor", "got 0")),
    "num_heads float": ({"num_heads": 2.0}, TypeError, ("num_heads: expected an int", "got float")),
    "causal": ({"causal": 1}, TypeError, ("causal: expected True or False", "got int")),
    "qk_norm": ({"qk_norm": "rms"}, TypeError, ("qk_norm: expected True or False", "got str")),
    "scale": ({"scale": torch.tensor(0.5)}, TypeError, ("scale: expected a number, or None", "got Tensor")),
    "activation": ({"negative_slope": 0.1}, TypeError, ("score_attention() got an unexpected keyword argument",)),
    # Masks.
    "padding dtype": (
        {"key_padding_mask": torch.zeros(5)}, TypeError,
        ("key_padding_mask: expected dtype torch.bool", "got torch.float32"),
    ),
    "padding shape": (
        {"key_padding_mask": torch.ones(4, dtype=torch.bool)}, ValueError,
        ("key_padding_mask: expected a shape that broadcasts to (..., N) = (5,)", "got (4,)"),
    ),
    "padding of more": (
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, ("key_padding_mask: expected", "got (2, 5)"),
    ),
    "padding device": (
        {"key_padding_mask": META_MASK}, ValueError, ("key_padding_mask: expected a tensor on cpu", "got one on meta"),
    ),
    "mask dtype": (
        {"attn_mask": torch.zeros(5, 5, dtype=F64)}, TypeError,
        ("attn_mask: expected dtype torch.bool or torch.float32", "got torch.float64"),
    ),
    "mask shape": (
        {"attn_mask": torch.zeros(3, 5, 5)}, ValueError,
        ("attn_mask: expected a shape that broadcasts to (..., num_heads, N, N) = (2, 5, 5)", "got (3, 5, 5)"),
    ),
    "mask list": ({"attn_mask": [[True]]}, TypeError, ("attn_mask: expected a tensor", "got list")),
    "mask trained": (
        {"attn_mask": torch.zeros(5, 5, requires_grad=True)}, ValueError,
        ("attn_mask: expected a tensor that does not require grad", "attn_mask.detach()"),
    ),
    # Rotary embedding.
    "rotary text": ({"rotary": "1e4"}, TypeError, ("rotary: expected a number, the base, or two tensors", "got str")),
    "rotary one": ({"rotary": TABLES[:1]}, TypeError, ("rotary: expected a number, the base, or two tensors", "got tuple")),
    "rotary base": ({"rotary": 0.0}, ValueError, ("rotary: expected a base above 0", "got 0.0")),
    "rotary odd": (
        {"rotary": 10.0, "num_heads": 8}, ValueError, ("heads of an even number of features", "d = 1"),
    ),
    "rotary short": (
        {"rotary": (torch.ones(4, 2), torch.ones(4, 2))}, ValueError,
        ("rotary cos: expected shape (P, R), equal for both, with P >= 5 positions and R <= d / 2 = 2", "got (4, 2)"),
    ),
    "rotary twice": (
        {"rotary": (torch.ones(5, 4), torch.ones(5, 4))}, ValueError, ("rotary cos: expected shape (P, R)", "each once"),
    ),
    "rotary unequal": (
        {"rotary": (torch.ones(5, 2), torch.ones(5, 1))}, ValueError, ("rotary sin: expected shape (P, R)", "got (5, 1)"),
    ),
    "rotary trained": (
        {"rotary": (TABLES[0], TABLES[1].clone().requires_grad_())}, ValueError,
        ("rotary sin: expected a tensor that does not require grad",),
    ),
    # Packed sequences.
    "offsets dtype": (
        {"cu_seqlens": OFFSETS.float()}, TypeError,
        ("cu_seqlens: expected dtype torch.int32 or torch.int64", "got torch.float32"),
    ),
    "offsets list": ({"cu_seqlens": [0, 5]}, TypeError, ("cu_seqlens: expected a tensor", "got list")),
    "offsets shape": ({"cu_seqlens": OFFSETS[None]}, ValueError, ("cu_seqlens: expected shape (S + 1,)", "got (1, 3)")),
    "offsets none": ({"cu_seqlens": OFFSETS[:0]}, ValueError, ("cu_seqlens: expected shape (S + 1,)", "got (0,)")),
    "offsets start": (
        {"cu_seqlens": torch.tensor([1, 5])}, ValueError,
        ("cu_seqlens: expected offsets from 0 to the number of rows, 5", "got [1, 5]"),
    ),
    "offsets end": ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, ("the number of rows, 5", "got [0, 4]")),
    "offsets decrease": (
        {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, ("that do not decrease", "got [0, 4, 3, 5]"),
    ),
    "many offsets": (
        {"cu_seqlens": torch.arange(20)}, ValueError, ("the number of rows, 5", "got [0, 1, 2, 3, ..., 19]"),
    ),
    "longest": (
        {"cu_seqlens": OFFSETS, "max_seqlen": 2}, ValueError,
        ("max_seqlen: expected the longest sequence, 3, or more", "got 2"),
    ),
    "longest 0": ({"cu_seqlens": OFFSETS, "max_seqlen": 0}, ValueError, ("max_seqlen: expected 1 or more", "got 0")),
    "longest float": ({"cu_seqlens": OFFSETS, "max_seqlen": 3.0}, TypeError, ("max_seqlen: expected an int", "got float")),
    "longest alone": ({"max_seqlen": 5}, ValueError, ("max_seqlen: expected cu_seqlens to be given with it",)),
    "offsets with padding": (
        {"cu_seqlens": OFFSETS, "key_padding_mask": torch.ones(5, dtype=torch.bool)}, ValueError,
        ("key_padding_mask: expected None with cu_seqlens",),
    ),
    "offsets with mask": (
        {"cu_seqlens": OFFSETS, "attn_mask": torch.ones(5, 5)}, ValueError, ("attn_mask: expected None with cu_seqlens",),
    ),
    "backend cuda": (
        {"backend": "cuda"}, ValueError, ("backend='cuda' cannot run this call: no CUDA kernel computes attention yet",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ATTENTION)
def test_bad_argument_of_attention(case):
    changes, error, parts = BAD_ATTENTION[case]
    message = complaint(error, changed("attention", **changes))
    for part in parts:
        assert part in message, message


def test_packed_sequences_are_not_recorded_by_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(problem, "capturing", lambda device: True)
    message = complaint(RuntimeError, changed("attention", cu_seqlens=OFFSETS))
    assert "cu_seqlens: expected a call that no CUDA graph records" in message


@pytest.mark.parametrize("op", SEQUENCES)
def test_the_operator_refuses_a_mask_that_requires_grad(op):
    """Who calls it without the public function is told too, not given a gradient of zero."""
    arguments = flat(op, state(), parameters(op), attn_mask=torch.zeros(5, 5))
    arguments[LEADING][-1].requires_grad_()
    message = complaint(ValueError, operator(op), *arguments)
    assert "attn_mask: expected a tensor that does not require grad" in message


@pytest.mark.parametrize(
    ("attention", "error", "parts"),
    [
        (torch.nn.Linear(D, D), TypeError, ("attention: expected an nn.MultiheadAttention", "got Linear")),
        (torch.nn.MultiheadAttention(D, 2, dropout=0.1), ValueError, ("attention: expected self-attention", "dropout=0.1")),
        (torch.nn.MultiheadAttention(D, 2, kdim=4), ValueError, ("kdim=4 and vdim=8",)),
        (torch.nn.MultiheadAttention(D, 2, add_bias_kv=True), ValueError, ("add_bias_kv=True",)),
        (torch.nn.MultiheadAttention(D, 2, add_zero_attn=True), ValueError, ("add_zero_attn=True",)),
    ],
)
def test_multihead_attention_that_computes_something_else(attention, error, parts):
    message = complaint(error, sk.ScoreAttention.from_multihead_attention, attention)
    for part in parts:
        assert part in message, message


def test_multihead_attention_has_its_own_bias():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'bias'"):
        sk.ScoreAttention.from_multihead_attention(torch.nn.MultiheadAttention(D, 2), bias=False)


TRANSFORMER = {**parameters("transformer"), "num_heads": 2, "iterations": 3}

BAD_TRANSFORMER = {
    "attention dict": (
        {"attention": {"w_qkv": draw(3 * D, D)}}, TypeError,
        ("attention: expected AttentionParams(w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias)", "got dict"),
    ),
    "mlp of attention": (
        {"mlp": SF.AttentionParams(draw(3 * D, D), None, draw(D, D), None)}, TypeError,
        ("mlp: expected MLPParams(w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias)", "got AttentionParams"),
    ),
    "placement": (
        {"norm_placement": "sandwich"}, ValueError, ("norm_placement: expected one of pre, post", "got 'sandwich'"),
    ),
    "norm_weight": (
        {"norm": "rmsnorm", "norm_weight": torch.ones(D)}, TypeError,
        ("score_transformer() got an unexpected keyword argument 'norm_weight'",),
    ),
    "h vector": ({"h": draw(D)}, ValueError, ("h: expected shape (..., N, D), sequences of N rows", "got (8,)")),
    "w_qkv None": ({"w_qkv": None}, TypeError, ("w_qkv: expected a tensor or a list of tensors", "got None")),
    "w2 does not chain": ({"w2": draw(D, H + 1)}, ValueError, ("w2: expected shape (D, H) = (8, 12)", "got (8, 13)")),
    "b_gate alone": ({"b_gate": draw(H)}, ValueError, ("b_gate: expected w_gate to be given", "got w_gate=None")),
    "norm of a half alone": (
        {"attention_norm_weight": torch.ones(D)}, ValueError,
        ("attention_norm_weight: expected norm to be layernorm or rmsnorm when attention_norm_weight is given",),
    ),
    "bias of rmsnorm": (
        {"norm": "rmsnorm", "mlp_norm_bias": torch.ones(D)}, ValueError,
        ("mlp_norm_bias: expected norm to be layernorm", "got norm='rmsnorm'"),
    ),
    "norm shape": (
        {"norm": "rmsnorm", "mlp_norm_weight": torch.ones(H)}, ValueError,
        ("mlp_norm_weight: expected shape (D) = (8,)", "got (12,)"),
    ),
    "norm dtype": (
        {"norm": "rmsnorm", "mlp_norm_weight": torch.ones(D, dtype=F16)}, TypeError,
        ("mlp_norm_weight: expected dtype torch.float32", "got torch.float16"),
    ),
    "sets of the halves": (
        {"w_out": draw(2, D, D), "w1": draw(3, H, D)}, ValueError,
        ("parameter sets: expected the same number L", "'w_out': 2", "'w1': 3"),
    ),
    "num_heads": ({"num_heads": 3}, ValueError, ("num_heads: expected a divisor of the number of features, 8", "got 3")),
    "mask trained": (
        {"attn_mask": torch.zeros(5, 5, requires_grad=True)}, ValueError,
        ("attn_mask: expected a tensor that does not require grad",),
    ),
    "backend cuda": (
        {"backend": "cuda"}, ValueError, ("backend='cuda' cannot run this call: no CUDA kernel computes transformer yet",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRANSFORMER)
def test_bad_argument_of_transformer(case):
    changes, error, parts = BAD_TRANSFORMER[case]
    given = public("transformer", {"h": state(), **TRANSFORMER, **changes}) | {
        name: value for name, value in changes.items() if name in ("attention", "mlp")
    }
    message = complaint(error, lambda: SF.score_transformer(**given))
    for part in parts:
        assert part in message, message


def encoder_layer(**options):
    return torch.nn.TransformerEncoderLayer(D, 2, H, **{"dropout": 0.0, **options})


def with_norms(*norms):
    layer = encoder_layer()
    layer.norm1, layer.norm2 = norms
    return layer


@pytest.mark.parametrize(
    ("layer", "error", "parts"),
    [
        (torch.nn.Linear(D, D), TypeError, ("layer: expected an nn.TransformerEncoderLayer, or several", "got Linear")),
        ([encoder_layer(), torch.nn.ReLU()], TypeError, ("layer: expected an nn.TransformerEncoderLayer", "got ReLU")),
        ([], ValueError, ("layer: expected one or more, got none",)),
        (encoder_layer(dropout=0.1), ValueError, ("layer: expected no active dropout", "p=0.1", "layer.eval()")),
        (encoder_layer(activation=torch.sin), ValueError, ("layer: expected an activation that this package has", "sin")),
        (encoder_layer(activation=torch.nn.Softplus()), ValueError, ("layer: expected an activation", "Softplus")),
        (
            with_norms(torch.nn.LayerNorm(D), torch.nn.LayerNorm(D, eps=0.1)), ValueError,
            ("layer: expected two nn.LayerNorm with the same eps", "eps=0.1"),
        ),
        (with_norms(torch.nn.LayerNorm(D), torch.nn.Identity()), ValueError, ("expected two nn.LayerNorm", "Identity()")),
        (
            [encoder_layer(), encoder_layer(norm_first=True)], ValueError,
            ("layer: expected layers with the same options", "in layer 1", "'pre'"),
        ),
    ],
)  # fmt: skip
def test_encoder_layer_that_computes_something_else(layer, error, parts):
    message = complaint(error, sk.ScoreTransformer.from_encoder_layer, layer)
    for part in parts:
        assert part in message, message


def test_options_against_the_layers_that_are_given():
    make = sk.ScoreTransformer.from_encoder_layer
    message = complaint(ValueError, make, [encoder_layer(), encoder_layer()], layers=3, iterations=6)
    assert "layers: expected 2 sets, one for each layer that is given, got 3" in message
    assert "multiple values for keyword argument 'norm'" in complaint(TypeError, make, encoder_layer(), norm="rmsnorm")


def test_dropout_of_attention_s_weights_alone_is_refused_too():
    layer = encoder_layer()
    layer.self_attn.dropout = 0.2
    message = complaint(ValueError, sk.ScoreTransformer.from_encoder_layer, layer)
    assert "layer: expected self-attention without extra keys and dropout, got dropout=0.2" in message


@pytest.mark.parametrize("backend", ["auto", "reference", "blas"])
def test_errors_do_not_depend_on_the_backend(backend):
    assert "w2: expected shape (D, H)" in complaint(ValueError, changed(w2=draw(D, H + 1), backend=backend))


def test_missing_arguments_are_named():
    assert "'iterations'" in complaint(TypeError, SF.score_linear, state(), draw(D, D))
    assert "'w2'" in complaint(TypeError, SF.score_mlp, state(), draw(H, D), None, iterations=3)


@pytest.mark.parametrize("name", ["h", "w1", "b2", "x0", "dt", "state_scale", "x0_scale", "norm_weight", "out", "w_gate"])
def test_out_refuses_whatever_requires_grad(name):
    options = {"x0": state(), "dt": torch.tensor(0.5), "state_scale": torch.ones(3), "x0_scale": torch.ones(3)}
    options |= {"norm": "rmsnorm", "norm_weight": torch.ones(D), "out": state(), "h": state()}
    given = {**parameters("mlp", gated=True), **options}
    given[name].requires_grad_()
    message = complaint(ValueError, changed(gated=True, **given))
    assert "out: expected no input that requires grad" in message
    assert "torch.no_grad()" in message
    with torch.no_grad():
        assert changed(gated=True, **given)() is given["out"]


@pytest.mark.parametrize("target", ["w1", "b1", "w2", "x0", "norm_weight", "rows of h", "h reversed"])
def test_out_refuses_to_overlap_an_input(target):
    memory = torch.zeros(2000)
    h, shifted = memory[: 5 * D].view(5, D), memory[D : 6 * D].view(5, D)
    given = {"h": h, "x0": state(), "norm": "rmsnorm", "norm_weight": torch.ones(D), **parameters("mlp")}
    if target == "rows of h":
        out = shifted
    elif target == "h reversed":
        given["h"] = draw(D, D)
        out = given["h"].t()
    else:
        size = given[target].numel()
        given[target] = memory[100 : 100 + size].view(given[target].shape)
        out = memory[100 + size - 1 : 100 + size - 1 + 5 * D].view(5, D)
    if target == "h reversed":
        given["x0"] = draw(D, D)
    message = complaint(ValueError, changed(out=out, **given))
    assert "out: expected h itself or memory that no input uses, got a tensor that overlaps an input" in message


def test_out_beside_an_input_in_one_allocation_is_accepted():
    memory = torch.zeros(2 * 5 * D)
    h, out = memory[: 5 * D].view(5, D), memory[5 * D :].view(5, D)
    assert changed(h=h, out=out)() is out


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_norm_parameters_of_16_bit_weights_may_be_float32(dtype):
    given = parameters("mlp", dtype=dtype)
    gain, bias = draw(D, seed=3) + 1, draw(D, seed=4)
    options = {
        "norm": "layernorm",
        "norm_weight": gain,
        "norm_bias": bias,
        "dt": torch.tensor(0.3),
        "state_scale": torch.ones(3),
    }
    found = call("mlp", state(dtype=dtype), given, **options)
    assert found.dtype == dtype
    expected = call("mlp", state(dtype=dtype), given, backend="reference", **options)
    assert (found - expected).float().norm() <= 4 * torch.finfo(dtype).eps * expected.float().norm()
    message = complaint(TypeError, changed(**given, h=state(dtype=dtype), norm="rmsnorm", norm_weight=gain.double()))
    assert f"norm_weight: expected dtype {dtype} or torch.float32" in message
    assert "got torch.float64" in message


@pytest.mark.parametrize("text", ["zero", "0", "-1", "", "nan", "inf"])
def test_scratch_budget_must_be_a_number(text, monkeypatch):
    monkeypatch.setenv("SCORE_KERNELS_SCRATCH_MB", text)
    message = complaint(ValueError, changed())
    assert "SCORE_KERNELS_SCRATCH_MB: expected a positive number of MiB" in message
    assert f"got {text!r}" in message


MODULES = {
    "unexpected": ({"dropout": 0.1}, TypeError, ("ScoreLinear() got an unexpected keyword argument 'dropout'",)),
    "activation": ({"activation": "swish"}, ValueError, ("activation: expected one of", "got 'swish'")),
    "norm": ({"norm": "batch"}, ValueError, ("norm: expected one of", "got 'batch'")),
    "update": ({"update": "euler"}, ValueError, ("update: expected one of", "got 'euler'")),
    "solver": ({"solver": "rk5"}, ValueError, ("solver: expected one of", "got 'rk5'")),
    "order": ({"order": "random"}, ValueError, ("order: expected one of", "got 'random'")),
    "backend": ({"backend": "mkl"}, ValueError, ("backend: expected one of auto, reference, blas, triton", "got 'mkl'")),
    "iterations": ({"iterations": -1}, ValueError, ("iterations: expected 0 or more", "got -1")),
    "iterations float": ({"iterations": 2.5}, TypeError, ("iterations: expected an int", "got float")),
    "eps": ({"eps": -1.0}, ValueError, ("eps: expected 0 or more", "got -1.0")),
    "dt replace": ({"update": "replace", "dt": 0.1}, ValueError, ('update="replace"', "got dt=0.1")),
    "layers 0": ({"layers": 0}, ValueError, ("layers: expected 1 to iterations = 4", "got 0")),
    "layers > T": ({"layers": 5}, ValueError, ("layers: expected 1 to iterations = 4", "got 5")),
    "learn_dt True": ({"learn_dt": True}, ValueError, ("learn_dt: expected one of False, scalar, per_iteration", "got 'True'")),
    "learn_dt replace": ({"learn_dt": "scalar", "update": "replace"}, ValueError, ("learn_dt: expected False", "got 'scalar'")),
    "start 1": ({"learn_dt": "scalar", "dt": 1.0}, ValueError, ("dt: expected a start strictly inside (0, 1)", "got 1.0")),
    "start 0": (
        {"learn_dt": "per_iteration", "dt": 0.0}, ValueError,
        ("dt: expected a start strictly inside (0, 1)", "got 0.0"),
    ),
    "start nan": ({"learn_dt": "scalar", "dt": float("nan")}, ValueError, ("dt: expected a start strictly inside", "got nan")),
    "start shape": (
        {"learn_dt": "scalar", "dt": torch.full((4,), 0.5)}, ValueError,
        ("dt: expected a number or shape ()", "got shape (4,)"),
    ),
    "start length": (
        {"learn_dt": "per_iteration", "dt": torch.full((3,), 0.5)}, ValueError,
        ("dt: expected a number or shape (4,)", "got shape (3,)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_bad_argument_of_a_module(case):
    changes, error, parts = MODULES[case]
    message = complaint(error, sk.ScoreLinear, D, **changes)
    for part in parts:
        assert part in message, message


@pytest.mark.usefixtures("plain_machine")
def test_bad_input_of_a_module():
    assert "got (8, 8)" in complaint(ValueError, sk.ScoreLinear(D), draw(5, D + 1))
    assert "iterations: expected 0 or more, got -1" in complaint(ValueError, sk.ScoreMLP(D, H), state(), iterations=-1)
    on_cpu = sk.ScoreLinear(D, backend="triton")
    assert "backend='triton' cannot run this call: it needs a GPU" in complaint(ValueError, on_cpu, state())


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="module 'score_kernels' has no attribute 'ScoreAttenion'"):
        sk.ScoreAttenion  # noqa: B018
