"""Random problems from named options, their gradients, and the ways in which the options can be combined."""

from __future__ import annotations

import dataclasses
import itertools
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
from score_kernels.problem import SHAPES, extent
from score_kernels.stages import SOLVERS
from score_kernels.transformer_arguments import nested

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
    "heads": (2, 1, 4),
    "causal": (False, True),
    "mask": ("none", "padding", "boolean", "additive", "of sequences", "of heads", "padding additive"),
    "scale": (None, 0.7),
    "rotary": ("none", "base", "tables"),
    "qk_norm": (False, True),
    "sequences": ("dense", "packed"),
    "placement": ("pre", "post"),
}

# The ops whose rows are sequences.
SEQUENCES = ("attention", "transformer")

# Options, and values of options, that only some ops have.
ONLY: dict[str, tuple[str, ...]] = {
    "activation": ("linear", "mlp", "transformer"),
    "gate": ("mlp", "transformer"),
    **dict.fromkeys(("heads", "causal", "mask", "scale", "rotary", "qk_norm", "sequences"), SEQUENCES),
    "placement": ("transformer",),
}
TWO_BIASES = {"bias": ("first", "last")}


def values(op: str) -> dict[str, tuple[Any, ...]]:
    """The options of an op with their values."""
    return {
        name: tuple(v for v in known if op != "linear" or v not in TWO_BIASES.get(name, ()))
        for name, known in OPTIONS.items()
        if op in ONLY.get(name, (op,))
    }


@dataclasses.dataclass
class Case:
    """A call of `score_<op>` with `arguments`, and the tensors in them that gradients are taken of, by name.

    A transformer's parameters are arguments by their flat names, as for the oracle.
    """

    op: str
    arguments: dict[str, Any]
    leaves: dict[str, Tensor]


def build(
    op: str,
    *,
    rows: int = 11,
    features: int | None = None,
    hidden: int = 7,
    iterations: int = 5,
    dtype: torch.dtype = F64,
    seed: int = 0,
    gain: float | None = None,
    device: str = "cpu",
    **choices: Any,
) -> Case:
    """A random problem; `choices` are values of OPTIONS. gain: of the weights; a product keeps the size of its input at 1.

    By default 0.7; less for a transformer, whose state grows by residuals of its own.

    The rows of ops on sequences are sequences of 3, or packed ones, or one where the layout is "vector".
    """
    if features is None:
        features = 8 if op in SEQUENCES else 5
    if gain is None:
        gain = 0.5 if op == "transformer" else 0.7
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

    batch = {"batch": (-(-rows // 2), 2), "vector": ()}.get(chosen["layout"], (rows,))
    if op in SEQUENCES:
        third = -(-rows // 3)
        dense = {"batch": (2, -(-third // 2), 3), "vector": (rows,)}.get(chosen["layout"], (third, 3))
        packed = (2, -(-rows // 2)) if chosen["layout"] == "batch" else (rows,)
        batch = dense if chosen["sequences"] == "dense" else packed

    def state(name: str) -> Tensor:
        if chosen["layout"] != "transposed":
            return leaf(name, *batch, features)
        x = leaf(name, features, *reversed(batch))
        leaves[name] = x.permute(*reversed(range(x.dim())))
        return leaves[name]

    kind, _, form = chosen["sets"].partition(" ")
    count = max(iterations, 1) if kind == "T" else min(int(kind), max(iterations, 1))

    def parameter(name: str, *shape: int, scale: float, shift: float = 0.0) -> Tensor | list[Tensor]:
        group = "norm" if "norm" in name else "weights" if name.startswith("w") else "biases"
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
    blocks: dict[str, dict[str, Sequence[str]]] = {
        "linear": {"weight": "DD", "bias": "D"},
        "mlp": {"w1": "HD", "b1": "H", "w2": "DH", "b2": "D"},
        "attention": {"w_qkv": ("3D", "D"), "b_qkv": ("3D",), "w_out": "DD", "b_out": "D"},
    }
    blocks["transformer"] = blocks["attention"] | blocks["mlp"]
    shapes = blocks[op]
    shapes |= {"none": {}, "gate": {"w_gate": "HD"}, "gate bias": {"w_gate": "HD", "b_gate": "H"}}[chosen["gate"]]
    first, last = ("bias", "b1", "b_qkv"), ("bias", "b2", "b_out")
    absent = {"all": (), "none": (*first, *last), "first": last, "last": first}[chosen["bias"]]
    for name, dims in shapes.items():
        scale = gain / width[dims[-1]] ** 0.5 if name.startswith("w") else 0.3
        arguments[name] = None if name in absent else parameter(name, *(extent(d, width) for d in dims), scale=scale)
    norm, *learned = chosen["norm"].split()
    for half in ("attention_", "mlp_") if op == "transformer" else ("",):
        if "gain" in learned:
            arguments[f"{half}norm_weight"] = parameter(f"{half}norm_weight", features, scale=0.2, shift=1.0)
        if "bias" in learned:
            arguments[f"{half}norm_bias"] = parameter(f"{half}norm_bias", features, scale=0.2)
    if chosen["x0"] != "none":
        arguments |= {"x0": state("x0"), "x0_scale": factor("x0_scale", chosen["x0"], 0.7)}
    arguments |= {name: chosen[name] for name in ("update", "solver", "order", "grad_iterations")}
    if op in ONLY["heads"]:
        arguments |= attention_inputs(chosen, batch, features, dtype, generator, device)
    if op in ONLY["activation"]:
        arguments |= {"activation": chosen["activation"], "negative_slope": 0.2}
    if op == "transformer":
        arguments["norm_placement"] = chosen["placement"]
    arguments |= {
        "norm": None if norm == "none" else norm,
        "eps": 1e-2,  # large enough to be missed
        "iterations": iterations,
        "dt": factor("dt", chosen["dt"], 0.4),
        "state_scale": factor("state_scale", chosen["state_scale"], 0.9),
        "return_trajectory": chosen["trajectory"] == "return",
        "save_trajectory": chosen["trajectory"] == "save",
    }
    for x in leaves.values():
        x.requires_grad_()
    return Case(op, arguments, leaves)


def attention_inputs(
    chosen: Mapping[str, Any], batch: Sequence[int], features: int, dtype: torch.dtype, generator: torch.Generator, device: str
) -> dict[str, Any]:
    """The arguments that only attention takes, for a state (*batch, features). Some rows of the masks let nothing through."""
    heads = chosen["heads"] if features % (2 * chosen["heads"]) == 0 else 1
    given = {"num_heads": heads, "causal": chosen["causal"], "scale": chosen["scale"], "qk_norm": chosen["qk_norm"]}
    *sequences, tokens = batch

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    if "padding" in chosen["mask"]:
        given["key_padding_mask"] = drawn(*sequences, tokens) > 0.7
        if sequences and sequences[0] > 1:
            given["key_padding_mask"][0] = True
    shapes = {"of sequences": (*sequences, 1, tokens, tokens), "of heads": (heads, tokens, tokens)}
    shape = shapes.get(chosen["mask"], (tokens, tokens))
    if chosen["mask"] in ("boolean", "of sequences"):
        given["attn_mask"] = drawn(*shape) > -0.5
        given["attn_mask"][..., :1, :] = False
    elif chosen["mask"] not in ("none", "padding"):
        given["attn_mask"] = drawn(*shape)
        given["attn_mask"][drawn(*shape) > 0.8] = -torch.inf
        given["attn_mask"][drawn(*shape) > 1.2] = torch.finfo(dtype).min
        given["attn_mask"][..., :1, :] = -torch.inf
        given["attn_mask"] = given["attn_mask"].to(dtype)
    if chosen["sequences"] == "packed":
        lengths = [3, 0, 1, 3, 4, 0]
        while sum(lengths) < tokens:
            lengths += lengths
        offsets = torch.tensor([0, *itertools.accumulate(lengths)]).clamp(max=tokens)
        given["cu_seqlens"] = torch.cat([offsets, offsets[-1:]]).to(torch.int32)
    width = features // heads // 2
    if chosen["rotary"] == "base" and width and features // heads % 2 == 0:
        given["rotary"] = 30.0
    elif chosen["rotary"] != "none" and width:
        # No rotation: of another length too.
        positions = 4 if chosen["sequences"] == "packed" else tokens
        tables = [drawn(positions + 1, max(width - 1, 1)) for _ in range(2)]
        given["rotary"] = tuple(table.to(device, F64 if dtype == F64 else torch.float32) for table in tables)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


def call(case: Case, backend: str) -> Tensor:
    """The output on a backend, or of the textbook oracle."""
    if backend == "oracle":
        return oracle.score(case.op, **case.arguments)
    return getattr(SF, f"score_{case.op}")(**public(case.op, case.arguments), backend=backend)


def public(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with parameters by their flat names as `score_<op>` takes them."""
    if op != "transformer":
        return dict(arguments)
    return {name: x for name, x in arguments.items() if name not in SHAPES[op]} | nested(arguments)


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
    """`replace` has no dt and no solver; packed sequences have no masks."""
    stack = choices.get("solver", "euler") == "euler" and choices.get("dt", "default") == "default"
    unmasked = choices.get("mask", "none") == "none"
    return (choices.get("update") != "replace" or stack) and (choices.get("sequences") != "packed" or unmasked)


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
