"""A character model of Shakespeare: a transformer of T layers against one or two layers iterated the SCORE way.

    python -m examples.language                                   # 4 x 128, context 64: minutes for each model on a CPU
    python -m examples.language --preset full --device cuda       # nanoGPT's shape: 6 layers, 6 heads, 384, context 256
    python -m examples.language --part train --variant "SCORE 1*"

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
from examples.shared import data, runner
from examples.shared.experiment import Experiment, Run


@dataclass(frozen=True)
class Settings:
    """iterations: T, the depth. context: N. steps: of a run, `batch` sequences each; rate: the highest learning rate."""

    features: int
    num_heads: int
    iterations: int
    context: int
    batch: int
    steps: int
    every: int
    rate: float
    seeds: int = 1
    # Sequences of the validation text that the loss is measured on, the same ones every time.
    validation: int = 200
    sample: int = 300


PRESETS = {
    "tiny": Settings(16, 2, 2, context=8, batch=4, steps=4, every=2, rate=2e-3, validation=4, sample=8),
    "cpu": Settings(128, 4, 4, context=64, batch=12, steps=1400, every=200, rate=2e-3),
    "full": Settings(384, 6, 6, context=256, batch=64, steps=5000, every=250, rate=1e-3),
}


@dataclass(frozen=True)
class Variant:
    """shared: how many layers are iterated, None: T layers. dt: None is 1/T. x0: the embedding is added in every iteration.

    learn_dt: one dt for each iteration, started at `dt`. F has an inner residual, so the decay cancels: the update is
    h + dt (F(h) - h), and dt = 1 with T layers an ordinary transformer.
    """

    shared: int | None
    dt: float | None
    x0: bool = False
    learn_dt: bool = False


VARIANTS = {
    "T layers": Variant(None, 1.0),
    "T layers, dt 0.5 (skip05)": Variant(None, 0.5),
    "SCORE 1 x T, dt 0.25": Variant(1, 0.25),
    "SCORE 1 x T, dt 0.5": Variant(1, 0.5),
    "SCORE 1 x T, dt 1/T": Variant(1, None),
    "SCORE 1 x T, dt 1": Variant(1, 1.0),
    "SCORE 1 x T, learned dt": Variant(1, 0.5, learn_dt=True),
    "SCORE 1 x T, dt 0.5, x0": Variant(1, 0.5, x0=True),
    "SCORE 2 x T/2, dt 0.5": Variant(2, 0.5),
    "SCORE 2 x T/2, dt 1": Variant(2, 1.0),
}


class LanguageModel(nn.Module):
    """Characters (B, N) -> logits (B, N, characters). Embedding and output layer are one matrix, as nanoGPT's."""

    def __init__(self, characters: int, settings: Settings, variant: Variant) -> None:
        super().__init__()
        iterations, features = settings.iterations, settings.features
        self.x0 = variant.x0
        self.characters, self.positions = nn.Embedding(characters, features), nn.Embedding(settings.context, features)
        self.body = sk.ScoreTransformer(
            features,
            settings.num_heads,
            4 * features,
            causal=True,
            iterations=iterations,
            layers=variant.shared or iterations,
            dt=1 / iterations if variant.dt is None else variant.dt,
            learn_dt="per_iteration" if variant.learn_dt else False,
            norm="layernorm",
            bias=False,
        )
        self.norm = nn.LayerNorm(features, bias=False)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        for name in ("w_qkv", "w_out", "w1", "w2"):  # what is added to the state is smaller, the more often it is added
            std = 0.02 / math.sqrt(2 * iterations) if name in ("w_out", "w2") else 0.02
            nn.init.normal_(getattr(self.body, name), std=std)

    def forward(self, text: Tensor) -> Tensor:
        h = self.characters(text) + self.positions.weight[: text.shape[1]]
        h = self.body(h, x0=h if self.x0 else None)
        return F.linear(self.norm(h), self.characters.weight)


class Language(Experiment):
    name = "language"
    data = data.TINY_SHAKESPEARE
    presets: ClassVar[dict[str, Any]] = PRESETS
    metric = "validation"

    def __init__(self, settings: Settings, file: Path | None, device: str) -> None:
        super().__init__(settings, file, device)
        assert file is not None
        text = file.read_text(encoding="utf-8")
        self.alphabet = sorted(set(text))
        codes = {character: code for code, character in enumerate(self.alphabet)}
        encoded = torch.tensor([codes[character] for character in text])
        self.text, self.validation = encoded.tensor_split([len(encoded) * 9 // 10])

    @property
    def variants(self) -> list[str]:
        """Where 1/T is another variant's dt, once."""
        same = {variant.dt for variant in VARIANTS.values()}
        return [name for name, v in VARIANTS.items() if v.dt is not None or 1 / self.settings.iterations not in same]

    def model(self, variant: str) -> nn.Module:
        return LanguageModel(len(self.alphabet), self.settings, VARIANTS[variant])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Matrices decay; norms and a learned dt do not."""
        groups: dict[float, list[nn.Parameter]] = {0.1: [], 0.0: []}
        for name, parameter in model.named_parameters():
            groups[0.0 if "norm" in name or name.endswith("dt_logit") else 0.1].append(parameter)
        decays = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
        return torch.optim.AdamW(decays, lr=self.settings.rate, betas=(0.9, 0.99))

    def rate(self, step: int) -> float:
        """Up in a twentieth of the run, down to a tenth by a cosine."""
        s = self.settings
        return float(s.rate * min(20 * (step + 1) / s.steps, 1) * (0.55 + 0.45 * math.cos(math.pi * step / s.steps)))

    def loss(self, model: nn.Module, run: Run, step: int) -> Tensor:
        starts = torch.randint(len(self.text) - self.settings.context, (self.settings.batch,))
        return self.cross_entropy(model, self.text, starts)

    def evaluate(self, model: nn.Module, run: Run) -> dict[str, float]:
        starts = torch.linspace(0, len(self.validation) - self.settings.context - 1, self.settings.validation).long()
        return {"validation": self.cross_entropy(model, self.validation, starts).item()}

    def cross_entropy(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        """Nats a character, of the sequences that start there."""
        rows = text[starts[:, None] + torch.arange(self.settings.context + 1)].to(self.device)
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def finish(self, model: nn.Module, run: Run, curve: list[dict[str, float]]) -> dict[str, Any]:
        """A text of the model's own, and the learned dt."""
        torch.manual_seed(run.seed)
        text = torch.tensor([[self.alphabet.index("\n")]], device=self.device)
        for _ in range(self.settings.sample):
            logits = model(text[:, -self.settings.context :])[0, -1]
            drawn = torch.multinomial(torch.softmax(logits.cpu() / 0.8, 0), 1)
            text = torch.cat([text, drawn[None].to(self.device)], 1)
        body = model.body
        assert isinstance(body, sk.ScoreTransformer)
        learned = body.dt.tolist() if isinstance(body.dt, Tensor) else []
        best = min(point["validation"] for point in curve)
        return {"best": best, "dt": learned, "text": "".join(self.alphabet[code] for code in text[0, 1:].tolist())}


def main(arguments: list[str] | None = None) -> int:
    return runner.main(Language, arguments)


if __name__ == "__main__":
    sys.exit(main())
