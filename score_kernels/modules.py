"""`ScoreLinear` and `ScoreMLP`: the ops as modules that hold their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from . import functional
from .arguments import check_iterations, check_keywords, check_options, one_of
from .problem import SHAPES, extent

# A learned dt stays this far inside (0, 1), where float32 still tells it from the ends.
MARGIN = 2.0**-20


class ModuleOptions(TypedDict, total=False):
    """Keyword arguments that a module passes on to its op; see `functional.score_mlp`."""

    eps: float
    update: str
    solver: str
    order: str
    x0_scale: float | Tensor
    state_scale: float | Tensor
    grad_iterations: int
    save_trajectory: bool
    backend: str


class ActivatedOptions(ModuleOptions, total=False):
    """Those of a module with an activation."""

    negative_slope: float


class ScoreModule(nn.Module):
    """What the modules share: parameters by the names and shapes of `SHAPES[op]`, with a leading L when `layers` is above 1.

    own: arguments of the op that only it takes, as they are given to it.
    """

    op: str
    keywords = ModuleOptions.__annotations__

    def __init__(
        self,
        sizes: dict[str, int],
        absent: tuple[str, ...],
        iterations: int,
        dt: float | Tensor | None,
        learn_dt: bool | str,
        layers: int,
        bias: bool,
        norm: str | None,
        own: dict[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: ModuleOptions,
    ) -> None:
        super().__init__()
        norm = None if norm == "none" else norm
        one_of("learn_dt", str(learn_dt), ("False", "scalar", "per_iteration"))
        check_keywords(type(self).__name__, options, self.keywords)
        check_options({**options, **own, "dt": dt, "norm": "none" if norm is None else norm})
        check_iterations(iterations)
        if not 1 <= layers <= max(iterations, 1):
            raise ValueError(f"layers: expected 1 to iterations = {iterations} parameter sets, got {layers}")
        self.iterations, self.layers, self.learn_dt, self.norm = iterations, layers, learn_dt, norm
        self.sizes, self.own = sizes, own
        absent += () if bias else tuple(name for name in SHAPES[self.op] if name.startswith("b") or name.endswith("bias"))
        unlearned = {None: ("norm_weight", "norm_bias"), "rmsnorm": ("norm_bias",)}.get(norm, ())
        for name, dims in SHAPES[self.op].items():
            shape = (*((layers,) if layers > 1 else ()), *(extent(d, sizes) for d in dims))
            without = name in absent or name.endswith(unlearned)
            parameter = None if without else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self._hold_dt(dt, device, str(options.get("update", "contractive")))
        self.options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
        for name, value in options.items():
            if isinstance(value, Tensor):
                self._hold(name, value, device)
        self.reset_parameters()

    def _hold(self, name: str, value: Tensor, device: torch.device | str | None) -> None:
        """Keeps a tensor that came as an argument: a Parameter is trained, anything else is a buffer."""
        moved = value.to(device)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value if moved is value else nn.Parameter(moved.detach(), value.requires_grad))
        else:
            self.register_buffer(name, moved)

    def _hold_dt(self, dt: float | Tensor | None, device: torch.device | str | None, update: str) -> None:
        if not self.learn_dt:
            if isinstance(dt, Tensor):
                self._hold("fixed_dt", dt, device)
            else:
                self.fixed_dt = dt
            return
        if update == "replace":
            raise ValueError('learn_dt: expected False with update="replace", which has no dt, got ' + repr(self.learn_dt))
        shape = () if self.learn_dt == "scalar" else (self.iterations,)
        start = torch.as_tensor(0.5 if dt is None else dt, dtype=torch.float64, device="cpu").detach()
        if start.shape not in ((), shape):
            raise ValueError(
                f"dt: expected a number or shape {shape} with learn_dt={self.learn_dt!r}, got shape {tuple(start.shape)}"
            )
        if not bool(((start > MARGIN) & (start < 1 - MARGIN)).all()):
            raise ValueError(f"dt: expected a start strictly inside (0, 1) with learn_dt={self.learn_dt!r}, got {dt}")
        # Numbers, not a buffer: they outlive `to("meta")` and `to_empty`.
        self.initial_dt = start.expand(shape).tolist()
        # One element where one is learned, not a scalar: FSDP2 shards no parameters without dimensions.
        self.dt_logit = nn.Parameter(torch.empty(shape or (1,), dtype=torch.float32, device=device))

    @property
    def activation(self) -> str | None:
        """The name of the activation, where the op has one."""
        return self.own.get("activation")

    @property
    def dt(self) -> float | Tensor | None:
        """The step: as given, or the learned one, strictly inside (0, 1)."""
        if not self.learn_dt:
            return self.fixed_dt
        dt = MARGIN + (1 - 2 * MARGIN) * torch.sigmoid(self.dt_logit)
        return dt.squeeze() if self.learn_dt == "scalar" else dt

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module, but a learned dt's logit keeps float32 when the weights go to 16 bits."""
        logit = self.dt_logit.detach() if self.learn_dt else None
        super()._apply(fn, recurse)
        if logit is not None and self.dt_logit.dtype.itemsize < logit.dtype.itemsize:
            self.dt_logit.data = logit.to(self.dt_logit.device)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights and biases as `nn.Linear` starts them, norms at 1 and 0, a learned dt at its initial value."""
        fan_in = self.sizes["D"]
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("norm_weight"):
                nn.init.ones_(parameter)
            elif name.endswith("norm_bias"):
                nn.init.zeros_(parameter)
            elif name == "dt_logit":
                start = torch.tensor(self.initial_dt, dtype=torch.float64, device="cpu")
                parameter.copy_(torch.logit((start - MARGIN) / (1 - 2 * MARGIN)))
            elif name in SHAPES[self.op]:
                # A bias follows its weight in SHAPES and starts within the same bound.
                fan_in = self.sizes[SHAPES[self.op][name][1]] if len(SHAPES[self.op][name]) == 2 else fan_in
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, h: Tensor, *, x0: Tensor | None = None, iterations: int | None = None) -> Tensor:
        """h (..., D) -> (..., D). x0: injected state, like h. iterations: depth of this call, default the module's."""
        return self.call(h, x0, iterations)

    def call(self, h: Tensor, x0: Tensor | None, iterations: int | None, **inputs: Any) -> Tensor:
        """The op with the module's parameters and options. inputs: arguments of the op for this call."""
        function: Callable[..., Tensor] = getattr(functional, f"score_{self.op}")
        held = {name: getattr(self, name) for name in ("x0_scale", "state_scale") if hasattr(self, name)}
        if x0 is None:
            held.pop("x0_scale", None)
        return function(
            h,
            **self.parameters_of_op(),
            iterations=self.iterations if iterations is None else iterations,
            dt=self.dt,
            norm=self.norm,
            x0=x0,
            **self.own,
            **inputs,
            **self.options,
            **held,
        )

    def parameters_of_op(self) -> dict[str, Any]:
        """The module's parameters as the op takes them."""
        return {name: getattr(self, name) for name in SHAPES[self.op]}

    def extra_repr(self) -> str:
        parts = [*(str(size) for size in self.sizes.values()), f"iterations={self.iterations}"]
        if self.layers > 1:
            parts.append(f"layers={self.layers}")
        if self.learn_dt:
            parts.append(f"learn_dt={self.learn_dt!r}")
        elif self.fixed_dt is not None:
            parts.append(f"dt={f'tensor{tuple(self.fixed_dt.shape)}' if isinstance(self.fixed_dt, Tensor) else self.fixed_dt}")
        if not any(name.startswith("b") for name, _ in self.named_parameters(recurse=False)):
            parts.append("bias=False")
        if getattr(self, "w_gate", None) is not None:
            parts.append("gated=True")
        parts += [f"{name}={value!r}" for name, value in self.own.items() if value not in (None, False)]
        parts += [f"norm={self.norm!r}"] if self.norm else []
        parts += [f"{name}={value!r}" for name, value in self.options.items()]
        return ", ".join(parts)


class ScoreLinear(ScoreModule):
    """T iterations of one shared `act(norm(h) W^T + b)`, D -> D, instead of a stack of T layers.

    Args:
        features: D.
        iterations: T.
        dt: a number, or a tensor () or (T,); None: 0.5 contractive, 1 residual.
        learn_dt: False, "scalar" or "per_iteration": a sigmoid-parametrised dt strictly inside (0, 1), started at `dt`.
        layers: L, the number of parameter sets: 1 shared by all iterations, T one each.
        bias: biases, those of a layernorm included.
        activation, norm, **options: as for `functional.score_linear`.

    `forward(h, *, x0=None, iterations=None)` takes (..., D) and returns (..., D). Both raise ValueError or TypeError as the op
    does, the constructor before it makes a parameter.
    """

    op = "linear"
    keywords = ActivatedOptions.__annotations__

    def __init__(
        self,
        features: int,
        *,
        iterations: int = 4,
        dt: float | Tensor | None = None,
        learn_dt: bool | str = False,
        layers: int = 1,
        bias: bool = True,
        activation: str = "relu",
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ActivatedOptions],
    ) -> None:
        sizes, own = {"D": features}, {"activation": activation}
        super().__init__(sizes, (), iterations, dt, learn_dt, layers, bias, norm, own, device, dtype, options)


class ScoreMLP(ScoreModule):
    """T iterations of one shared `act(norm(h) W1^T + b1) W2^T + b2`, D -> H -> D, instead of a stack of T blocks.

    Args:
        features, hidden_features: D, H.
        gated: with a gate, `(act(n Wg^T + bg) * (n W1^T + b1)) W2^T + b2`; activation="silu" makes it SwiGLU.
        iterations, dt, learn_dt, layers, bias, activation, norm, **options: as for `ScoreLinear`, `functional.score_mlp`.

    `forward(h, *, x0=None, iterations=None)` takes (..., D) and returns (..., D). Both raise ValueError or TypeError as the op
    does, the constructor before it makes a parameter.
    """

    op = "mlp"
    keywords = ActivatedOptions.__annotations__

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        gated: bool = False,
        iterations: int = 4,
        dt: float | Tensor | None = None,
        learn_dt: bool | str = False,
        layers: int = 1,
        bias: bool = True,
        activation: str = "gelu",
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[ActivatedOptions],
    ) -> None:
        sizes, own = {"D": features, "H": hidden_features}, {"activation": activation}
        absent = () if gated else ("w_gate", "b_gate")
        super().__init__(sizes, absent, iterations, dt, learn_dt, layers, bias, norm, own, device, dtype, options)
