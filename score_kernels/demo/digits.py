"""Part 2 of the demo: an ordinary stack of `nn.Linear` blocks and its SCORE twins, trained on scikit-learn's digits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from bench.memory import peak_in_child
from score_kernels.modules import ScoreMLP

from . import screen
from .threads import one_thread

PIXELS, FEATURES, HIDDEN, CLASSES, DEPTH = 64, 128, 256, 10, 8
BATCH, LEARNING_RATE, MEMORY_ROWS = 64, 1e-3, 8192
SEEDS, EPOCHS = 3, 15
QUICK_SEEDS, QUICK_EPOCHS = 1, 4


class Residual(nn.Module):
    """h + block(h)"""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        return h + self.block(h)


def _block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, FEATURES))


def _score(layers: int, learn_dt: bool | str = False) -> nn.Module:
    return ScoreMLP(FEATURES, HIDDEN, iterations=DEPTH, layers=layers, norm="layernorm", learn_dt=learn_dt)


BASELINE = "stack of 8 blocks"

# What stands between the input layer and the head.
BODIES: dict[str, Callable[[], nn.Module]] = {
    BASELINE: lambda: nn.Sequential(*(_block() for _ in range(DEPTH))),
    "the same, with residuals": lambda: nn.Sequential(*(Residual(_block()) for _ in range(DEPTH))),
    "SCORE, 1 block x 8": lambda: _score(1),
    "SCORE, 1 block x 8, learned dt": lambda: _score(1, "per_iteration"),
    "SCORE, 2 blocks x 4": lambda: _score(2),
}


class Data(NamedTuple):
    """Standardised pixels (rows, 64) and digits (rows,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Result:
    """accuracies: percent of the test set after the last epoch, one a seed; epochs_s: seconds; peak_mb: None: not measured."""

    parameters: int
    accuracies: list[float] = field(default_factory=list)
    epochs_s: list[float] = field(default_factory=list)
    peak_mb: float | None = None

    @property
    def accuracy(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def run(console: Console, quick: bool, seed: int) -> None:
    """Trains all, prints the table and what it says."""
    seeds, epochs = (QUICK_SEEDS, QUICK_EPOCHS) if quick else (SEEDS, EPOCHS)
    data = load()
    console.rule("2. Is it useful? Handwritten digits: a stack and its SCORE twins")
    with one_thread(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=seeds * epochs + len(BODIES))
        results = train(data, range(seed, seed + seeds), epochs, lambda: progress.advance(task))
        reason = measure_memory(results, lambda: progress.advance(task))
    console.print(table(results))
    screen.paragraph(
        console,
        f"{len(data.train_y)} images to train on, {len(data.test_y)} to test, the same split for all. Every network: "
        f"{PIXELS} -> {FEATURES}, {DEPTH} x (LayerNorm, {FEATURES} -> {HIDDEN}, GELU, {HIDDEN} -> {FEATURES}), {FEATURES} -> "
        f"{CLASSES}; Adam, learning rate {LEARNING_RATE:g} falling to 0, batches of {BATCH}, {epochs} epochs, "
        f"{'1 seed' if seeds == 1 else f'{seeds} seeds (mean ± standard deviation)'}. Time: median, on one thread; the "
        f"networks take turns, epoch by epoch. Memory: the peak that one training step on {MEMORY_ROWS} rows adds, in a "
        "process of its own.",
    )
    if reason:
        screen.paragraph(console, f"Memory was not measured: {reason}")
    screen.points(console, conclusions(results))


def load() -> Data:
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    mean, deviation = train_x.mean(), train_x.std()
    images = (torch.tensor((part - mean) / deviation, dtype=torch.float32) for part in (train_x, test_x))
    digits = (torch.tensor(part) for part in (train_y, test_y))
    (train_pixels, test_pixels), (train_digits, test_digits) = images, digits
    return Data(train_pixels, train_digits, test_pixels, test_digits)


def network(name: str) -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, FEATURES), BODIES[name](), nn.Linear(FEATURES, CLASSES))


def train(data: Data, seeds: Sequence[int], epochs: int, on_epoch: Callable[[], object]) -> dict[str, Result]:
    """Trains every network from every seed; within a seed they take turns, so that their times share the machine's drift."""
    results = {name: Result(sum(p.numel() for p in network(name).parameters())) for name in BODIES}
    for seed in seeds:
        networks, optimizers, schedules = {}, {}, {}
        for name in BODIES:
            torch.manual_seed(seed)
            networks[name] = network(name)
            optimizers[name] = torch.optim.Adam(networks[name].parameters(), lr=LEARNING_RATE)
            schedules[name] = LinearLR(optimizers[name], 1.0, 0.0, total_iters=epochs * -(-len(data.train_y) // BATCH))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            batches = torch.randperm(len(data.train_y), generator=generator).split(BATCH)
            for name, model in networks.items():
                start = time.perf_counter()
                for rows in batches:
                    _step(model, data.train_x[rows], data.train_y[rows])
                    optimizers[name].step()
                    schedules[name].step()
                results[name].epochs_s.append(time.perf_counter() - start)
            on_epoch()
        for name, model in networks.items():
            with torch.no_grad():
                right = (model(data.test_x).argmax(1) == data.test_y).double().mean()
            results[name].accuracies.append(100 * float(right))
    return results


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def measure_memory(results: Mapping[str, Result], on_network: Callable[[], object]) -> str | None:
    """Fills in the peak memory of a training step; the reason if this system cannot tell."""
    for name, result in results.items():
        try:
            result.peak_mb = peak_in_child("score_kernels.demo.digits:training_step", name)
        except RuntimeError as error:
            return str(error)
        on_network()
    return None


def training_step(name: str) -> Callable[[], object]:
    """What the child process of `measure_memory` measures: forward and backward of one network on a large batch."""
    torch.manual_seed(0)
    model, x, y = network(name), torch.randn(MEMORY_ROWS, PIXELS), torch.randint(CLASSES, (MEMORY_ROWS,))
    return lambda: _step(model, x, y)


def table(results: Mapping[str, Result]) -> Table:
    rows = screen.table(("network",), ("parameters", "test accuracy", "time per epoch", "memory of a step"))
    for name, r in results.items():
        memory = "-" if r.peak_mb is None else f"{r.peak_mb:.0f} MB"
        rows.add_row(name, f"{r.parameters:,}", _percent(r), f"{1e3 * median(r.epochs_s):.0f} ms", memory)
    return rows


def conclusions(results: Mapping[str, Result]) -> list[str]:
    """One sentence for each SCORE network, against the stack; all of it computed from the results."""
    base = results[BASELINE]
    sentences = []
    for name, r in results.items():
        if not name.startswith("SCORE"):
            continue
        parts = [
            f"{name}: {r.parameters / base.parameters:.2f}x the stack's parameters",
            f"accuracy {_percent(r)} against {_percent(base)}, {_difference(r, base)}",
            f"{median(r.epochs_s) / median(base.epochs_s):.2f}x its time per epoch",
        ]
        if r.peak_mb is not None and base.peak_mb:
            parts.append(f"{r.peak_mb / base.peak_mb:.2f}x its memory")
        sentences.append("; ".join(parts) + ".")
    return sentences


def _percent(result: Result) -> str:
    spread = "" if result.spread is None else f" ± {result.spread:.1f}"
    return f"{result.accuracy:.1f}{spread} %"


def _difference(result: Result, base: Result) -> str:
    points = result.accuracy - base.accuracy
    if result.spread is None or base.spread is None:
        return f"{points:+.1f} points (one seed: that may be chance)"
    clear = abs(points) > result.spread + base.spread
    return f"{points:+.1f} points, {'more' if clear else 'no more'} than the spreads together"
