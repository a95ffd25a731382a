"""`share`: from an ordinary stack to a SCORE model, in which one block stands for all the blocks of a run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .arguments import one_of
from .finding import examine
from .fused import Run
from .modules import ScoreLinear, ScoreMLP

__all__ = ["Shared", "share"]


@dataclass(frozen=True)
class Shared:
    """What `share` made of a stack: the runs as text, and the number of parameters before and after."""

    runs: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        return f"{'; '.join(self.runs)}: {self.parameters_before} parameters before, {self.parameters_after} after"


def share(stack: nn.Sequential, dt: float | Tensor | None = None, init: str = "first") -> nn.Sequential:
    """The SCORE twin of a stack, to be trained: every run of two or more equal blocks becomes one block, applied as often.

    The runs are those of `convert`: F is `[norm] Linear(D, D) [activation]`, which becomes a `ScoreLinear`, or `[norm]
    Linear(D, H) activation Linear(H, D)`, which becomes a `ScoreMLP`. The update is `h <- (1 - dt) h + dt F(h)`; of residual
    blocks, where F(h) is h + block(h), that is `h <- h + dt block(h)`. The rest, as head and tail, is copied, and the stack is
    not changed. The twin computes another function: it is to be trained. (With dt=1, a stack of equal layers and its twin are
    the same.)

    Args:
        stack: `nn.Sequential` (a `FusedSequential` is one), (..., in) -> (..., out).
        dt: a number, or a tensor () or (T,); None: 0.5.
        init: the parameters of the one block: those of the "first" of its run, or the "mean" of all of them.

    Returns a new `nn.Sequential`, in the stack's dtype, device and mode, whose attribute `report` is a `Shared`.
    Raises TypeError for what is no nn.Sequential, ValueError for a stack without such a run or an unknown init, and one of the
    two, as the op does, for a run whose parameters have mixed dtypes or devices.
    """
    if not isinstance(stack, nn.Sequential):
        raise TypeError(f"stack: expected an nn.Sequential, got {type(stack).__name__}; pass the part of the model that is one")
    one_of("init", init, ("first", "mean"))
    parts, tokens, found = examine(stack)
    starts = {run.start: run for run in found if run.iterations > 1}
    if not starts:
        reasons = [f"{path}: {token}" for (path, _), token in zip(parts, tokens, strict=True) if isinstance(token, str)]
        why = f"; no part of one: {', '.join(reasons)}" if reasons else ""
        raise ValueError(f"stack: expected two or more equal blocks one after the other, got none{why}")
    # One memo for all: what is tied in the stack is tied in the copy.
    memo: dict[int, object] = {}
    layers: list[nn.Module] = []
    runs = []
    at = 0
    while at < len(parts):
        if at in starts:
            run, stop = Run.of(starts[at], tokens), starts[at].stop
            layers.append(_twin(run, parts[at:stop], dt, init))
            runs.append(str(run))
            at = stop
        else:
            layers.append(copy.deepcopy(parts[at][1], memo))
            at += 1
    shared = nn.Sequential(*layers)
    shared.training = stack.training
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (stack, shared)]
    shared.__dict__["report"] = Shared(tuple(runs), *count)
    return shared


@torch.no_grad()
def _twin(run: Run, parts: Sequence[tuple[str, nn.Module]], dt: float | Tensor | None, init: str) -> ScoreLinear | ScoreMLP:
    modules = run.modules(parts)
    assert modules is not None
    run.plan(modules)  # raises for parameters that do not go together
    state = run.state(modules)
    settings = run.settings(state.dtype)
    update = settings["update"] if run.block.residual else "contractive"
    options = {**settings, "update": update, "dt": 0.5 if dt is None else dt}
    kind: type[ScoreLinear | ScoreMLP] = ScoreLinear if run.block.op == "linear" else ScoreMLP
    twin = kind(*run.block.sizes, device=state.device, dtype=state.dtype, **options)
    for name, sets in run.parameters(modules).items():
        if sets is None:
            setattr(twin, name, None)
        else:
            getattr(twin, name).copy_(sets[0] if init == "first" else torch.stack(sets).mean(0))
    return twin.train(modules[0].training)
