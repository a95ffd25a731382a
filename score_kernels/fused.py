"""`FusedSequential`: an `nn.Sequential` that computes runs of equal blocks in one fused call each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from . import arguments, functional, ops
from .finding import Block, Found
from .plan import Plan
from .problem import Problem, compute_dtype
from .tokens import ACTIVATION, NORM, RESIDUAL, SEQUENTIALS, Token, describe, hooked, leaves


@dataclass(frozen=True)
class Run:
    """A run of `iterations` equal blocks. tokens: of all its modules, which have to be found again for the fused call.

    options: of the op: activation, negative_slope, norm, eps, as far as they matter.
    """

    tokens: tuple[Token, ...]
    block: Block
    iterations: int
    options: dict[str, Any]

    @classmethod
    def of(cls, found: Found, tokens: Sequence[Any]) -> Run:
        values = {token.kind: token.value for token in found.block.tokens}
        activation, slope = values.get(ACTIVATION, ("identity", None))
        options = {"activation": activation, **({} if slope is None else {"negative_slope": slope})}
        if NORM in values:
            options["norm"], _, options["eps"], *_ = values[NORM]
        return cls(tuple(tokens[found.start : found.stop]), found.block, found.iterations, options)

    def modules(self, parts: Sequence[tuple[str, nn.Module]]) -> list[nn.Module] | None:
        """The modules that compute, residual blocks taken apart; None if they are no longer what the run was made of."""
        if len(parts) != len(self.tokens):
            return None
        found: list[nn.Module] = []
        for (_, module), token in zip(parts, self.tokens, strict=True):
            if token.kind != RESIDUAL:
                inside, tokens = [module], [token]
            elif type(module) is token.value[0] and not hooked(module):
                inside = [module.get_submodule(name) for name, _ in token.value[1]]
                tokens = [inner for _, inner in token.value[1]]
            else:
                return None
            if [describe(m) for m in inside] != tokens:
                return None
            found += inside
        return found

    def parameters(self, modules: Sequence[nn.Module]) -> dict[str, list[Tensor] | None]:
        """The parameters of the op by name: the modules' own, in lists, a set for each block."""
        linears = [m for m in modules if isinstance(m, nn.Linear)]
        norms = [m for m in modules if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
        owners: dict[tuple[str, str], Sequence[nn.Module]] = {("norm_weight", "norm_bias"): norms}
        if self.block.op == "linear":
            owners["weight", "bias"] = linears
        else:
            owners["w1", "b1"], owners["w2", "b2"] = linears[::2], linears[1::2]
        sets: dict[str, list[Any]] = {
            name: [getattr(owner, attribute, None) for owner in having]
            for names, having in owners.items()
            for name, attribute in zip(names, ("weight", "bias"), strict=True)
        }
        return {name: found if found and found[0] is not None else None for name, found in sets.items()}

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """The options of the op; an eps of None is that of the dtype which nn.RMSNorm computes in."""
        update = {"update": "residual" if self.block.residual else "replace", "iterations": self.iterations}
        eps = {"eps": torch.finfo(compute_dtype(dtype)).eps} if self.options.get("eps", 0) is None else {}
        return {**self.options, **eps, **update}

    def state(self, modules: Sequence[nn.Module]) -> Tensor:
        """A state (0, D) of no rows, of the dtype and on the device that the modules take."""
        weight = next(m.weight for m in modules if isinstance(m, nn.Linear))
        return weight.detach().new_empty(0, self.block.sizes[0])

    def plan(self, modules: Sequence[nn.Module]) -> Plan:
        """How the fused call will run. Raises TypeError or ValueError, as the op does, for parameters that it does not take."""
        h, op = self.state(modules), self.block.op
        given: dict[str, Any] = self.parameters(modules)
        norms = {name: given.pop(name) for name in ("norm_weight", "norm_bias")}
        call = arguments.check(op, h, given, **norms, **self.settings(h.dtype))
        return ops.plan_of(Problem.build(op, call.tensors, call.options))

    def __call__(self, h: Tensor, modules: Sequence[nn.Module]) -> Tensor:
        function: Callable[..., Tensor] = getattr(functional, f"score_{self.block.op}")
        return function(h, **self.parameters(modules), **self.settings(h.dtype))

    def __str__(self) -> str:
        sizes = " -> ".join(str(size) for size in (*self.block.sizes, self.block.sizes[0]))
        names = [self.options[name] for name in ("norm", "activation") if name in self.options]
        return f"{self.iterations} x {'residual ' if self.block.residual else ''}{self.block.op} {sizes}, {', '.join(names)}"


def _promotes(h: Tensor) -> bool:
    """Whether autocast is on for another dtype than h's: PyTorch then adds a residual in h's dtype, the ops in autocast's."""
    device = h.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return enabled and h.dtype != torch.get_autocast_dtype(device)


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that computes each of its `runs` in one fused call; `convert` makes one of a Sequential, in place.

    It holds the same children under the same names, so parameters, `state_dict`, indexing and iteration are those of the
    Sequential; a slice keeps the runs that it holds in full. (..., in) -> (..., out), dtypes as its children take.

    Each forward looks whether the modules of a run still are what they were. Where they are not (a hook, another module,
    dropout switched on), the modules themselves are called; so they are under global module hooks, symbolic tracing and
    forward-mode differentiation.
    """

    # Path of a run's first module -> the run.
    runs: Mapping[str, Run] = {}

    def forward(self, input: Any) -> Any:
        if not self.runs or not isinstance(input, Tensor) or _has_any_global_hook() or forward_ad._current_level >= 0:
            return super().forward(input)
        parts = list(leaves(self))
        at = 0
        while at < len(parts):
            path, module = parts[at]
            run = self.runs.get(path)
            modules = None
            if run is not None and not (run.block.residual and _promotes(input)):
                modules = run.modules(parts[at : at + len(run.tokens)])
            if run is None or modules is None:
                input, at = module(input), at + 1
            else:
                input, at = run(input, modules), at + len(run.tokens)
        return input

    def outside(self) -> list[tuple[str, nn.Module]]:
        """The modules that are in no run, with their paths."""
        inside: set[nn.Module] = set()
        others = []
        left = 0
        for path, module in leaves(self):
            left = len(self.runs[path].tokens) if path in self.runs else max(left - 1, 0)
            if left:
                inside.add(module)
            else:
                others.append((path, module))
        return [(path, module) for path, module in others if module not in inside]

    def __getitem__(self, idx: Any) -> Any:
        part: Any = super().__getitem__(idx)
        if isinstance(idx, slice):
            part.runs = self.runs
        return part

    def extra_repr(self) -> str:
        return "\n".join(f"from {path}: {run}" for path, run in self.runs.items())


SEQUENTIALS.add(FusedSequential)
