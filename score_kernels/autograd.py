"""The autograd Functions of the ops, and the same static methods registered as the operators' autograd formulas.

`ScoreMLPFunction.apply(options, h, x0, coefficients, state_scale, x0_scale, *parameters)` takes the flat form of a call
(`problem.Options`, `problem.SHAPES`) and returns (h_T, trajectory). Gradients come from the operator `<op>_backward`, which is
itself differentiable, through the reference: double backward works in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import operator
from .problem import INPUTS, LEADING, Options, Problem, without_autocast

Tensors = Sequence[Tensor | None]


class _ScoreFunction(torch.autograd.Function):
    """What the Functions of all ops share; a subclass names its op."""

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_trajectory: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, trajectory = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:])
        # A trajectory that was not kept is an empty tensor; a traced graph passes an empty gradient for it.
        grad_trajectory = grad_trajectory if ctx.options.trajectory else None
        if grad_out is None and grad_trajectory is None:
            return None, *(None for _ in needs)
        flat = (grad_out, grad_trajectory, trajectory, *tensors)
        found = iter(_BackwardFunction.apply(ctx.op, ctx.options, needs, *flat))
        return None, *(next(found) if need else None for need in needs)


def _run(op: str, options: Options, tensors: Tensors) -> tuple[Tensor, Tensor]:
    return operator(op)(*tensors[:LEADING], list(tensors[LEADING:]), *options.of(op))


def _save(ctx: Any, op: str, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.op = op
    ctx.options, *tensors = inputs
    _refuse_gradients(op, ctx.options, tensors)
    ctx.save_for_backward(*tensors, output[1] if ctx.options.trajectory else None)
    ctx.set_materialize_grads(False)


def _refuse_gradients(op: str, options: Options, tensors: Tensors) -> None:
    for name, x in Problem.build(op, tensors, options).inputs.items() if op in INPUTS else ():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad, it has no gradient; got one that does")


def _vmap(function: type[_ScoreFunction], info: Any, in_dims: Sequence[int | None], options: Options, tensors: Tensors) -> Any:
    """A batch of h or x0 is more rows; a batch of anything else is a loop."""
    dims = in_dims[1:]
    if all(dim is None for dim in dims[2:]):
        rows = [_batch_first(x, dim, info.batch_size) for x, dim in zip(tensors[:2], dims, strict=False)]
        out, trajectory = function.apply(options, *rows, *tensors[2:])
        return (out, trajectory), (0, 1 if options.trajectory else None)
    calls = [function.apply(options, *_select(tensors, dims, i)) for i in range(info.batch_size)]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0, 0)


def _batch_first(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _select(tensors: Tensors, dims: Sequence[int | None], i: int) -> list[Tensor | None]:
    return [x if x is None or dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]


class ScoreLinearFunction(_ScoreFunction):
    """score_linear; parameters: weight, bias, norm_weight, norm_bias, each `options.counts` tensors."""

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _run("linear", options, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, "linear", inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], options: Options, *tensors: Tensor | None) -> Any:
        return _vmap(ScoreLinearFunction, info, in_dims, options, tensors)


class ScoreMLPFunction(_ScoreFunction):
    """score_mlp; parameters: w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, each `options.counts` tensors."""

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _run("mlp", options, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, "mlp", inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], options: Options, *tensors: Tensor | None) -> Any:
        return _vmap(ScoreMLPFunction, info, in_dims, options, tensors)


class ScoreAttentionFunction(_ScoreFunction):
    """score_attention; parameters: w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias, each `options.counts` tensors.

    After them the inputs of `problem.INPUTS`, which have no gradient.
    """

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _run("attention", options, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, "attention", inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], options: Options, *tensors: Tensor | None) -> Any:
        return _vmap(ScoreAttentionFunction, info, in_dims, options, tensors)


class ScoreTransformerFunction(_ScoreFunction):
    """score_transformer; parameters: those of attention and of mlp, the norms' as attention_norm_weight, mlp_norm_weight, ...

    After them the inputs of `problem.INPUTS`, which have no gradient.
    """

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return _run("transformer", options, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, "transformer", inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], options: Options, *tensors: Tensor | None) -> Any:
        return _vmap(ScoreTransformerFunction, info, in_dims, options, tensors)


class _BackwardFunction(torch.autograd.Function):
    """The operator `<op>_backward`, returning the gradients that `needs` asks for; differentiable through the reference."""

    @staticmethod
    def forward(op: str, options: Options, needs: list[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads, inputs = tensors[:3], tensors[3:]
        return tuple(operator(f"{op}_backward")(*grads, *inputs[:LEADING], list(inputs[LEADING:]), needs, *options.of(op)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.options, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_trajectory, _, *tensors = ctx.saved_tensors
        inputs = (grad_out, grad_trajectory, *tensors)
        with without_autocast(tensors[0].device.type):
            first, second, *rest = _second_order(ctx.op, ctx.options, ctx.needs, inputs, grads)
        return None, None, None, first, second, None, *rest

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], op: str, options: Options, needs: list[bool], *tensors: Tensor | None) -> Any:
        calls = [_BackwardFunction.apply(op, options, needs, *_select(tensors, in_dims[3:], i)) for i in range(info.batch_size)]
        outputs = tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)


def _second_order(op: str, options: Options, needs: Sequence[bool], inputs: Tensors, grads: Tensors) -> list[Tensor | None]:
    """Gradients of <grads, op_backward(inputs)> for inputs = (grad_out, grad_trajectory, *tensors).

    Both derivatives are `torch.func.vjp` of the reference: unlike `torch.autograd.grad` it works inside torch.func's
    transforms, and every position is a variable of its own, so that a tensor may be given twice (x0 = h, tied weights).
    """
    given = [i for i, x in enumerate(inputs) if x is not None and x.is_floating_point()]
    wanted = [2 + i for i, need in enumerate(needs) if need]

    def replaced(flat: Tensors, positions: Sequence[int], values: Tensors) -> list[Tensor | None]:
        new = dict(zip(positions, values, strict=True))
        return [new.get(i, x) for i, x in enumerate(flat)]

    def first_order(*values: Tensor) -> tuple[Tensor, ...]:
        flat = replaced(inputs, given, values)

        def forward(*chosen: Tensor) -> tuple[Tensor, ...]:
            last, states = reference.score(Problem.build(op, replaced(flat, wanted, chosen)[2:], options))
            outputs = (last, torch.stack(states))
            return tuple(x for x, g in zip(outputs, flat, strict=False) if g is not None)

        found = torch.func.vjp(forward, *(flat[i] for i in wanted))[1](tuple(g for g in flat[:2] if g is not None))
        return tuple(x for x, g in zip(found, grads, strict=True) if g is not None)

    if all(g is None for g in grads):
        return [None] * len(inputs)
    found = torch.func.vjp(first_order, *(inputs[i] for i in given))[1](tuple(g for g in grads if g is not None))
    return replaced([None] * len(inputs), given, found)


def score(op: str, options: Options, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """(h_T, trajectory), differentiable: by the operator, or by the Function, which torch.func's transforms need.

    The operator is the faster of the two: a Function with setup_context has its arguments bound by inspect in every call.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return _run(op, options, tensors)
    return FUNCTIONS[op].apply(options, *tensors)


def _register(op: str, function: type[_ScoreFunction]) -> None:
    """The operators' autograd formulas: the Functions' static methods, between the operators' lists and the flat form."""

    def setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
        options = Options(*inputs[LEADING + 1 :])
        function.setup_context(ctx, (options, *inputs[:LEADING], *inputs[LEADING]), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = (False, *needs[:LEADING], *needs[LEADING])
        _, *found = function.backward(ctx, *grads)
        return *found[:LEADING], found[LEADING:], *(None for _ in ctx.options.of(op))

    def setup_second(ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
        grads, tensors, (parameters, needs, *options) = inputs[:3], inputs[3 : 3 + LEADING], inputs[3 + LEADING :]
        _BackwardFunction.setup_context(ctx, (op, Options(*options), needs, *grads, *tensors, *parameters), tuple(output))

    def second(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        found = _BackwardFunction.backward(ctx, *grads)[3:]
        leading = 3 + LEADING
        return *found[:leading], list(found[leading:]), None, *(None for _ in ctx.options.of(op))

    torch.library.register_autograd(f"score_kernels::{op}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"score_kernels::{op}_backward", second, setup_context=setup_second)


FUNCTIONS: dict[str, type[_ScoreFunction]] = {
    "linear": ScoreLinearFunction,
    "mlp": ScoreMLPFunction,
    "attention": ScoreAttentionFunction,
    "transformer": ScoreTransformerFunction,
}

for _op, _function in FUNCTIONS.items():
    _register(_op, _function)
