"""SCORE in fused kernels: one shared block applied T times, `h <- (1 - dt) h + dt F(h)`, instead of a stack of layers.

Everything is loaded on first use: importing this package imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import autograd, functional
    from .modules import ScoreLinear, ScoreMLP
    from .plans import available_backends, explain

# Public name -> module that holds it; a module's own name stands for the module. No function has the name of a module here:
# importing that module would put it in the function's place.
_PUBLIC = {
    "ScoreLinear": "modules",
    "ScoreMLP": "modules",
    "autograd": "autograd",
    "available_backends": "plans",
    "explain": "plans",
    "functional": "functional",
}

__all__ = ["ScoreLinear", "ScoreMLP", "autograd", "available_backends", "explain", "functional"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    value = module if name in ("autograd", "functional") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
