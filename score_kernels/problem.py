"""One call of an op, checked and in one shape for every backend: tensors, parameter sets, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stages
from .devices import capturing
from .plan import HALVES

# Parameters of each op in the order in which every layer of the package passes them; D features, H hidden features.
SHAPES: dict[str, dict[str, Sequence[str]]] = {
    "linear": {"weight": "DD", "bias": "D", "norm_weight": "D", "norm_bias": "D"},
    "mlp": {
        "w1": "HD", "b1": "H", "w2": "DH", "b2": "D", "w_gate": "HD", "b_gate": "H", "norm_weight": "D", "norm_bias": "D",
    },
    "attention": {
        "w_qkv": ("3D", "D"), "b_qkv": ("3D",), "w_out": "DD", "b_out": "D", "norm_weight": "D", "norm_bias": "D",
    },
}  # fmt: skip


def in_half(op: str, name: str) -> str:
    """The name in a transformer of a parameter of one of its halves."""
    return f"{op}_{name}" if is_norm(name) else name


def is_norm(name: str) -> bool:
    """Whether a parameter is a norm's: these may be float32 beside weights of 16 bits."""
    return name.endswith(("norm_weight", "norm_bias"))


SHAPES["transformer"] = {in_half(op, name): dims for op in HALVES for name, dims in SHAPES[op].items()}

# Inputs that only this op has, none of them differentiable. They follow the parameters in the flat form.
INPUTS: dict[str, tuple[str, ...]] = {
    "attention": ("key_padding_mask", "attn_mask", "rotary_cos", "rotary_sin", "cu_seqlens"),
}
INPUTS["transformer"] = INPUTS["attention"]

# The last field of `Options` that the operators of an op take; those of other ops end with "backend".
LAST_OPTION = {"attention": "max_seqlen", "transformer": "norm_placement"}

# Tensor arguments before the parameters in the flat form: h, x0, coefficients, state_scale, x0_scale.
LEADING = 5

# A `grad_iterations` for which gradients reach every iteration.
ALL_ITERATIONS = 1 << 30

NORMS = ("none", "layernorm", "rmsnorm")

# Where a transformer has its norms: on the input of each half, or on its sum with that input.
NORM_PLACEMENTS = ("pre", "post")


class Options(NamedTuple):
    """The static half of a call; the fields are the trailing arguments of the registered operators, in this order.

    counts: how many tensors each parameter of `SHAPES[op]` has (0 absent, 1 shared by all iterations, L one per set), and
    each input of `INPUTS[op]` (0 or 1). trajectory: keep every state, for the caller or for backward.
    Behind `backend`, attention's own, and behind them a transformer's: the operators of an op end at its `LAST_OPTION`.
    max_seqlen: 0 where it is not known.
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
    num_heads: int = 1
    causal: bool = False
    scale: float = 1.0
    qk_norm: bool = False
    max_seqlen: int = 0
    norm_placement: str = "pre"

    def of(self, op: str) -> tuple[Any, ...]:
        """The fields that the operators of this op take."""
        return self[: Options._fields.index(LAST_OPTION.get(op, "backend")) + 1]


def extent(dim: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension in `SHAPES`: "D", or a multiple as "3D"; -1 where it is not known."""
    return int(dim[:-1] or 1) * sizes[dim[-1]] if dim[-1] in sizes else -1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state, accumulation and coefficients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Inside, autocast leaves the dtypes alone; some devices, as meta, have no autocast to switch off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@dataclass(frozen=True)
class Problem:
    """h (..., D); x0 like h; coefficients (T, stages, 5); state_scale, x0_scale (T,); parameters by name, each a list.

    inputs: those of `INPUTS[op]` by name, None where they are not given. known: the lengths of packed sequences, once they have
    been read; a problem that is made of this one shares them.
    """

    op: str
    h: Tensor
    x0: Tensor | None
    coefficients: Tensor
    state_scale: Tensor | None
    x0_scale: Tensor | None
    parameters: dict[str, list[Tensor]]
    inputs: dict[str, Tensor | None]
    options: Options
    known: list[list[int]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def build(cls, op: str, tensors: Sequence[Tensor | None], options: Options) -> Problem:
        """From the flat form: h, x0, coefficients, state_scale, x0_scale, *parameters, *inputs, as `options.counts` tells."""
        h, x0, coefficients, state_scale, x0_scale, *flat = tensors
        assert h is not None
        assert coefficients is not None
        rest = iter(flat)
        names = (*SHAPES[op], *INPUTS.get(op, ()))
        lists = {name: list(islice(rest, n)) for name, n in zip(names, options.counts, strict=True)}
        parameters = {name: lists[name] for name in SHAPES[op]}
        inputs = {name: next(iter(lists[name]), None) for name in INPUTS.get(op, ())}
        return cls(op, h, x0, coefficients, state_scale, x0_scale, parameters, inputs, options)  # type: ignore[arg-type]

    @property
    def iterations(self) -> int:
        return self.coefficients.shape[0]

    @property
    def stages(self) -> int:
        return self.coefficients.shape[1]

    @property
    def features(self) -> int:
        return self.h.shape[-1]

    @property
    def hidden(self) -> int:
        """H of mlp; D of linear, whose only product is D -> D; of attention 3D, its q, k and v.

        Of a transformer the wider half's: they take turns.
        """
        own = self.parameters["w1"][0].shape[0] if "w1" in self.parameters else self.features
        return max(own, 3 * self.features) if self.op in INPUTS else own

    @property
    def tokens(self) -> int:
        """Rows that belong together: of a row-wise op 1, else the longest sequence."""
        if self.op not in INPUTS:
            return 1
        packed, rows = self.inputs["cu_seqlens"], self.h.shape[-2]
        if packed is not None and readable(packed):
            rows = max(self.lengths, default=0)
        return max(rows, 1)

    @property
    def lengths(self) -> list[int]:
        """Of packed sequences, read on the host once."""
        if not self.known:
            packed = self.inputs["cu_seqlens"]
            assert packed is not None
            self.known.append(sequence_lengths(packed, self.h.shape[-2], self.options.max_seqlen))
        return self.known[0]

    @property
    def sets(self) -> int:
        return max(len(tensors) for tensors in self.parameters.values())

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

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the operands of products: h's dtype, or where h is a state in float32, that of the weights."""
        return next(iter(self.parameters.values()))[0].dtype

    def half(self, op: str) -> Problem:
        """A transformer's problem as that of one of its halves: the same but for the parameters."""
        return replace(self, op=op, parameters={name: self.parameters[in_half(op, name)] for name in SHAPES[op]})

    def set_at(self, t: int) -> int:
        return stages.parameter_set(t, self.iterations, self.sets, self.options.order)

    def parameter(self, name: str, index: int) -> Tensor | None:
        """Parameter `name` of set `index`; a parameter given once belongs to every set."""
        tensors = self.parameters[name]
        return tensors[index % len(tensors)] if tensors else None


def readable(x: Tensor) -> bool:
    """Whether x has values that can be read on the host: not while a graph is traced."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type != "meta"


def sequence_lengths(cu_seqlens: Tensor, total: int, max_seqlen: int = 0) -> list[int]:
    """The lengths of packed sequences, read on the host.

    Raises ValueError for offsets that do not cut the `total` rows, RuntimeError where a CUDA graph records the call.
    """
    if capturing(cu_seqlens.device):
        raise RuntimeError(
            "cu_seqlens: expected a call that no CUDA graph records, its values are read on the host; "
            "in a graph pad the sequences to one length and pass key_padding_mask"
        )
    offsets = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != total or any(length < 0 for length in lengths):
        raise ValueError(
            f"cu_seqlens: expected offsets from 0 to the number of rows, {total}, that do not decrease, got {_short(offsets)}"
        )
    if max_seqlen and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen: expected the longest sequence, {max(lengths)}, or more, got {max_seqlen}")
    return lengths


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
