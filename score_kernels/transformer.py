"""A transformer as a block of the `blas` backend: attention and mlp, iterated and reversed as one block on whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from torch import Tensor

from .attention import Attention, Kept
from .blocks import MLP, Block, Gradients, Rows
from .linalg import Number, add_, dot, scale_
from .plan import HALVES
from .problem import SHAPES, Problem, in_half


class Transformer(Block):
    """F(z) = y + mlp(y) with y = z + attention(z), or "post": F(z) = norm(y + mlp(y)) with y = norm(z + attention(z))"""

    def __init__(self, problem: Problem, gradients: Gradients | None = None) -> None:
        # Not the base's: the halves hold the parameters.
        given = gradients or {}
        of = {op: {name: given.get(in_half(op, name), []) for name in SHAPES[op]} for op in HALVES}
        self.attention, self.mlp = (self.half(problem.half(op), of[op]) for op in HALVES)
        self.post = problem.options.norm_placement == "post"
        # Who norms the sums: a half without its products, with the same parameters and gradients.
        self.norms = copy(self.attention), copy(self.mlp)
        for block in (self.attention, self.mlp) if self.post else self.norms:
            block.norm = "none"

    def half(self, problem: Problem, gradients: Gradients) -> Block:
        """The block of a half's problem."""
        return Attention(problem, gradients) if problem.op == "attention" else MLP(problem, gradients)

    def tiles(self, total: int, rows: int) -> Iterator[Rows]:
        return self.attention.tiles(total, rows)

    @staticmethod
    def kept(problem: Problem) -> int:
        return Attention.kept(problem)

    def inner(self, y: Tensor, index: int) -> Tensor:
        """F(y), or "pre": F(y) - y, what the halves add."""
        return self._inner(y, self.attention.inner(y, index), index)

    def inner_kept(self, y: Tensor, index: int) -> tuple[Tensor, Kept]:
        u, kept = self.attention.inner_kept(y, index)
        return self._inner(y, u, index), kept

    def _inner(self, y: Tensor, u: Tensor, index: int) -> Tensor:
        """`inner`, from what attention's heads made of y."""
        attended = self.attention.outer(u, index)
        middle, _ = self.norms[0].normed(y + attended, index)
        added = self.mlp.outer(self.mlp.inner(middle, index), index)
        return self.norms[1].normed(added.add_(middle), index)[0] if self.post else added.add_(attended)

    def outer_(self, y: Tensor, u: Tensor, index: int, q: Number, w: Number) -> Tensor:
        """With "pre" y <- (q + w) y + w u: where the decay cancels, q + w rounds to 1, and q y + w y would drift with T."""
        return add_(scale_(y, q if self.post else q + w), w, u)

    def backward(
        self, y: Tensor, g: Tensor, w: Number, index: int, want_dw: bool, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor | None]:
        first, second = self.norms
        if kept is None:
            u, kept = self.attention.inner_kept(y, index)
        else:
            u = self.attention.round(kept.out)
        attended = y + self.attention.outer(u, index)
        middle, saved = first.normed(attended, index)
        if self.post:
            total = middle + self.mlp.outer(self.mlp.inner(middle, index), index)
            result, of_total = second.normed(total, index)
            dw = dot(g, result) if want_dw else None
            dmiddle = second.normalise_backward(g * w, total, of_total, index)
            dmiddle.add_(self.mlp.backward(middle, dmiddle, 1.0, index, False)[0])
        else:
            dmiddle, dw = self.mlp.backward(middle, g, w, index, want_dw)
            dw = None if dw is None else dw + dot(g, middle)
            add_(dmiddle, w, g)
        dy = first.normalise_backward(dmiddle, attended, saved, index)
        return dy.add_(self.attention.backward(y, dy, 1.0, index, False, kept)[0]), dw
