"""`python -m score_kernels doctor --verify`: every fused kernel against float64 on this machine's GPU, and the record of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from . import functional, verified
from .activations import ACTIVATIONS
from .ops import machine_of, observe_plans
from .plan import HALVES
from .planner import FUSED
from .problem import INPUTS, NORMS, SHAPES, in_half
from .stages import SOLVERS
from .transformer_arguments import nested

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Each width of the kernels, and two that have to be padded; with the heads of attention.
HEADS = {20: 1, 64: 2, 100: 4, 128: 4, 256: 8}
WIDTHS = tuple(HEADS)
SEQUENCES, TOKENS, ITERATIONS = 6, 50, 4

# How many times the error of blas, or one rounding of an operand, a kernel may be off. Sums over rows cancel: they have more.
TIMES, TIMES_OF_SUMS = 4, 16
# tf32 has 10 bits of mantissa. Where it takes a preactivation over the kink of these, a gradient changes by a whole term, and
# blas, which computes full float32, does not show how often that happens.
EPS = {torch.float32: 2.0**-10}
KINKED = ("relu", "leaky_relu")


# What varies of a block: its activation, or who attends to whom, or where the norms are.
VARIANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "mlp", "gated mlp"), tuple(ACTIVATIONS)),
    "attention": ("every token", "long", "causal", "rotary", "qk_norm", "padding", "mask", "packed"),
    "transformer": ("post", "long", "causal", "rotary", "qk_norm", "padding", "mask", "packed"),
    "gated transformer": ("every token", "post"),
}
KINDS = tuple(VARIANTS)


@dataclass(frozen=True)
class Check:
    """A call on one backend. reason: why its planner does not take it, or what it raised; share: the largest error of its
    result and gradients against float64, in shares of what is allowed: more than 1, or NaN, is wrong."""

    backend: str
    call: str
    share: float | None
    reason: str | None = None

    @property
    def refused(self) -> bool:
        return self.share is None and str(self.reason).startswith("backend=")

    @property
    def passed(self) -> bool:
        return self.share is not None and self.share <= 1


@dataclass(frozen=True)
class Call:
    """One call: what it computes, and everything else of it by turns. square: one set of parameters, and H is D."""

    kind: str
    features: int
    dtype: torch.dtype
    variant: str
    norm: str
    solver: str
    square: bool = False

    @property
    def op(self) -> str:
        return self.kind.split()[-1]

    def __str__(self) -> str:
        dtype, width = str(self.dtype).removeprefix("torch."), "D = H" if self.square else "D"
        return f"{self.kind}, {width} = {self.features}, {dtype}, {self.variant}, {self.norm}, {self.solver}"


def calls() -> Iterator[Call]:
    """Every block in every width and dtype; every variant and every solver with every block."""
    turns = {kind: zip(itertools.cycle(every), itertools.cycle(NORMS), strict=False) for kind, every in VARIANTS.items()}
    for kind, features, dtype in itertools.product(KINDS, WIDTHS, DTYPES):
        yield Call(kind, features, dtype, *next(turns[kind]), "euler")
    for kind, every in VARIANTS.items():
        for variant in every:
            yield Call(kind, 64, torch.bfloat16, variant, "layernorm", "euler")
        for solver in SOLVERS:
            yield Call(kind, 128, torch.bfloat16, "gelu" if "gelu" in every else every[0], "rmsnorm", solver)
    # CUDA has kernels of their own for these, which keep the gradients of the weights.
    for features, dtype, activation in itertools.product(WIDTHS[:4], DTYPES[:2], ACTIVATIONS):
        yield Call("mlp", features, dtype, activation, "layernorm", "euler", square=True)


def verify(device: torch.device, tell: Callable[[str], object], given: list[Call] | None = None) -> list[Check]:
    """Checks the calls on every fused backend of the device; tell: is told how far it is."""
    backends = [name for name in FUSED if getattr(machine_of(device), name) is None]
    every = list(itertools.product(backends, list(calls()) if given is None else given))
    found = []
    with _tf32():
        for number, (backend, call) in enumerate(every, start=1):
            tell(f"{number} of {len(every)}: {backend}, {call}")
            found.append(check(backend, call, device))
    return found


def check(backend: str, call: Call, device: torch.device) -> Check:
    """One call with two sets of parameters, or one, x0 and all scales: result and gradients of every input."""
    inputs = _inputs(call, device)
    try:
        with observe_plans() as plans:
            ours = _run(backend, call, inputs, call.dtype)
    except Exception as error:
        return Check(backend, str(call), None, str(error))
    if plans[0].backend != backend:
        return Check(backend, str(call), None, f"{plans[0].backend} ran in its place")
    exact, plain = _run("reference", call, inputs, torch.float64), _run("blas", call, inputs, call.dtype)
    eps = EPS.get(call.dtype, torch.finfo(call.dtype).eps)
    shares = []
    if call.dtype == torch.float32 and call.variant in KINKED:
        exact = {"output": exact["output"]}
    for name, expected in exact.items():
        off, usual = ((x[name].double() - expected).norm() / max(expected.norm().item(), 1.0) for x in (ours, plain))
        times = TIMES if name in ("output", "h", "x0") else TIMES_OF_SUMS
        shares.append(off / (times * max(usual.item(), eps)))
    return Check(backend, str(call), torch.stack(shares).nan_to_num(torch.inf).max().item())


def run(tell: Callable[[str], object]) -> dict[str, Any]:
    """Verifies the current GPU and records what passed: "passed", and "says", lines for people."""
    if not torch.cuda.is_available():
        return {"passed": False, "says": ["there is no GPU to compare kernels on"]}
    device = torch.device("cuda", torch.cuda.current_device())
    checks = verify(device, tell)
    right = record(checks, device)
    wrong = [c for c in checks if not (c.passed or c.refused)]
    ran = sum(not c.refused for c in checks)
    says = [
        f"{ran - len(wrong)} of {ran} calls are right; auto takes {' and '.join(right) or 'no kernels'} ({verified.path()})"
    ]
    says += [f"wrong: {c.backend}, {c.call}: {c.reason or f'{c.share:.1f} times the error that is allowed'}" for c in wrong]
    return {"passed": ran > len(wrong) == 0, "says": says}


def record(checks: list[Check], device: torch.device) -> list[str]:
    """Records the backends that ran something here and were right in all of it; returns their names."""
    ran = {check.backend for check in checks if not check.refused}
    wrong = {check.backend for check in checks if not (check.passed or check.refused)}
    right = sorted(ran - wrong)
    gpu = torch.cuda.get_device_properties(device)
    facts = {"arch": gpu.major * 10 + gpu.minor, "gpu": gpu.name, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    verified.write([{"backend": name, **facts, "checks": sum(c.backend == name for c in checks)} for name in right])
    return right


def _inputs(call: Call, device: torch.device) -> dict[str, Tensor]:
    """In float64, exactly representable in the call's dtype."""
    generator, op = torch.Generator().manual_seed(0), call.op
    d, sets, hidden = call.features, 1 if call.square else 2, call.features if call.square else 2 * call.features + 9
    rows = (SEQUENCES * TOKENS,) if op not in INPUTS or call.variant == "packed" else (SEQUENCES, TOKENS)
    if call.variant == "long":
        rows = (SEQUENCES // 2, 2 * TOKENS)
    shapes: dict[str, tuple[int, ...]] = {"h": (*rows, d), "x0": (*rows, d)}
    if op == "linear":
        shapes |= {"weight": (sets, d, d), "bias": (sets, d)}
    if op in INPUTS:
        shapes |= {"w_qkv": (sets, 3 * d, d), "b_qkv": (sets, 3 * d), "w_out": (sets, d, d), "b_out": (sets, d)}
    if op in ("mlp", "transformer"):
        shapes |= {"w1": (sets, hidden, d), "b1": (sets, hidden), "w2": (sets, d, hidden), "b2": (sets, d)}
    if call.kind.startswith("gated"):
        shapes |= {"w_gate": (sets, hidden, d), "b_gate": (sets, hidden)}
    learned = {"none": (), "rmsnorm": ("norm_weight",), "layernorm": ("norm_weight", "norm_bias")}[call.norm]
    for name in learned:
        shapes |= dict.fromkeys([in_half(half, name) for half in HALVES] if op == "transformer" else [name], (sets, d))
    matrices = ("weight", "w1", "w2", "w_gate", "w_qkv", "w_out")
    inputs = {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if name in matrices else 1.0)
        for name, shape in shapes.items()
    }
    return {name: x.to(call.dtype).to(device, torch.float64) for name, x in inputs.items()}


def _run(backend: str, call: Call, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The result and the gradients of all inputs."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    scales = {
        name: torch.linspace(low, high, ITERATIONS, dtype=torch.float64).to(leaves["h"].device, _scalar(dtype)).requires_grad_()
        for name, low, high in (("dt", 0.3, 0.6), ("x0_scale", 0.2, -0.1), ("state_scale", 0.9, 1.1))
    }
    op: Callable[..., Tensor] = getattr(functional, f"score_{call.op}")
    norm = None if call.norm == "none" else call.norm
    given = {"iterations": ITERATIONS, "norm": norm, "solver": call.solver, "backend": backend}
    tensors: dict[str, Any] = dict(leaves)
    if call.op == "transformer":
        tensors = {name: x for name, x in leaves.items() if name not in SHAPES[call.op]} | nested(leaves)
    out = op(**tensors, **scales, **given, **_own(call, leaves["h"]))
    cotangent = (
        torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(call.dtype).to(out.dtype)
    )
    every = leaves | scales
    return {"output": out.detach()} | dict(zip(every, torch.autograd.grad(out, list(every.values()), cotangent), strict=True))


def _own(call: Call, h: Tensor) -> dict[str, Any]:
    """The arguments that only this block has."""
    if call.op not in INPUTS:
        return {"activation": call.variant}
    token = torch.arange(TOKENS, device=h.device)
    # The third of these sequences is empty.
    packed = torch.tensor([0, TOKENS, TOKENS + 1, TOKENS + 1, 3 * TOKENS - 9, 4 * TOKENS - 9]).clamp(max=h.shape[-2])
    of_variant: dict[str, dict[str, Any]] = {
        "every token": {},
        "long": {},
        "causal": {"causal": True},
        "rotary": {"rotary": 10000.0, "causal": True},
        "qk_norm": {"qk_norm": True},
        "padding": {"key_padding_mask": (token >= TOKENS // 2).expand(SEQUENCES, TOKENS)},
        "mask": {"attn_mask": (token[:, None] - token).abs() < 9},
        "packed": {"cu_seqlens": torch.cat([packed, packed.new_tensor([h.shape[-2]])]).to(h.device)},
        "post": {"norm_placement": "post"},
    }
    given = {"activation": "gelu"} if call.op == "transformer" else {}
    return {"num_heads": HEADS[call.features], **given, **of_variant[call.variant]}


def _scalar(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def _tf32() -> Iterator[None]:
    """float32 in tf32, without which the kernels do not take it."""
    before: Any = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
