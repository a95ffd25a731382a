"""What is measured: one case, as data. `suites` has the cases that there are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from score_kernels.problem import INPUTS, SHAPES, extent

MODES = ("forward", "backward", "training")


@dataclass(frozen=True)
class Case:
    """One problem: T iterations of a block of one op on `rows` rows.

    features, hidden: D and H (H = D for linear and attention). sets: L. source: where the shape comes from. graph: on a GPU,
    time the replay of a CUDA graph of the forward pass: the kernels without the cost of launching them. grad_iterations:
    gradients reach the last so many iterations (None: all). heads, tokens, causal: of attention and transformer, whose rows
    are sequences of so many tokens; attention's activation is "identity". norm_placement: of a transformer.
    """

    name: str
    op: str
    rows: int
    features: int
    hidden: int
    iterations: int
    source: str
    dtype: str = "float32"
    modes: tuple[str, ...] = ("forward",)
    activation: str = "gelu"
    norm: str | None = "layernorm"
    gated: bool = False
    bias: bool = True
    update: str = "contractive"
    solver: str = "euler"
    dt: float | None = 0.5
    sets: int = 1
    order: str = "consecutive"
    graph: bool = False
    grad_iterations: int | None = None
    heads: int = 1
    tokens: int = 1
    causal: bool = False
    norm_placement: str = "pre"

    @property
    def batch(self) -> tuple[int, ...]:
        """The dimensions of the state before its features."""
        return (self.rows // self.tokens, self.tokens) if self.op in INPUTS else (self.rows,)

    @property
    def first_grad(self) -> int:
        """The first iteration that gradients reach."""
        return 0 if self.grad_iterations is None else max(self.iterations - self.grad_iterations, 0)

    def set_at(self, t: int) -> int:
        """The parameter set of iteration t."""
        return t * self.sets // self.iterations if self.order == "consecutive" else t % self.sets

    @property
    def params(self) -> dict[str, Any]:
        """What a result's `params` says: the options of the call that are not columns of their own."""
        columns = ["name", "op", "rows", "features", "hidden", "iterations", "source", "dtype", "modes", "sets"]
        columns += [] if self.op in INPUTS else ["heads", "tokens", "causal"]
        columns += [] if self.op == "transformer" else ["norm_placement"]
        return {"L": self.sets, **{key: value for key, value in asdict(self).items() if key not in columns}}

    @property
    def options(self) -> tuple[str, ...]:
        """What sets it apart from other cases of its shape, in words."""
        words = (self.activation, self.norm or "no norm", self.solver, self.update)
        flags = {
            f"{self.heads} heads, {self.tokens} tokens": self.op in INPUTS,
            f"{self.norm_placement}-norm": self.op == "transformer" and self.norm is not None,
            "causal": self.causal,
            "gated": self.gated,
            f"L={self.sets} {self.order}": self.sets > 1,
            f"gradients through {self.grad_iterations}": self.grad_iterations is not None,
            "CUDA graph": self.graph,
        }
        return (*words, *(word for word, there in flags.items() if there))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that the case has, by the op's names, without a leading L."""
        sizes = {"D": self.features, "H": self.hidden}
        absent = set() if self.gated else {"w_gate", "b_gate"}
        unlearned = {None: ("norm_weight", "norm_bias"), "rmsnorm": ("norm_bias",)}.get(self.norm, ())
        if not self.bias:
            absent |= {name for name in SHAPES[self.op] if name.startswith("b") or name.endswith("bias")}
        given = [name for name in SHAPES[self.op] if name not in absent and not name.endswith(unlearned)]
        return {name: tuple(extent(d, sizes) for d in SHAPES[self.op][name]) for name in given}
