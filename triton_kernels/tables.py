"""What a launch reads beside the states: the parameters by a table of their addresses, the coefficients and the scales."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from score_kernels.problem import Problem

from .ring import NORM

# The pointer table, coefficients and scales: what every launch of a call reads.
Tables = tuple[Tensor, Tensor, Tensor, Tensor]

# Bytes that Triton may take for granted of a parameter's address.
ALIGNMENT = 16


def prepared(problem: Problem) -> Problem:
    """The parameters as the kernels read them: contiguous, at aligned addresses, gain and bias of the norm in one dtype.

    The new problem holds the copies that this takes for as long as the launches need them.
    """
    norm = {p.dtype for name in NORM for p in problem.parameters[name]}
    dtypes = dict.fromkeys(NORM, torch.float32) if len(norm) > 1 else {}

    def ready(p: Tensor, dtype: torch.dtype) -> Tensor:
        p = p.to(dtype).contiguous()
        return p.clone() if p.data_ptr() % ALIGNMENT else p

    parameters = {name: [ready(p, dtypes.get(name, p.dtype)) for p in ps] for name, ps in problem.parameters.items()}
    state_scale, x0_scale = (None if s is None else s.contiguous() for s in (problem.state_scale, problem.x0_scale))
    coefficients = problem.coefficients.contiguous()
    return replace(problem, parameters=parameters, coefficients=coefficients, state_scale=state_scale, x0_scale=x0_scale)


def tables(problem: Problem) -> Tables:
    """Pointers (L, parameters), coefficients and scales; a scale that is not given is never read."""
    rows = []
    for index in range(problem.sets):
        row = [problem.parameter(name, index) for name in problem.parameters]
        rows.append(tuple(0 if p is None else p.data_ptr() for p in row))
    coefficients = problem.coefficients
    state_scale, x0_scale = (coefficients if s is None else s for s in (problem.state_scale, problem.x0_scale))
    return _pointers(tuple(rows), problem.h.device), coefficients, state_scale, x0_scale


def _pointers(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return (_filled if _capturing(device) else _copied)(rows, device)


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records this call."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=256)
def _copied(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Copied to the device once for each set of addresses."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _filled(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """For a CUDA graph, which may not copy from the host: each address is the argument of a kernel that writes it.

    Not cached, in either direction: this memory is the graph's, and a table that is not might be dropped before a replay.
    """
    table = torch.empty(len(rows), len(rows[0]), dtype=torch.int64, device=device)
    for entry, address in zip(table.view(-1), itertools.chain(*rows), strict=True):
        entry.fill_(address)
    return table
