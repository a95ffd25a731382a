"""Who is measured: this package's backends, and what a user would write or pick instead of them. All data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.backends import mkldnn

from score_kernels import ops

from . import attention_peers, peers
from .cases import Case
from .inputs import Forward, make, ours
from .peers import eager as eager  # the one that everything is compared with

Limits = Callable[[Case, str], str | None]


def _itself(case: Case) -> Case:
    return case


@dataclass(frozen=True)
class Provider:
    """kind: "ours" or "peer". requires: modules that have to be installed, by `install`. compiles: its first call compiles.

    kernel: it is a backend of that name, which runs on some devices and some cases only. gpu: it makes no sense without one.
    forward_only: it has no backward on a CPU. limits: why it does not take a case in a mode, or None. stands_for: the case that
    it computes in the place of the given one, as much work but another function, which it is held to. module: `build` makes an
    nn.Module with parameters of its own.
    """

    name: str
    kind: str
    about: str
    build: Callable[[Case], Forward]
    requires: tuple[str, ...] = ()
    install: str = ""
    compiles: bool = False
    kernel: bool = False
    gpu: bool = False
    forward_only: bool = False
    limits: Limits = lambda case, mode: None
    stands_for: Callable[[Case], Case] = _itself
    module: bool = False

    @property
    def title(self) -> str:
        """Its name in tables and figures: one that computes something else says so."""
        return self.name if self.stands_for is _itself else f"{self.name} (what SCORE replaces)"

    def absent(self, device: str) -> str | None:
        """Why it cannot be measured on this device, or None."""
        if missing := [module for module in self.requires if find_spec(module) is None]:
            return f"{', '.join(missing)} not installed: {self.install}"
        if self.gpu and not device.startswith("cuda"):
            return "it needs a GPU"
        if not self.kernel:
            return None
        reason: str | None = getattr(ops.machine_of(torch.device(device)), self.name)
        return reason

    def refuses(self, case: Case, mode: str, dtype: torch.dtype, device: str) -> str | None:
        """Why it does not take this case, by its limits or as its planner says of no rows of it; or None."""
        if reason := self.limits(case, mode):
            return reason
        if self.forward_only and mode != "forward" and not device.startswith("cuda"):
            return "its backward needs a GPU"
        if not self.kernel:
            return None
        given = make(replace(case, rows=0), "forward", dtype, device)
        try:
            self.build(case)(given.h, given.parameters)
        except ValueError as error:
            return str(error)
        return None


def _without_onednn(case: Case) -> Forward:
    run = ours(case, backend="blas")

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        # `flags` would set tf32 too, and warns that this processor has none.
        enabled, *_ = mkldnn.set_flags(False, _fp32_precision=None)
        try:
            return run(h, parameters)
        finally:
            mkldnn.set_flags(enabled, _fp32_precision=None)

    return forward


def _forward_only(case: Case, mode: str) -> str | None:
    return "it saves memory between forward and backward: without backward it is eager" if mode == "forward" else None


def _graphed(case: Case, mode: str) -> str | None:
    return "its own CUDA graphs cannot be captured in the one that this case replays" if case.graph else None


# max-autotune without CUDA graphs: the harness replays one where a case says so, for everyone.
MAX = "max-autotune-no-cudagraphs"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", "peer", "the plain PyTorch loop", eager),
        Provider("checkpoint", "peer", "the same, each iteration under activation checkpointing", peers.checkpointed,
                 limits=_forward_only),
        Provider("torch_compile", "peer", "torch.compile of the plain loop", peers.compiled, compiles=True),
        Provider("torch_compile_max", "peer", "the same with max-autotune", partial(peers.compiled, mode=MAX), compiles=True),
        Provider("torch_compile_graphs", "peer", "the same with max-autotune and its own CUDA graphs", peers.compiled_graphs,
                 compiles=True, gpu=True, limits=_graphed),
        Provider("stack", "peer", "the nn.Sequential that SCORE replaces: T layers, T times the parameters, no residual; as "
                 "much work, another function, held to its own float64", peers.stack, limits=peers.no_stack,
                 stands_for=peers.stack_of, module=True),
        Provider("torchdiffeq", "peer", "its fixed-step solvers: euler, midpoint, heun2", peers.ode, ("torchdiffeq",),
                 "pip install torchdiffeq", limits=peers.no_ode),
        Provider("liger", "peer", "the plain loop with Liger's SwiGLU", peers.liger, ("liger_kernel",),
                 "pip install liger-kernel", gpu=True, limits=peers.no_swiglu),
        Provider("encoder_layer", "peer", "nn.TransformerEncoderLayer, in the plain loop", attention_peers.EncoderLoop,
                 limits=attention_peers.no_encoder_layer, module=True),
        Provider("flex_attention", "peer", "torch.compile of the plain loop with FlexAttention", attention_peers.flex,
                 compiles=True, forward_only=True, limits=attention_peers.no_flex_attention),
        Provider("reference", "ours", "the oracle: the formulas as they read", partial(ours, backend="reference")),
        Provider("blas", "ours", "the kernels' algorithm in PyTorch calls", partial(ours, backend="blas")),
        Provider("triton", "ours", "the Triton kernels: one launch for all T", partial(ours, backend="triton"), kernel=True),
        Provider("cuda", "ours", "the CUDA kernels: one launch for all T", partial(ours, backend="cuda"), kernel=True),
        Provider("auto", "ours", "what a call without backend= runs on", partial(ours, backend="auto")),
        Provider("blas_no_onednn", "ours", "the same with torch's BLAS in oneDNN's place", _without_onednn),
    )
}  # fmt: skip


def title(name: str) -> str:
    """What tables and figures call a provider of a result, which may be one that there is no more."""
    return PROVIDERS[name].title if name in PROVIDERS else name
