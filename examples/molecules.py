"""Solubility of molecules (ESOL): graph networks of T layers against one layer iterated the SCORE way.

    python -m examples.molecules                      # 64 features, T = 4, 5 seeds: minutes on a CPU
    python -m examples.molecules --part train --variant "attention*" --seeds 1

Results go to examples/results/, and from there by `python -m examples.report` to docs/experiments.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import score_kernels as sk
from examples.graphs import Graphs, read
from examples.shared import data, runner
from examples.shared.experiment import Experiment, Run


@dataclass(frozen=True)
class Settings:
    """iterations: T. batch: molecules. rate: the highest learning rate. Molecules are split 80/10/10 at random, by the seed."""

    features: int
    num_heads: int
    iterations: int
    batch: int
    epochs: int
    rate: float
    seeds: int
    steps: int | None = None


PRESETS = {
    "tiny": Settings(8, 2, 2, batch=32, epochs=1, rate=2e-3, seeds=1, steps=4),
    "cpu": Settings(64, 4, 4, batch=32, epochs=20, rate=3e-3, seeds=5),
    "full": Settings(256, 8, 4, batch=32, epochs=200, rate=1e-3, seeds=5),
}


class Attention(nn.Module):
    """Graph attention: atoms attend to their neighbours and themselves, T times in one call."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__()
        options = {"iterations": settings.iterations, "norm": "layernorm", **options}
        self.attention = sk.ScoreAttention(settings.features, settings.num_heads, **options)

    def forward(self, h: Tensor, graphs: Graphs) -> Tensor:
        """h (B, N, D) -> (B, N, D)"""
        result: Tensor = self.attention(h, attn_mask=graphs.neighbours[:, None])
        return result


class Messages(nn.Module):
    """Message passing: T times `h <- (1 - dt) h + dt mlp(the sum over an atom's neighbours and itself)`.

    update: "contractive", "residual" (`h + mlp(...)`) or "replace" (`mlp(...)`), as the ops have them.
    """

    def __init__(self, settings: Settings, update: str = "contractive", dt: float = 0.5, layers: int = 1) -> None:
        super().__init__()
        self.update, self.dt, self.iterations, d = update, dt, settings.iterations, settings.features
        self.layers = nn.ModuleList(
            sk.ScoreMLP(d, 2 * d, iterations=1, update="replace", norm="layernorm") for _ in range(layers)
        )

    def forward(self, h: Tensor, graphs: Graphs) -> Tensor:
        """h (B, N, D) -> (B, N, D)"""
        neighbours = graphs.neighbours.to(h.dtype)
        for t in range(self.iterations):
            message = self.layers[t * len(self.layers) // self.iterations](neighbours @ h)
            if self.update == "contractive":
                h = torch.lerp(h, message, self.dt)
            else:
                h = h + message if self.update == "residual" else message
        return h


# What stands between the embedding of the atoms and the readout. SCORE: one layer, T times.
BODIES: dict[str, dict[str, Any]] = {
    "T layers": {"update": "replace", "layers": "T"},
    "T layers, residual": {"update": "residual", "layers": "T"},
    "T layers, dt 0.5 (skip05)": {"dt": 0.5, "layers": "T"},
    "SCORE, dt 0.25": {"dt": 0.25},
    "SCORE, dt 0.5": {"dt": 0.5},
    "SCORE, dt 0.5, heun": {"dt": 0.5, "solver": "heun"},
    "SCORE, dt 0.5, rk4": {"dt": 0.5, "solver": "rk4"},
}
KINDS = {"attention": Attention, "messages": Messages}


class MoleculeNetwork(nn.Module):
    """Graphs -> (B,): atoms embedded, the body, the mean and the sum over atoms, and a small mlp."""

    def __init__(self, inputs: int, features: int, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.norm = nn.Linear(inputs, features), body, nn.LayerNorm(features)
        self.readout = nn.Sequential(nn.Linear(2 * features, features), nn.GELU(), nn.Linear(features, 1))

    def forward(self, graphs: Graphs) -> Tensor:
        h = self.norm(self.body(self.embed(graphs.atoms), graphs)) * graphs.real
        total, count = h.sum(1), graphs.real.sum(1)
        prediction: Tensor = self.readout(torch.cat([total / count, total / TYPICAL_ATOMS], 1))
        return prediction.squeeze(1)


# Batches whose molecules are sorted by size together.
POOL = 8

# Keeps the sum over atoms near the size of their mean.
TYPICAL_ATOMS = 16


class MoleculeExperiment(Experiment):
    name = "molecules"
    data = data.ESOL
    presets: ClassVar[dict[str, Any]] = PRESETS
    metric = "validation"

    def __init__(self, settings: Settings, file: Path | None, device: str) -> None:
        super().__init__(settings, file, device)
        assert file is not None
        self.molecules = read(file)
        # One sample of the speed part is an epoch.
        self.sample_steps = self.per_epoch = math.ceil(len(self.split(0)[0]) / settings.batch)

    def split(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Molecules to train on, to choose the epoch by, and to test with: 80/10/10 of a random order."""
        n = len(self.molecules.targets)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        train, validation, test = order.tensor_split([n * 8 // 10, n * 9 // 10])
        return train, validation, test

    @property
    def variants(self) -> list[str]:
        """The solvers are attention's: they are inside the op."""
        return [f"{kind}: {body}" for kind in KINDS for body in BODIES if kind == "attention" or "solver" not in BODIES[body]]

    def model(self, variant: str) -> nn.Module:
        kind, _, name = variant.partition(": ")
        options = {key: self.settings.iterations if value == "T" else value for key, value in BODIES[name].items()}
        return MoleculeNetwork(self.molecules.features, self.settings.features, KINDS[kind](self.settings, **options))

    def steps(self, variant: str) -> int:
        return int(self.settings.steps or self.settings.epochs * self.per_epoch)

    def every(self, variant: str) -> int:
        return self.per_epoch

    def rate(self, step: int) -> float:
        """Falls to 0 by a cosine."""
        return float(self.settings.rate * (0.5 + 0.5 * math.cos(math.pi * step / self.steps(""))))

    def loss(self, model: nn.Module, run: Run, step: int) -> Tensor:
        epoch, at = divmod(step, self.per_epoch)
        rows = self.batches(run.seed, epoch)[at]
        return F.mse_loss(model(self.molecules.batch(rows, self.device)), self.scaled(rows, run.seed).to(self.device))

    def batches(self, seed: int, epoch: int) -> list[Tensor]:
        """The training molecules in a random order, but those of about one size together: little of a batch is padding."""
        train, size = self.split(seed)[0], self.settings.batch
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        pools = train[torch.randperm(len(train), generator=generator)].split(POOL * size)
        batches = [rows for pool in pools for rows in pool[self.molecules.sizes[pool].argsort()].split(size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def evaluate(self, model: nn.Module, run: Run) -> dict[str, float]:
        """Root mean square errors, in the logarithm (base 10) of moles per litre."""
        _, validation, test = self.split(run.seed)
        return {name: self.rmse(model, rows, run.seed) for name, rows in {"validation": validation, "test": test}.items()}

    def rmse(self, model: nn.Module, rows: Tensor, seed: int) -> float:
        found = model(self.molecules.batch(rows, self.device)).cpu()
        return float((found - self.scaled(rows, seed)).square().mean().sqrt() * self.deviation(seed))

    def scaled(self, rows: Tensor, seed: int) -> Tensor:
        """Targets with mean 0 and deviation 1 on the training molecules."""
        return (self.molecules.targets[rows] - self.molecules.targets[self.split(seed)[0]].mean()) / self.deviation(seed)

    def deviation(self, seed: int) -> Tensor:
        return self.molecules.targets[self.split(seed)[0]].std()

    def finish(self, model: nn.Module, run: Run, curve: list[dict[str, float]]) -> dict[str, Any]:
        """The test error of the epoch with the least validation error."""
        return {"rmse": min(curve, key=lambda point: point["validation"])["test"]}


def main(arguments: list[str] | None = None) -> int:
    return runner.main(MoleculeExperiment, arguments)


if __name__ == "__main__":
    sys.exit(main())
