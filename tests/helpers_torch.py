"""Small problems in the ops' flat form and as keyword arguments, for the tests of how the ops sit in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SEQUENCES, public
from row_wise import split
from torch import Tensor

from score_kernels import arguments, blas
from score_kernels import functional as SF
from score_kernels.plan import HALVES
from score_kernels.problem import LEADING, SHAPES, extent

D, H = 8, 12


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.4) -> Tensor:
    """Normal numbers, the same in every dtype but for the rounding."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def parameters(op: str, *, gated: bool = False, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Any]:
    """Weights and biases of an op by name."""
    sizes = {"D": D, "H": H}
    found = {}
    for seed, (name, dims) in enumerate(SHAPES[op].items()):
        if "norm" not in name and (gated or not name.endswith("_gate")):
            found[name] = draw(*(extent(d, sizes) for d in dims), dtype=dtype, seed=seed).requires_grad_(grad)
    return found


def taken(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options for this op: those on sequences have heads, attention no activation, a transformer two norms."""
    heads = {"num_heads": 2} if op in SEQUENCES else {}
    if op == "transformer":
        norms = {name: options[name] for name in ("norm_weight", "norm_bias") if name in options}
        options = {name: value for name, value in options.items() if name not in norms}
        options |= {f"{half}_{name}": x for half in HALVES for name, x in norms.items()}
    return {**heads, **{name: value for name, value in options.items() if (op, name) != ("attention", "activation")}}


def call(op: str, h: Tensor, given: dict[str, Any], **options: Any) -> Tensor:
    """`score_<op>` with its parameters by name."""
    return getattr(SF, f"score_{op}")(h, **public(op, {**given, "iterations": 3, **taken(op, options)}))


def flat(
    op: str, h: Tensor, given: dict[str, Any], *, grad: bool = False, iterations: int = 2, **options: Any
) -> tuple[Any, ...]:
    """The arguments of `torch.ops.score_kernels.<op>`: leading tensors, the list of parameters, options; all tensors leaves."""
    options = {"iterations": iterations, **taken(op, {"activation": "silu", **options})}
    checked = arguments.check(op, **split(op, {"h": h, **given, **options}))
    parameters = LEADING + sum(checked.options.counts[: len(SHAPES[op])])
    leaves = [None if x is None else x.detach().requires_grad_(grad and i < parameters) for i, x in enumerate(checked.tensors)]
    return (*leaves[:LEADING], leaves[LEADING:], *checked.options.of(op))


def equal_gradients(found: list[Tensor | None], expected: list[Tensor | None], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def break_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every result of `blas` wrong by 1e-4."""
    right = blas.forward

    def wrong(problem, plan, out):
        states = right(problem, plan, out)
        out.mul_(1 + 1e-4)
        return states

    monkeypatch.setattr(blas, "forward", wrong)
