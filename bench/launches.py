"""What Triton's compiled kernels occupy: registers and spills, known once they were launched."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def launched() -> Iterator[list[Any]]:
    """Collects the compiled kernel of every launch inside the context; none where Triton is missing or interprets.

    Triton returns it to whoever launches; its cache has those of earlier calls too, so it is taken where it is returned.
    """
    kernels: list[Any] = []
    if find_spec("triton") is None:
        yield kernels
        return
    function: Any = importlib.import_module("triton.runtime.jit").JITFunction
    launch = function.run

    def run(*args: Any, **kwargs: Any) -> Any:
        kernel = launch(*args, **kwargs)
        kernels.append(kernel)
        return kernel

    function.run = run
    try:
        yield kernels
    finally:
        function.run = launch


def occupied(kernels: Sequence[Any]) -> tuple[int | None, int | None]:
    """Registers of a thread, and 4-byte words that it spills: the most of any of the kernels, None where there are none."""
    return tuple(max((getattr(kernel, name) for kernel in kernels), default=None) for name in ("n_regs", "n_spills"))  # type: ignore[return-value]
