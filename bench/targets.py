"""What providers are compared on: one case in one mode and dtype, or whatever else answers the same questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from . import inputs, peers
from .cases import Case
from .flops import flops, traffic
from .inputs import Inputs
from .measure import Prepared
from .precision import DTYPES
from .providers import PROVIDERS, Provider

# One row of a result file; `schema.json` describes it.
Row = dict[str, Any]

# What setting up and checking one provider costs, in the operations that the same time would have computed.
SETUP_FLOPS = 2e11


class Absent(Exception):
    """A provider that cannot be measured here, and why."""


class Bench(Protocol):
    """A target on a device."""

    def step(self, provider: Provider) -> Prepared:
        """What is measured; raises Absent for a provider that does not do it."""

    def expected(self, provider: Provider) -> list[Tensor]:
        """The float64 answer that the result of `step` is held to."""

    def tolerance(self, provider: Provider) -> float:
        """The largest relative error from it with which the result is right."""


class Target(Protocol):
    """`Problem`, and `user_module.ModuleProblem`. Picklable: a child process measures its memory."""

    @property
    def name(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def graph(self) -> bool:
        """Whether a GPU's times are those of a replayed CUDA graph."""

    def provider(self, name: str) -> Provider: ...
    def work(self, providers: int, rounds: int) -> float:
        """How long it takes, roughly, relative to other targets."""

    def row(self, provider: Provider) -> Row:
        """The columns that say what is measured."""

    def on(self, device: str) -> Bench: ...


@dataclass(frozen=True)
class Problem:
    """One case in one mode and dtype."""

    case: Case
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.mode} {self.dtype}"

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def graph(self) -> bool:
        return self.case.graph

    def provider(self, name: str) -> Provider:
        return PROVIDERS[name]

    def work(self, providers: int, rounds: int) -> float:
        return providers * (SETUP_FLOPS + (rounds + 4) * flops(self.case, self.mode))

    def row(self, provider: Provider) -> Row:
        case = provider.stands_for(self.case)
        return {
            "op": case.op,
            "rows": case.rows,
            "features": case.features,
            "hidden": case.hidden,
            "iterations": case.iterations,
            "params": case.params,
            "flops": flops(case, self.mode),
            "bytes": traffic(case, self.mode, DTYPES[self.dtype].dtype.itemsize),
        }

    def on(self, device: str) -> CaseBench:
        return CaseBench(self, device)


class CaseBench:
    """The tensors of a problem, and their float64 answers: made once for all providers that compute the same case."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.dtype = DTYPES[problem.dtype].dtype
        self.given: dict[Case, Inputs] = {}
        self.answers: dict[Case, list[Tensor]] = {}

    def step(self, provider: Provider) -> Prepared:
        case, mode = self.problem.case, self.problem.mode
        if reason := provider.absent(self.device) or provider.refuses(case, mode, self.dtype, self.device):
            raise Absent(reason)
        case = provider.stands_for(case)
        run, given = provider.build(case), self._given(case)
        if not isinstance(run, nn.Module):
            return inputs.step(run, given, mode)
        return inputs.step(lambda h, _: run(h), peers.held_by(run, case, given), mode)

    def expected(self, provider: Provider) -> list[Tensor]:
        case = provider.stands_for(self.problem.case)
        if case not in self.answers:
            try:
                self.answers[case] = inputs.reference(case, self._given(case), self.problem.mode)
            except Exception as error:
                raise RuntimeError(f"the float64 reference raised {type(error).__name__}: {error}") from error
        answer = self.answers[case]
        if not provider.module or self.problem.mode == "forward":
            return answer
        head = len(answer) - len(case.shapes)
        return [*answer[:head], *peers.layer_by_layer(case, dict(zip(case.shapes, answer[head:], strict=True)))]

    def tolerance(self, provider: Provider) -> float:
        return inputs.tolerance(DTYPES[self.problem.dtype].eps, self.problem.mode, provider.stands_for(self.problem.case))

    def _given(self, case: Case) -> Inputs:
        if case not in self.given:
            self.given[case] = inputs.make(case, self.problem.mode, self.dtype, self.device)
        return self.given[case]
