"""The registered operators: `torch.ops.score_kernels.<op>`, its gradient `<op>_backward`, and the in-place form `<op>_`.

The backend is chosen inside the operator, from the tensors it is given: never while a graph is traced. Every operator takes
the flat form of a call (`Problem.build`), its parameters in one list with `counts` telling how many tensors each of them has.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from . import blas, planner, stages
from .planner import IN_BACKWARD, INTERPRETER, Machine, Plan
from .problem import SHAPES, Options, Problem, compute_dtype, without_autocast
from .settings import interpreted, scratch_budget, strict

_INPUTS = "Tensor h, Tensor? x0, Tensor coefficients, Tensor? state_scale, Tensor? x0_scale, Tensor[] parameters"
_OPTIONS = (
    "int[] counts, str activation, float negative_slope, str norm, float eps, str solver, str order, SymInt grad_iterations, "
    "bool trajectory, str backend"
)

_observers: list[list[Plan]] = []
_announced: set[str] = set()


@contextmanager
def observe_plans() -> Iterator[list[Plan]]:
    """Collects the plan of every call made inside the context."""
    plans: list[Plan] = []
    _observers.append(plans)
    try:
        yield plans
    finally:
        _observers.remove(plans)


def note(plan: Plan) -> None:
    for plans in _observers:
        plans.append(plan)


def plan_of(problem: Problem) -> Plan:
    """The plan of a call on the machine that its tensors are on."""
    dtype, device, solver = problem.compute_dtype, problem.h.device, problem.options.solver
    return planner.plan(
        problem.op,
        features=problem.features,
        hidden=problem.hidden,
        gated=problem.gated,
        iterations=problem.iterations - problem.first_grad,
        dtype=str(problem.h.dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        machine=machine_of(device),
        scratch_budget=scratch_budget(device.type),
        state_tiles=1 + stages.uses_z(solver) + stages.uses_sum(solver),
        stages=problem.coefficients.shape[1],
        backend=problem.options.backend,
    )


def machine_of(device: torch.device) -> Machine:
    """What the planner has to know of a device; a CPU runs the Triton kernels where `TRITON_INTERPRET=1` interprets them."""
    reason = None if _has_triton() else "triton is not installed: pip install 'triton>=3.6'"
    if device.type == "cpu":
        return INTERPRETER if interpreted() and reason is None else Machine(triton=reason or "it needs a GPU")
    if device.type != "cuda":
        return Machine(device.type, triton=f"it runs on CUDA and ROCm devices, not on {device.type}")
    # The newer of two interfaces: it knows what was set by the older one, which fails to read what was set by this one.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return replace(_gpu(device.index if device.index is not None else torch.cuda.current_device()), tf32=tf32, triton=reason)


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _gpu(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    kind = "hip" if torch.version.hip else "cuda"
    verified = planner.VERIFIED if kind == "cuda" else frozenset[int]()
    return Machine(kind, arch, properties.multi_processor_count, shared, verified=verified)


def _announce(plan: Plan, *, backward: bool) -> None:
    """Warns once, or raises where that is wanted, for every faster backend that does not run this pass."""
    for name, reason in plan.skipped:
        if name.endswith(IN_BACKWARD) != backward:
            continue
        call, runs = (f"backward of score_{plan.op}", plan.backward) if backward else (f"score_{plan.op}", plan.backend)
        text = f"{call} runs on {runs!r}, not on {name.removesuffix(IN_BACKWARD)!r}: {reason}"
        if strict():
            raise RuntimeError(f"{text} (SCORE_KERNELS_STRICT=1)")
        if text not in _announced:
            _announced.add(text)
            warnings.warn(text, stacklevel=2)


def _forward(problem: Problem, out: Tensor) -> Tensor:
    with without_autocast(problem.h.device.type):
        plan = plan_of(problem)
        note(plan)
        _announce(plan, backward=False)
        with record_function(f"score_kernels::{plan.op} {plan.backend} forward"):  # what a profile shows
            return _backend(plan.backend).forward(problem, plan, out)


def _backend(name: str) -> Any:
    """The module that computes; Triton is imported by its first call."""
    return importlib.import_module(".triton_kernels.launch", __package__) if name == "triton" else blas


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _register(op: str) -> None:
    name = f"score_kernels::{op}"

    @torch.library.custom_op(name, mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
    def run(h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        problem = Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options))
        out = _empty(h, h.shape)
        return out, _forward(problem, out)

    @run.register_fake
    def _(h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        states = (coefficients.shape[0] + 1, *h.shape) if Options(*options).trajectory else (0,)
        return _empty(h, h.shape), torch.empty(states, dtype=compute_dtype(h.dtype), device=h.device)

    @torch.library.custom_op(
        f"{name}_backward",
        mutates_args=(),
        schema=f"(Tensor? grad_out, Tensor? grad_states, Tensor? states, {_INPUTS}, bool[] needs, {_OPTIONS}) -> Tensor[]",
    )
    def backward(  # type: ignore[no-untyped-def]
        grad_out, grad_states, states, h, x0, coefficients, state_scale, x0_scale, parameters, needs, *options
    ):
        problem = Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options))
        with without_autocast(h.device.type):
            plan = plan_of(problem)
            _announce(plan, backward=True)
            with record_function(f"score_kernels::{op} {plan.backward} backward"):
                return _backend(plan.backward).backward(problem, plan, grad_out, grad_states, states, needs)

    @backward.register_fake
    def _(  # type: ignore[no-untyped-def]
        grad_out, grad_states, states, h, x0, coefficients, state_scale, x0_scale, parameters, needs, *options
    ):
        tensors = (h, x0, coefficients, state_scale, x0_scale, *parameters)
        return [_empty(x, x.shape) for x, need in zip(tensors, needs, strict=True) if need]

    @torch.library.custom_op(f"{name}_", mutates_args=("out",), schema=f"(Tensor(a!) out, {_INPUTS}, {_OPTIONS}) -> ()")
    def run_(out, h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        _forward(Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options)), out)


for _op in SHAPES:
    _register(_op)


def operator(name: str) -> Callable[..., Any]:
    """`torch.ops.score_kernels.<name>`"""
    return getattr(torch.ops.score_kernels, name)
