"""Which backend runs a call, and how: a pure function of the call's shape and the machine, so it is tested anywhere."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from . import kernel_tiles, row_tiles
from .machine import Kernel, Machine
from .plan import HALVES, Plan
from .triton_kernels.attention_configs import SequenceTile
from .triton_kernels.configs import SCALES, Tile

BACKENDS = ("reference", "blas", "triton", "cuda")

# Those that run all iterations in one launch, fastest first.
FUSED = ("cuda", "triton")

# Ops that backends have no kernel for.
NO_KERNEL = {
    "attention": {"cuda": "no CUDA kernel computes attention yet"},
    "transformer": {"cuda": "no CUDA kernel computes transformer yet"},
}

# Of a transformer: (op, plan) of halves that run by themselves.
Halves = tuple[tuple[str, Plan], ...]

# Elements of a record that backward leaves for the gradients of the parameters, of D and the hidden features of all layers.
RECORDS = {
    "linear": lambda features, hidden: 2 * features,
    "mlp": lambda features, hidden: 2 * features + hidden,
    "attention": lambda features, hidden: 6 * features,
    # Both halves, and behind each what the gradients of a norm that follows it are sums of.
    "transformer": lambda features, hidden: 12 * features + hidden,
}

# What the name of a backend that was not chosen for backward alone ends with.
IN_BACKWARD = " in backward"

# Bytes of the gradient of a scalar from one row: float32, and float64 while they are summed.
SCALAR = 4 + 8

# Rows and columns of a weight gradient that one program of a library's product has.
PRODUCT_TILE = 128


def plan(
    op: str,
    *,
    features: int,
    hidden: int,
    gated: bool,
    activation: str,
    iterations: int,
    dtype: str,
    itemsize: int,
    machine: Machine,
    scratch_budget: int,
    tokens: int = 1,
    heads: int = 1,
    state_tiles: int = 1,
    stages: int = 1,
    sets: int = 1,
    kept: int = 0,
    backend: str = "auto",
) -> Plan:
    """Plans one call.

    features, hidden: D and H. iterations: those that gradients reach. dtype: the input's, as "bfloat16".
    itemsize: bytes of an element of state (4, or 8 for float64). scratch_budget: bytes. state_tiles, stages: of the solver.
    sets: L. tokens: rows that no tile may part, the longest sequence of an op on sequences. heads: of attention. kept: numbers
    of a row that blas keeps in backward beside a state.
    Raises ValueError for a backend that is unknown, or named and unable to run the call.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    # Of blas, by numbers of a row that it keeps and bytes of scratch: rows, backward_rows, interval, scratch_bytes.
    row, wide = features * itemsize, hidden * (2 if gated else 1) * itemsize
    walk = partial(_walk, row, wide, tokens, iterations, machine.device)
    chosen = "blas" if backend == "auto" else backend
    base = Plan(op, chosen, chosen, machine.device, dtype, iterations, *walk(kept * itemsize, scratch_budget))
    if backend not in FUSED and (backend != "auto" or machine.device == "cpu"):
        return base

    block = (op, features, hidden, gated, activation, dtype, stages, sets)
    kernel, no_cuda = machine.kernel("forward", *block)
    kind = f"gated {op}" if gated else op
    forward, backward, no_triton = kernel_tiles.tiles(kind, features, dtype, machine, state_tiles, tokens, features // heads)
    no_launch = no_triton or (None if backward else _too_wide(kind, features, heads))
    halves: Halves = ()
    if op == "transformer" and no_launch is not None:
        # The walk has the other half of the scratch.
        halves = _halves(
            features=features, hidden=hidden, gated=gated, activation=activation, dtype=dtype, itemsize=itemsize,
            machine=machine, scratch_budget=scratch_budget // 2, tokens=tokens, heads=heads,
        )  # fmt: skip
    reasons = {"cuda": no_cuda, "triton": None if halves else no_triton, **NO_KERNEL.get(op, {})}
    if backend == "auto":
        reasons = {name: reason or _unverified(name, machine) for name, reason in reasons.items()}
    elif reasons[backend] is not None:
        raise ValueError(f"backend={backend!r} cannot run this call: {reasons[backend]}")
    able = [name for name in FUSED if reasons[name] is None and backend in (name, "auto")]
    if not able:
        return replace(base, skipped=tuple((name, str(reasons[name])) for name in FUSED))
    faster = FUSED[: FUSED.index(able[0])] if backend == "auto" else ()
    # Two programs of a product for every multiprocessor.
    parts = max(2 * machine.multiprocessors // (math.ceil(features / PRODUCT_TILE) * math.ceil(hidden / PRODUCT_TILE)), 1)
    base = replace(
        base, backend=able[0], kernel=kernel if able[0] == "cuda" else None,
        forward_tile=forward if no_triton is None else None, parts=parts,
        skipped=tuple((name, str(reasons[name])) for name in faster),
    )  # fmt: skip
    if isinstance(base.forward_tile, SequenceTile):
        programs = kernel_tiles.forward_programs(base.forward_tile, features, machine, scratch_budget)
        base = replace(base, forward_programs=programs)
    if halves:
        attends = dict(halves).get("attention")
        kept = kept if attends is None or attends.backward_tile is None else 0
        return _by_halves(base, halves, str(no_launch), walk(kept * itemsize, scratch_budget // 2))

    record, products = RECORDS[op](features, hidden * (3 if gated else 2)), parts * features * hidden * 4
    if base.backend == "cuda":
        base = _on_cuda(base, *machine.kernel("backward", *block), features, record, products, machine, scratch_budget)
        if base.backward_kernel is not None:
            return base
    # Triton walks the states again by itself, whoever runs forward.
    if backward is None or reasons["triton"] is not None:
        return _on_blas(base, reasons["triton"] or str(no_launch))
    # Of a row and iteration: the ring's records, the stages' inputs and the gradients of scalars.
    of_stages = stages * (record * (4 if dtype == "float32" else 2) + features * 4) + (5 * stages + SCALES) * SCALAR
    return _on_triton(base, backward, features, products, iterations * of_stages + features * 4, machine, scratch_budget)


def _walk(row: int, wide: int, tokens: int, iterations: int, device: str, kept: int, budget: int) -> tuple[int, int, int, int]:
    """rows, backward_rows, interval and scratch_bytes of blas. row, wide, kept: bytes of a row's state, hidden features, and
    of what is kept beside a state."""
    rows = row_tiles.forward_rows(row, wide, tokens, device, budget)
    backward_rows, interval = row_tiles.checkpoints(rows, iterations, row, kept, budget, tokens)
    return rows, backward_rows, interval, backward_rows * row_tiles.scratch_row(iterations, interval, row, kept)


def _too_wide(kind: str, features: int, heads: int) -> str:
    heads_of = f" with heads of {features // heads} features" if kind in kernel_tiles.SEQUENCES else ""
    return f"backward of D = {features}{heads_of} does not fit in registers"


def _halves(*, hidden: int, tokens: int, heads: int, **call: Any) -> Halves:
    """The plans of the halves of a transformer that Triton's kernels can run, one iteration a call."""
    found = []
    own = {"attention": {"hidden": 3 * call["features"], "tokens": tokens, "heads": heads}, "mlp": {"hidden": hidden}}
    for op in HALVES:
        gated = op == "mlp" and call["gated"]
        with suppress(ValueError):  # refused, as by name: blas has this half
            found.append((op, plan(op, **{**call, **own[op], "gated": gated, "iterations": 1, "backend": "triton"})))
    return tuple(found)


def _by_halves(base: Plan, halves: Halves, reason: str, walk: tuple[int, int, int, int]) -> Plan:
    """The passes of a transformer that no launch has room for, a launch for each half of an iteration. reason: of the former.

    Where no half has a backward kernel, blas runs that pass.
    """
    rows, backward_rows, interval, scratch = walk
    if base.forward_tile is None:
        base = replace(base, rows=rows, skipped=(*base.skipped, ("one launch", reason)))
    of_halves = [of for _, of in halves if of.backward_tile is not None]
    if not of_halves:
        return _on_blas(replace(base, halves=halves), reason)
    if base.forward_tile is not None:
        base = replace(base, skipped=(*base.skipped, (f"one launch{IN_BACKWARD}", reason)))
    return replace(
        base, halves=halves, backward="triton", backward_rows=backward_rows, interval=interval,
        scratch_bytes=scratch + max(of.scratch_bytes for of in of_halves),
    )  # fmt: skip


def _unverified(backend: str, machine: Machine) -> str | None:
    """Why `auto` does not choose kernels that would run."""
    if (backend, machine.arch) in machine.verified:
        return None
    return f"no hardware results are committed for compute capability {machine.arch / 10}; backend={backend!r} selects it"


def _on_cuda(
    base: Plan, kernel: Kernel | None, reason: str | None, features: int, record: int, products: int, machine: Machine,
    scratch_budget: int,
) -> Plan:  # fmt: skip
    """Backward by this kernel, if it is one and a block of rows has its scratch; else with why it is not. record: elements."""
    if kernel is not None and reason is None:
        partials = machine.multiprocessors * math.prod(kernel.partials) * 4
        record, fixed = (0, partials) if kernel.accumulates else (record, products)
        # Of a row: the ring's records, the gradients of scalars, the states, and dL/dx0.
        row = base.iterations * (record * 2 + (5 + SCALES) * SCALAR) + (base.iterations + 2) * features * 4
        chunk = (scratch_budget - fixed) // row // kernel.rows * kernel.rows
        if chunk > 0:
            return replace(
                base, backward="cuda", backward_kernel=kernel, programs=machine.multiprocessors, chunk_rows=chunk,
                scratch_bytes=fixed + chunk * row,
            )  # fmt: skip
        reason = f"not even one block of rows has its scratch within {scratch_budget} bytes"
    return replace(base, skipped=(*base.skipped, (f"cuda{IN_BACKWARD}", str(reason))))


def _on_triton(
    base: Plan, tile: Tile | SequenceTile, features: int, products: int, row: int, machine: Machine, scratch_budget: int
) -> Plan:
    """Programs and rows of a launch within the scratch budget; blas where not even one tile fits. row: bytes of a row."""
    programs = kernel_tiles.programs(tile, machine)
    fixed = kernel_tiles.backward_scratch(tile, features, base.forward_programs, programs) + products
    chunk = (scratch_budget - fixed) // row // tile.rows * tile.rows
    if tile.shared > machine.shared_memory or chunk < tile.rows:
        needs = f"({tile.shared} bytes, {scratch_budget} bytes)"
        return _on_blas(base, f"backward needs more shared memory or scratch than there is {needs}")
    return replace(
        base, backward="triton", backward_tile=tile, programs=programs, chunk_rows=chunk, scratch_bytes=fixed + chunk * row,
    )  # fmt: skip


def _on_blas(base: Plan, reason: str) -> Plan:
    """Backward by blas, for this reason."""
    return replace(base, backward="blas", skipped=(*base.skipped, (f"triton{IN_BACKWARD}", reason)))
