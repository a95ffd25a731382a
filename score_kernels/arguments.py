"""Checks what the caller passed and brings it into the flat form; errors name the argument, the expected and the given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stages
from .activations import ACTIVATIONS
from .planner import BACKENDS
from .problem import ALL_ITERATIONS, NORM_PLACEMENTS, NORMS, SHAPES, Options, compute_dtype, extent, is_norm


class Call(NamedTuple):
    """A checked call: the flat tensors and options of `Problem.build`, and what the caller wants back."""

    tensors: list[Tensor | None]
    options: Options
    out: Tensor | None
    return_trajectory: bool


class Own(NamedTuple):
    """What only one op takes: the inputs of `INPUTS[op]` by name, in its order, and fields of `Options`."""

    inputs: dict[str, Tensor | None]
    options: dict[str, Any]


# One tensor, a stack with a leading L, or a list of L tensors.
Parameter = Tensor | Sequence[Tensor]

# Options that are names, and the names they take.
NAMES: dict[str, Collection[str]] = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
    "update": (*stages.UPDATES, "replace"),
    "solver": stages.SOLVERS,
    "order": stages.ORDERS,
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    op: str,
    h: Tensor,
    parameters: Mapping[str, Parameter | None],
    iterations: int,
    *,
    activation: str = "identity",
    dt: float | Tensor | None = None,
    negative_slope: float = 0.01,
    norm: str | None = None,
    norm_weight: Parameter | None = None,
    norm_bias: Parameter | None = None,
    eps: float = 1e-5,
    update: str = "contractive",
    solver: str = "euler",
    order: str = "consecutive",
    x0: Tensor | None = None,
    x0_scale: float | Tensor | None = None,
    state_scale: float | Tensor | None = None,
    grad_iterations: int | None = None,
    return_trajectory: bool = False,
    save_trajectory: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
    own: Callable[[Tensor], Own] | None = None,
) -> Call:
    """Checks a call of `op` and flattens it; the defaults here are the public ones. own: checks what only this op takes."""
    check_state(h)
    check_iterations(iterations)
    norm = "none" if norm is None else norm
    names = {"activation": activation, "norm": norm, "update": update, "solver": solver, "order": order, "backend": backend}
    check_options({**names, "dt": dt, "grad_iterations": grad_iterations, "eps": eps, "negative_slope": negative_slope})
    h, x0, given = autocast(h, x0, {**parameters, "norm_weight": norm_weight, "norm_bias": norm_bias})
    extra = Own({}, {}) if own is None else own(h)
    lists = parameter_lists(op, h, given, iterations)
    check_norm(norm, lists)
    table = coefficients(h, dt, iterations, update, solver)
    if x0 is not None:
        check_like("x0", x0, h, (h.dtype,))
        if x0.shape != h.shape:
            raise ValueError(f"x0: expected the shape of h, {tuple(h.shape)}, got {tuple(x0.shape)}")
    elif x0_scale is not None:
        raise ValueError(f"x0_scale: expected x0 to be given with it, got x0=None and x0_scale={x0_scale!r}")
    scales = [scale("state_scale", state_scale, h, iterations), scale("x0_scale", x0_scale, h, iterations)]
    lists |= {name: [] if x is None else [x] for name, x in extra.inputs.items()}
    tensors = [h, x0, table, *scales, *(x for tensors in lists.values() for x in tensors)]
    if out is not None:
        check_out(out, h, tensors, return_trajectory)
    keep = return_trajectory or (save_trajectory and torch.is_grad_enabled() and out is None)
    options = Options(
        counts=tuple(len(tensors) for tensors in lists.values()),
        activation=activation,
        negative_slope=float(negative_slope),
        norm=norm,
        eps=float(eps),
        solver=solver,
        order=order,
        grad_iterations=ALL_ITERATIONS if grad_iterations is None else grad_iterations,
        trajectory=keep,
        backend=backend,
        **extra.options,
    )
    return Call(tensors, options, out, return_trajectory)


def check_keywords(function: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}; its options: {', '.join(sorted(known))}"
            )


def one_of(name: str, value: str | None, known: Collection[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_state(h: Tensor) -> None:
    if not isinstance(h, Tensor):
        raise TypeError(f"h: expected a tensor, got {type(h).__name__}")
    if h.dtype not in _DTYPES:
        raise TypeError(f"h: expected a floating-point tensor (float16, bfloat16, float32, float64), got {h.dtype}")
    if h.dim() == 0 or h.shape[-1] == 0:
        raise ValueError(f"h: expected shape (..., D) with D >= 1, got {tuple(h.shape)}")


def check_iterations(iterations: int) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int | torch.SymInt):
        raise TypeError(f"iterations: expected an int, got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"iterations: expected 0 or more, got {iterations}")


def check_like(name: str, x: Tensor, h: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.device != h.device:
        raise ValueError(f"{name}: expected a tensor on {h.device}, where h is, got one on {x.device}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: expected dtype {expected} to go with h ({h.dtype}), got {x.dtype}; convert one of them")


def parameter_lists(op: str, h: Tensor, given: Mapping[str, Parameter | None], iterations: int) -> dict[str, list[Tensor]]:
    """Every parameter as a list: empty if absent, one tensor for all sets, or L tensors."""
    shapes = SHAPES[op]
    sizes = {"D": h.shape[-1]}
    lists: dict[str, list[Tensor]] = {}
    for name, dims in shapes.items():
        lists[name] = tensors = _as_list(name, given.get(name), len(dims))
        dtypes = (h.dtype, compute_dtype(h.dtype)) if is_norm(name) else (h.dtype,)
        for x in tensors:
            check_like(name, x, h, dtypes)
            if "H" in dims and x.dim() == len(dims):
                sizes.setdefault("H", x.shape[dims.index("H")])
            expected = tuple(extent(d, sizes) for d in dims)
            if tuple(x.shape) != expected:
                letters = ", ".join(dims)
                raise ValueError(
                    f"{name}: expected shape ({letters}) = {expected} (or a leading L, or a list), D being h's last dimension "
                    f"{sizes['D']}, got {tuple(x.shape)}"
                )
        if not tensors and name.startswith("w") and name != "w_gate":
            raise TypeError(f"{name}: expected a tensor or a list of tensors, got None")
    if given.get("b_gate") is not None and not lists["w_gate"]:
        raise ValueError("b_gate: expected w_gate to be given with it, got w_gate=None")
    lengths = {name: len(tensors) for name, tensors in lists.items() if len(tensors) > 1}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"parameter sets: expected the same number L for all parameters that have sets, got {lengths}")
    sets = max([1, *lengths.values()])
    if sets > iterations > 0:
        raise ValueError(f"parameter sets: expected at most one set for each of the {iterations} iterations, got L = {sets}")
    return lists


def _as_list(name: str, value: Parameter | None, dims: int) -> list[Tensor]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return list(value.unbind(0)) if value.dim() == dims + 1 else [value]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected at least one tensor, got an empty list; pass None for no {name}")
    return list(value)


def check_norm(norm: str, lists: Mapping[str, list[Tensor]]) -> None:
    for name in filter(is_norm, lists):
        kinds = ("layernorm", "rmsnorm") if name.endswith("norm_weight") else ("layernorm",)
        if lists[name] and norm not in kinds:
            raise ValueError(f"{name}: expected norm to be {' or '.join(kinds)} when {name} is given, got norm={norm!r}")


def coefficients(h: Tensor, dt: object, iterations: int, update: str, solver: str) -> Tensor:
    step = None if dt is None else _per_iteration("dt", dt, h, iterations)
    return stages.coefficient_table(step, iterations, update, solver, compute_dtype(h.dtype), h.device)


def scale(name: str, value: object, h: Tensor, iterations: int) -> Tensor | None:
    """A factor for each iteration, as a (T,) tensor."""
    if value is None:
        return None
    given = _per_iteration(name, value, h, iterations)
    dtype = compute_dtype(h.dtype)
    given = given.to(dtype) if isinstance(given, Tensor) else torch.full((), given, dtype=dtype, device=h.device)
    return given.expand(iterations).contiguous()


def _per_iteration(name: str, value: object, h: Tensor, iterations: int) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.device != h.device:
            raise ValueError(f"{name}: expected a tensor on {h.device}, where h is, got one on {value.device}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, iterations)):
            raise ValueError(f"{name}: expected shape () or (T,) = ({iterations},), got {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{name}: expected a number or a tensor of shape () or (T,), got {type(value).__name__}")
    return value  # type: ignore[return-value]  # a SymFloat stands for a float while a graph is traced


def check_out(out: Tensor, h: Tensor, tensors: Sequence[Tensor | None], return_trajectory: bool) -> None:
    """`out` may be h itself; it must not overlap an input in any other way, nor be asked for gradients or a trajectory."""
    check_like("out", out, h, (h.dtype,))
    if out.shape != h.shape:
        raise ValueError(f"out: expected the shape of h, {tuple(h.shape)}, got {tuple(out.shape)}")
    if return_trajectory:
        raise ValueError("out: expected return_trajectory=False, a trajectory is always a new tensor; got True")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (out, *tensors)):
        raise ValueError("out: expected no input that requires grad, out= is for inference; call it under torch.no_grad()")
    if torch.compiler.is_compiling():
        return
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out: expected memory of its own for every element, got an expanded tensor, strides {out.stride()}")
    for x in tensors:
        if x is None or x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            continue
        same = x.data_ptr() == out.data_ptr() and x.stride() == out.stride() and x is tensors[0]
        if not same and _span(x)[0] < _span(out)[1] and _span(out)[0] < _span(x)[1]:
            raise ValueError("out: expected h itself or memory that no input uses, got a tensor that overlaps an input")


def _span(x: Tensor) -> tuple[int, int]:
    """First and last byte address of x."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_options(options: Mapping[str, Any]) -> None:
    """The options of a call, or those of them that a module is given: known names, numbers in their range."""
    for name, known in NAMES.items():
        if name in options:
            one_of(name, options[name], known)
    backend, dt, solver = options.get("backend", "auto"), options.get("dt"), options.get("solver", "euler")
    one_of("backend", backend, ("auto", *BACKENDS))
    if options.get("update") == "replace" and (dt is not None or solver != "euler"):
        given = f"dt={dt!r}" if dt is not None else f"solver={solver!r}"
        raise ValueError(f'update="replace" is an ordinary stack, without dt or solver; got {given}; leave it out')
    last = options.get("grad_iterations")
    if last is not None and (isinstance(last, bool) or not isinstance(last, int | torch.SymInt)):
        raise TypeError(f"grad_iterations: expected an int, or None for all, got {type(last).__name__}")
    if last is not None and last < 1:
        raise ValueError(f"grad_iterations: expected 1 or more, or None for all, got {last}; torch.no_grad() is none")
    for name in ("eps", "negative_slope"):
        value = options.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if name == "eps" and not value >= 0:
            raise ValueError(f"eps: expected 0 or more, got {value}")


def autocast(
    h: Tensor, x0: Tensor | None, given: Mapping[str, Parameter | None]
) -> tuple[Tensor, Tensor | None, Mapping[str, Parameter | None]]:
    """Under autocast: state, injection, weights and biases in autocast's dtype (float64 is left alone, as in torch)."""
    device = h.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return h, x0, given
    dtype = torch.get_autocast_dtype(device)

    def cast(x: object) -> object:
        if isinstance(x, list | tuple):
            return [cast(y) for y in x]
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    cast_parameters = {name: x if is_norm(name) else cast(x) for name, x in given.items()}
    return cast(h), cast(x0), cast_parameters  # type: ignore[return-value]
