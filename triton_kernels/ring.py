"""The ring: what a backward launch leaves behind, and the gradients of the parameters that are products and sums of it.

A launch writes a record for each iteration, stage and row of its chunk; the next launch overwrites them. Sums over rows run in
a fixed order, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from score_kernels.problem import Problem


class Layer(NamedTuple):
    """A weight and its bias. Gradients of F: the weight's is left^T right, the bias's the sum of left over rows.

    unscaled: left is the gradient of the whole update, w F(x), so that its sums take the factor w of their stage.
    """

    weight: str
    bias: str
    left: str
    right: str
    unscaled: bool = False


# The norm's gain and bias. Where they stand before a layer, its right field is the normed state without them.
NORM = ("norm_weight", "norm_bias")
NORMED = "x"

# A part of a product has at least so many rows, that it costs more than to add it up.
PART_ROWS = 256


class Ring:
    """fields: name -> width, in the order in which the kernel writes them. wanted: names of parameters. parts: of a product."""

    def __init__(
        self, problem: Problem, fields: dict[str, int], layers: tuple[Layer, ...], wanted: set[str], rows: int, parts: int
    ) -> None:
        self.problem, self.parts, self.fields, self.wanted = problem, parts, fields, wanted
        self.iterations, self.stages = problem.iterations - problem.first_grad, problem.coefficients.shape[1]
        before = wanted.intersection(NORM)
        self.layers = [e for e in layers if {e.weight, e.bias} & wanted or (e.right == NORMED and before)]
        # A gain needs the products of the layers that it stands before; biases need sums only.
        multiplied = [e for e in self.layers if e.weight in wanted or (e.right == NORMED and "norm_weight" in wanted)]
        size = self.iterations * self.stages * rows * sum(fields.values()) if self.layers else 0
        self.records = problem.h.new_empty(size)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(problem.sets, *shape, dtype=torch.float32, device=problem.h.device)

        self.products = {e.weight: zeros(fields[e.left], fields[e.right]) for e in multiplied}
        self.sums = {e.weight: zeros(fields[e.left]) for e in self.layers}

    def add(self, rows: int) -> None:
        """Adds what a launch of so many rows wrote."""
        views = dict(zip(self.fields, self._views(rows), strict=True))
        scale = self.problem.coefficients[self.problem.first_grad :, :, 3, None].float()
        for layer, index in itertools.product(self.layers, range(self.problem.sets)):
            left, right = views[layer.left], views[layer.right]
            for block in self._blocks(index):
                if layer.weight in self.products:
                    product = _product(left[block].flatten(0, 2), right[block].flatten(0, 2), self.parts)
                    self.products[layer.weight][index] += product
                sums = left[block].sum(2, dtype=torch.float32)
                self.sums[layer.weight][index] += (sums * scale[block] if layer.unscaled else sums).sum((0, 1))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the wanted parameters, (L, ...), by name.

        With x = gain n + bias before W, and P = left^T n, s = the sum of left: dL/dW = gain P + s bias^T,
        dL/dgain = the sum of W P over its rows, dL/dbias = s W.
        """
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            product, total = self.products.get(layer.weight), self.sums[layer.weight]
            found[layer.bias] = total
            if layer.right == NORMED:
                weight = torch.stack(self.problem.parameters[layer.weight]).float()
                found["norm_bias"] = found.get("norm_bias", 0) + (weight * total[:, :, None]).sum(1)
                if product is not None:
                    found["norm_weight"] = found.get("norm_weight", 0) + (weight * product).sum(1)
                    gain, bias = (self._stacked(name) for name in NORM)
                    product = product if gain is None else product * gain[:, None]
                    product = product if bias is None else product + total[:, :, None] * bias[:, None]
            if product is not None:
                found[layer.weight] = product
        return {name: found[name] for name in self.wanted}

    def _stacked(self, name: str) -> Tensor | None:
        """A parameter's sets in float32; None where the problem does not have it."""
        tensors = self.problem.parameters[name]
        return torch.stack(tensors).float() if tensors else None

    def _views(self, rows: int) -> Iterator[Tensor]:
        """The fields as (iterations, stages, rows, width)."""
        start = 0
        for width in self.fields.values():
            size = self.iterations * self.stages * rows * width
            yield self.records[start : start + size].view(self.iterations, self.stages, rows, width)
            start += size

    def _blocks(self, index: int) -> list[slice]:
        """The iterations of a set, from `first_grad` on, in runs."""
        first = self.problem.first_grad
        found = [t - first for t in range(first, self.problem.iterations) if self.problem.set_at(t) == index]
        if found and found[-1] - found[0] == len(found) - 1:
            return [slice(found[0], found[-1] + 1)]
        return [slice(t, t + 1) for t in found]


def _product(left: Tensor, right: Tensor, parts: int) -> Tensor:
    """left^T right: the rows in parts, to keep every multiprocessor busy, whose products are added up in order."""
    parts = min(parts, max(left.shape[0] // PART_ROWS, 1))
    size = left.shape[0] // parts
    whole = size * parts
    total = _batched(left[:whole].unflatten(0, (parts, size)), right[:whole].unflatten(0, (parts, size))).sum(0)
    return total if whole == left.shape[0] else total + _batched(left[None, whole:], right[None, whole:])[0]


def _batched(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cpu" or left.dtype == torch.float32:
        return torch.bmm(left.mT.float(), right.float())
    return torch.bmm(left.mT, right, out_dtype=torch.float32)
