"""Tiles of the attention kernels, compiled ahead of time as in `test_budgets.py`: no spill, the shared memory that is said.

The tests compile some of the table, to which the others are near. `python tests/test_attention_budgets.py 90` compiles all that
the planner finds in it for a family, with the solver that has the most state and with Euler, and prints what is over its
budget; under another Triton with the folder of that first in PYTHONPATH. `search 90 forward "gated transformer" 128 128 32`
prints tiles within budget for a place of the table (family, pass, kind; rows, D, features of a head).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_budgets import SHARED, STAGES, STATE, VERSIONS, compiled, report, serve

from score_kernels.kernel_tiles import SEQUENCES, place
from score_kernels.problem import SHAPES
from score_kernels.triton_kernels.attention_configs import (
    FORWARD_SLOTS,
    LONGEST,
    SHORT,
    SequenceTile,
    Table,
    backward_slots,
    group_rows,
)

DIRECTIONS = ("forward", "backward")
KINDS = tuple(SEQUENCES)
# Rows of a group, D and features of a head: the powers of two that a call is padded to.
PLACES = [
    (rows, columns, features)
    for rows, columns, features in itertools.product((64, LONGEST), (16, 32, 64, 128, 256), (16, 32, 64, 128))
    if features <= columns
]
# A transformer's tile is for norms in either place.
PLACEMENTS = {"attention": ("pre",), "transformer": ("post", "pre"), "gated transformer": ("post", "pre")}


class Job(NamedTuple):
    """One compilation. The defaults are the options that take the most registers; arch: 90, or "gfx942"."""

    arch: int | str
    direction: str
    columns: int
    features: int
    tile: tuple[int, ...]
    state_tiles: int = 3
    dtype: str = "bf16"
    mask: str = "additive"
    packed: bool = False
    kind: str = "attention"
    placement: str = "pre"
    state: str = ""

    @property
    def name(self) -> str:
        shape = f"{self.arch} {self.direction} D={self.columns} d={self.features} {self.tile}"
        return f"{shape} {self.state_tiles} {self.dtype} {self.mask} {self.kind} {self.placement}"


def table(kind: str, direction: str) -> Table:
    """By family, then by rows of a group, D and features of a head."""
    return SEQUENCES[kind][DIRECTIONS.index(direction)]


def jobs_of(family: int, direction: str, kind: str = "attention", **options: Any) -> list[Job]:
    """A pass in all places that have a tile, the widest last, with norms in both places."""
    return [
        Job(family, direction, columns, features, tuple(tile), kind=kind, placement=placement, **options)
        for rows, columns, features in PLACES
        if (tile := place(table(kind, direction)[family], rows, columns, features))
        for placement in PLACEMENTS[kind]
    ]


def misses(jobs: list[Job], results: dict[str, dict[str, int]]) -> dict[str, str]:
    """The jobs over their budget, and what the compiler says of them."""
    limits = {job.name: SequenceTile(*job.tile).shared for job in jobs}
    return {
        name: f"{found}, {limits[name]} bytes of shared memory in the table"
        for name, found in results.items()
        if found["stack"] or found["spilled"] or found["serialised"] or found["shared"] > limits[name]
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "direction", "version"), [(80, "forward", "pinned"), *((90, "backward", version) for version in VERSIONS)]
)
def test_a_tile_of_the_table(family, direction, kind, version):
    """The widest D with the longest sequences."""
    jobs = jobs_of(family, direction, kind)[-len(PLACEMENTS[kind]) :]
    assert misses(jobs, compiled(jobs, version, __file__)) == {}


def test_a_state_in_float32_between_launches():
    jobs = [jobs_of(90, direction, state_tiles=1, state="fp32")[-1] for direction in DIRECTIONS]
    assert misses(jobs, compiled(jobs, script=__file__)) == {}


@pytest.mark.parametrize("kind", ["attention", "transformer"])
def test_rocm_compiles(kind):
    jobs = [job._replace(arch="gfx942") for job in jobs_of(80, "forward", kind)[:1]]
    assert all(found["shared"] > 0 for found in compiled(jobs, script=__file__).values())


def test_the_table():
    """Keys say what tiles are for, shared memory is within the smallest of the family, short sequences share a group."""
    for kind, direction in itertools.product(KINDS, DIRECTIONS):
        found = table(kind, direction)
        assert set(found) == set(SHARED)
        for family, tiles in found.items():
            # Backward of both halves spills but on the family of sm_90.
            assert (64, 64, 32) in tiles or (kind != "attention" and direction == "backward" and family != 90)
            for (rows, columns, features), tile in tiles.items():
                if tile is None:
                    continue
                assert (tile.rows, max(tile.features, features)) == (rows, tile.features)
                assert (tile.hidden > 0) == (kind != "attention")
                assert rows % tile.tile == 0
                assert features <= columns
                assert tile.shared <= SHARED[family]
    assert all(tokens <= group_rows(tokens) <= LONGEST for tokens in range(1, LONGEST + 1))
    assert group_rows(SHORT) >= 2 * SHORT


def compile_job(job: Job) -> dict[str, int]:
    """Compiles one job, in a process that does not interpret Triton."""
    from score_kernels.triton_kernels import iterate_sequences
    from score_kernels.triton_kernels.iterate import Static
    from score_kernels.triton_kernels.sequences import Sequences

    tile, backward = SequenceTile(*job.tile), job.direction == "backward"
    wanted = dict.fromkeys(("want_x0", "want_scalars", "want_parameters", "grad_trajectory"), backward)
    static = Static(
        features=job.columns, hidden=4 * job.columns, columns=job.columns, tile=tile.tile, rows=tile.rows, chunk=tile.features,
        precision="tf32" if job.dtype == "fp32" else "ieee", activation="identity", norm="layernorm", present=(True,) * 6,
        parameters=6, gain=True, norm_bias=True, gain_float32=False, stages=STAGES[job.state_tiles],
        uses_z=job.state_tiles > 1, uses_sum=job.state_tiles > 2, cyclic=False, x0=True, state_scale=True, x0_scale=True,
        records=0 if backward else STAGES[job.state_tiles], slots=backward_slots(tile) if backward else FORWARD_SLOTS,
        heads=job.columns // job.features, causal=True, qk_norm=True, angles=job.features // 2, padding=not job.packed,
        mask="none" if job.packed else job.mask, packed=job.packed, several=job.packed or tile.rows <= 2 * SHORT, **wanted,
    )  # fmt: skip
    of_mlp = None
    if job.kind != "attention":
        gated, parameters = job.kind.startswith("gated"), len(SHAPES["mlp"])
        static = static._replace(placement=job.placement)
        of_mlp = static._replace(
            chunk=tile.hidden, activation="gelu", present=(True,) * 4 + (gated,) * 2 + (True,) * 2, parameters=parameters,
            want_scalars=backward and job.placement == "pre",
        )  # fmt: skip
        static = static._replace(others=parameters)
    kernel = getattr(iterate_sequences, f"sequence_{job.direction}_kernel")
    kinds = {
        "*fp32": ("scratch", "mask", "cos", "sin"), "*i64": ("bounds",), "*i32": ("positions",), "*u8": ("padding",),
        "fp32": ("scale", "eps"),
    }  # fmt: skip
    given = {name: kind for kind, names in kinds.items() for name in names}
    sequences = Sequences(**{name: given.get(name, "i32") for name in Sequences._fields})  # type: ignore[arg-type]
    integers = ("rows", "states_rows", "grad_rows", "iterations", "first", "sets")
    float32 = ("coefficients", "state_scale", "x0_scale", "states", "grad_states", "scalars")
    types = {
        **dict.fromkeys(kernel.arg_names, "*" + job.dtype), **dict.fromkeys(float32, "*fp32"),
        **dict.fromkeys(integers, "i32"), "table": "*i64", "eps": "fp32", "slope": "fp32", "sequences": sequences,
        **dict.fromkeys(STATE if job.state else (), "*" + job.state),
    }  # fmt: skip
    return report(kernel, types, {"S": static, "M": of_mlp}, job.arch, tile.warps, tile.stages)


def fitting(family: int, direction: str, kind: str, columns: int, features: int, tile: SequenceTile) -> SequenceTile | None:
    """The tile with its shared memory, if it is within budget under both versions, with the most state and with Euler."""
    shared = 0
    for version, tiles, placement in itertools.product(VERSIONS, (3, 1), PLACEMENTS[kind]):
        given = tuple(tile._replace(shared=SHARED[family]))
        job = Job(family, direction, columns, features, given, state_tiles=tiles, kind=kind, placement=placement)
        results = compiled([job], version, __file__)
        if misses([job], results):
            return None
        shared = max(shared, results[job.name]["shared"])
    return tile._replace(shared=shared)


def search(family: int, direction: str, kind: str, key: tuple[int, int, int]) -> Iterator[SequenceTile]:
    """Tiles for a place of the table, the ones with the most rows at a time first; also such that pad the heads to more."""
    rows, columns, features = key
    chunks = (0,) if kind == "attention" else (64, 32, 16)
    padded = [width for width in (16, 32, 64, 128) if width >= features]
    for rows_at_a_time, width, hidden, warps, pipeline in itertools.product((64, 32, 16), padded, chunks, (8, 4), (2, 1)):
        tile = SequenceTile(rows, rows_at_a_time, width, warps, pipeline, 0, hidden)
        if found := fitting(family, direction, kind, columns, features, tile):
            yield found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[1:2] == ["search"]:
        family, direction, kind, *key = sys.argv[2:]
        for tile in search(int(family), direction, kind, tuple(map(int, key))):  # type: ignore[arg-type]
            print(tuple(tile), flush=True)
    elif sys.stdin.isatty() or sys.argv[1:]:
        for family in map(int, sys.argv[1:] or SHARED):
            for direction, kind, tiles in itertools.product(DIRECTIONS, KINDS, (3, 1)):
                for job in jobs_of(family, direction, kind, state_tiles=tiles):
                    print(job.name, misses([job], {job.name: compile_job(job)}) or "within its budget", flush=True)
    else:
        serve(lambda job: compile_job(Job(*job)))
