"""The compiled CUDA kernels, `score_kernels._cuda` (csrc/): which of them a device runs, and the passes of a call by them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import blas
from .activations import ACTIVATIONS
from .machine import Kernel
from .plan import Plan
from .pointers import NORM, pointers, prepared
from .problem import LEADING, Problem
from .triton_kernels.configs import SCALES
from .triton_kernels.ring import Ring, collected, wanted_parameters

# Gradients of p, q, v, w, e and the two scales.
SCALARS = 5 + SCALES


@functools.cache
def module() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        return importlib.import_module("._cuda", __package__)
    except ModuleNotFoundError:
        return "it was not built: docs/building.md says how"
    except ImportError as error:
        return f"score_kernels._cuda cannot be imported: {error}"


@functools.cache
def kernels(arch: int) -> tuple[tuple[Kernel, ...], str | None]:
    """The kernels that run on a device of compute capability `arch` (90 for 9.0), or none and the reason."""
    compiled = module()
    if isinstance(compiled, str):
        return (), compiled
    source = serving(compiled.architectures(), arch)
    if source is None:
        built = ", ".join(compiled.architectures())
        wanted = f"this device has compute capability {arch / 10}; TORCH_CUDA_ARCH_LIST chooses when the package is built"
        return (), f"it was built for {built}, {wanted}"
    families = {name: compiled.family(activation=name) for name in ACTIVATIONS}

    def described(index: int, entry: dict[str, Any]) -> Kernel:
        family = entry.pop("family")
        return Kernel(index=index, activations=tuple(name for name in families if families[name] == family), **entry)

    every = [described(index, entry) for index, entry in enumerate(compiled.kernels())]
    return tuple(kernel for kernel in every if kernel.arch == source), None


def serving(architectures: list[str], arch: int) -> int | None:
    """The `arch` of the kernels that run on a device of this compute capability, by what was compiled; None: there are none.

    Binaries sm_NN run within their generation and from NN on, sm_90a on 9.0 alone, PTX compute_NN from NN on.
    """
    if arch == 90 and "sm_90a" in architectures:
        return 90
    for name in architectures:
        kind, _, number = name.partition("_")
        if number.isdecimal() and int(number) <= arch and (kind == "compute" or int(number) // 10 == arch // 10):
            return 80
    return None


def forward(problem: Problem, plan: Plan, out: Tensor) -> Tensor:
    """Writes h_T into `out` (like h, contiguous; h itself is allowed); returns all states (T+1, ...), or an empty tensor."""
    kernel = plan.kernel
    assert kernel is not None
    problem = prepared(problem)
    h, x0 = _flat(problem.h, problem), None if problem.x0 is None else _flat(problem.x0, problem)
    keep = problem.options.trajectory
    trajectory = h.new_empty((problem.iterations + 1, *problem.h.shape) if keep else 0, dtype=torch.float32)
    last = out.view(h.shape)
    if problem.iterations == 0:
        last.copy_(h)
        if keep:
            trajectory.copy_(problem.h)
    else:
        _walk(problem, kernel, h, x0, last, trajectory if keep else None)
    return trajectory


def backward(
    problem: Problem,
    plan: Plan,
    grad_out: Tensor | None,
    grad_trajectory: Tensor | None,
    trajectory: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the inputs whose flag in `needs` is set, in the order of `Problem.build`; a missing gradient is zero.

    In chunks of rows, as triton_kernels/launch.py: forward once more, which keeps the chunk's states, unless they were saved;
    the backward kernel; then the products and sums of what that left in the ring. A kernel that accumulates leaves none: what
    its blocks have added to their partial sums, chunk after chunk, is added up at the end.
    """
    if problem.iterations == 0:
        return blas.backward(problem, plan, grad_out, grad_trajectory, trajectory, needs)
    kernel, walking = plan.backward_kernel, plan.kernel
    assert kernel is not None
    assert walking is not None
    call = prepared(problem)
    h, x0 = _flat(call.h, call), None if call.x0 is None else _flat(call.x0, call)
    first, every = call.first_grad, (call.iterations + 1, *h.shape)
    steps = call.iterations - first
    given = torch.zeros_like(h) if grad_out is None else grad_out.reshape(h.shape).contiguous()
    grad_states = None if grad_trajectory is None else grad_trajectory.reshape(every).contiguous()
    saved = None if trajectory is None else trajectory.view(every)
    wanted, rows = wanted_parameters(call, needs), min(plan.chunk_rows, h.shape[0])
    grad_h, grad_x0 = torch.empty_like(h), torch.empty_like(h) if needs[1] else None

    float32 = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
    totals = torch.zeros(call.iterations, SCALARS, dtype=torch.float64, device=h.device)
    walked = float32((steps + 1) * rows * call.features if saved is None else 0)
    scalars = float32(steps * SCALARS * rows if any(needs[2:LEADING]) else 0)
    summed = float32(rows * call.features if needs[1] else 0)
    ring = Ring(call, wanted, 0 if kernel.accumulates else rows, plan.parts)
    # No more than have rows; an even number has rows, since two blocks load their weights together.
    blocks = max(min(plan.programs, -(-rows // kernel.rows) + 1), 2)
    partials = float32((blocks, *kernel.partials)).zero_() if kernel.accumulates else None
    for start in range(0, h.shape[0], max(rows, 1)):
        chunk = slice(start, min(start + rows, h.shape[0]))
        count = chunk.stop - start
        injected = None if x0 is None else x0[chunk]
        if saved is None:
            states, apart = walked[: (steps + 1) * count * call.features].view(steps + 1, count, -1), count
            # The last state is not needed: it goes where the gradient of h will be.
            _walk(call, walking, h[chunk], injected, grad_h[chunk], states, first)
        else:
            states, apart = saved[first:, chunk], h.shape[0]
        # What the kernel leaves alone is 0.
        parts = scalars[: steps * SCALARS * count].zero_() if scalars.numel() else None
        sums = summed[: count * call.features] if needs[1] else None
        _launch(
            "backward", call, kernel, h.device, rows=count, first=first, states_rows=apart, grad_rows=h.shape[0],
            states=(states.data_ptr(), ((steps - 1) * apart + count) * call.features),
            grad_out=_span(given[chunk]), grad_states=_apart(grad_states, chunk), grad_h=_span(grad_h[chunk]),
            grad_x0=_span(sums), scalars=_span(parts), ring=_span(ring.records) if wanted and partials is None else None,
            blocks=blocks, partials=_span(partials), x0=_span(injected),
        )  # fmt: skip
        if parts is not None:
            totals[first:] += parts.view(steps, SCALARS, count).sum(-1, dtype=torch.float64)
        if grad_x0 is not None and sums is not None:
            grad_x0[chunk] = sums.view(count, -1)
        if wanted and partials is None:
            ring.add(count)
    if partials is not None:
        ring.add_partials(partials.sum(0))
    return collected(problem, needs, grad_h, grad_x0, totals, ring.gradients())


def _walk(
    problem: Problem, kernel: Kernel, h: Tensor, x0: Tensor | None, out: Tensor, states: Tensor | None, first: int = 0
) -> None:
    """Forward: h_T of these rows into `out`, and h_first ... h_T into `states` (T+1-first, rows, D), if that is given."""
    _launch(
        "forward", problem, kernel, h.device, rows=h.shape[0], first=first, h=_span(h), x0=_span(x0), out=_span(out),
        states=_span(states),
    )  # fmt: skip


def _launch(function: str, problem: Problem, kernel: Kernel, device: torch.device, **given: Any) -> None:
    """Calls a function of the module with these arguments and those that they have in common."""
    options, compiled = problem.options, module()
    assert not isinstance(compiled, str)
    index, stream = _place(device)
    sizes = {"kernel": kernel.index, "features": problem.features, "hidden": problem.hidden, "sets": problem.sets}
    # Written by a launch of its own before the kernel's, so it may be reused as soon as the stream is past both.
    packed = torch.empty(compiled.packed_bytes(**sizes), dtype=torch.uint8, device=device)
    # torch makes no context on the device that was current before; the module, which restores that device, would.
    with torch.cuda.device_of(problem.h):
        getattr(compiled, function)(
            **sizes, **given, device=index, stream=stream, iterations=problem.iterations,
            order=options.order, norm=options.norm, activation=options.activation, negative_slope=options.negative_slope,
            eps=options.eps, norm_float32=any(p.dtype == torch.float32 for name in NORM for p in problem.parameters[name]),
            coefficients=_span(problem.coefficients), state_scale=_span(problem.state_scale), x0_scale=_span(problem.x0_scale),
            table=_span(pointers(problem)), packed=_span(packed),
        )  # fmt: skip


def _place(device: torch.device) -> tuple[int, int]:
    """Index and current stream of a device."""
    index: int = device.index
    return index, torch.cuda.current_stream(device).cuda_stream


def _flat(x: Tensor, problem: Problem) -> Tensor:
    return x.reshape(-1, problem.features).contiguous()


def _apart(x: Tensor | None, chunk: slice) -> tuple[int, int] | None:
    """The chunk of the rows of every state of x (T+1, M, D): its address, and the elements from there to its end."""
    if x is None:
        return None
    states, rows, features = x.shape
    return x[:, chunk].data_ptr(), ((states - 1) * rows + chunk.stop - chunk.start) * features


def _span(x: Tensor | None) -> tuple[int, int] | None:
    return None if x is None else (x.data_ptr(), x.numel())
