"""One call of an op, checked and in one shape for every backend: tensors, parameter sets, options."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from . import stages

# Parameters of each op in the order in which every layer of the package passes them; D features, H hidden features.
SHAPES: dict[str, dict[str, str]] = {
    "linear": {"weight": "DD", "bias": "D", "norm_weight": "D", "norm_bias": "D"},
    "mlp": {
        "w1": "HD", "b1": "H", "w2": "DH", "b2": "D", "w_gate": "HD", "b_gate": "H", "norm_weight": "D", "norm_bias": "D",
    },
}  # fmt: skip

# Tensor arguments before the parameters in the flat form: h, x0, coefficients, state_scale, x0_scale.
LEADING = 5

# A `grad_iterations` for which gradients reach every iteration.
ALL_ITERATIONS = 1 << 30

NORMS = ("none", "layernorm", "rmsnorm")


class Options(NamedTuple):
    """The static half of a call; the fields are the trailing arguments of the registered operators, in this order.

    counts: how many tensors each parameter of `SHAPES[op]` has (0 absent, 1 shared by all iterations, L one per set).
    trajectory: keep every state, for the caller or for backward.
    """

    counts: tuple[int, ...]
    activation: str = "relu"
    negative_slope: float = 0.01
    norm: str = "none"
    eps: float = 1e-5
    solver: str = "euler"
    order: str = "consecutive"
    grad_iterations: int = ALL_ITERATIONS
    trajectory: bool = False
    backend: str = "auto"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, accumulation and coefficients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Inside, autocast leaves the dtypes alone; some devices, as meta, have no autocast to switch off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@dataclass(frozen=True)
class Problem:
    """h (..., D); x0 like h; coefficients (T, stages, 5); state_scale, x0_scale (T,); parameters by name, each a list."""

    op: str
    h: Tensor
    x0: Tensor | None
    coefficients: Tensor
    state_scale: Tensor | None
    x0_scale: Tensor | None
    parameters: dict[str, list[Tensor]]
    options: Options

    @classmethod
    def build(cls, op: str, tensors: Sequence[Tensor | None], options: Options) -> Problem:
        """From the flat form: h, x0, coefficients, state_scale, x0_scale, *parameters, told apart by `options.counts`."""
        h, x0, coefficients, state_scale, x0_scale, *flat = tensors
        assert h is not None
        assert coefficients is not None
        rest = iter(flat)
        parameters = {name: list(islice(rest, n)) for name, n in zip(SHAPES[op], options.counts, strict=True)}
        return cls(op, h, x0, coefficients, state_scale, x0_scale, parameters, options)  # type: ignore[arg-type]

    @property
    def iterations(self) -> int:
        return self.coefficients.shape[0]

    @property
    def features(self) -> int:
        return self.h.shape[-1]

    @property
    def hidden(self) -> int:
        """H of mlp; D of linear, whose only product is D -> D."""
        return self.parameters["w1"][0].shape[0] if self.op == "mlp" else self.features

    @property
    def sets(self) -> int:
        return max(self.options.counts)

    @property
    def gated(self) -> bool:
        return bool(self.parameters.get("w_gate"))

    @property
    def first_grad(self) -> int:
        """The first iteration that gradients reach; the state is detached there when it is not 0."""
        return max(0, self.iterations - self.options.grad_iterations)

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.h.dtype)

    def set_at(self, t: int) -> int:
        return stages.parameter_set(t, self.iterations, self.sets, self.options.order)

    def parameter(self, name: str, index: int) -> Tensor | None:
        """Parameter `name` of set `index`; a parameter given once belongs to every set."""
        tensors = self.parameters[name]
        return tensors[index % len(tensors)] if tensors else None
