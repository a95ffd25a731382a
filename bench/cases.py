"""What is measured: cases and suites, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from score_kernels.problem import SHAPES

MODES = ("forward", "backward", "training")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One problem: T iterations of a block of one op on `rows` rows.

    features, hidden: D and H (H = D for linear). sets: L. source: where the shape comes from. graph: on a GPU, time the replay
    of a CUDA graph of the forward pass: the kernels without the cost of launching them.
    """

    name: str
    op: str
    rows: int
    features: int
    hidden: int
    iterations: int
    source: str
    dtype: str = "float32"
    modes: tuple[str, ...] = ("forward",)
    activation: str = "gelu"
    norm: str | None = "layernorm"
    gated: bool = False
    bias: bool = True
    update: str = "contractive"
    solver: str = "euler"
    dt: float | None = 0.5
    sets: int = 1
    order: str = "consecutive"
    graph: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """What a result's `params` says: the options of the call that are not columns of their own."""
        columns = ("name", "op", "rows", "features", "hidden", "iterations", "source", "dtype", "modes", "sets")
        return {"L": self.sets, **{key: value for key, value in asdict(self).items() if key not in columns}}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that the case has, by the op's names, without a leading L."""
        sizes = {"D": self.features, "H": self.hidden}
        absent = set() if self.gated else {"w_gate", "b_gate"}
        absent |= {None: {"norm_weight", "norm_bias"}, "rmsnorm": {"norm_bias"}}.get(self.norm, set())
        if not self.bias:
            absent |= {name for name in SHAPES[self.op] if name.startswith("b") or name.endswith("bias")}
        return {name: tuple(sizes[d] for d in dims) for name, dims in SHAPES[self.op].items() if name not in absent}


@dataclass(frozen=True)
class Suite:
    """Cases that belong together; providers: the ones measured unless others are asked for; memory: peak memory as well."""

    about: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...] = ("eager", "torch_compile", "blas")
    memory: bool = False


def _square_rows(iterations: int, modes: tuple[str, ...], shapes: tuple[tuple[int, int], ...]) -> tuple[Case, ...]:
    source = "design section 10: the CPU's targets"
    return tuple(
        Case(f"mlp-{d}x{h}-t{iterations}", "mlp", 16384, d, h, iterations, source, modes=modes) for d, h in shapes
    )  # fmt: skip


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
)  # fmt: skip

FLOOR = _square_rows(8, ("forward",), ((64, 64), (128, 128), (128, 512), (256, 256), (256, 1024), (512, 512)))
TRAINING = _square_rows(16, ("training",), ((64, 64), (128, 128), (128, 512), (256, 256), (256, 1024)))


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

ON_A_GPU = ("eager", "torch_compile", "torch_compile_max", "blas", "triton", "auto")

SUITES: dict[str, Suite] = {
    "quick": Suite("every kind of case, in 2 minutes on 2 cores", QUICK, ("eager", "torch_compile", "reference", "blas")),
    "floor": Suite("forward on a CPU: the speed that blas must keep", FLOOR),
    "training": Suite("a training step on a CPU: time and peak memory at T = 16", TRAINING, ("eager", "blas"), memory=True),
    "headline": Suite("a GPU's table: shared blocks in bfloat16", HEADLINE, ON_A_GPU),
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
