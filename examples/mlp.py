"""Deep MLPs of 1 to 32 layers against one layer iterated the SCORE way: do they train, what do they know, what do they take.

    python -m examples.mlp                                    # digits and diabetes of scikit-learn: minutes on a CPU
    python -m examples.mlp --part train --variant "digits*depth 8"

Results go to examples/results/, and from there by `python -m examples.report` to docs/experiments.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import score_kernels as sk
from examples.shared import runner
from examples.shared.experiment import Experiment, Run, start


@dataclass(frozen=True)
class Settings:
    """depths: T. batch: rows of a training step; rows: of a step of the speed part."""

    features: int
    depths: tuple[int, ...]
    batch: int
    rows: int
    steps: int
    rate: float
    seeds: int


PRESETS = {
    "tiny": Settings(8, (1, 2), batch=16, rows=32, steps=3, rate=2e-3, seeds=1),
    "cpu": Settings(64, (1, 2, 4, 8, 16, 32), batch=64, rows=8192, steps=300, rate=2e-3, seeds=3),
    "full": Settings(256, (1, 2, 4, 8, 16, 32), batch=64, rows=65536, steps=2000, rate=1e-3, seeds=10),
}

# What stands between the input layer and the head, all of them T times `leaky_relu(h W^T + b)`. SCORE: one W and b, dt 0.5.
BODIES: dict[str, dict[str, Any]] = {
    "plain stack": {"update": "replace", "layers": "T"},
    "residual stack": {"update": "residual", "layers": "T"},
    "SCORE": {},
    "SCORE, dt 1/T": {"dt": "1/T"},
    "SCORE, midpoint": {"solver": "midpoint"},
    "SCORE, heun": {"solver": "heun"},
    "SCORE, rk4": {"solver": "rk4"},
}
TIMED = ("plain stack", "SCORE", "SCORE, rk4")


class Task(NamedTuple):
    """Rows to train on and to test with. outputs: classes, or 1 of a regression; rows: in a step."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int
    rows: int

    @classmethod
    def split(cls, data: tuple[Any, Any], outputs: int, rows: int) -> Task:
        """A quarter to test with; inputs, and the targets of a regression, with mean 0 and deviation 1 on the rest."""
        parts = (torch.tensor(part) for part in train_test_split(*data, test_size=0.25, random_state=0))
        train_x, test_x, train_y, test_y = parts
        inputs = standardised(train_x, test_x)
        targets = (train_y, test_y) if outputs > 1 else standardised(train_y, test_y)
        return cls(inputs[0], targets[0], inputs[1], targets[1], outputs, rows)

    def loss(self, model: nn.Module, rows: Tensor, device: str) -> Tensor:
        """Of these training rows."""
        found, wanted = model(self.train_x[rows].to(device)), self.train_y[rows].to(device)
        return F.cross_entropy(found, wanted) if self.outputs > 1 else F.mse_loss(found[:, 0], wanted)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    deviation = train.std(0).clamp(min=1e-6)  # pixels of the frame never change
    first, second = ((part - train.mean(0)) / deviation for part in (train, test))
    return first.float(), second.float()


class Mlp(Experiment):
    name = "mlp"
    presets: ClassVar[dict[str, Any]] = PRESETS
    metric = "score"

    def __init__(self, settings: Settings, file: Path | None, device: str) -> None:
        super().__init__(settings, file, device)
        digits = Task.split(load_digits(return_X_y=True), 10, settings.batch)
        diabetes = Task.split(load_diabetes(return_X_y=True), 1, settings.batch)
        self.tasks = {"digits": digits, "diabetes": diabetes}
        self.timed_tasks = {f"{settings.rows:,} rows": digits._replace(rows=settings.rows)}

    @property
    def variants(self) -> list[str]:
        return [f"{task}: {body}, depth {t}" for task in self.tasks for body in BODIES for t in self.settings.depths]

    @property
    def timed(self) -> list[str]:
        return [f"{task}: {body}, depth {t}" for task in self.timed_tasks for body in TIMED for t in self.settings.depths]

    def task(self, variant: str) -> Task:
        return {**self.tasks, **self.timed_tasks}[variant.partition(": ")[0]]

    def model(self, variant: str) -> nn.Module:
        body, _, depth = variant.partition(": ")[2].rpartition(", depth ")
        numbers = {"T": int(depth), "1/T": 1 / int(depth)}
        options: dict[str, Any] = {key: numbers.get(value, value) for key, value in BODIES[body].items()}
        features, task = self.settings.features, self.task(variant)
        return nn.Sequential(
            nn.Linear(task.train_x.shape[1], features),
            sk.ScoreLinear(features, iterations=int(depth), activation="leaky_relu", **options),
            nn.Linear(features, task.outputs),
        )

    def every(self, variant: str) -> int:
        return self.steps(variant)

    def rate(self, step: int) -> float:
        """Falls to 0 by a cosine."""
        return float(self.settings.rate * (0.5 + 0.5 * math.cos(math.pi * step / self.settings.steps)))

    def loss(self, model: nn.Module, run: Run, step: int) -> Tensor:
        task = self.task(run.variant)
        return task.loss(model, torch.randint(len(task.train_y), (task.rows,)), self.device)

    def evaluate(self, model: nn.Module, run: Run) -> dict[str, float]:
        """Of the test rows: the share that is classified right, or R^2."""
        task = self.task(run.variant)
        found = model(task.test_x.to(self.device)).cpu()
        if task.outputs > 1:
            return {"score": (found.argmax(1) == task.test_y).double().mean().item()}
        error, spread = (found[:, 0] - task.test_y).square().mean(), (task.test_y - task.test_y.mean()).square().mean()
        return {"score": 1 - (error / spread).item()}

    def finish(self, model: nn.Module, run: Run, curve: list[dict[str, float]]) -> dict[str, Any]:
        """What the body does to the gradient, before training and after it."""
        fresh, _ = start(self, run)
        return {"gradient_before": self.gradient(fresh, run), "gradient_after": self.gradient(model, run)}

    @torch.enable_grad()
    def gradient(self, model: nn.Module, run: Run) -> float:
        """The norm of the gradient at the body's input over the one at its output; 1 is a body that hands it through."""
        assert isinstance(model, nn.Sequential)
        states: list[Tensor] = []
        hooks = [model[i].register_forward_hook(lambda _, inputs, output: states.append(output)) for i in (0, 1)]
        task = self.task(run.variant)
        loss = task.loss(model, torch.arange(min(256, len(task.train_y))), self.device)
        for hook in hooks:
            hook.remove()
        before, after = torch.autograd.grad(loss, states)
        return (before.norm() / after.norm()).item()


def main(arguments: list[str] | None = None) -> int:
    return runner.main(Mlp, arguments)


if __name__ == "__main__":
    sys.exit(main())
