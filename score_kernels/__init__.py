"""SCORE in fused kernels: one shared block applied T times, `h <- (1 - dt) h + dt F(h)`, instead of a stack of layers.

Everything is loaded on first use: importing this package imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import autograd, functional
    from .attention_module import ScoreAttention
    from .conversion import convert, revert
    from .fused import FusedSequential
    from .modules import ScoreLinear, ScoreMLP
    from .plans import available_backends, explain
    from .sharing import share
    from .transformer_module import ScoreTransformer

# Public name -> module that holds it; a module's own name stands for the module.
_PUBLIC = {
    "FusedSequential": "fused",
    "ScoreAttention": "attention_module",
    "ScoreLinear": "modules",
    "ScoreMLP": "modules",
    "ScoreTransformer": "transformer_module",
    "autograd": "autograd",
    "available_backends": "plans",
    "convert": "conversion",
    "explain": "plans",
    "functional": "functional",
    "revert": "conversion",
    "share": "sharing",
}

__all__ = [
    "FusedSequential",
    "ScoreAttention",
    "ScoreLinear",
    "ScoreMLP",
    "ScoreTransformer",
    "autograd",
    "available_backends",
    "convert",
    "explain",
    "functional",
    "revert",
    "share",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    value = module if name == _PUBLIC[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
