"""What runs where: the backends of this machine, and the plans of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import ops
from .planner import BACKENDS, Plan


def available_backends() -> list[str]:
    """The names that `backend=` takes on this machine, slowest first."""
    machine = ops.machine_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return [name for name in BACKENDS if name != "triton" or machine.triton is None]


class Explanation(tuple[Plan, ...]):
    """The plans of the calls that were made, in order; prints as one short table for each."""

    def __str__(self) -> str:
        return "\n\n".join(str(plan) for plan in self) or "no score_kernels op was called"


def explain(fn: Callable[..., Any] | nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Calls `fn(*args, **kwargs)` once and tells how each score_kernels op in it ran, and why not on a faster backend.

    fn: one of the functional ops, a module, or anything that calls them.
    """
    with ops.observe_plans() as plans:
        fn(*args, **kwargs)
    return Explanation(plans)
