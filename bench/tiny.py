"""One small forward and backward of every op on all fused kernels, for `compute-sanitizer`: `python -m bench.tiny`."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import torch

from score_kernels import ops
from score_kernels.planner import FUSED

from .cases import Case
from .inputs import make, ours, reference, relative_error, step, tolerance

MLP = Case("tiny-mlp", "mlp", 200, 64, 64, 3, "a sanitizer's pace", "bfloat16", activation="gelu_tanh", norm="rmsnorm")
CASES = (MLP, replace(MLP, name="tiny-linear", op="linear"))


def run(device: str, dtype: torch.dtype) -> None:
    """Raises AssertionError when a result is wrong or other kernels computed it, or none could."""
    machine = ops.machine_of(torch.device(device))
    backends = [name for name in FUSED if getattr(machine, name) is None]
    assert backends, f"no fused kernels run here: triton: {machine.triton}; cuda: {machine.cuda}"
    for backend, case in product(backends, CASES):
        given = make(case, "training", dtype, device)
        with ops.observe_plans() as plans:
            prepare, train = step(ours(case, backend), given, "training")
            results = train(prepare())
        assert isinstance(results, list)
        error = relative_error(results, reference(case, given, "training"))
        print(f"{case.name}: backend {plans[0].backend}, backward {plans[0].backward}, relative error {error:.1e}")
        assert plans[0].backend == backend
        assert error <= tolerance(torch.finfo(dtype).eps, "training")


if __name__ == "__main__":
    # Every tensor an allocation of its own, so that what is read or written beyond it is found; torch looks when it allocates.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    run("cuda", torch.bfloat16)
