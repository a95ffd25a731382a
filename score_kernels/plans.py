"""What runs where: the backends of this machine, and the plans of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from . import ops
from .fused import FusedSequential
from .plan import Plan
from .planner import BACKENDS, FUSED


def available_backends() -> list[str]:
    """The names that `backend=` takes on this machine, slowest first."""
    machine = ops.machine_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return [name for name in BACKENDS if name not in FUSED or getattr(machine, name) is None]


class Explanation(tuple[Plan, ...]):
    """The plans of the calls that were made, in order; prints as one short table for each.

    blocks: for each plan, the module that made the call, by its name in the model and its type; "" where none did.
    """

    blocks: tuple[str, ...]

    def __new__(cls, plans: Iterable[Plan], blocks: Iterable[str]) -> Self:
        made = super().__new__(cls, plans)
        made.blocks = tuple(blocks)
        return made

    def __str__(self) -> str:
        tables = [f"{block}\n{plan}" if block else str(plan) for block, plan in zip(self.blocks, self, strict=True)]
        return "\n\n".join(tables) or "no score_kernels op was called"


def explain(fn: Callable[..., Any] | nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Calls `fn(*args, **kwargs)` once and tells how each score_kernels op in it ran, and why not on a faster backend.

    fn: one of the functional ops, a module, or anything that calls them. Of a module, it also tells which block made the call.

    Returns an `Explanation`. Raises what the call raises.
    """
    with ops.observe_plans() as plans, _callers(fn, plans) as blocks:
        fn(*args, **kwargs)
    return Explanation(plans, blocks)


@contextmanager
def _callers(fn: object, plans: list[Plan]) -> Iterator[list[str]]:
    """Collects the innermost module that made each call: whoever begins or ends, what nobody has is of the one that ran.

    Modules of a run have no hooks: those would have its FusedSequential call them one by one.
    """
    blocks: list[str] = []
    running = [""]
    handles = []

    def catch_up(*_: object) -> None:
        blocks.extend(running[-1:] * (len(plans) - len(blocks)))

    def begin(name: str, module: nn.Module, _: object) -> None:
        catch_up()
        running.append(f"{name} ({type(module).__name__})")

    def end(*_: object) -> None:
        catch_up()
        running.pop()

    def look(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(partial(begin, name or "the model")))
        handles.append(module.register_forward_hook(end, always_call=True))
        for child, inner in module.outside() if isinstance(module, FusedSequential) else module.named_children():
            look(inner, f"{name}.{child}" if name else child)

    if isinstance(fn, nn.Module):
        look(fn, "")
    try:
        yield blocks
    finally:
        catch_up()
        for handle in handles:
            handle.remove()
