"""What a module of a stack computes, as data: modules with equal tokens are the same function of input and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Kinds of modules; OTHER stands for what has no token.
LINEAR, NORM, ACTIVATION, TRANSPARENT, RESIDUAL, OTHER = "l", "n", "a", "t", "r", "."


class Token(NamedTuple):
    """One module: its kind, and all that its function depends on beside the values of its parameters.

    value: of LINEAR (in, out, has bias), of NORM (name, features, eps, has weight, has bias), of ACTIVATION (name, slope or
    None), of RESIDUAL (class, names and tokens of the modules inside).
    """

    kind: str
    value: tuple[Any, ...] = ()


def _linear(module: nn.Linear) -> Token | str:
    if is_traceable_wrapper_subclass(module.weight):
        return f"its weight is a {type(module.weight).__name__}"
    return Token(LINEAR, (module.in_features, module.out_features, module.bias is not None))


def _norm(name: str, module: nn.LayerNorm | nn.RMSNorm) -> Token | str:
    if len(module.normalized_shape) != 1:
        return f"it normalises over the last {len(module.normalized_shape)} dimensions, a block's norm over one"
    weight, bias = module.weight is not None, getattr(module, "bias", None) is not None
    return Token(NORM, (name, module.normalized_shape[0], module.eps, weight, bias))


def _dropout(module: nn.Dropout) -> Token | str:
    return Token(TRANSPARENT) if module.p == 0 else f"active dropout, p={module.p}"


_READERS: dict[type, Callable[[Any], Token | str]] = {
    nn.Linear: _linear,
    nn.LayerNorm: lambda m: _norm("layernorm", m),
    nn.RMSNorm: lambda m: _norm("rmsnorm", m),
    nn.ReLU: lambda m: Token(ACTIVATION, ("relu", None)),
    nn.LeakyReLU: lambda m: Token(ACTIVATION, ("leaky_relu", m.negative_slope)),
    nn.GELU: lambda m: Token(ACTIVATION, ("gelu" if m.approximate == "none" else "gelu_tanh", None)),
    nn.SiLU: lambda m: Token(ACTIVATION, ("silu", None)),
    nn.Tanh: lambda m: Token(ACTIVATION, ("tanh", None)),
    nn.Sigmoid: lambda m: Token(ACTIVATION, ("sigmoid", None)),
    nn.Identity: lambda m: Token(TRANSPARENT),
    nn.Dropout: _dropout,
}

UNKNOWN = "no part of a block"

# Why a module of another class is left alone: the first class that it is an instance of.
_REASONS: dict[type, str] = {
    nn.Linear: "a subclass of nn.Linear",
    nn.Sequential: "a subclass of nn.Sequential",
    _BatchNorm: "it normalises over rows",
    _DropoutNd: "active dropout",
    nn.Module: UNKNOWN,
}

# The classes that only call their children one after the other; `FusedSequential` joins them.
SEQUENTIALS: set[type] = {nn.Sequential}


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward of the instance's own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def describe(module: nn.Module) -> Token | str:
    """The module's token, or why it has none. Cheap: every forward of a FusedSequential asks again."""
    if not hooked(module):
        if type(module) in SEQUENTIALS:
            return Token(TRANSPARENT)
        if read := _READERS.get(type(module)):
            return read(module)
    return _reason(module)


def _reason(module: nn.Module) -> str:
    if isinstance(module, LazyModuleMixin):
        return "its parameters are not initialised: run a batch through the model first"
    if hooked(module):
        return "it has hooks"
    if is_parametrized(module):
        return "it is parametrized"
    return next(reason for kind, reason in _REASONS.items() if isinstance(module, kind))


def leaves(stack: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all that a stack calls one after the other, nested Sequentials looked through unless hooked."""
    for name, module in stack._modules.items():
        assert module is not None
        if type(module) in SEQUENTIALS and not hooked(module):
            yield from leaves(module, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", module
