"""The activations of `score_kernels.activations.ACTIVATIONS` and their derivatives, in float32, by name."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(a):
    # exp of a number that is not positive cannot overflow.
    e = tl.exp(-2.0 * tl.abs(a))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0, -t, t)


@triton.jit
def _gelu_tanh_argument(a):
    return 0.7978845608028654 * (a + 0.044715 * a * a * a)


@triton.jit
def _relu(a):
    # Unlike a maximum, this keeps NaN.
    return tl.where(a < 0, 0.0, a)


@triton.jit
def activate(a, slope, S: tl.constexpr):
    """act(a)"""
    if S.activation == "relu":
        return _relu(a)
    elif S.activation == "relu2":
        return _relu(a) * _relu(a)
    elif S.activation == "leaky_relu":
        return tl.where(a < 0, a * slope, a)
    elif S.activation == "gelu":
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif S.activation == "gelu_tanh":
        return 0.5 * a * (1.0 + _tanh(_gelu_tanh_argument(a)))
    elif S.activation == "silu":
        return a * tl.sigmoid(a)
    elif S.activation == "tanh":
        return _tanh(a)
    elif S.activation == "sigmoid":
        return tl.sigmoid(a)
    else:
        tl.static_assert(S.activation == "identity")
        return a


@triton.jit
def derivative(a, slope, S: tl.constexpr):
    """act'(a); at the kinks as PyTorch has it."""
    if S.activation == "relu":
        return tl.where(a <= 0, 0.0, 1.0)
    elif S.activation == "relu2":
        return 2.0 * _relu(a)
    elif S.activation == "leaky_relu":
        return tl.where(a <= 0, slope, 1.0)
    elif S.activation == "gelu":
        return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    elif S.activation == "gelu_tanh":
        t = _tanh(_gelu_tanh_argument(a))
        return 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * a * a)
    elif S.activation == "silu":
        s = tl.sigmoid(a)
        return s * (1.0 + a * (1.0 - s))
    elif S.activation == "tanh":
        t = _tanh(a)
        return 1.0 - t * t
    elif S.activation == "sigmoid":
        s = tl.sigmoid(a)
        return s * (1.0 - s)
    else:
        tl.static_assert(S.activation == "identity")
        return tl.full(a.shape, 1.0, tl.float32)
