"""The ring: what a backward launch leaves behind, and the gradients of the parameters that are products and sums of it.

A launch writes a record for each iteration, stage and row of its chunk; the next launch overwrites them. Sums over rows run in
a fixed order, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from score_kernels.plan import HALVES
from score_kernels.pointers import NORM
from score_kernels.problem import LEADING, SHAPES, Problem, extent, in_half

from .configs import SCALES


class Layer(NamedTuple):
    """A weight and its bias. Gradients of F: the weight's is left^T right, the bias's the sum of left over rows.

    unscaled: left is the gradient of the whole update, w F(x), so that its sums take the factor w of their stage.
    """

    weight: str
    bias: str
    left: str
    right: str
    unscaled: bool = False


# Of each op: the fields of a record with their widths, in the order in which kernels write them; what they are for.
FIELDS: dict[str, dict[str, str]] = {
    "linear": {"x": "D", "da": "D"},
    "mlp": {"x": "D", "g": "D", "u": "H", "dz": "H", "dgate": "H"},
    "attention": {"x": "D", "g": "D", "u": "D", "dqkv": "3D"},
}
# Behind them, of a block whose norm follows it: what the gradients of the norm are sums of.
NORM_FIELDS = {"dgain": "D", "dbias": "D"}
LAYERS: dict[str, tuple[Layer, ...]] = {
    "linear": (Layer("weight", "bias", "da", "x"),),
    "mlp": (
        Layer("w1", "b1", "dz", "x"),
        Layer("w2", "b2", "g", "u", unscaled=True),
        Layer("w_gate", "b_gate", "dgate", "x"),
    ),
    "attention": (Layer("w_qkv", "b_qkv", "dqkv", "x"), Layer("w_out", "b_out", "g", "u", unscaled=True)),
}

# No layers, but biases as theirs: sums.
NORM_LAYERS = (Layer("", "norm_weight", "dgain", ""), Layer("", "norm_bias", "dbias", ""))

# Where the norm's gain and bias stand before a layer, its right field is the normed state without them.
NORMED = "x"

# A part of a product has at least so many rows, that it costs more than to add it up.
PART_ROWS = 256


def wanted_parameters(problem: Problem, needs: Sequence[bool]) -> set[str]:
    """The names of the parameters that want a gradient, by the flags of all inputs."""
    names = [name for name, tensors in problem.parameters.items() for _ in tensors]
    return {name for name, need in zip(names, needs[LEADING:], strict=False) if need}


def rings(problem: Problem, wanted: set[str], rows: int, parts: int) -> dict[str, Ring]:
    """Of the op, or of each half of a transformer."""
    if problem.op != "transformer":
        return {problem.op: Ring(problem, wanted, rows, parts)}
    post, made = problem.options.norm_placement == "post", {}
    for op in HALVES:
        names = {name for name in SHAPES[op] if in_half(op, name) in wanted}
        # What reaches attention has w in it, of the mlp as well where a norm is between the update and it.
        made[op] = Ring(problem.half(op), names, rows, parts, follows=post, weighted=post or op == "attention")
    return made


class Ring:
    """wanted: names of parameters. rows: of a launch, at most. parts: of a product. follows: whether the norm follows the
    block. weighted: whether g is w g already."""

    def __init__(
        self, problem: Problem, wanted: set[str], rows: int, parts: int, follows: bool = False, weighted: bool = False
    ) -> None:
        width = {"D": problem.features, "H": problem.hidden}
        every_field = FIELDS[problem.op] | (NORM_FIELDS if follows else {})
        fields = {name: extent(w, width) for name, w in every_field.items() if name != "dgate" or problem.gated}
        every_layer = (e for e in (*LAYERS[problem.op], *NORM_LAYERS) if e.left in fields)
        layers = [e._replace(unscaled=e.unscaled and not weighted) for e in every_layer]
        self.problem, self.parts, self.fields, self.wanted = problem, parts, fields, wanted
        # The right field that the norm's gain and bias stand before.
        self.normed = None if follows else NORMED
        self.iterations, self.stages = problem.iterations - problem.first_grad, problem.stages
        before = wanted.intersection(NORM)
        self.layers = [e for e in layers if {e.weight, e.bias} & wanted or (e.right == self.normed and before)]
        # A gain needs the products of the layers that it stands before; biases need sums only.
        multiplied = [e for e in self.layers if e.weight in wanted or (e.right == self.normed and "norm_weight" in before)]
        size = self.iterations * self.stages * rows * sum(fields.values()) if self.layers else 0
        self.records = problem.h.new_empty(size, dtype=problem.operand_dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(problem.sets, *shape, dtype=torch.float32, device=problem.h.device)

        self.products = {e.weight: zeros(fields[e.left], fields[e.right]) for e in multiplied}
        self.sums = {e.bias: zeros(fields[e.left]) for e in self.layers}

    def add(self, rows: int) -> None:
        """Adds what a launch of so many rows wrote."""
        views = dict(zip(self.fields, self._views(rows), strict=True))
        scale = self.problem.coefficients[self.problem.first_grad :, :, 3, None].float()
        for layer, index in itertools.product(self.layers, range(self.problem.sets)):
            left = views[layer.left]
            for block in self._blocks(index):
                if layer.weight in self.products:
                    product = _product(left[block].flatten(0, 2), views[layer.right][block].flatten(0, 2), self.parts)
                    self.products[layer.weight][index] += product
                sums = left[block].sum(2, dtype=torch.float32)
                self.sums[layer.bias][index] += (sums * scale[block] if layer.unscaled else sums).sum((0, 1))

    def add_partials(self, sums: Tensor) -> None:
        """Adds what blocks that accumulate have summed, of mlp with one set: (2, columns + 4, columns), see csrc/params.h."""
        columns, hidden, features = sums.shape[2], self.problem.hidden, self.problem.features
        widths, products = (hidden, features), sums[:, :hidden, :features]
        every = zip((1, 2), widths, sums[:, columns:].sum(1), (products[0], products[1].mT), strict=True)
        for layer, width, total, product in every:
            if f"w{layer}" in self.products:
                self.products[f"w{layer}"] += product
            if f"b{layer}" in self.sums:
                self.sums[f"b{layer}"] += total[:width]

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the wanted parameters, (L, ...), by name.

        With x = gain n + bias before W, and P = left^T n, s = the sum of left: dL/dW = gain P + s bias^T,
        dL/dgain = the sum of W P over its rows, dL/dbias = s W.
        """
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            product, total = self.products.get(layer.weight), self.sums[layer.bias]
            found[layer.bias] = total
            if layer.right == self.normed:
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


def collected(
    problem: Problem,
    needs: Sequence[bool],
    grad_h: Tensor,
    grad_x0: Tensor | None,
    scalars: Tensor,
    parameters: dict[str, Tensor],
) -> list[Tensor]:
    """The gradients that are wanted, in the order and dtypes of the inputs. scalars: (T, stages x 5 + 2)."""
    leading = (problem.h, problem.x0, problem.coefficients, problem.state_scale, problem.x0_scale)
    table = scalars[:, :-SCALES].unflatten(1, (-1, 5))
    found = [
        gradient.to(like.dtype).view(like.shape)
        for need, gradient, like in zip(needs, (grad_h, grad_x0, table, scalars[:, -2], scalars[:, -1]), leading, strict=False)
        if need and like is not None and gradient is not None
    ]
    flags = iter(needs[LEADING:])
    for name, tensors in problem.parameters.items():
        for index, parameter in enumerate(tensors):
            if next(flags):
                sets = parameters[name]
                # Copies: an operator's outputs must not share memory.
                found.append((sets[index] if len(tensors) > 1 else sets.sum(0)).to(parameter.dtype, copy=True))
    return found


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
