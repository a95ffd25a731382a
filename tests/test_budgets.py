"""Every tile of the table, compiled ahead of time: no spilled register, no serialised wgmma, the shared memory that it says.

No GPU is needed. Compilations run in other processes, for in this one Triton interprets; those processes run this file, under
the Triton of this environment or under that in the folder `SCORE_KERNELS_OTHER_TRITON` (the version that hardware has).

`python tests/test_budgets.py search 90 "gated mlp" 3 128 forward` prints the tiles within budget under both for a place of the
table (family, block, tiles of state, D), largest first: what takes the place of one that a new Triton puts over its budget.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from score_kernels import stages
from score_kernels.activations import ACTIVATIONS
from score_kernels.problem import NORMS
from score_kernels.triton_kernels.configs import BACKWARD, FORWARD, Tile

# Bytes of shared memory for a program: the smallest of the architectures that a family serves.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}

# state tiles -> stages of the solver that needs them (euler; midpoint, heun, ralston; rk4).
STAGES = {1 + stages.uses_z(name) + stages.uses_sum(name): len(program) for name, program in stages.SOLVERS.items()}

KINDS = ("mlp", "gated mlp", "linear")

# Arguments that are float32 where a kernel has half of a transformer's iteration.
STATE = ("h", "out", "grad_out", "grad_h")

OTHER_TRITON = os.environ.get("SCORE_KERNELS_OTHER_TRITON")
VERSIONS = ("pinned", "other") if OTHER_TRITON else ("pinned",)

# The hardware that has the other version is of family 90: for the rest the pinned one is enough.
COMPILED = [(family, "pinned") for family in SHARED] + [(90, version) for version in VERSIONS[1:]]

# Backward tiles of family 90 (block, D) that have fewer rows than wgmma takes, since all larger ones that were tried spill.
WITHOUT_WGMMA = {("gated mlp", 128)}


class Job(NamedTuple):
    """One compilation. The defaults are the options that take the most registers; arch: 90, or "gfx942"."""

    arch: int | str
    kind: str
    state_tiles: int
    columns: int
    backward: bool
    tile: tuple[int, ...]
    dtype: str = "bf16"
    activation: str = "gelu"
    norm: str = "layernorm"
    injected: bool = True
    trajectory: bool = False
    state: str = ""

    @property
    def name(self) -> str:
        return f"{self.arch} {self.kind} {self.state_tiles} D={self.columns} {'backward' if self.backward else 'forward'}"


def jobs_of(family: int, kind: str, state_tiles: int, *, backward: bool, **options: Any) -> list[Job]:
    """A pass at every width of a part of the table."""
    table = BACKWARD[family].get(kind, {}) if backward else FORWARD[family].get((kind, state_tiles), {})
    return [Job(family, kind, state_tiles, columns, backward, tuple(tile), **options) for columns, tile in table.items()]


@functools.cache
def compiler(version: str, script: str) -> subprocess.Popen[str]:
    """A process that `serve`s. It imports torch once for all tests."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folder = tempfile.TemporaryDirectory()
    environment["TRITON_CACHE_DIR"] = folder.name
    if version == "other":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (OTHER_TRITON, os.environ.get("PYTHONPATH"))))
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, script], env=environment, stdin=pipe, stdout=pipe, text=True)
    atexit.register(lambda: (process.communicate(), folder.cleanup()))
    return process


def compiled(jobs: list[Any], version: str = "pinned", script: str = __file__) -> dict[str, dict[str, int]]:
    """What the compiler says of each job, by its name; script: the file that compiles them."""
    process = compiler(version, script)
    print(json.dumps(jobs), file=process.stdin, flush=True)
    answer = json.loads(process.stdout.readline())  # type: ignore[union-attr]
    assert isinstance(answer, list), answer
    return {job.name: found for job, found in zip(jobs, answer, strict=True)}


def over_budget(job: Job, found: dict[str, int]) -> list[str]:
    """Why a kernel misses its budget."""
    reasons = []
    if found["stack"] or found["spilled"]:
        reasons.append(f"{found['spilled']} bytes spilled, a stack of {found['stack']}")
    if found["serialised"]:
        reasons.append("wgmma serialised")
    if found["shared"] > SHARED[int(job.arch)]:
        reasons.append(f"{found['shared']} bytes of shared memory")
    exempt = job.tile in {tuple(BACKWARD[90][kind][columns]) for kind, columns in WITHOUT_WGMMA}
    if job.arch == 90 and bool(found["wgmma"]) == exempt:
        reasons.append("wgmma: WITHOUT_WGMMA is stale" if exempt else "no wgmma")
    return reasons


def misses(jobs: list[Job], results: dict[str, dict[str, int]]) -> dict[str, list[str]]:
    return {job.name: reasons for job in jobs if (reasons := over_budget(job, results[job.name]))}


@pytest.mark.parametrize(("family", "version"), COMPILED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_of_the_table(family, kind, backward, version):
    """On family 90 with every solver: the one with the most state is not always the one that takes the most registers.

    Backward, which has one tile for all of them, and the other families with the least and the most state; backward under the
    other version with the most.
    """
    solvers = list(STAGES) if family == 90 and not backward else [min(STAGES), max(STAGES)]
    if version == "other" and backward:
        solvers = [max(STAGES)]
    jobs = [job for tiles in solvers for job in jobs_of(family, kind, tiles, backward=backward, trajectory=not backward)]
    results = compiled(jobs, version)
    assert misses(jobs, results) == {}
    assert {j.name: results[j.name]["shared"] for j in jobs if results[j.name]["shared"] > Tile(*j.tile).shared} == {}


def test_the_table_is_complete():
    """Forward to D = 256 for Euler's mlp and to 128 for all else; backward to 128 whatever the solver, gated on 80 to 64."""
    assert set(FORWARD) == set(BACKWARD) == set(SHARED)
    for family in SHARED:
        assert set(FORWARD[family]) == set(itertools.product(KINDS, STAGES))
        for (kind, state_tiles), widths in FORWARD[family].items():
            assert set(widths) >= {16, 32, 64, 128} | ({256} if (kind, state_tiles) == ("mlp", 1) else set())
        assert set(BACKWARD[family]) == set(KINDS)
        for kind, widths in BACKWARD[family].items():
            assert set(widths) >= {16, 32, 64} | ({128} if (family, kind) != (80, "gated mlp") else set())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize(
    "options", [{"activation": name} for name in ACTIVATIONS] + [{"norm": name} for name in NORMS], ids=str
)
def test_other_options(kind, options, backward):
    jobs = [job for job in jobs_of(90, kind, 1, backward=backward, **options) if job.columns == 64]
    assert misses(jobs, compiled(jobs)) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"injected": False}, {"trajectory": True}], ids=str)
def test_other_inputs(kind, options):
    jobs = [
        job
        for tiles, backward in itertools.product((min(STAGES), max(STAGES)), (False, True))
        for job in jobs_of(90, kind, tiles, backward=backward, **options)
        if job.columns == 32
    ]
    assert misses(jobs, compiled(jobs)) == {}


@pytest.mark.parametrize("kind", ["mlp", "gated mlp"])
def test_a_state_in_float32_between_launches(kind):
    jobs = [
        job._replace(injected=False)
        for backward in (False, True)
        for job in jobs_of(90, kind, 1, backward=backward, state="fp32")
        if job.columns >= 64
    ]
    assert misses(jobs, compiled(jobs)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_fits_in_the_tiles_of_twice_the_width(kind):
    jobs = [
        job._replace(columns=job.columns // 2)
        for backward in (False, True)
        for job in jobs_of(90, kind, 1, backward=backward, dtype="fp32")
        if job.columns > 16
    ]
    assert misses(jobs, compiled(jobs)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_rocm_compiles(kind):
    both = [job for backward in (False, True) for job in jobs_of(80, kind, 1, backward=backward)]
    jobs = [job._replace(arch="gfx942") for job in both if job.columns == 64]
    assert all(found["shared"] > 0 for found in compiled(jobs).values())


def compile_job(job: Job) -> dict[str, int]:
    """Compiles one job, in a process that does not interpret Triton."""
    from score_kernels.triton_kernels import iterate, linear, mlp

    kind, tile = job.kind, Tile(*job.tile)
    op, gated = kind.split()[-1], kind.startswith("gated")
    features, hidden = job.columns, job.columns * (4 if op == "mlp" else 1)
    has_norm = job.norm != "none"
    present = (*((True,) * 4 + (gated,) * 2 if op == "mlp" else (True, True)), has_norm, job.norm == "layernorm")
    wanted = dict.fromkeys(("want_x0",) * job.injected + ("want_scalars", "want_parameters"), job.backward)
    static = iterate.Static(
        features=features, hidden=hidden, columns=job.columns, tile=tile.rows, chunk=tile.hidden,
        precision="tf32" if job.dtype == "fp32" else "ieee", activation=job.activation, norm=job.norm, present=present,
        parameters=len(present), gain=present[-2], norm_bias=present[-1], gain_float32=False,
        stages=STAGES[job.state_tiles], uses_z=job.state_tiles > 1,
        uses_sum=job.state_tiles > 2, cyclic=False, x0=job.injected, state_scale=job.injected, x0_scale=job.injected,
        records=STAGES[job.state_tiles] if job.trajectory and not job.backward else 0,
        grad_trajectory=job.trajectory and job.backward, **wanted,
    )  # fmt: skip
    module = {"mlp": mlp, "linear": linear}[op]
    kernel = iterate.backward_kernel if job.backward else iterate.forward_kernel
    constants = {"S": static}
    name = "reverse" if job.backward else "update"
    constants[name.upper()] = getattr(module, f"{op}_{name}")
    integers = ("rows", "states_rows", "grad_rows", "iterations", "first", "sets")
    float32 = ("coefficients", "state_scale", "x0_scale", "states", "grad_states", "scratch", "scalars")
    types = {
        **dict.fromkeys(kernel.arg_names, "*" + job.dtype), **dict.fromkeys(float32, "*fp32"), **dict.fromkeys(integers, "i32"),
        "table": "*i64", "eps": "fp32", "slope": "fp32",
    }  # fmt: skip
    types |= dict.fromkeys(STATE if job.state else (), "*" + job.state)
    return report(kernel, types, constants, job.arch, tile.warps, tile.stages)


def report(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], arch: int | str, warps: int, pipeline: int
) -> dict[str, int]:
    """Compiles a kernel and tells what it needs. types: of its arguments, of which those of a tuple are one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {}
    for i, kind in enumerate(signature.values()):
        parts = {(i,): kind} if isinstance(kind, str) else {(i, j): part for j, part in enumerate(kind)}
        attributes |= {place: [["tt.divisibility", 16]] for place, part in parts.items() if part.startswith("*")}
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
    with contextlib.redirect_stdout(io.StringIO()) as log:
        source = ASTSource(kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": pipeline})
    found = {"shared": kernel.metadata.shared}
    if target.backend == "cuda":
        text = log.getvalue()
        number = {name: int(re.search(pattern, text)[1]) for name, pattern in PTXAS.items()}  # type: ignore[index]
        found |= number | {"serialised": "C7512" in text, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}
    return found


def serve(compile_one: Callable[[list[Any]], dict[str, int]]) -> None:
    """For each line of jobs, a line of what they came to, or the error of the first that fails."""
    for line in sys.stdin:
        answer: list[dict[str, int]] | str
        try:
            answer = [compile_one(job) for job in json.loads(line)]
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


PTXAS = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spilled": r"(\d+) bytes spill stores",
}


def search(family: int, kind: str, state_tiles: int, columns: int, *, backward: bool) -> Iterator[Tile]:
    """Tiles within budget, under both versions and in backward with every solver."""
    chunks = (columns,) if kind == "linear" else (64, 32, 16)
    for rows, chunk, warps, pipeline in itertools.product((128, 64, 32, 16), chunks, (8, 4), (2, 1, 3)):
        tile, shared = (rows, chunk, warps, pipeline, 0), 0
        solvers = STAGES if backward else (state_tiles,)
        jobs = [Job(family, kind, tiles, columns, backward, tile, trajectory=not backward) for tiles in solvers]
        for version in VERSIONS:
            results = compiled(jobs, version)
            if misses(jobs, results):
                break
            shared = max(shared, *(found["shared"] for found in results.values()))
        else:
            yield Tile(rows, chunk, warps, pipeline, shared)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[1:2] == ["search"]:
        family, kind, state_tiles, columns, direction = sys.argv[2:]
        for tile in search(int(family), kind, int(state_tiles), int(columns), backward=direction == "backward"):
            print(tile, flush=True)
    else:
        serve(lambda job: compile_job(Job(*job)))
