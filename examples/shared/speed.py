"""Our path against the plain loop of the same model: step times in interleaved rounds, peak memory in child processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

import score_kernels as sk
from bench.measure import compare, paired_ratio
from bench.memory import peak_in_child
from score_kernels.plans import Explanation

from .experiment import Experiment, Row, Run, advance, start
from .plain import plainly

# Both compute the same: the losses of the first step agree to this.
TOLERANCE = 1e-4


def training(experiment: Experiment, variant: str, plain: bool) -> Callable[[], float]:
    """What one sample is: `sample_steps` training steps, always the same ones; returns the loss of the first."""
    run = Run(variant, 0)
    model, optimizer = start(experiment, run)
    if plain:
        model = plainly(model)
        optimizer = experiment.optimizer(model)

    def sample() -> float:
        losses = [advance(experiment, model, optimizer, run, step) for step in range(experiment.sample_steps)]
        return losses[0]

    return sample


def in_child(example: str, preset: str, file: Path | None, device: str, variant: str, plain: bool) -> Callable[[], float]:
    """The same, made in a fresh process."""
    experiments = vars(importlib.import_module(f"examples.{example}")).values()
    found = next(e for e in experiments if isinstance(e, type) and issubclass(e, Experiment) and e is not Experiment)
    return training(found(found.presets[preset], file, device), variant, plain)


def measure(experiment: Experiment, variant: str, preset: str, rounds: int, tell: Callable[[int], object]) -> Row:
    """The row of the results. Raises ValueError when the two do not compute the same."""
    losses = {how: training(experiment, variant, plain)() for how, plain in (("ours", False), ("plain", True))}
    if abs(losses["ours"] - losses["plain"]) > TOLERANCE * max(abs(losses["plain"]), 1):
        raise ValueError(f"{variant}: expected one loss of our path and of the plain loop, got {losses}")
    both = {how: training(experiment, variant, how == "plain") for how in losses}
    times = compare(both, rounds, baseline="plain", device=experiment.device, on_round=tell)
    row: Row = {"variant": variant, "seed": 0, "steps": experiment.sample_steps, "losses": losses}
    row["backends"] = sorted({plan.backend for plan in explained(experiment, variant)})
    row["samples_ms"] = {how: summary.samples_ms for how, summary in times.items()}
    row["peak_mb"] = {how: _peak(experiment, variant, preset, how == "plain") for how in losses}
    return row


def explained(experiment: Experiment, variant: str) -> Explanation:
    """How the ops of a training step run."""
    run = Run(variant, 0)
    model, _ = start(experiment, run)
    return sk.explain(experiment.loss, model, run, 0)


def _peak(experiment: Experiment, variant: str, preset: str, plain: bool) -> float | None:
    """In MB; None where this system cannot tell."""
    arguments = (experiment.name, preset, experiment.file, experiment.device, variant, plain)
    try:
        return peak_in_child("examples.shared.speed:in_child", *arguments)
    except RuntimeError as error:
        if "/proc" in str(error):
            return None
        raise


def median_ms(row: Row, how: str) -> float:
    """Of one training step."""
    return float(torch.tensor(row["samples_ms"][how], dtype=torch.float64).median()) / row["steps"]


def sentence(row: Row) -> str:
    ratio = paired_ratio(row["samples_ms"]["plain"], row["samples_ms"]["ours"])
    times = f"a step takes {median_ms(row, 'ours'):.1f} ms, the plain loop {median_ms(row, 'plain'):.1f} ms"
    return f"{times}: {ratio.median:.2f}x as fast ({ratio.low:.2f} to {ratio.high:.2f})"
