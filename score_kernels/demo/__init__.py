"""`python -m score_kernels demo`: correctness, training on digits and a small benchmark, in under 3 minutes on two cores.

Everything it prints is measured in the run; so are its conclusions.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = 100

# Module -> what to do when it cannot be imported, in the order in which they are tried.
NEEDED = {
    "torch": "`python -m score_kernels doctor` tells why and what to do",
    "rich": "pip install 'score-kernels[demo]'",
    "sklearn": "pip install 'score-kernels[demo]'",
    "bench.measure": "it is part of the source checkout, not of the installed package: run `make demo` in a source checkout",
}


def run(quick: bool = False, seed: int = 0) -> int:
    """Runs the demo. Returns 0; 1 when a backend fails the accuracy check; 2 when something it needs is missing."""
    for name, fix in NEEDED.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"the demo needs {name}, which cannot be imported ({error}): {fix}", file=sys.stderr)
            return 2
    import torch
    from rich.console import Console

    from . import checks, digits, speed

    console = Console(highlight=False)
    console.width = min(console.width, COLUMNS) if console.is_terminal else COLUMNS
    start = time.perf_counter()
    console.print(
        f"[bold]score_kernels demo[/bold]: one block F applied T times, h <- (1 - dt) h + dt F(h), in place of T layers.\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, seed {seed}{', quick' if quick else ''}."
    )
    passed = checks.run(console, quick, seed)
    digits.run(console, quick, seed)
    speed.run(console, quick)
    _closing(console)
    verdict = "passed" if passed else "[bold red]FAILED[/bold red]"
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s; accuracy check {verdict}.")
    return 0 if passed else 1


def _closing(console: Console) -> None:
    from .screen import paragraph

    console.rule("What a GPU would add")
    paragraph(
        console,
        "Triton and CUDA kernels that run all T iterations in one launch, the state staying on the chip. They pass their tests "
        "on a CPU, by Triton's interpreter and an emulation, and compile for GPUs, but were never run on one: until results "
        "from hardware are committed, tensors on a GPU are computed there by the same blas backend, that is by "
        "PyTorch's own products, unless backend='triton' or 'cuda' is asked for. Nothing above says how fast they are. "
        "`python -m score_kernels doctor` tells what this machine has; TRITON_INTERPRET=1 and --quick make this demo check the "
        "Triton kernels too, for many minutes.",
    )
