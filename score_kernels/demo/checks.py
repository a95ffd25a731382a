"""Part 1 of the demo: every backend against the reference in float64, by the rules that the project's tests hold it to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.cases import Case
from bench.inputs import Forward, Inputs, make, ours, reference, step
from bench.providers import eager
from score_kernels.ops import machine_of

from . import screen
from .threads import one_thread

DTYPES = (torch.float32, torch.bfloat16)

# An error may be this many times that of the eager loop in the same dtype: (result, gradients).
LIMITS = {torch.float32: (4.0, 4.0), torch.bfloat16: (1.0, 1.5)}

SEEDS = 20
QUICK_SEEDS = 5


def _case(name: str, op: str, activation: str, norm: str | None, **options: object) -> Case:
    fields = {"rows": 128, "features": 64, "hidden": 64 if op == "linear" else 96, "iterations": 8, "source": "demo"} | options
    return Case(name, op, activation=activation, norm=norm, **fields)  # type: ignore[arg-type]


# Smooth activations only: where a derivative jumps, one preactivation that rounds to the other side of 0 decides the error.
CASES = (
    _case("linear, silu", "linear", "silu", None),
    _case("linear, tanh, layernorm", "linear", "tanh", "layernorm"),
    _case("mlp, gelu, layernorm", "mlp", "gelu", "layernorm"),
    _case("mlp, silu, 2 sets of weights", "mlp", "silu", None, sets=2),
    _case("gated mlp (SwiGLU), rmsnorm", "mlp", "silu", "rmsnorm", gated=True),
    _case("mlp, midpoint solver", "mlp", "gelu", "layernorm", solver="midpoint"),
    _case("mlp, heun solver", "mlp", "gelu", "layernorm", solver="heun"),
    _case("mlp, rk4 solver", "mlp", "gelu", "layernorm", solver="rk4"),
)


@dataclass(frozen=True)
class Outcome:
    """Relative errors of one call, dtype and backend against float64, and the same as multiples of the eager loop's.

    gradient, gradient_ratio: of the input whose multiple is the largest.
    """

    case: str
    dtype: torch.dtype
    backend: str
    forward: float
    forward_ratio: float
    gradient: float
    gradient_ratio: float

    @property
    def passed(self) -> bool:
        forward, gradient = LIMITS[self.dtype]
        return self.forward_ratio <= forward and self.gradient_ratio <= gradient


def run(console: Console, quick: bool, seed: int) -> bool:
    """Checks all, prints the table, tells whether all passed."""
    seeds = range(seed, seed + (QUICK_SEEDS if quick else SEEDS))
    console.rule("1. Is it right? Every backend against float64")
    outcomes = []
    with one_thread(), Progress(console=console, transient=True) as progress:
        for case in progress.track(CASES, description="checking"):
            for dtype in DTYPES:
                outcomes += check(case, dtype, seeds)
    console.print(table(outcomes))
    (forward32, _), (forward16, gradient16) = LIMITS[torch.float32], LIMITS[torch.bfloat16]
    screen.paragraph(
        console,
        f"Numbers are errors, norm(x - exact) / norm(exact), root mean square of {len(seeds)} random draws; exact: the "
        "formulas in float64. "
        f"x loop: that error as a multiple of a plain PyTorch loop's in the same dtype; at most {forward32:g} in float32, "
        f"{forward16:g} in bfloat16 ({gradient16:g} for gradients; the input that comes off worst is shown). Backends: "
        "reference, the formulas under ordinary autograd; blas, the default on a CPU: tiles of rows that stay in cache, "
        "gradients by hand.",
    )
    failed = [o for o in outcomes if not o.passed]
    console.print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed.", style="bold red" if failed else "bold green"
    )
    return not failed


def check(case: Case, dtype: torch.dtype, seeds: Iterable[int]) -> list[Outcome]:
    """One call in one dtype, by every backend that computes it."""
    providers: dict[str, Forward] = {"eager": eager(case), **{name: ours(case, name) for name in backends(dtype)}}
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in providers}
    for seed in seeds:
        inputs = draw(case, dtype, seed)
        exact = reference(case, inputs, "training")
        for name, forward in providers.items():
            prepare, train = step(forward, inputs, "training")
            results = train(prepare())
            assert isinstance(results, list)
            errors = [(x.double() - y).norm() / y.norm() for x, y in zip(results, exact, strict=True)]
            squares[name].append(torch.stack(errors).square())
    rms = {name: torch.stack(rows).mean(0).sqrt() for name, rows in squares.items()}
    outcomes = []
    for name in backends(dtype):
        ratio = rms[name] / rms["eager"]
        # NaN compares as the worst, and fails.
        worst = 1 + int(ratio[1:].nan_to_num(math.inf).argmax())
        numbers = (rms[name][0], ratio[0], rms[name][worst], ratio[worst])
        outcomes.append(Outcome(case.name, dtype, name, *(float(x) for x in numbers)))
    return outcomes


def backends(dtype: torch.dtype) -> list[str]:
    """The backends that compute this dtype on a CPU, where all checks run: Triton's interpreter has bfloat16 products wrong."""
    triton = machine_of(torch.device("cpu")).triton is None and dtype != torch.bfloat16
    return ["reference", "blas", *(["triton"] if triton else [])]


def draw(case: Case, dtype: torch.dtype, seed: int) -> Inputs:
    """The tensors of a case with their elements, which are independent, shuffled: another draw from the same distributions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = make(case, "training", dtype, "cpu")
    with torch.no_grad():
        for x in (*inputs.leaves, inputs.cotangent):
            x.copy_(x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x))
    return inputs


def table(outcomes: list[Outcome]) -> Table:
    rows = screen.table(("call", "dtype", "backend"), ("result", "x loop", "gradients", "x loop", ""))
    previous = None
    for o in outcomes:
        name = o.case if o.case != previous else ""
        previous = o.case
        verdict = "[green]pass[/green]" if o.passed else "[bold red]FAIL[/bold red]"
        numbers = (f"{o.forward:.1e}", f"{o.forward_ratio:.2f}", f"{o.gradient:.1e}", f"{o.gradient_ratio:.2f}")
        rows.add_row(name, str(o.dtype).removeprefix("torch."), o.backend, *numbers, verdict)
    return rows
