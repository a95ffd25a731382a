"""What a user would write or pick instead of this package's ops: the plain loop, and what other projects offer for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from score_kernels.activations import ACTIVATIONS
from score_kernels.problem import INPUTS

from .cases import Case
from .inputs import Forward, Inputs

NEGATIVE_SLOPE = 0.01
EPS = 1e-5

Block = Callable[[Tensor], Tensor]

# What makes the hidden features of a gated block: (case, gate's input to the activation, the other factor) -> (M, H).
Gate = Callable[[Case, Tensor, Tensor], Tensor]

# Calls an iteration: (iteration, state) -> the next state.
Around = Callable[[Block, Tensor], Tensor]

# What the heads do: (case, q, k, v (B, heads, N, d)) -> (B, heads, N, d).
Heads = Callable[[Case, Tensor, Tensor, Tensor], Tensor]


def _heun(k: Block, y: Tensor, dt: float) -> Tensor:
    k1 = k(y)
    return y + dt / 2 * (k1 + k(y + dt * k1))


def _ralston(k: Block, y: Tensor, dt: float) -> Tensor:
    k1 = k(y)
    return y + dt / 4 * (k1 + 3 * k(y + 2 * dt / 3 * k1))


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
    "ralston": _ralston,
    "rk4": _rk4,
}


def step_size(case: Case) -> float:
    return {"contractive": 0.5, "residual": 1.0, "replace": 0.0}[case.update] if case.dt is None else case.dt


def plainly(case: Case, a: Tensor, up: Tensor) -> Tensor:
    return _activation(case, a) * up


def simply(step: Block, h: Tensor) -> Tensor:
    return step(h)


def sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)


class Parts(NamedTuple):
    """The parts of a block that a peer has functions of its own for."""

    gate: Gate = plainly
    heads: Heads = sdpa


PLAIN = Parts()


def eager(case: Case, parts: Parts = PLAIN, around: Around = simply) -> Forward:
    """The loop that a user would write, in the input's dtype; `around` calls each of its iterations."""

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        sets = parameter_sets(case, parameters)
        return loop(case, [partial(BLOCKS[case.op], case, parts, p) for p in sets], h, around)

    return forward


def loop(case: Case, blocks: Sequence[Block], h: Tensor, around: Around = simply) -> Tensor:
    """T iterations, of a block for each set. Those that no gradient reaches run without autograd, as a user writes them."""
    steps = [partial(_step, case, step_size(case), block) for block in blocks]
    with torch.no_grad():
        for t in range(case.first_grad):
            h = steps[case.set_at(t)](h)
    for t in range(case.first_grad, case.iterations):
        h = around(steps[case.set_at(t)], h)
    return h


def parameter_sets(case: Case, parameters: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters of each set. Unbound together, so that their gradients are put together once, not once for each set."""
    if case.sets == 1:
        return [parameters]
    sets = zip(*(p.unbind() for p in parameters.values()), strict=True)
    return [dict(zip(parameters, tensors, strict=True)) for tensors in sets]


def _step(case: Case, dt: float, block: Block, h: Tensor) -> Tensor:
    if case.update == "replace":
        return block(h)
    if case.update == "residual":
        return SOLVERS[case.solver](block, h, dt)
    if case.solver == "euler":
        return torch.lerp(h, block(h), dt)
    return SOLVERS[case.solver](partial(_decaying, block), h, dt)


def _decaying(block: Block, y: Tensor) -> Tensor:
    return block(y) - y


def _linear(case: Case, parts: Parts, p: dict[str, Tensor], y: Tensor) -> Tensor:
    return _activation(case, F.linear(_norm(case, p, y), p["weight"], p.get("bias")))


def _mlp(case: Case, parts: Parts, p: dict[str, Tensor], y: Tensor) -> Tensor:
    return _feed_forward(case, parts, p, _norm(case, p, y))


def _attention(case: Case, parts: Parts, p: dict[str, Tensor], y: Tensor) -> Tensor:
    return _attend(case, parts, p, _norm(case, p, y))


def _transformer(case: Case, parts: Parts, p: dict[str, Tensor], y: Tensor) -> Tensor:
    if case.norm_placement == "pre":
        y = y + _attend(case, parts, p, _norm(case, p, y, "attention_"))
        return y + _feed_forward(case, parts, p, _norm(case, p, y, "mlp_"))
    y = _norm(case, p, y + _attend(case, parts, p, y), "attention_")
    return _norm(case, p, y + _feed_forward(case, parts, p, y), "mlp_")


def _feed_forward(case: Case, parts: Parts, p: dict[str, Tensor], n: Tensor) -> Tensor:
    up = F.linear(n, p["w1"], p.get("b1"))
    u = parts.gate(case, F.linear(n, p["w_gate"], p.get("b_gate")), up) if case.gated else _activation(case, up)
    return F.linear(u, p["w2"], p.get("b2"))


def _attend(case: Case, parts: Parts, p: dict[str, Tensor], n: Tensor) -> Tensor:
    qkv = F.linear(n, p["w_qkv"], p.get("b_qkv"))
    q, k, v = qkv.unflatten(-1, (3, case.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.linear(parts.heads(case, q, k, v).transpose(1, 2).flatten(2), p["w_out"], p.get("b_out"))


BLOCKS: dict[str, Callable[[Case, Parts, dict[str, Tensor], Tensor], Tensor]] = {
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "transformer": _transformer,
}


def _norm(case: Case, p: dict[str, Tensor], y: Tensor, of: str = "") -> Tensor:
    """of: which of the block's norms, as its parameters' names begin."""
    if case.norm is None:
        return y
    gain, bias = p.get(f"{of}norm_weight"), p.get(f"{of}norm_bias")
    if case.norm == "layernorm":
        return F.layer_norm(y, (case.features,), gain, bias, EPS)
    return F.rms_norm(y, (case.features,), gain, EPS)


def _activation(case: Case, a: Tensor) -> Tensor:
    return ACTIVATIONS[case.activation].forward(a, NEGATIVE_SLOPE)


def checkpointed(case: Case) -> Forward:
    """The same loop, which keeps the state of every iteration only and computes the rest again in backward."""

    def around(step: Block, h: Tensor) -> Tensor:
        result: Tensor = checkpoint(step, h, use_reentrant=False, preserve_rng_state=False)
        return result

    return eager(case, around=around)


def compiled(case: Case, mode: str | None = None) -> Forward:
    return torch.compile(eager(case), mode=mode)


def compiled_graphs(case: Case) -> Forward:
    """max-autotune with torch.compile's own CUDA graphs: a call may overwrite what the one before it returned."""
    run = compiled(case, "max-autotune")

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(h, parameters)

    return forward


def stack_of(case: Case) -> Case:
    """The case of T layers with parameters of their own, each of which replaces the state."""
    return replace(case, update="replace", solver="euler", dt=None, sets=case.iterations, order="consecutive")


class SquaredReLU(nn.Module):
    """torch has none."""

    def forward(self, a: Tensor) -> Tensor:
        return F.relu(a).square()


ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "leaky_relu": partial(nn.LeakyReLU, NEGATIVE_SLOPE),
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class GatedUnit(nn.Module):
    """What makes the hidden features of a gated block."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(case.features, case.hidden, case.bias) for _ in range(2))
        self.activation = ACTIVATION_MODULES[case.activation]()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.gate(x))
        return activated * self.up(x)


def stack(case: Case) -> nn.Sequential:
    """The layers of `stack_of(case)` as one writes them in torch."""
    return nn.Sequential(*(module for _ in range(case.iterations) for module in _layer(case)))


def _layer(case: Case) -> list[nn.Module]:
    d, h = case.features, case.hidden
    norm: list[nn.Module] = []
    if case.norm is not None:
        norm = [nn.LayerNorm(d, EPS, bias=case.bias) if case.norm == "layernorm" else nn.RMSNorm(d, EPS)]
    activation = ACTIVATION_MODULES[case.activation]
    if case.op == "linear":
        return [*norm, nn.Linear(d, d, case.bias), activation()]
    hidden = [GatedUnit(case)] if case.gated else [nn.Linear(d, h, case.bias), activation()]
    return [*norm, *hidden, nn.Linear(h, d, case.bias)]


# The parameters of a layer in the order in which its modules have them.
IN_A_LAYER = (
    "norm_weight", "norm_bias", "weight", "bias", "w_qkv", "b_qkv", "w_out", "b_out", "w_gate", "b_gate",
    "w1", "b1", "w2", "b2", "attention_norm_weight", "attention_norm_bias", "mlp_norm_weight", "mlp_norm_bias",
)  # fmt: skip


def layer_by_layer(case: Case, parameters: dict[str, Tensor]) -> list[Tensor]:
    """The parameters of all sets, or what belongs to them, in the order in which a stack's modules have them."""
    return [p[name] for p in parameter_sets(case, parameters) for name in IN_A_LAYER if name in p]


def held_by(stack: nn.Module, case: Case, given: Inputs) -> Inputs:
    """The inputs with the stack's own parameters, which get the values of the given ones."""
    stack.to(given.h.device, given.h.dtype).requires_grad_(given.h.requires_grad)
    own: dict[str, Tensor] = dict(stack.named_parameters())
    with torch.no_grad():
        for parameter, value in zip(own.values(), layer_by_layer(case, given.parameters), strict=True):
            parameter.copy_(value)
    return replace(given, parameters=own)


# Layers from which on the gradients of a stack without residuals are noise in 16 bits; kinks, squares and gates add to it.
DEEP_STACK = 17
DEEP_ROUGH_STACK = 9
ROUGH = ("relu", "leaky_relu", "relu2")


def no_stack(case: Case, mode: str) -> str | None:
    """Why T layers are not the same work as the case, or None."""
    if case.op in INPUTS:
        return "it has no attention"
    if case.solver != "euler":
        return f"T layers do less work than T steps of {case.solver}, which calls the block several times"
    if case.iterations >= (DEEP_ROUGH_STACK if case.gated or case.activation in ROUGH else DEEP_STACK):
        return f"{case.iterations} layers of {case.activation} without residuals have no gradients to speak of in 16 bits"
    return "a stack has gradients through all of its layers" if case.first_grad > 0 else None


# torchdiffeq's name of a solver with the same tableau. Its "rk4" is another method, the 3/8 rule.
ODE_METHODS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2"}


def no_ode(case: Case, mode: str) -> str | None:
    """Why torchdiffeq does not solve the case, or None."""
    if case.update == "replace":
        return "a stack that replaces its state is no differential equation"
    if case.sets > 1 or case.first_grad > 0 or case.iterations == 0:
        return "a differential equation has one set of parameters, gradients through all of its steps, and steps"
    if case.solver == "rk4":
        return "torchdiffeq's rk4 is the 3/8 rule, another method of order 4"
    return None if case.solver in ODE_METHODS else f"torchdiffeq has no fixed-step solver {case.solver}"


def ode(case: Case) -> Forward:
    """The state as the solution of dy/dt = k(y), on a grid of T steps of dt."""
    odeint: Callable[..., Tensor] = importlib.import_module("torchdiffeq").odeint
    method = ODE_METHODS[case.solver]

    def forward(h: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        block = partial(BLOCKS[case.op], case, PLAIN, parameters)
        k = block if case.update == "residual" else partial(_decaying, block)
        grid = _grid(case.iterations, step_size(case), h.device)
        options = {"grid_constructor": lambda f, y, t: grid}
        return odeint(lambda t, y: k(y), h, grid[[0, -1]], method=method, options=options)[-1]

    return forward


@functools.cache
def _grid(iterations: int, dt: float, device: torch.device) -> Tensor:
    """Times in float64: the steps between them are dt to its last bit or so, in whatever dtype the state is."""
    return torch.arange(iterations + 1, dtype=torch.float64, device=device) * dt


def no_swiglu(case: Case, mode: str) -> str | None:
    """Why Liger's SwiGLU is not in the case, or None."""
    swiglu = case.op in ("mlp", "transformer") and case.gated and case.activation == "silu"
    return None if swiglu else "it has no SwiGLU: a gated mlp with silu"


def liger(case: Case) -> Forward:
    """The plain loop with Liger's kernel in the place of silu(a) * up, forward and backward."""
    function: Any = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return eager(case, Parts(gate=lambda _, a, up: function.apply(a, up)))
