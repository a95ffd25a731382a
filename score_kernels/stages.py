"""The stage program: what one iteration does with F, for every solver and update, as a table of numbers.

An iteration turns z (the state, scaled and with x0 mixed in) into the next state. With y = z and S = 0 it runs, stage by stage,

    S <- S + e y
    y <- p z + q y + v S + w F(y)

and the last y is the new state. A backend sees the (T, stages, 5) table of (p, q, v, w, e), and nothing else of dt, the
update or the solver. The table is affine in dt, so its gradient reaches a learned dt through ordinary autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .devices import capturing

COLUMNS = ("p", "q", "v", "w", "e")

Stage = tuple[float, float, float, float, float]

# Stages in terms of the vector field: y <- p z + q y + v S + w dt k(y). Adding a solver is adding an entry.
# midpoint, heun, rk4: Hairer, Norsett, Wanner, Solving ODEs I, section II.1. RK4 keeps no k_i: dt k_1 = 2 (y_2 - z) and so on
# turn its weighted sum into S = (-z + y_2 + 2 y_3 + y_4) / 3.
SOLVERS: dict[str, tuple[Stage, ...]] = {
    "euler": ((0, 1, 0, 1, 0),),
    "midpoint": ((0, 1, 0, 1 / 2, 0), (1, 0, 0, 1, 0)),
    "heun": ((0, 1, 0, 1, 0), (1 / 2, 1 / 2, 0, 1 / 2, 0)),
    "ralston": ((0, 1, 0, 2 / 3, 0), (5 / 8, 3 / 8, 0, 3 / 4, 0)),  # Ralston, Math. Comp. 16 (1962) 431
    "rk4": ((0, 1, 0, 1 / 2, -1 / 3), (1, 0, 0, 1 / 2, 1 / 3), (1, 0, 0, 1, 2 / 3), (0, 0, 1, 1 / 6, 1 / 3)),
}

# The vector field is k(y) = F(y) - decay y: the update's decay, and its default dt.
UPDATES: dict[str, tuple[float, float]] = {"contractive": (1.0, 0.5), "residual": (0.0, 1.0)}

# replace: h <- F(z), an ordinary stack of layers; it has no dt.
REPLACE: tuple[Stage, ...] = ((0, 0, 0, 1, 0),)

ORDERS = ("consecutive", "cyclic")


def uses_z(solver: str) -> bool:
    """Whether the solver reads z after its first stage (a second tile of state)."""
    return any(p for p, *_ in SOLVERS[solver])


def uses_sum(solver: str) -> bool:
    """Whether the solver accumulates S (a third tile of state)."""
    return any(e for *_, e in SOLVERS[solver])


def parameter_set(t: int, iterations: int, sets: int, order: str) -> int:
    """The parameter set of iteration t: `floor(t L / T)` for "consecutive", `t mod L` for "cyclic"."""
    return t * sets // iterations if order == "consecutive" else t % sets


def coefficient_table(
    dt: float | Tensor | None, iterations: int, update: str, solver: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The (T, stages, 5) table of (p, q, v, w, e), differentiable in `dt`.

    dt: a number, a tensor of shape () or (T,), or None for the update's default. `replace` takes None only.
    """
    if isinstance(dt, Tensor) or torch.compiler.is_compiling():
        return _table(dt, iterations, update, solver, dtype, device)
    return _kept((_table, dt, iterations, update, solver), dtype, device)


def _table(
    dt: float | Tensor | None, iterations: int, update: str, solver: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if update == "replace":
        return _constant(REPLACE, dtype, device).expand(iterations, -1, -1).contiguous()
    decay, default = UPDATES[update]
    stages = SOLVERS[solver]
    fixed = _constant(tuple((p, q, v, 0.0, e) for p, q, v, _, e in stages), dtype, device)
    slope = _constant(tuple((0.0, -decay * w, 0.0, w, 0.0) for *_, w, _ in stages), dtype, device)
    dt = default if dt is None else dt
    steps = dt.to(dtype) if isinstance(dt, Tensor) else torch.full((), dt, dtype=dtype, device=device)
    return fixed + steps.expand(iterations)[:, None, None] * slope


def _constant(rows: tuple[Stage, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(rows, dtype=dtype, device=device)
    return _kept((torch.tensor, rows), dtype, device)


def _kept(call: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `call` makes, a function and its arguments: made once and kept, so that a later call launches and copies nothing."""
    key = (call, dtype, device)
    if key in _KEPT:
        return _KEPT[key]
    function, *given = call
    with torch.inference_mode(False):
        made: Tensor = function(*given, dtype=dtype, device=device)
    # Not where a CUDA graph records, whose memory it is, nor from a mode that fakes tensors. Dropped never: graphs may read it.
    if type(made) is Tensor and not capturing(device) and len(_KEPT) < MOST_KEPT:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # calls on other streams read it as well
        _KEPT[key] = made
    return made


MOST_KEPT = 1024
_KEPT: dict[Any, Tensor] = {}
