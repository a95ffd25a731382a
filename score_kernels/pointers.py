"""The parameters of a call as kernels read them: by a table of addresses, so that sets given as lists cost no copy."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from .devices import capturing
from .problem import Problem, is_norm

NORM = ("norm_weight", "norm_bias")


def prepared(problem: Problem, alignment: int = 1) -> Problem:
    """The parameters contiguous, at addresses that are multiples of `alignment` bytes, gains and biases of norms in one dtype.

    The new problem holds the copies that this takes for as long as the launches need them.
    """
    norms = [name for name in problem.parameters if is_norm(name)]
    found = {p.dtype for name in norms for p in problem.parameters[name]}
    dtypes = dict.fromkeys(norms, torch.float32) if len(found) > 1 else {}

    def ready(p: Tensor, dtype: torch.dtype) -> Tensor:
        p = p.to(dtype).contiguous()
        return p.clone() if p.data_ptr() % alignment else p

    parameters = {name: [ready(p, dtypes.get(name, p.dtype)) for p in ps] for name, ps in problem.parameters.items()}
    state_scale, x0_scale = (None if s is None else s.contiguous() for s in (problem.state_scale, problem.x0_scale))
    coefficients = problem.coefficients.contiguous()
    return replace(problem, parameters=parameters, coefficients=coefficients, state_scale=state_scale, x0_scale=x0_scale)


def pointers(problem: Problem) -> Tensor:
    """The addresses (L, parameters) on the device, 0 for a parameter that is not given."""
    rows = []
    for index in range(problem.sets):
        row = [problem.parameter(name, index) for name in problem.parameters]
        rows.append(tuple(0 if p is None else p.data_ptr() for p in row))
    return _table(tuple(rows), problem.h.device)


def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    if capturing(device):
        return _filled(rows, device)
    return _copied(rows, device, torch.cuda.current_stream(device) if device.type == "cuda" else None)


@functools.lru_cache(maxsize=256)
def _copied(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    """Copied to the device once for each set of addresses, and stream: when dropped, its memory is that stream's again.

    On a thread of its own: where torch.compile warms up before it records a graph, all that the calling thread allocates is
    the graph's memory, in which nothing may be kept.
    """

    def copy() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.tensor(rows, dtype=torch.int64, device=device)

    with ThreadPoolExecutor(1) as own:
        return own.submit(copy).result()


def _filled(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """For a CUDA graph, which may not copy from the host: each address is the argument of a kernel that writes it.

    Not cached, in either direction: this memory is the graph's, and a table that is not might be dropped before a replay.
    """
    table = torch.empty(len(rows), len(rows[0]), dtype=torch.int64, device=device)
    for entry, address in zip(table.view(-1), itertools.chain(*rows), strict=True):
        entry.fill_(address)
    return table
