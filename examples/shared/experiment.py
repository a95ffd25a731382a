"""An experiment: models that are compared, how a step of one looks, and training that can be interrupted."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .data import DataSet

Row = dict[str, Any]


class Run(NamedTuple):
    """What is trained: one of the experiment's variants, from a seed."""

    variant: str
    seed: int


class Experiment(ABC):
    """One example. Whatever is random in a step depends on the run's seed and the step's number alone.

    file: the data set, whole, or None where `data` is None. presets: the sizes by name.
    """

    name: ClassVar[str]
    data: ClassVar[DataSet | None] = None
    presets: ClassVar[dict[str, Any]]
    # Which of the reported numbers is shown while it runs.
    metric: ClassVar[str]

    def __init__(self, settings: Any, file: Path | None, device: str) -> None:
        self.settings, self.file, self.device = settings, file, device

    @property
    @abstractmethod
    def variants(self) -> list[str]:
        """What is trained from every seed."""

    @property
    def timed(self) -> list[str]:
        """What is timed against the plain loop."""
        return self.variants

    @abstractmethod
    def model(self, variant: str) -> nn.Module:
        """A new model; the seed was set."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.settings.rate)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return float(self.settings.rate)

    def steps(self, variant: str) -> int:
        """How many there are in a run."""
        return int(self.settings.steps)

    def every(self, variant: str) -> int:
        """Steps between two evaluations."""
        return int(self.settings.every)

    # Steps in one sample of the speed part.
    sample_steps = 1

    @abstractmethod
    def loss(self, model: nn.Module, run: Run, step: int) -> Tensor:
        """Of the step's batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, run: Run) -> dict[str, float]:
        """A point of the curve."""

    def finish(self, model: nn.Module, run: Run, curve: list[dict[str, float]]) -> dict[str, Any]:
        """What else the row of a finished run has."""
        return {}


class Interrupted(Exception):
    """Ctrl-C: the run's checkpoint is written."""


@dataclass
class Progress:
    """How far a run is. seconds: on the clock; cpu_seconds: what the process computed in them, on all of its threads."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def start(experiment: Experiment, run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(run.seed)
    model = experiment.model(run.variant).to(experiment.device)
    return model, experiment.optimizer(model)


def advance(experiment: Experiment, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, step: int) -> float:
    """One training step; its loss."""
    torch.manual_seed(1_000_003 * run.seed + step)
    for group in optimizer.param_groups:
        group["lr"] = experiment.rate(step)
    loss = experiment.loss(model, run, step)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(experiment: Experiment, run: Run, checkpoint: Path, tell: Callable[[int, dict[str, float]], object]) -> Row:
    """One run, from its checkpoint if there is one; the row of the results. Raises Interrupted after the step of a Ctrl-C.

    tell: called with the steps done and the last point of the curve, with the loss of the last step.
    """
    model, optimizer = start(experiment, run)
    steps, every = experiment.steps(run.variant), experiment.every(run.variant)
    done = load(checkpoint, model, optimizer)
    with interrupts() as interrupted:
        while done.step < steps:
            clock, cpu = time.perf_counter(), time.process_time()
            loss = advance(experiment, model, optimizer, run, done.step)
            done.step += 1
            point = done.step % every == 0 or done.step == steps
            if point:
                model.eval()
                with torch.no_grad():
                    done.curve.append({"step": done.step, "loss": loss, **experiment.evaluate(model, run)})
                model.train()
            done.seconds += time.perf_counter() - clock
            done.cpu_seconds += time.process_time() - cpu
            if point or interrupted():
                save(checkpoint, model, optimizer, done)
            tell(done.step, {**(done.curve[-1] if done.curve else {}), "loss": loss})
            if interrupted():
                raise Interrupted
    model.eval()
    with torch.no_grad():
        finished = experiment.finish(model, run, done.curve)
    row = {**run._asdict(), "parameters": sum(p.numel() for p in model.parameters()), "steps": steps}
    return {**row, "seconds": done.seconds, "cpu_seconds": done.cpu_seconds, **finished, "curve": done.curve}


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, a Ctrl-C is noted for whoever asks; the second one interrupts as ever."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, done: Progress) -> None:
    """Whole or not at all."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = checkpoint.with_name(f"{checkpoint.name}.part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": vars(done)}, part)
    part.replace(checkpoint)


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    if not checkpoint.exists():
        return Progress()
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return Progress(**saved["done"])
