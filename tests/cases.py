"""Random problems from named options, their gradients, and the ways in which the options can be combined."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any
from unittest import mock

import oracle
import torch
from torch import Tensor

from score_kernels import functional as SF
from score_kernels import ops
from score_kernels.activations import ACTIVATIONS
from score_kernels.stages import SOLVERS

F64 = torch.float64

# Option -> its values, the first being the default. Every pair of values occurs in `pairwise(op)`.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", *(name for name in ACTIVATIONS if name != "gelu")),
    "norm": ("none", "layernorm", "layernorm gain", "layernorm bias", "layernorm gain bias", "rmsnorm", "rmsnorm gain"),
    "update": ("contractive", "residual", "replace"),
    "solver": tuple(SOLVERS),
    "dt": ("default", "float", "scalar", "vector"),
    "sets": ("1", "2 stacked", "3 list", "T stacked", "T list"),
    "shared": ("nothing", "biases", "norm", "weights"),
    "order": ("consecutive", "cyclic"),
    "x0": ("none", "plain", "float", "scalar", "vector"),
    "state_scale": ("none", "float", "scalar", "vector"),
    "bias": ("all", "none", "first", "last"),
    "gate": ("none", "gate", "gate bias"),
    "grad_iterations": (None, 1, 2, 100),
    "trajectory": ("none", "return", "save"),
    "layout": ("rows", "batch", "transposed", "vector"),
}

MLP_ONLY = {"gate": ("gate", "gate bias"), "bias": ("first", "last")}


def values(op: str) -> dict[str, tuple[Any, ...]]:
    """The options of an op with their values."""
    return {
        name: tuple(v for v in known if op == "mlp" or v not in MLP_ONLY.get(name, ()))
        for name, known in OPTIONS.items()
        if op == "mlp" or name != "gate"
    }


@dataclasses.dataclass
class Case:
    """A call of `score_<op>` with `arguments`, and the tensors in them that gradients are taken of, by name."""

    op: str
    arguments: dict[str, Any]
    leaves: dict[str, Tensor]


def build(
    op: str,
    *,
    rows: int = 11,
    features: int = 5,
    hidden: int = 7,
    iterations: int = 5,
    dtype: torch.dtype = F64,
    seed: int = 0,
    gain: float = 0.7,
    device: str = "cpu",
    **choices: Any,
) -> Case:
    """A random problem; `choices` are values of OPTIONS. gain: of the weights; a product keeps the size of its input at 1."""
    chosen = {name: known[0] for name, known in OPTIONS.items()} | choices
    unknown = set(chosen) - set(OPTIONS)
    assert not unknown, f"no such option: {unknown}"
    generator = torch.Generator().manual_seed(seed)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        # Drawn in float64, so that a problem is the same in every dtype but for the rounding.
        drawn = torch.randn(shape, generator=generator, dtype=F64) * scale + shift
        leaves[name] = drawn.to(device, dtype)
        return leaves[name]

    def state(name: str) -> Tensor:
        shapes = {"batch": (-(-rows // 2), 2, features), "transposed": (features, rows), "vector": (features,)}
        x = leaf(name, *shapes.get(chosen["layout"], (rows, features)))
        if chosen["layout"] == "transposed":
            x = leaves[name] = x.t()
        return x

    kind, _, form = chosen["sets"].partition(" ")
    count = max(iterations, 1) if kind == "T" else min(int(kind), max(iterations, 1))

    def parameter(name: str, *shape: int, scale: float, shift: float = 0.0) -> Tensor | list[Tensor]:
        group = "norm" if name.startswith("norm") else "weights" if name.startswith("w") else "biases"
        if count == 1 or chosen["shared"] == group:
            return leaf(name, *shape, scale=scale, shift=shift)
        if form == "stacked":
            return leaf(name, count, *shape, scale=scale, shift=shift)
        return [leaf(f"{name}[{i}]", *shape, scale=scale, shift=shift) for i in range(count)]

    def factor(name: str, form: str, middle: float) -> float | Tensor | None:
        shapes = {"scalar": (), "vector": (iterations,)}
        coefficient_dtype = F64 if dtype == F64 else torch.float32
        if form in shapes:
            return leaf(name, *shapes[form], scale=0.1 * middle, shift=middle, dtype=coefficient_dtype)
        return middle if form == "float" else None

    arguments: dict[str, Any] = {"h": state("h")}
    width = {"D": features, "H": hidden}
    shapes = {"weight": "DD", "bias": "D"} if op == "linear" else {"w1": "HD", "b1": "H", "w2": "DH", "b2": "D"}
    shapes |= {"none": {}, "gate": {"w_gate": "HD"}, "gate bias": {"w_gate": "HD", "b_gate": "H"}}[chosen["gate"]]
    absent = {"all": (), "none": ("bias", "b1", "b2"), "first": ("b2",), "last": ("b1",)}[chosen["bias"]]
    for name, dims in shapes.items():
        scale = gain / width[dims[-1]] ** 0.5 if name.startswith("w") else 0.3
        arguments[name] = None if name in absent else parameter(name, *(width[d] for d in dims), scale=scale)
    norm, *learned = chosen["norm"].split()
    if "gain" in learned:
        arguments["norm_weight"] = parameter("norm_weight", features, scale=0.2, shift=1.0)
    if "bias" in learned:
        arguments["norm_bias"] = parameter("norm_bias", features, scale=0.2)
    if chosen["x0"] != "none":
        arguments |= {"x0": state("x0"), "x0_scale": factor("x0_scale", chosen["x0"], 0.7)}
    arguments |= {name: chosen[name] for name in ("activation", "update", "solver", "order", "grad_iterations")}
    arguments |= {
        "norm": None if norm == "none" else norm,
        "eps": 1e-2,  # large enough to be missed
        "negative_slope": 0.2,
        "iterations": iterations,
        "dt": factor("dt", chosen["dt"], 0.4),
        "state_scale": factor("state_scale", chosen["state_scale"], 0.9),
        "return_trajectory": chosen["trajectory"] == "return",
        "save_trajectory": chosen["trajectory"] == "save",
    }
    for x in leaves.values():
        x.requires_grad_()
    return Case(op, arguments, leaves)


def call(case: Case, backend: str) -> Tensor:
    """The output on a backend, or of the textbook oracle."""
    if backend == "oracle":
        return oracle.score(case.op, **case.arguments)
    return getattr(SF, f"score_{case.op}")(**case.arguments, backend=backend)


def cotangent(like: Tensor, seed: int = 1) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return drawn.to(like.device, like.dtype)


def gradients(case: Case, backend: str, wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The output, as "output", and the gradients of the wanted leaves (all) for a random cotangent; unused leaves get zero."""
    names = list(case.leaves if wanted is None else wanted)
    for name, x in case.leaves.items():
        x.requires_grad_(name in names)
    out = call(case, backend)
    if not names:
        assert not out.requires_grad
        return {"output": out}
    found = torch.autograd.grad(out, [case.leaves[n] for n in names], cotangent(out), materialize_grads=True)
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def second_gradients(case: Case, backend: str) -> dict[str, Tensor]:
    """Gradients of <v, gradients> for random v, of every leaf and of the first cotangent; an independent one gets zero."""
    out = call(case, backend)
    first = cotangent(out).requires_grad_()
    leaves = [*case.leaves.values(), first]
    found = torch.autograd.grad(out, leaves[:-1], first, create_graph=True, materialize_grads=True)
    pairs = [(g, cotangent(g, seed=2 + i)) for i, g in enumerate(found) if g.requires_grad]
    second = torch.autograd.grad([g for g, _ in pairs], leaves, [v for _, v in pairs], materialize_grads=True)
    return dict(zip([*case.leaves, "cotangent"], second, strict=True))


def substitute(case: Case, tensors: Sequence[Tensor], names: Sequence[str]) -> Case:
    """The case with other tensors for the leaves of these names."""
    new = {id(case.leaves[name]): x for name, x in zip(names, tensors, strict=True)}

    def swap(value: Any) -> Any:
        return [swap(x) for x in value] if isinstance(value, list) else new.get(id(value), value)

    return Case(case.op, {name: swap(value) for name, value in case.arguments.items()}, {})


def laid_out(case: Case, layout: Callable[[Tensor], Tensor]) -> Case:
    """The same values, every tensor in another layout."""
    names = list(case.leaves)
    moved = [layout(case.leaves[name].detach()).requires_grad_() for name in names]
    for name, x in zip(names, moved, strict=True):
        assert torch.equal(x, case.leaves[name])
    new = substitute(case, moved, names)
    new.leaves = dict(zip(names, moved, strict=True))
    return new


# The same values in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone(),
    "every second element": lambda x: torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[
        ..., ::2
    ].copy_(x),
    "every second row": lambda x: (
        torch.zeros(2 * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)[::2].copy_(x) if x.dim() else x.clone()
    ),
    "part of a wider row": lambda x: torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)[
        ..., 2:-1
    ].copy_(x),
    "permuted batch": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() else x.clone(),
}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    """Each tensor within `tolerance` of the expected one, relative to its norm, or to 1 where little is left of it."""
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert b.isfinite().all(), f"{name}: the expected values are not finite, choose another problem"
        error = ((a - b).norm() / max(b.norm().item(), 1.0)).item()
        assert error <= tolerance, f"{name}: error {error:.2e} of {b.norm().item():.2e}, tolerance {tolerance:.0e}"


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"{name}: differs in {(found[name] != expected[name]).sum()} elements"


@contextmanager
def planned(**fields: int) -> Iterator[None]:
    """Inside, every plan has these fields: small tiles, a chosen checkpoint interval, rows of a launch and programs."""
    original = ops.plan_of
    with mock.patch.object(ops, "plan_of", lambda problem: dataclasses.replace(original(problem), **fields)):
        yield


def legal(choices: Mapping[str, Any]) -> bool:
    """`replace` has no dt and no solver."""
    return choices.get("update") != "replace" or (
        choices.get("solver", "euler") == "euler" and choices.get("dt", "default") == "default"
    )


def single(op: str) -> list[dict[str, Any]]:
    """Every value of every option on its own."""
    return [{name: value} for name, known in values(op).items() for value in known]


def pairwise(op: str) -> list[dict[str, Any]]:
    """Choices of all options in which every legal pair of two options' values occurs: greedy, the same every time."""
    known = values(op)
    pairs = {
        ((a, x), (b, y)): None for a, b in combinations(known, 2) for x, y in product(known[a], known[b]) if legal({a: x, b: y})
    }
    rng = random.Random(0)
    cover = []
    while pairs:
        chosen = dict(next(iter(pairs)))
        for name in rng.sample([n for n in known if n not in chosen], len(known) - 2):
            new = [v for v in known[name] if legal({**chosen, name: v})]
            chosen[name] = max(new, key=lambda v: sum(_pair(known, name, v, *item) in pairs for item in chosen.items()))
        for (a, x), (b, y) in combinations([(n, chosen[n]) for n in known], 2):
            pairs.pop(((a, x), (b, y)), None)
        cover.append({n: chosen[n] for n in known})
    return cover


def _pair(known: Mapping[str, Any], a: str, x: Any, b: str, y: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    names = list(known)
    return ((a, x), (b, y)) if names.index(a) < names.index(b) else ((b, y), (a, x))


def label(choices: Mapping[str, Any]) -> str:
    """A test id: the values that are not defaults."""
    parts = [f"{n}={v}" for n, v in choices.items() if v != OPTIONS[n][0]] or [f"{n}={v}" for n, v in choices.items()][:1]
    return ",".join(parts).replace(" ", "_")
