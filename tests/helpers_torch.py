"""Small problems in the ops' flat form and as keyword arguments, for the tests of how the ops sit in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from score_kernels import arguments, blas
from score_kernels import functional as SF
from score_kernels.problem import LEADING, SHAPES

D, H = 8, 12


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.4) -> Tensor:
    """Normal numbers, the same in every dtype but for the rounding."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def parameters(op: str, *, gated: bool = False, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Any]:
    """Weights and biases of an op by name."""
    sizes = {"D": D, "H": H}
    found = {}
    for seed, (name, dims) in enumerate(SHAPES[op].items()):
        if not name.startswith("norm_") and (gated or not name.endswith("_gate")):
            found[name] = draw(*(sizes[d] for d in dims), dtype=dtype, seed=seed).requires_grad_(grad)
    return found


def call(op: str, h: Tensor, given: dict[str, Any], **options: Any) -> Tensor:
    """`score_<op>` with its parameters by name."""
    return getattr(SF, f"score_{op}")(h, **given, **{"iterations": 3, **options})


def flat(
    op: str, h: Tensor, given: dict[str, Any], *, grad: bool = False, iterations: int = 2, **options: Any
) -> tuple[Any, ...]:
    """The arguments of `torch.ops.score_kernels.<op>`: leading tensors, the list of parameters, options; all tensors leaves."""
    checked = arguments.check(op, h, given, iterations, **{"activation": "silu", **options})
    leaves = [None if x is None else x.detach().requires_grad_(grad) for x in checked.tensors]
    return (*leaves[:LEADING], leaves[LEADING:], *checked.options)


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
