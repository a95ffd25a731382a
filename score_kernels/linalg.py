"""The arithmetic of the `blas` backend on tiles of rows: in-place updates, products, dot products."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many columns of the narrower operand the BLAS, which takes transposes as they are, is faster than oneDNN.
NARROW = 128

# A coefficient: a number on the CPU, a 0-dim tensor elsewhere, so that reading it does not wait for the device.
Number = float | Tensor


def add_(y: Tensor, a: Number, x: Tensor) -> Tensor:
    """y <- y + a x"""
    return y.addcmul_(x, a) if isinstance(a, Tensor) else y.add_(x, alpha=a)


def scale_(y: Tensor, a: Number) -> Tensor:
    """y <- a y"""
    return y if isinstance(a, float) and a == 1.0 else y.mul_(a)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b over all elements."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (M, K), W (N, K), b (N,); transposed views cost no copy of W.

    In float32 on a CPU this calls oneDNN, which torch links beside its BLAS and which has AVX-512 kernels for every vendor's
    processors: MKL, torch's default for this product, runs at half their rate on AMD's (docs/numerics.md).
    `torch.backends.mkldnn.flags(enabled=False)` selects the BLAS, as everywhere in torch.
    """
    if x.numel() and _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def arranged(weight: Tensor) -> Tensor:
    """The weight for many products: with contiguous columns where oneDNN has them, which packs those faster at each of them."""
    return weight.t().contiguous().t() if _by_onednn(weight) else weight


def add_outer_(y: Tensor, w: Number, a: Tensor, b: Tensor) -> Tensor:
    """y <- y + w a^T b, the sum over the rows of their outer products, for a (M, N), b (M, K)."""
    if isinstance(w, float) and min(y.shape) <= NARROW:
        return y.addmm_(a.t(), b, alpha=w)
    # The first operand's transpose is copied: let it be the narrower one.
    return add_(y, w, product(a.t(), b.t()) if a.shape[1] <= b.shape[1] else product(b.t(), a.t()).t())


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch._C._get_mkldnn_enabled() and onednn()


@functools.cache
def onednn() -> bool:
    """Whether torch has oneDNN's linear operator: part of what torch.compile emits for a CPU, and in no stable namespace."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
