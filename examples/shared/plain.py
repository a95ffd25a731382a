"""The same model as a plain PyTorch loop: what the speed of the fused path is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import SOLVERS
from score_kernels.activations import ACTIVATIONS
from score_kernels.modules import ScoreModule
from score_kernels.stages import UPDATES, parameter_set

Parameters = dict[str, Tensor]


def plainly(model: nn.Module) -> nn.Module:
    """A copy of the model whose Score modules are loops of PyTorch's own functions."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ScoreModule):
                setattr(parent, name, Plain(child))
    return model


class Plain(nn.Module):
    """The function of a Score module, with its parameters, one iteration after the other."""

    def __init__(self, module: ScoreModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, h: Tensor, *, x0: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        m = self.module
        update, solver, order = (_option(m, name) for name in ("update", "solver", "order"))
        given = dict(m.named_parameters(recurse=False))
        parameters = {name: p.unbind() if m.layers > 1 else (p,) for name, p in given.items() if name != "dt_logit"}
        for t in range(m.iterations):
            z = h if x0 is None else h + x0
            at = parameter_set(t, m.iterations, m.layers, order)
            block = partial(BLOCKS[m.op], m, {name: sets[at] for name, sets in parameters.items()}, attn_mask)
            h = block(z) if update == "replace" else _step(block, z, update, solver, self._dt(t, update))
        return h

    def _dt(self, t: int, update: str) -> Any:
        dt = UPDATES[update][1] if self.module.dt is None else self.module.dt
        return dt[t] if isinstance(dt, Tensor) and dt.dim() else dt


def _step(block: Callable[[Tensor], Tensor], z: Tensor, update: str, solver: str, dt: Any) -> Tensor:
    if (update, solver) == ("contractive", "euler"):
        return torch.lerp(z, block(z), dt)
    return SOLVERS[solver](block if update == "residual" else lambda y: block(y) - y, z, dt)


def _linear(m: ScoreModule, p: Parameters, mask: Tensor | None, y: Tensor) -> Tensor:
    return _activation(m, F.linear(_norm(m, p, y), p["weight"], p.get("bias")))


def _mlp(m: ScoreModule, p: Parameters, mask: Tensor | None, y: Tensor) -> Tensor:
    return F.linear(_activation(m, F.linear(_norm(m, p, y), p["w1"], p.get("b1"))), p["w2"], p.get("b2"))


def _attention(m: ScoreModule, p: Parameters, mask: Tensor | None, y: Tensor) -> Tensor:
    qkv = F.linear(_norm(m, p, y), p["w_qkv"], p.get("b_qkv"))
    q, k, v = qkv.unflatten(-1, (3, m.own["num_heads"], -1)).permute(2, 0, 3, 1, 4).unbind()
    u = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=m.own["causal"])
    return F.linear(u.transpose(1, 2).flatten(2), p["w_out"], p.get("b_out"))


def _transformer(m: ScoreModule, p: Parameters, mask: Tensor | None, z: Tensor) -> Tensor:
    """Norms before the halves."""
    attention, mlp = ({name.removeprefix(f"{half}_"): x for name, x in p.items()} for half in ("attention", "mlp"))
    y = z + _attention(m, attention, mask, z)
    return y + _mlp(m, mlp, mask, y)


# What the ops take where nothing is given.
DEFAULTS = {"update": "contractive", "solver": "euler", "order": "consecutive", "eps": 1e-5, "negative_slope": 0.01}


def _option(m: ScoreModule, name: str) -> Any:
    return m.options.get(name, DEFAULTS[name])


BLOCKS = {"linear": _linear, "mlp": _mlp, "attention": _attention, "transformer": _transformer}


def _norm(m: ScoreModule, p: Parameters, y: Tensor) -> Tensor:
    if m.norm == "layernorm":
        return F.layer_norm(y, y.shape[-1:], p["norm_weight"], p.get("norm_bias"), _option(m, "eps"))
    return y if m.norm is None else F.rms_norm(y, y.shape[-1:], p["norm_weight"], _option(m, "eps"))


def _activation(m: ScoreModule, a: Tensor) -> Tensor:
    return ACTIVATIONS[str(m.activation)].forward(a, _option(m, "negative_slope"))
