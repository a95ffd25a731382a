"""score_transformer: values and gradients in float64; torch's encoder layers, masks, packed sequences."""

from __future__ import annotations

import math
from itertools import pairwise

import cases
import pytest
import torch
from cases import F64, assert_close, build, gradients, planned
from row_wise import RowWise, random_shapes
from torch import nn

import score_kernels as sk


class TestTransformer(RowWise):
    op = "transformer"
    # Alone, an option is attention's or the mlp's.
    alone = False
    test_random_shapes = random_shapes("transformer", examples=30)


every_backend = pytest.mark.parametrize("backend", ["reference", "blas"])


def encoder(layers: int, **options: object) -> nn.TransformerEncoder:
    """torch's stack of layers, D = 32, 4 heads, H = 48, with random numbers in all of its parameters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, **{"dropout": 0.0, "batch_first": True, **options})
    stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.2)
    return stack


def inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """h, and masks as torch's layer and as `score_transformer` take them."""
    h, padding, allowed = torch.randn(5, 9, 32), torch.rand(5, 9) > 0.7, torch.rand(9, 9) > 0.3
    allowed[:, 0], padding[:, 0] = True, False
    theirs = {"src_key_padding_mask": padding, "mask": ~allowed}
    return h, theirs, {"key_padding_mask": padding, "attn_mask": allowed}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@every_backend
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"bias": False}, {"activation": nn.LeakyReLU(0.3)}], ids=str)
def test_it_is_an_encoder_of_torch(backend, norm_first, options):
    """Three layers as three parameter sets, and one of them alone; values and gradients, with masks and without."""
    stack = encoder(3, norm_first=norm_first, **options)
    h, theirs, ours = inputs()
    for layers, run in ((stack.layers, stack), (stack.layers[1], None)):
        settings = {"update": "replace", "backend": backend, **({} if run else {"iterations": 1})}
        module = sk.ScoreTransformer.from_encoder_layer(layers, **settings)
        assert close(module(h), (run or layers)(h))
    module = sk.ScoreTransformer.from_encoder_layer(stack.layers, update="replace", backend=backend)
    found, expected = module(h, **ours), stack(h, **theirs)
    assert close(found, expected)
    grad = torch.randn_like(found)
    names = [name for name, _ in module.named_parameters()]
    found = dict(zip(names, torch.autograd.grad(found, list(module.parameters()), grad), strict=True))
    torch.autograd.backward(expected, grad)
    for name, of_layer in {
        "w_qkv": "self_attn.in_proj_weight", "w_out": "self_attn.out_proj.weight", "attention_norm_weight": "norm1.weight",
        "w1": "linear1.weight", "w2": "linear2.weight", "mlp_norm_weight": "norm2.weight",
    }.items():  # fmt: skip
        assert close(found[name], torch.stack([layer.get_parameter(of_layer).grad for layer in stack.layers]), 1e-5), name


def test_the_layout_of_torch_s_layer_is_the_only_difference_of_batch_first():
    rows, columns = (encoder(1, batch_first=first).layers[0] for first in (True, False))
    columns.load_state_dict(rows.state_dict())
    h = inputs()[0]
    module = sk.ScoreTransformer.from_encoder_layer(columns, update="replace", iterations=1)
    assert close(module(h), columns(h.transpose(0, 1)).transpose(0, 1))
    assert torch.equal(module(h), sk.ScoreTransformer.from_encoder_layer(rows, update="replace", iterations=1)(h))


def test_a_copy_of_a_layer_is_a_copy():
    """Of one in eval mode too, whose dropout does nothing."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, layer_norm_eps=0.1, dtype=F64).eval()
    module = sk.ScoreTransformer.from_encoder_layer(layer, layers=3, iterations=6, causal=True)
    assert (module.w1.dtype, module.w1.shape, module.training, module.options["eps"]) == (F64, (3, 12, 8), False, 0.1)
    assert all(torch.equal(x, layer.self_attn.in_proj_weight) for x in module.w_qkv)
    with torch.no_grad():
        module.w_qkv.zero_()
    assert layer.self_attn.in_proj_weight.any()


@every_backend
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_failure_case_11_rows_with_nothing_to_attend_to(backend, placement, dtype):
    """Attention gives b_out there and the mlp goes on from it: the same as with q, k and v of 0."""
    choices = {"norm": "rmsnorm gain", "placement": placement, "mask": "padding additive", "causal": True}
    case = build("transformer", rows=12, iterations=1, dtype=dtype, update="replace", **choices)
    case.arguments["attn_mask"].fill_(-math.inf)
    found = gradients(case, backend)
    assert all(x.isfinite().all() for x in found.values())
    for name in ("w_qkv", "b_qkv"):
        assert not found[name].any()
        case.leaves[name].data.zero_()
    case.arguments |= {"attn_mask": None, "key_padding_mask": None}
    bare = gradients(case, backend)
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close({"output": found["output"], "w1": found["w1"]}, {"output": bare["output"], "w1": bare["w1"]}, tolerance)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_failure_case_12_infinities_and_finite_sentinels(backend, dtype, placement):
    """-inf and sentinels in one mask, in one row, in all of a row: values and gradients near those in float64."""
    value = torch.finfo(dtype).min
    mask = torch.zeros(3, 3)
    mask[0, 1:], mask[1, 0], mask[1, 1:], mask[2] = value, -math.inf, value, value
    found = {}
    for kind in (dtype, F64):
        case = build("transformer", rows=9, iterations=3, dtype=dtype, norm="layernorm gain", placement=placement)
        names = list(case.leaves)
        leaves = [x.detach().to(kind).requires_grad_() for x in case.leaves.values()]
        moved = cases.substitute(case, leaves, names)
        moved.leaves = dict(zip(names, leaves, strict=True))
        moved.arguments["attn_mask"] = mask.to(dtype).to(kind)
        found[kind] = gradients(moved, backend if kind == dtype else "reference")
    for name, b in found[F64].items():
        assert (found[dtype][name].double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm(), name


@every_backend
@pytest.mark.parametrize("choices", [{}, {"causal": True, "rotary": "tables", "placement": "post", "norm": "rmsnorm"}], ids=str)
def test_packed_sequences_are_the_sequences(backend, choices):
    """However they fall into tiles."""
    case = build("transformer", rows=23, sequences="packed", **choices)
    found = gradients(case, backend, ("h",))
    with planned(rows=9, backward_rows=5, interval=2):
        assert_close(gradients(case, backend, ("h",)), found)
    h, offsets = case.leaves["h"], case.arguments["cu_seqlens"].tolist()
    parts = []
    for start, stop in pairwise(offsets):
        case.arguments |= {"h": h[start:stop], "cu_seqlens": None}
        parts.append(cases.call(case, backend))
    assert_close({"output": torch.cat(parts)}, {"output": found["output"]})
    assert_close({"h": torch.autograd.grad(torch.cat(parts), h, cases.cotangent(h))[0]}, {"h": found["h"]})


def test_with_norms_before_the_halves_the_decay_cancels():
    """Contractive and residual updates: h + dt branch(h), and h + dt (h + branch(h))."""
    case = build("transformer", iterations=1, norm="rmsnorm", dt="float")
    h, dt = case.arguments["h"], case.arguments["dt"]
    contractive = cases.call(case, "blas")
    case.arguments["update"] = "residual"
    torch.testing.assert_close(cases.call(case, "blas") - dt * h, contractive, rtol=1e-13, atol=1e-13)


def test_a_tile_is_whole_sequences_and_the_plan_says_so():
    module = sk.ScoreTransformer(64, 4, 256, iterations=9, norm="layernorm")
    (plan,) = sk.explain(module, torch.randn(400, 48, 64))
    assert (plan.op, plan.backend, plan.rows % 48, plan.backward_rows % 48) == ("transformer", "blas", 0, 0)
    assert 48 < plan.rows < 400 * 48
    # The wider half's hidden features are in a tile's working set.
    (wider,) = sk.explain(sk.ScoreTransformer(64, 4, 1024), torch.randn(400, 48, 64))
    assert wider.rows < plan.rows
