"""score_attention: values and gradients in float64; masks, packed sequences, torch's kernel and what replaces it on a GPU."""

from __future__ import annotations

import math
from itertools import pairwise, product

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import F64, assert_close, build, gradients, planned
from kernels import error, wide
from row_wise import RowWise, random_shapes
from torch import nn
from torch.utils._pytree import tree_leaves

import score_kernels as sk
from score_kernels import blas, sdpa
from score_kernels import functional as SF

every_backend = pytest.mark.parametrize("backend", ["reference", "blas"])


class TestAttention(RowWise):
    op = "attention"
    test_random_shapes = random_shapes("attention")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def weights(features: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    """w_qkv, b_qkv, w_out, b_out"""
    shapes = ((3 * features, features), (3 * features,), (features, features), (features,))
    return [draw(*shape, seed=i, dtype=dtype) / features**0.5 for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(("tokens", "features", "heads"), [(1, 1, 1), (1, 6, 2), (33, 6, 3), (65, 16, 16), (130, 8, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_and_heads_of_any_size(tokens, features, heads, causal):
    h = draw(3, tokens, features).requires_grad_()
    names = ("w_qkv", "b_qkv", "w_out", "b_out")
    case = cases.Case("attention", {"h": h, **dict(zip(names, weights(features), strict=True))}, {})
    case.arguments |= {"num_heads": heads, "iterations": 3, "causal": causal}
    case.leaves = {name: x.requires_grad_() for name, x in case.arguments.items() if isinstance(x, torch.Tensor)}
    with planned(rows=2 * tokens, backward_rows=tokens, interval=2):
        assert_close(gradients(case, "blas"), gradients(case, "oracle"))


@every_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_multihead_attention(backend, bias, masked):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = sk.ScoreAttention.from_multihead_attention(attention, update="replace", iterations=1, backend=backend)
    h = torch.randn(5, 9, 32)
    padding, allowed = torch.rand(5, 9) > 0.7, torch.rand(9, 9) > 0.3
    allowed[:, 0], padding[:, 0] = True, False
    ours = {"key_padding_mask": padding, "attn_mask": allowed} if masked else {}
    theirs = {"key_padding_mask": padding, "attn_mask": ~allowed} if masked else {}
    expected = attention(h, h, h, need_weights=False, **theirs)[0]
    found = module(h, **ours)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    grad = torch.randn_like(found)
    expected = torch.autograd.grad(expected, list(attention.parameters()), grad)
    found = torch.autograd.grad(found, list(module.parameters()), grad)
    # In the order of the names: weight and bias in, weight and bias out.
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_copy_of_multihead_attention_is_a_copy():
    attention = nn.MultiheadAttention(8, 2, dtype=F64).eval()
    module = sk.ScoreAttention.from_multihead_attention(attention, layers=3, iterations=6, causal=True)
    assert (module.w_qkv.dtype, module.w_qkv.shape, module.training) == (F64, (3, 24, 8), False)
    assert all(torch.equal(x, attention.in_proj_weight) for x in module.w_qkv)
    with torch.no_grad():
        module.w_qkv.zero_()
    assert attention.in_proj_weight.any()


@every_backend
def test_scaled_dot_product_attention_of_torch(backend):
    """The same masks and the same scale mean the same; bool and added, for sequences and heads."""
    h, (w_qkv, b_qkv, w_out, b_out) = draw(2, 7, 12), weights(12)
    q, k, v = F.linear(h, w_qkv, b_qkv).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    options = {"num_heads": 3, "iterations": 1, "update": "replace", "backend": backend}
    for mask in (draw(7, 7), draw(3, 7, 7), draw(2, 1, 7, 7), draw(2, 3, 7, 7), draw(2, 1, 1, 7)):
        for attn_mask in (mask, mask > -1):
            plain = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=0.7).transpose(1, 2).flatten(2)
            found = SF.score_attention(h, w_qkv, b_qkv, w_out, b_out, attn_mask=attn_mask, scale=0.7, **options)
            torch.testing.assert_close(found, F.linear(plain, w_out, b_out), rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_failure_case_11_rows_with_nothing_to_attend_to(backend, dtype):
    """F is b_out there, whichever mask it was, and all gradients are numbers."""
    h = draw(4, 6, 8, dtype=dtype).requires_grad_()
    given = [x.requires_grad_() for x in weights(8, dtype)]
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0], padding[1, :3] = True, True
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[4] = False
    added = torch.zeros(6, 6, dtype=dtype).masked_fill(~allowed, -math.inf)
    options = {"num_heads": 2, "iterations": 1, "update": "replace", "backend": backend, "causal": True}
    for attn_mask in (None, allowed, added):
        out = SF.score_attention(h, *given, key_padding_mask=padding, attn_mask=attn_mask, **options)
        # Left padding: the first rows of a causal sequence see nothing but padding.
        nothing = torch.zeros(4, 6, dtype=torch.bool)
        nothing[0], nothing[1, :3], nothing[:, 4] = True, True, attn_mask is not None
        assert torch.equal(out[nothing], given[3].expand_as(out[nothing]))
        assert not torch.equal(out[~nothing], given[3].expand_as(out[~nothing]))
        found = torch.autograd.grad(out.float().square().sum(), [h, *given])
        assert all(g.isfinite().all() for g in found)
        assert not found[0][0].any(), "a sequence of padding has no gradient"


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sentinel", ["-1e4", "-1e9", "min"])
@pytest.mark.parametrize("causal", [False, True])
def test_failure_case_12_infinities_and_finite_sentinels(backend, dtype, sentinel, causal):
    """-inf and sentinels in one mask, in one row, in all of a row: values and gradients near those in float64."""
    value = torch.finfo(dtype).min if sentinel == "min" else max(float(sentinel), torch.finfo(dtype).min)
    mask = torch.zeros(6, 6)
    mask[0, 2:], mask[1], mask[2, :3], mask[2, 3:], mask[3], mask[4, :5] = value, value, value, -math.inf, -math.inf, value
    mask = mask.to(dtype)
    found = {}
    for kind in (dtype, F64):
        h = draw(3, 6, 8, dtype=dtype).to(kind).requires_grad_()
        given = [x.to(kind).requires_grad_() for x in weights(8, dtype)]
        options = {"num_heads": 2, "iterations": 3, "causal": causal, "backend": backend if kind == dtype else "reference"}
        out = SF.score_attention(h, *given, attn_mask=mask.to(kind), **options)
        found[kind] = [out, *torch.autograd.grad(out, [h, *given], draw(3, 6, 8, seed=9).to(kind))]
    for a, b in zip(found[dtype], found[F64], strict=True):
        assert (a.double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


KEPT = [{}, {"qk_norm": True}, {"qk_norm": True, "rotary": "base"}, {"qk_norm": True, "dtype": torch.bfloat16}]


@pytest.mark.parametrize("choices", [*KEPT, {"sequences": "packed"}, {"solver": "heun", "mask": "padding"}], ids=str)
def test_backward_uses_what_the_block_keeps(monkeypatch, choices):
    """What the walk kept is what backward would compute again, and a wrong value of it makes wrong gradients."""
    case = build("attention", rows=18, features=8, iterations=5, **choices)
    original = blas.Attention.inner_kept
    found = {}
    for interval in (1, 3):
        for name, keep in {
            "kept": lambda kept: kept,
            "nothing": lambda kept: None,
            "wrong out": lambda kept: kept._replace(out=kept.out * 2),
            "wrong qkv": lambda kept: kept._replace(qkv=kept.qkv * 2),
            "wrong weights": lambda kept: kept._replace(of_groups=[group + 1 for group in kept.of_groups]),
        }.items():

            def inner_kept(self, y, index, keep=keep):
                u, kept = original(self, y, index)
                return u, keep(kept)

            monkeypatch.setattr(blas.Attention, "inner_kept", inner_kept)
            with planned(rows=9, backward_rows=9, interval=interval):
                found[name] = gradients(case, "blas")
        cases.assert_same_bits(found["kept"], found["nothing"])
        for name, weight in (("wrong out", "w_out"), ("wrong qkv", "w_qkv"), ("wrong weights", "w_qkv")):
            assert not torch.equal(found[name][weight], found["kept"][weight]), name


@pytest.mark.parametrize("choices", KEPT, ids=str)
def test_the_planner_counts_what_the_block_keeps(choices):
    case = build("attention", rows=18, features=8, **choices)
    problems = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "forward", lambda problem, plan, out: problems.append(problem) or out.new_empty(0))
        with torch.no_grad():
            cases.call(case, "blas")
    (problem,) = problems
    block = blas.Attention(problem)
    (tile,) = block.tiles(18, 18)
    _, kept = block.inner_kept(problem.h.reshape(18, 8)[tile].to(problem.compute_dtype), 0)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(kept) if x is not None}
    assert sum(storages.values()) == 18 * blas.kept(problem) * problem.compute_dtype.itemsize


@every_backend
@pytest.mark.parametrize("choices", [{}, {"causal": True, "rotary": "tables"}, {"qk_norm": True, "norm": "rmsnorm"}], ids=str)
def test_packed_sequences_are_the_sequences(backend, choices):
    """However they fall into tiles."""
    case = build("attention", rows=23, sequences="packed", **choices)
    offsets = case.arguments["cu_seqlens"].tolist()
    found = gradients(case, backend, ("h",))
    with planned(rows=9, backward_rows=5, interval=2):
        assert_close(gradients(case, backend, ("h",)), found)
    h = case.leaves["h"]
    parts = []
    for start, stop in pairwise(offsets):
        case.arguments |= {"h": h[start:stop], "cu_seqlens": None}
        parts.append(cases.call(case, backend))
    assert_close({"output": torch.cat(parts)}, {"output": found["output"]})
    assert_close({"h": torch.autograd.grad(torch.cat(parts), h, cases.cotangent(h))[0]}, {"h": found["h"]})


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packed_sequences_of_16_bits(backend, dtype):
    """The state is in float32 and the result in the input's dtype, also where rows are picked one by one."""
    case = build("attention", rows=23, sequences="packed", dtype=dtype, x0="vector")
    found, expected = gradients(case, backend), gradients(wide(case), "reference")
    for name, x in expected.items():
        assert found[name].dtype == case.leaves.get(name, case.leaves["h"]).dtype
        assert error(found[name], x) <= 16 * torch.finfo(dtype).eps, name


def test_a_row_that_is_masked_out_does_not_change_the_others():
    h, given = draw(2, 6, 8), weights(8)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    options = {"num_heads": 2, "iterations": 4, "key_padding_mask": padding}
    found = SF.score_attention(h, *given, **options)
    h[:, 4:] += 100
    assert torch.equal(SF.score_attention(h, *given, **options)[:, :4], found[:, :4])


def test_causal_rows_see_no_later_ones():
    h, given = draw(2, 70, 8), weights(8)
    found = SF.score_attention(h, *given, num_heads=2, iterations=4, causal=True)
    h[:, 40:] += 1
    changed = SF.score_attention(h, *given, num_heads=2, iterations=4, causal=True)
    torch.testing.assert_close(changed[:, :40], found[:, :40], rtol=1e-13, atol=1e-13)
    assert ((changed - found).abs().amax(-1) > 1e-6)[:, 40:].all()


def test_rotary_scores_depend_on_distances():
    """Turning all positions by the same angles changes nothing."""
    h, given = draw(2, 9, 8), weights(8)
    cos, sin = (x[:, None] for x in (torch.arange(20.0).cos(), torch.arange(20.0).sin()))
    options = {"num_heads": 2, "iterations": 3}
    near = SF.score_attention(h, *given, rotary=(cos.to(F64), sin.to(F64)), **options)
    far = SF.score_attention(h, *given, rotary=(cos[11:].to(F64), sin[11:].to(F64)), **options)
    # float32 angles
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(near, SF.score_attention(h, *given, **options), rtol=1e-2)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3), (2, 1, 2, 3), (5,), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("masks", [(), ("padding",), ("padding", "heads")], ids=str)
def test_leading_dimensions(shape, masks):
    """Every sequence with its own part of the masks, which broadcast over leading dimensions."""
    *batch, tokens = shape
    h, given = draw(*shape, 8), weights(8)
    options = {"num_heads": 2, "iterations": 3}
    padding = draw(tokens) > 0.5 if "padding" in masks else None
    # The same for the first of the leading dimensions.
    mask = draw(*(1 for _ in batch[:1]), *batch[1:], 2, tokens, tokens, seed=3) if "heads" in masks else None
    with planned(rows=2 * tokens or 1):
        out = SF.score_attention(h, *given, key_padding_mask=padding, attn_mask=mask, **options)
    assert out.shape == h.shape
    for index in product(*(range(size) for size in batch)):
        own = mask if mask is None else mask.expand(*batch, -1, -1, -1)[index]
        expected = SF.score_attention(h[index], *given, key_padding_mask=padding, attn_mask=own, **options)
        torch.testing.assert_close(out[index], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0)])
def test_failure_case_28_vmap_over_states_and_masks(in_dims):
    h, given = draw(4, 2, 6, 8), weights(8)
    padding = draw(4, 2, 6) > 0.5
    h, padding = (x if dim == 0 else x[0] for x, dim in zip((h, padding), in_dims, strict=True))

    def run(h, padding):
        return SF.score_attention(h, *given, num_heads=2, iterations=3, key_padding_mask=padding)

    expected = [run(*(x if dim is None else x[i] for x, dim in zip((h, padding), in_dims, strict=True))) for i in range(4)]
    torch.testing.assert_close(torch.func.vmap(run, in_dims=in_dims)(h, padding), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_backend
def test_failure_case_14_added_masks_under_autocast(backend, dtype):
    """In float32 or in autocast's dtype: the call with all else cast by hand."""
    h, given = draw(2, 6, 8, dtype=torch.float32), weights(8, torch.float32)
    options = {"num_heads": 2, "iterations": 3, "rotary": 10.0, "backend": backend}
    for mask in (draw(6, 6, dtype=torch.float32), draw(6, 6, dtype=dtype)):
        with torch.autocast("cpu", dtype=dtype):
            found = SF.score_attention(h, *given, attn_mask=mask, **options)
        expected = SF.score_attention(h.to(dtype), *(x.to(dtype) for x in given), attn_mask=mask, **options)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`blas` without torch's kernel for a CPU, with room for the scores of few query rows."""
    monkeypatch.setattr(sdpa, "forward", sdpa.chunked)
    monkeypatch.setattr(sdpa, "backward", sdpa.chunked_backward)
    monkeypatch.setenv("SCORE_KERNELS_SCRATCH_MB", "0.001")


IN_SCORES = [c for c in cases.single("attention") if c.keys() & {"heads", "causal", "mask", "scale", "sequences"}]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("choices", IN_SCORES, ids=cases.label)
def test_attention_by_query_rows(choices):
    case = build("attention", rows=18, **choices)
    with planned(rows=9, backward_rows=9, interval=2):
        assert_close(gradients(case, "blas"), gradients(case, "oracle"))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_scores_come_a_few_query_rows_at_a_time():
    q = draw(1, 1, 16, 4)
    chunks = [(rows, keys.stop) for rows, keys in sdpa._chunks(q, causal=True)]
    assert chunks == [(slice(start, start + 2), start + 2) for start in range(0, 16, 2)]


def test_a_tile_is_whole_sequences():
    h, given = draw(500, 48, 64, dtype=torch.float32), weights(64, torch.float32)
    (plan,) = sk.explain(SF.score_attention, h, *given, num_heads=4, iterations=9)
    assert (plan.backend, plan.rows % 48, plan.backward_rows % 48) == ("blas", 0, 0)
    assert 48 < plan.backward_rows < plan.rows < 500 * 48
    seen = []
    original = blas.Attention.tiles

    def tiles(self, total, rows):
        for tile in original(self, total, rows):
            seen.append(tile)
            yield tile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas.Attention, "tiles", tiles)
        SF.score_attention(draw(5, 7, 4), *weights(4), num_heads=2, iterations=2)
        with planned(rows=15):
            SF.score_attention(draw(5, 7, 4), *weights(4), num_heads=2, iterations=2)
    assert seen == [slice(0, 35), slice(0, 14), slice(14, 28), slice(28, 35)]
