"""The cases and suites that there are: products of shapes and options, with where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from .cases import MODES, Case

Shapes = Sequence[tuple[int, int]]


def family(name: str, source: str, shapes: Shapes, **fields: Any) -> tuple[Case, ...]:
    """Every combination of the shapes (D, H) and the fields that are lists, in this order; other fields are of all cases.

    name: a format of the fields. op is "mlp" unless it is given.
    """
    axes = {key: value if isinstance(value, list) else [value] for key, value in {"op": "mlp", **fields}.items()}
    cases = []
    for (features, hidden), *values in product(shapes, *axes.values()):
        case: dict[str, Any] = {"features": features, "hidden": hidden, **dict(zip(axes, values, strict=True))}
        cases.append(Case(name=name.format(**case), source=source, **case))
    return tuple(cases)


def squares(*features: int) -> Shapes:
    return [(d, d) for d in features]


@dataclass(frozen=True)
class Suite:
    """Cases that belong together; providers: the ones measured unless others are asked for; memory: peak memory as well."""

    about: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...] = ("eager", "torch_compile", "blas")
    memory: bool = False


QUICK = (
    Case(
        "mlp-launch-bound", "mlp", 256, 128, 128, 16, "small batches: the cost of a call, not of its products",
        activation="relu", norm="rmsnorm",
    ),
    Case(
        "mlp-wide-hidden", "mlp", 2048, 128, 512, 8, "a transformer's feed-forward block, H = 4 D",
        modes=("forward", "training"),
    ),
    Case(
        "linear-leaky", "linear", 4096, 128, 128, 8, "SCORE's own MLP form, arXiv 2603.10544",
        activation="leaky_relu", norm=None,
    ),
    Case(
        "mlp-swiglu-cyclic", "mlp", 1024, 256, 512, 6, "two sets of a gated block in turns, as recursive models use them",
        activation="silu", norm="rmsnorm", gated=True, bias=False, update="residual", dt=1.0, sets=2, order="cyclic",
    ),
    Case(
        "mlp-molecules-rk4", "mlp", 2048, 128, 128, 4, "an ESOL batch of 1,000 to 4,000 atoms, arXiv 2603.10544",
        activation="relu", solver="rk4", dt=0.25,
    ),
    Case(
        "attention-64-tokens", "attention", 4096, 128, 128, 8, "64 sequences of 64 tokens, 4 heads", activation="identity",
        modes=("forward", "training"), heads=4, tokens=64,
    ),
    Case(
        "attention-causal", "attention", 2048, 384, 384, 6, "nanoGPT's character-level model: D = 384, 6 heads, 256 tokens",
        activation="identity", bias=False, heads=6, tokens=256, causal=True,
    ),
    Case(
        "transformer-molecules", "transformer", 2048, 128, 128, 4, "an ESOL batch: 128 molecules of 16 atoms, arXiv 2603.10544",
        activation="relu", heads=4, tokens=16,
    ),
)  # fmt: skip

CPU_SHAPES = [(64, 64), (128, 128), (128, 512), (256, 256), (256, 1024)]
CPU_TARGETS = ("mlp-{features}x{hidden}-t{iterations}", "design section 10: the CPU's targets")
FLOOR = family(*CPU_TARGETS, [*CPU_SHAPES, (512, 512)], rows=16384, iterations=8)
# Sequences of the suite "quick", at the T of the memory that a training step may take. Deep, a preactivation that rounds to the
# other side of a kink is a matter of time: not relu.
DEEP = tuple(
    replace(case, name=f"{case.name}-t16", iterations=16, modes=("training",), activation=activation)
    for case, activation in zip(QUICK[-3:], ("identity", "identity", "gelu"), strict=True)
)
TRAINING = (*family(*CPU_TARGETS, CPU_SHAPES, rows=16384, iterations=16, modes=("training",)), *DEEP)


def _headline(d: int, iterations: int, activation: str = "relu", mode: str = "forward") -> Case:
    name = "-".join(["gpu", f"{d}x{d}", f"t{iterations}", activation, *([mode] if mode != "forward" else [])])
    source = "design section 10: the GPU's targets"
    return Case(name, "mlp", 262144, d, d, iterations, source, "bfloat16", (mode,), activation, "rmsnorm")


# What matters most comes first: a run may end before its last case.
HEADLINE = (
    *(_headline(d, 4) for d in (128, 64, 256)),
    *(_headline(d, 4, mode="training") for d in (128, 64, 256)),
    replace(_headline(128, 16), name="gpu-small", rows=1024),
    replace(_headline(128, 16), name="gpu-small-graph", rows=1024, graph=True),
    *(_headline(d, 4, "gelu") for d in (128, 64, 256)),
    *(_headline(d, 16) for d in (128, 64, 256)),
    *(_headline(d, 16, mode="training") for d in (128, 64, 256)),
    *(_headline(d, 16, "gelu") for d in (128, 64, 256)),
)

BF16: dict[str, Any] = {"dtype": "bfloat16", "norm": "rmsnorm"}
SWIGLU: dict[str, Any] = {"activation": "silu", "norm": "rmsnorm", "gated": True, "bias": False}
STEP = ("forward", "training")

FULL = (
    *family(
        "launch-{features}-m{rows}-t{iterations}", "small batches: the cost of a call, not of its products",
        squares(64, 128, 256), rows=[32, 256, 1024, 4096], iterations=[3, 8, 16], modes=STEP, **BF16,
    ),
    *family(
        "square-{features}-t{iterations}", "design section 10: the GPU's targets, and the widths beyond them",
        squares(64, 128, 256, 512, 1024), rows=262144, iterations=[4, 16], modes=MODES, activation="relu", **BF16,
    ),
    *family(
        "wide-{features}x{hidden}-t{iterations}", "the feed-forward block of a transformer, H = 4 D",
        [(512, 2048), (768, 3072)], rows=262144, iterations=4, modes=MODES, **BF16,
    ),
    *family(
        "esol-m{rows}-{solver}", "an ESOL batch of 1,000 to 4,000 atoms, arXiv 2603.10544",
        squares(128), rows=[1024, 4096], iterations=4, modes=STEP, activation="relu", solver=["euler", "heun", "rk4"], dt=0.25,
    ),
    *family(
        "nanogpt-char", "nanoGPT's train_shakespeare_char: the feed-forward part of its 6 layers, 64 x 256 tokens",
        [(384, 1536)], rows=64 * 256, iterations=6, dtype="bfloat16", modes=STEP, bias=False, update="residual", dt=1.0,
    ),
    *family(
        "language-t{iterations}", "SCORE's language model: the feed-forward part, arXiv 2603.10544",
        [(256, 1024)], rows=32768, iterations=[4, 8], dtype="bfloat16", modes=STEP, activation="relu2", norm="rmsnorm",
        bias=False, update="residual", dt=0.5,
    ),
    *family(
        "trm-m{rows}", "TRM, arXiv 2510.04871: two layers in turns, 3 x 7 times, gradients through the last 7; Sudoku and ARC",
        [(512, 1536)], rows=[97, 916], iterations=21, dtype="bfloat16", modes=STEP, update="residual", dt=1.0, sets=2,
        order="cyclic", grad_iterations=7, **SWIGLU,
    ),
    *family(
        "transformer-esol-m{rows}", "an ESOL batch of 1,000 to 4,000 atoms, 16 to a molecule, arXiv 2603.10544",
        squares(128), op="transformer", rows=[1024, 4096], iterations=4, modes=STEP, activation="relu", dt=0.25, heads=4,
        tokens=16,
    ),
    *family(
        "transformer-nanogpt", "nanoGPT's train_shakespeare_char: 6 layers as one, 64 x 256 tokens, 6 heads",
        [(384, 1536)], op="transformer", rows=64 * 256, iterations=6, dtype="bfloat16", modes=STEP, bias=False, heads=6,
        tokens=256, causal=True,
    ),
    *family(
        "transformer-trm-m{rows}", "TRM, arXiv 2510.04871: as trm above, with its attention of 8 heads over 97 tokens",
        [(512, 1536)], op="transformer", rows=[97, 16 * 97], iterations=21, dtype="bfloat16", modes=STEP, update="replace",
        dt=None, sets=2, order="cyclic", grad_iterations=7, heads=8, tokens=97, norm_placement="post", **SWIGLU,
    ),
    *family(
        "depth-t{iterations}", "a sweep over T",
        squares(128), rows=65536, iterations=[1, 2, 4, 8, 16, 32, 64], modes=STEP, **BF16,
    ),
    *family(
        "rows-m{rows}", "a sweep over rows", squares(128), rows=[4**n for n in range(3, 11)], iterations=8, modes=STEP, **BF16
    ),
    *family(
        "precision-{dtype}", "one shape in every precision", squares(128), rows=65536, iterations=8, modes=MODES,
        **{**BF16, "dtype": ["float32", "tf32", "bfloat16", "float16"]},
    ),
)  # fmt: skip

ON_A_GPU = ("eager", "torch_compile", "torch_compile_max", "blas", "triton", "cuda", "auto")
A_CASE_OF_YOUR_OWN = ("eager", "torch_compile", "blas", "triton", "cuda", "auto")
EVERYONE = (
    "eager", "checkpoint", "torch_compile", "torch_compile_max", "torch_compile_graphs", "stack", "torchdiffeq", "liger",
    "encoder_layer", "flex_attention", "reference", "blas", "triton", "cuda", "auto",
)  # fmt: skip

SUITES: dict[str, Suite] = {
    "quick": Suite("every kind of case, in 2 minutes on 2 cores", QUICK, ("eager", "torch_compile", "reference", "blas")),
    "floor": Suite("forward on a CPU: the speed that blas must keep", FLOOR),
    "training": Suite("a training step on a CPU: time and peak memory at T = 16", TRAINING, ("eager", "blas"), memory=True),
    "headline": Suite("a GPU's table: shared blocks in bfloat16", HEADLINE, ON_A_GPU),
    "full": Suite("everything, for a GPU and an evening: what people run, sweeps, all precisions, all peers", FULL, EVERYONE),
}


def select(suite: str | None, patterns: list[str]) -> tuple[Case, ...]:
    """The cases of a suite (None: of all suites) whose name matches one of the patterns (none given: all of them).

    Raises ValueError when a pattern matches nothing.
    """
    cases = [case for name, entry in SUITES.items() if suite in (None, name) for case in entry.cases]
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"--case {pattern!r} matches none of: {', '.join(case.name for case in cases)}")
    return tuple(case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns))
