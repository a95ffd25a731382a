"""The registered operators: `torch.ops.score_kernels.<op>`, its gradient `<op>_backward`, and the in-place form `<op>_`.

The backend is chosen inside the operator, from the tensors it is given: never while a graph is traced. Every operator takes
the flat form of a call (`Problem.build`), its parameters, and inputs of its own, in one list with `counts` telling how many
tensors each of them has.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from . import blas, cuda, machine, planner, stages, verified
from .machine import INTERPRETER, Machine
from .plan import Plan
from .planner import FUSED, IN_BACKWARD
from .problem import SHAPES, Options, Problem, compute_dtype, without_autocast
from .settings import interpreted, scratch_budget, strict

_INPUTS = "Tensor h, Tensor? x0, Tensor coefficients, Tensor? state_scale, Tensor? x0_scale, Tensor[] parameters"
_OPTIONS = (
    "int[] counts, str activation, float negative_slope, str norm, float eps, str solver, str order, SymInt grad_iterations, "
    "bool trajectory, str backend"
)
_OWN = {"attention": ", int num_heads, bool causal, float scale, bool qk_norm, SymInt max_seqlen"}
_OWN["transformer"] = _OWN["attention"] + ", str norm_placement"

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


# The planner is a pure function, and a training loop makes the same few calls over and over.
_plan = functools.lru_cache(maxsize=1024)(planner.plan)


def plan_of(problem: Problem) -> Plan:
    """The plan of a call on the machine that its tensors are on."""
    dtype, device, solver = problem.compute_dtype, problem.h.device, problem.options.solver
    return _plan(
        problem.op,
        features=problem.features,
        hidden=problem.hidden,
        tokens=problem.tokens,
        heads=problem.options.num_heads,
        gated=problem.gated,
        activation=problem.options.activation,
        iterations=problem.iterations - problem.first_grad,
        dtype=str(problem.h.dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        machine=machine_of(device),
        scratch_budget=scratch_budget(device.type),
        state_tiles=1 + stages.uses_z(solver) + stages.uses_sum(solver),
        stages=problem.stages,
        sets=problem.sets,
        kept=blas.kept(problem),
        backend=problem.options.backend,
    )


def machine_of(device: torch.device) -> Machine:
    """What the planner has to know of a device; a CPU runs the Triton kernels where `TRITON_INTERPRET=1` interprets them."""
    reason = None if _has_triton() else "triton is not installed: pip install 'triton>=3.6'"
    if device.type == "cpu":
        return INTERPRETER if interpreted() and reason is None else Machine(triton=reason or "it needs a GPU")
    if device.type != "cuda":
        wanted = "it runs on {} devices, not on " + device.type
        return Machine(device.type, triton=wanted.format("CUDA and ROCm"), cuda=wanted.format("CUDA"))
    # The newer of two interfaces: it knows what was set by the older one, which fails to read what was set by this one.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _gpu(device.index if device.index is not None else torch.cuda.current_device(), tf32, reason)


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _gpu(index: int, tf32: bool, no_triton: str | None) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    multiprocessors = properties.multi_processor_count
    if torch.version.hip:
        return Machine("hip", arch, multiprocessors, shared, tf32, no_triton, "it runs on CUDA devices, not on ROCm's")
    kernels, no_cuda = cuda.kernels(arch)
    known = machine.VERIFIED | verified.recorded()
    return Machine("cuda", arch, multiprocessors, shared, tf32, no_triton, no_cuda, kernels, known)


def _announce(plan: Plan, *, backward: bool) -> None:
    """Where no fused kernel runs this pass: warns once, or raises where that is wanted, for each that might have."""
    call, runs = (f"backward of score_{plan.op}", plan.backward) if backward else (f"score_{plan.op}", plan.backend)
    for name, reason in plan.skipped:
        if name.endswith(IN_BACKWARD) != backward or runs in FUSED:
            continue
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
            written = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
            trajectory: Tensor = _runs(plan, backward=False).forward(problem, plan, written)
            if written is not out:
                out.copy_(written)
            return trajectory


def _runs(plan: Plan, *, backward: bool) -> Any:
    """The module that computes a pass; Triton is imported by its first call."""
    name = plan.backward if backward else plan.backend
    if name == "triton":
        module = "halves" if plan.by_halves(backward=backward) else "launch"
        return importlib.import_module(f".triton_kernels.{module}", __package__)
    return cuda if name == "cuda" else blas


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _defined(name: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an operator without aliases. `torch.library.custom_op` would look for them in the results of every call."""
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    decorator: Any = torch.library.impl(name, "default")
    return decorator


def _register(op: str) -> None:
    name = f"score_kernels::{op}"
    options_ = _OPTIONS + _OWN.get(op, "")

    @_defined(name, f"({_INPUTS}, {options_}) -> (Tensor, Tensor)")
    def run(h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        problem = Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options))
        out = _empty(h, h.shape)
        return out, _forward(problem, out)

    @torch.library.register_fake(name)
    def _(h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        states = (coefficients.shape[0] + 1, *h.shape) if Options(*options).trajectory else (0,)
        return _empty(h, h.shape), torch.empty(states, dtype=compute_dtype(h.dtype), device=h.device)

    @_defined(
        f"{name}_backward",
        f"(Tensor? grad_out, Tensor? grad_states, Tensor? states, {_INPUTS}, bool[] needs, {options_}) -> Tensor[]",
    )
    def backward(  # type: ignore[no-untyped-def]
        grad_out, grad_states, states, h, x0, coefficients, state_scale, x0_scale, parameters, needs, *options
    ):
        problem = Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options))
        with without_autocast(h.device.type):
            plan = plan_of(problem)
            _announce(plan, backward=True)
            with record_function(f"score_kernels::{op} {plan.backward} backward"):
                return _runs(plan, backward=True).backward(problem, plan, grad_out, grad_states, states, needs)

    @torch.library.register_fake(f"{name}_backward")
    def _(  # type: ignore[no-untyped-def]
        grad_out, grad_states, states, h, x0, coefficients, state_scale, x0_scale, parameters, needs, *options
    ):
        tensors = (h, x0, coefficients, state_scale, x0_scale, *parameters)
        return [_empty(x, x.shape) for x, need in zip(tensors, needs, strict=True) if need]

    @torch.library.custom_op(f"{name}_", mutates_args=("out",), schema=f"(Tensor(a!) out, {_INPUTS}, {options_}) -> ()")
    def run_(out, h, x0, coefficients, state_scale, x0_scale, parameters, *options):  # type: ignore[no-untyped-def]
        _forward(Problem.build(op, (h, x0, coefficients, state_scale, x0_scale, *parameters), Options(*options)), out)


for _op in SHAPES:
    _register(_op)


def operator(name: str) -> Callable[..., Any]:
    """`torch.ops.score_kernels.<name>`"""
    return getattr(torch.ops.score_kernels, name)
