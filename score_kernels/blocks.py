"""F and its hand-derived gradient for one tile of rows: what the `blas` backend iterates.

State, accumulation and gradients are float32 (float64); operands of products are rounded to the input's dtype first, as
tensor cores take them. Weight gradients are accumulated tile by tile in the caller's order, so they are repeatable.

A block splits F in two, so that the second half can land on the state: `u = inner(y)`, then `F(y) = outer(u)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .linalg import Number, add_, add_outer_, arranged, dot, product, scale_
from .problem import Problem

Gradients = dict[str, list[Tensor | None]]

# The rows of a tile among those of the state: a range, or their indices.
Rows = slice | Tensor


class Block:
    """Parameters of all sets in the compute dtype, the norm, and the gradient accumulators (None where not wanted)."""

    def __init__(self, problem: Problem, gradients: Gradients | None = None) -> None:
        options, dtype = problem.options, problem.compute_dtype
        self.norm, self.eps, self.slope = options.norm, options.eps, options.negative_slope
        self.activation = ACTIVATIONS[options.activation]
        self.features = [problem.features]
        self.operand_dtype, self.dtype = problem.operand_dtype, dtype
        self.parameters = {name: [p.to(dtype) for p in tensors] for name, tensors in problem.parameters.items()}
        self.weights = {name: [arranged(p) for p in ps if p.dim() == 2] for name, ps in self.parameters.items()}
        self.gradients = gradients or {}

    def tiles(self, total: int, rows: int) -> Iterator[Rows]:
        """The tiles of `total` rows, about `rows` each. The block computes on the one that was yielded last."""
        for start in range(0, total, rows):
            yield slice(start, min(start + rows, total))

    def inner(self, y: Tensor, index: int) -> Tensor:
        raise NotImplementedError

    def outer(self, u: Tensor, index: int) -> Tensor:
        """The second half of F."""
        raise NotImplementedError

    def outer_(self, y: Tensor, u: Tensor, index: int, q: Number, w: Number) -> Tensor:
        """y <- q y + w outer(u)"""
        return add_(scale_(y, q), w, self.outer(u, index))

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """For L = <g, w F(y)>: dL/dy and, if wanted, dL/dw; parameter gradients are accumulated.

        kept: what `inner_kept` kept of the same y; None: it is computed again.
        """
        raise NotImplementedError

    def inner_kept(self, y: Tensor, index: int) -> tuple[Tensor, Any]:
        """`inner`, and what `backward` would have to compute again: `kept` numbers of each row, None where that is none."""
        return self.inner(y, index), None

    @staticmethod
    def kept(problem: Problem) -> int:
        """Numbers of a row that are worth their memory in backward: they are kept beside its states."""
        return 0

    def get(self, name: str, index: int) -> Tensor | None:
        tensors = self.parameters[name]
        return tensors[index % len(tensors)] if tensors else None

    def weight(self, name: str, index: int) -> Tensor:
        """W for products x W^T."""
        tensors = self.weights[name]
        return tensors[index % len(tensors)]

    def transposed(self, name: str, index: int) -> Tensor:
        """W^T for products g W."""
        tensors = self.parameters[name]
        return tensors[index % len(tensors)].t()

    def round(self, x: Tensor) -> Tensor:
        """x as an operand of a product."""
        return x if self.operand_dtype == self.dtype else x.to(self.operand_dtype).to(self.dtype)

    def normalise(self, y: Tensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """norm(y) as an operand, and the (mean, 1/deviation) of the rows that its gradient needs."""
        x, saved = self.normed(y, index)
        return self.round(x), saved

    def normed(self, y: Tensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`normalise` without rounding."""
        gain, bias = self.get("norm_weight", index), self.get("norm_bias", index)
        if self.norm == "none":
            return y, None
        if self.norm == "layernorm":
            x, mean, rstd = torch.native_layer_norm(y, self.features, gain, bias, self.eps)
            return x, (mean, rstd)
        rstd = torch.linalg.vector_norm(y, dim=1, keepdim=True).square_().div_(y.shape[1]).add_(self.eps).rsqrt_()
        x = y * rstd
        return x if gain is None else x.mul_(gain), (rstd, rstd)

    def normalise_backward(self, dx: Tensor, y: Tensor, saved: tuple[Tensor, Tensor] | None, index: int) -> Tensor:
        """dL/dy from dx = dL/dnorm(y); rmsnorm: dy = r (dx gain - x mean(dx gain x)), x = r y."""
        if saved is None:
            return dx
        gain, bias = self.get("norm_weight", index), self.get("norm_bias", index)
        if self.norm == "layernorm":
            mask = [True, self.wants("norm_weight", index), self.wants("norm_bias", index)]
            dy, dgain, dbias = torch.ops.aten.native_layer_norm_backward(dx, y, self.features, *saved, gain, bias, mask)
            self.accumulate("norm_weight", index, dgain)
            self.accumulate("norm_bias", index, dbias)
            return dy
        rstd, _ = saved
        x = y * rstd
        if self.wants("norm_weight", index):
            self.accumulate("norm_weight", index, (dx * x).sum(0))
        dx = dx if gain is None else dx * gain
        mean = (dx * x).mean(1, keepdim=True)
        return torch.addcmul(dx, x, mean, value=-1).mul_(rstd)

    def wants(self, name: str, index: int) -> bool:
        return self.gradient(name, index) is not None

    def gradient(self, name: str, index: int) -> Tensor | None:
        tensors = self.gradients.get(name)
        return tensors[index % len(tensors)] if tensors else None

    def accumulate(self, name: str, index: int, value: Tensor) -> None:
        gradient = self.gradient(name, index)
        if gradient is not None:
            gradient.add_(value)

    def accumulate_linear(self, weight: str, bias: str, index: int, dout: Tensor, x: Tensor, w: Number = 1.0) -> None:
        """For out = x W^T + b: dW += w dout^T x and db += w (column sums of dout)."""
        dweight, dbias = self.gradient(weight, index), self.gradient(bias, index)
        if dweight is not None:
            add_outer_(dweight, w, dout, x)
        if dbias is not None:
            add_(dbias, w, dout.sum(0))


class Linear(Block):
    """F(y) = act(norm(y) W^T + b)"""

    def inner(self, y: Tensor, index: int) -> Tensor:
        x, _ = self.normalise(y, index)
        return self.activation.forward(product(x, self.weight("weight", index), self.get("bias", index)), self.slope)

    def outer(self, u: Tensor, index: int) -> Tensor:
        return u

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        x, saved = self.normalise(y, index)
        a = product(x, self.weight("weight", index), self.get("bias", index))
        dw = dot(g, self.activation.forward(a, self.slope)) if want_dw else None
        da = self.round(self.activation.backward(g * w, a, self.slope))
        self.accumulate_linear("weight", "bias", index, da, x)
        return self.normalise_backward(product(da, self.transposed("weight", index)), y, saved, index), dw


class MLP(Block):
    """F(y) = u W2^T + b2 with n = norm(y), u = act(n W1^T + b1), or gated u = act(n Wg^T + bg) * (n W1^T + b1)"""

    def inner(self, y: Tensor, index: int) -> Tensor:
        x, _ = self.normalise(y, index)
        up, gate = self._preactivations(x, index)
        return self.round(self._activate(up, gate))

    def outer(self, u: Tensor, index: int) -> Tensor:
        return product(u, self.weight("w2", index), self.get("b2", index))

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        act = self.activation
        x, saved = self.normalise(y, index)
        up, gate = self._preactivations(x, index)
        u = self.round(self._activate(up, gate))
        g = self.round(g)
        self.accumulate_linear("w2", "b2", index, g, u, w)
        du = product(g, self.transposed("w2", index))
        dw = dot(du, u) if want_dw else None
        bias = self.get("b2", index)
        if dw is not None and bias is not None:
            dw += torch.dot(g.sum(0), bias)
        du.mul_(w)
        if gate is None:
            dup, dgate = self.round(act.backward(du, up, self.slope)), None
        else:
            dup = self.round(du * act.forward(gate, self.slope))
            dgate = self.round(act.backward(du.mul_(up), gate, self.slope))
        self.accumulate_linear("w1", "b1", index, dup, x)
        dx = product(dup, self.transposed("w1", index))
        if dgate is not None:
            self.accumulate_linear("w_gate", "b_gate", index, dgate, x)
            dx += product(dgate, self.transposed("w_gate", index))
        return self.normalise_backward(dx, y, saved, index), dw

    def _preactivations(self, x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        up = product(x, self.weight("w1", index), self.get("b1", index))
        if not self.weights["w_gate"]:
            return up, None
        return up, product(x, self.weight("w_gate", index), self.get("b_gate", index))

    def _activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        act = self.activation.forward
        return act(up, self.slope) if gate is None else act(gate, self.slope) * up
