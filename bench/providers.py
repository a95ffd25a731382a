"""Who is measured: this package's backends, and what a user would write or pick instead of them. All data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from score_kernels import ops
from score_kernels.activations import ACTIVATIONS

from .cases import Case
from .inputs import Forward, make, ours

NEGATIVE_SLOPE = 0.01
EPS = 1e-5

Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """kind: "ours" or "peer". requires: modules that have to be installed, by `install`. compiles: its first call compiles.

    kernel: it is a backend of that name, which runs on some devices and some cases only.
    """

    name: str
    kind: str
    about: str
    build: Callable[[Case], Forward]
    requires: tuple[str, ...] = ()
    install: str = ""
    compiles: bool = False
    kernel: bool = False

    def absent(self, device: str) -> str | None:
        """Why it cannot be measured on this device, or None."""
        if missing := [module for module in self.requires if find_spec(module) is None]:
            return f"{', '.join(missing)} not installed: {self.install}"
        return ops.machine_of(torch.device(device)).triton if self.kernel else None

    def refuses(self, case: Case, dtype: torch.dtype, device: str) -> str | None:
        """Why it does not take this case, as its planner says of no rows of it; or None."""
        if not self.kernel:
            return None
        given = make(replace(case, rows=0), "forward", dtype, device)
        try:
            self.build(case)(given.h, given.parameters)
        except ValueError as error:
            return str(error)
        return None


def _heun(k: Block, y: Tensor, dt: float) -> Tensor:
    k1 = k(y)
    return y + dt / 2 * (k1 + k(y + dt * k1))


def _rk4(k: Block, y: Tensor, dt: float) -> Tensor:
    k1 = k(y)
    k2 = k(y + dt / 2 * k1)
    k3 = k(y + dt / 2 * k2)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k(y + dt * k3))


# One step of size dt along k(y) = F(y) - y or F(y), in the textbook's form.
SOLVERS: dict[str, Callable[[Block, Tensor, float], Tensor]] = {
    "euler": lambda k, y, dt: y + dt * k(y),
    "midpoint": lambda k, y, dt: y + dt * k(y + dt / 2 * k(y)),
    "heun": _heun,
    "rk4": _rk4,
}


def eager(case: Case) -> Forward:
    """The loop that a user would write, in the input's dtype."""
    dt = {"contractive": 0.5, "residual": 1.0, "replace": 0.0}[case.update] if case.dt is None else case.dt
    solve = SOLVERS[case.solver]
    block = {"linear": _linear, "mlp": _mlp}[case.op]

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        sets = [{name: p[i] if case.sets > 1 else p for name, p in parameters.items()} for i in range(case.sets)]
        for t in range(case.iterations):
            p = sets[t * case.sets // case.iterations if case.order == "consecutive" else t % case.sets]
            if case.update == "replace":
                h = block(case, p, h)
            elif case.update == "residual":
                h = solve(partial(block, case, p), h, dt)
            elif case.solver == "euler":
                h = torch.lerp(h, block(case, p, h), dt)
            else:
                h = solve(partial(_decaying, partial(block, case, p)), h, dt)
        return h

    return forward


def _decaying(block: Block, y: Tensor) -> Tensor:
    return block(y) - y


def _linear(case: Case, p: dict[str, Tensor], y: Tensor) -> Tensor:
    return _activation(case, F.linear(_norm(case, p, y), p["weight"], p.get("bias")))


def _mlp(case: Case, p: dict[str, Tensor], y: Tensor) -> Tensor:
    n = _norm(case, p, y)
    up = F.linear(n, p["w1"], p.get("b1"))
    u = _activation(case, F.linear(n, p["w_gate"], p.get("b_gate"))) * up if case.gated else _activation(case, up)
    return F.linear(u, p["w2"], p.get("b2"))


def _norm(case: Case, p: dict[str, Tensor], y: Tensor) -> Tensor:
    if case.norm is None:
        return y
    if case.norm == "layernorm":
        return F.layer_norm(y, (case.features,), p.get("norm_weight"), p.get("norm_bias"), EPS)
    return F.rms_norm(y, (case.features,), p.get("norm_weight"), EPS)


def _activation(case: Case, a: Tensor) -> Tensor:
    return ACTIVATIONS[case.activation].forward(a, NEGATIVE_SLOPE)


def _without_onednn(case: Case) -> Forward:
    run = ours(case, backend="blas")

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return run(h, parameters)

    return forward


def _compiled(case: Case) -> Forward:
    return torch.compile(eager(case))


def _compiled_max(case: Case) -> Forward:
    """Without its own CUDA graphs, whose inputs are copied: the harness replays one where a case says so, for everyone."""
    return torch.compile(eager(case), mode="max-autotune-no-cudagraphs")


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", "peer", "the plain PyTorch loop", eager),
        Provider("torch_compile", "peer", "torch.compile of the same loop", _compiled, compiles=True),
        Provider("torch_compile_max", "peer", "the same with max-autotune", _compiled_max, compiles=True),
        Provider("reference", "ours", "the oracle: the formulas as they read", partial(ours, backend="reference")),
        Provider("blas", "ours", "the kernels' algorithm in PyTorch calls", partial(ours, backend="blas")),
        Provider("triton", "ours", "the Triton kernels: one launch for all T", partial(ours, backend="triton"), kernel=True),
        Provider("auto", "ours", "what a call without backend= runs on", partial(ours, backend="auto")),
        Provider("blas_no_onednn", "ours", "the same with torch's BLAS in oneDNN's place", _without_onednn),
    )
}
