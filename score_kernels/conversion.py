"""`convert`: the stacks of a model compute in fused calls, with the model's own modules and parameters; `revert` undoes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .finding import examine
from .fused import FusedSequential, Run
from .tokens import LINEAR, RESIDUAL, SEQUENTIALS, Token

__all__ = ["Entry", "Report", "convert", "revert"]

# `min_speedup` times this many rows, so often.
_ROWS, _ROUNDS = 4096, 9

_ALONE = "no second block like it beside it"


@dataclass(frozen=True)
class Entry:
    """path: in the model, of a run "first to last". what: the module, or the blocks of a run. reason: why it was not replaced.

    backend: that the planner chooses for the run. gain: measured time of the modules over that of the fused call, or None.
    """

    path: str
    what: str
    reason: str = ""
    backend: str = ""
    gain: float | None = None


@dataclass(frozen=True)
class Report:
    """What `convert` did, or with `dry_run` would do. Prints as a table.

    replaced: runs that are one fused call now. skipped: what could not be, or was not worth it, and why. left: linear layers
    that are part of no run, as heads and tails.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (kind, entry.path, entry.what, entry.reason or _expected(entry))
            for kind in ("replaced", "skipped", "left")
            for entry in getattr(self, kind)
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        lines = ["  ".join([*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join(
            lines if self.replaced else ["nothing is replaced: no run of equal blocks in an nn.Sequential", *lines]
        )


def convert(model: nn.Module, *, dry_run: bool = False, min_speedup: float | None = None) -> Report:
    """Makes runs of equal blocks in the model's `nn.Sequential`s one fused call each. In place; `revert` undoes it.

    A run is two or more blocks of the same sizes, activation, norm, eps and biases, one after the other. A block is

        [norm] Linear(D, D) [activation]
        [norm] Linear(D, H) activation Linear(H, D)     here a run may be a single block
        a module of yours whose forward is `x + block(x)`, `block` being children as above: straight-line code, nothing else

    with LayerNorm or RMSNorm over the last dimension and ReLU, LeakyReLU, GELU, SiLU, Tanh or Sigmoid. Nested Sequentials are
    looked through. Hooks, dropout, batch norm, parametrizations, subclasses of `nn.Linear` and mixed dtypes or devices end a
    run or forbid it, and the report says so.

    An `nn.Sequential` with runs becomes a `FusedSequential`: the very same object of another class. Its children, Parameters,
    names, `state_dict` and hooks stay, so optimizers, ties and checkpoints stay valid; other models are not touched. It
    computes the same function, to rounding. Convert before `fully_shard`; revert before TorchScript.

    Args:
        model: any module, in any dtype, on any device.
        dry_run: report only.
        min_speedup: replace only runs whose fused call is measured to be so many times as fast as their modules, in a forward
            of 4096 random rows. None: do not measure. Calls of a few rows gain least, or lose.

    Returns the report. Raises TypeError or ValueError for arguments that are no module or no speedup.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if min_speedup is not None and (isinstance(min_speedup, bool) or not isinstance(min_speedup, int | float)):
        raise TypeError(f"min_speedup: expected a number, or None for no measurement, got {type(min_speedup).__name__}")
    if min_speedup is not None and not min_speedup > 0:
        raise ValueError(f"min_speedup: expected a number above 0, or None for no measurement, got {min_speedup}")
    conversion = _Conversion(dry_run, min_speedup)
    conversion.visit(model, "")
    return conversion.report


def revert(model: nn.Module) -> None:
    """Makes every `FusedSequential` in the model the `nn.Sequential` that it was, in place. Revert before `fully_shard`."""
    for module in model.modules():
        if type(module) is FusedSequential:
            module.__dict__.pop("runs", None)
            module.__class__ = nn.Sequential  # type: ignore[assignment]


class _Conversion:
    """One walk over a model."""

    def __init__(self, dry_run: bool, min_speedup: float | None) -> None:
        self.dry_run, self.min_speedup = dry_run, min_speedup
        self.report = Report()
        self.seen: set[int] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if isinstance(module, nn.Sequential) and type(module) in SEQUENTIALS and "forward" not in module.__dict__:
            self.stack(module, path)
        else:
            for name, child in module.named_children():
                self.visit(child, f"{path}{name}.")

    def stack(self, stack: nn.Sequential, path: str) -> None:
        parts, tokens, found = examine(stack)
        runs: dict[str, Run] = {}
        rest = set(range(len(parts)))
        for run in found:
            members = parts[run.start : run.stop]
            fused = Run.of(run, tokens)
            entry = self.judge(fused, members, path)
            if entry.reason:
                self.report.skipped.append(entry)
            else:
                self.report.replaced.append(entry)
                runs[members[0][0]] = fused
            rest -= set(range(run.start, run.stop))
        if not self.dry_run and (runs or isinstance(stack, FusedSequential)):
            # The same object: whoever holds it, its hooks and its children stay.
            stack.__class__ = FusedSequential
            stack.__dict__["runs"] = runs
        linear = any(isinstance(token, Token) and token.kind in (LINEAR, RESIDUAL) for token in tokens)
        for i in sorted(rest):
            self.remain(f"{path}{parts[i][0]}", parts[i][1], tokens[i], linear)

    def judge(self, run: Run, members: Sequence[tuple[str, nn.Module]], path: str) -> Entry:
        """The entry of a run; with a reason if it is not replaced."""
        first, last = (path + members[i][0] for i in (0, -1))
        entry = Entry(first if first == last else f"{first} to {last}", str(run))
        modules = run.modules(members)
        assert modules is not None
        try:
            plan = run.plan(modules)
        except (TypeError, ValueError) as error:
            return replace(entry, reason=str(error))
        if self.min_speedup is None:
            return replace(entry, backend=plan.backend)
        gain = _gain(run, [module for _, module in members], modules)
        reason = f"measured {gain:.2f} times as fast, min_speedup={self.min_speedup}" if gain < self.min_speedup else ""
        return replace(entry, backend=plan.backend, gain=gain, reason=reason)

    def remain(self, path: str, module: nn.Module, token: Token | str, linear: bool) -> None:
        """A module of a stack that is in no run: what is inside, else why."""
        before = len(self.report.replaced)
        self.visit(module, f"{path}.")
        if len(self.report.replaced) > before:
            return
        if isinstance(token, str):
            if linear or any(isinstance(m, nn.Linear) for m in module.modules()):
                self.report.skipped.append(Entry(path, type(module).__name__, token))
        elif token.kind == LINEAR:
            sizes = token.value[:2]
            reason = _ALONE if sizes[0] == sizes[1] else "not square"
            self.report.left.append(Entry(path, f"Linear({sizes[0]}, {sizes[1]})", reason))
        elif token.kind == RESIDUAL:
            self.report.left.append(Entry(path, type(module).__name__, _ALONE))


def _gain(run: Run, members: Sequence[nn.Module], modules: Sequence[nn.Module]) -> float:
    """Measured: the time of the modules' own calls over that of the fused call."""
    weight = run.state(modules)
    if weight.device.type == "meta":
        raise ValueError("min_speedup: expected parameters on a device that computes, got them on meta; leave it out there")
    # A generator of its own: the caller's random numbers stay what they were.
    x = torch.randn(_ROWS, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)

    def own() -> Tensor:
        y = x
        for module in members:
            y = module(y)
        return y

    def seconds(call: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        call()
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return time.perf_counter() - start

    with torch.no_grad():
        rounds = [(seconds(own), seconds(lambda: run(x, modules))) for _ in range(_ROUNDS + 2)]
    return statistics.median(a / b for a, b in rounds[2:])


def _expected(entry: Entry) -> str:
    return entry.backend if entry.gain is None else f"{entry.backend}, measured {entry.gain:.2f} times as fast"
