"""The registered operators pass every utility of `torch.library.opcheck`, whatever the layout of their inputs."""

from __future__ import annotations

import pytest
import torch
from cases import SEQUENCES
from helpers_torch import D, H, draw, flat, parameters
from torch.library import opcheck

from score_kernels.ops import operator
from score_kernels.problem import LEADING

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

LAYOUTS = {
    "rows": lambda: draw(6, D),
    "batch": lambda: draw(2, 3, D),
    "transposed": lambda: draw(D, 6).t(),
    "permuted": lambda: draw(3, D, 2).permute(2, 0, 1),
    "sliced": lambda: draw(12, 2 * D)[::2, 1 : 1 + D],
    "expanded": lambda: draw(1, D).expand(6, D),
}


def case(kind, h, **extra):
    """The op's name, and its flat arguments with everything that a call can have."""
    op = "mlp" if kind == "gated" else kind
    given = parameters(op, gated=kind == "gated")
    if kind == "linear":
        given["weight"] = draw(D, D, seed=1).t()
    elif kind in SEQUENCES:
        given["w_qkv"] = [draw(D, 3 * D, seed=seed).t() for seed in (1, 2)]
        if kind == "transformer":
            # With an eps that keeps second derivatives small: two ways to them in float32 are compared.
            extra |= {"norm_placement": "post", "eps": 0.1}
        extra |= {"key_padding_mask": draw(*h.shape[:-1]) > 0.3, "attn_mask": draw(2, h.shape[-2], h.shape[-2]), "rotary": 10.0}
    else:
        # Two sets: a list of transposed views, a stack whose sets are slices of memory.
        given["w1"] = [draw(D, H, seed=seed).t() for seed in (1, 2)]
        given["w2"] = draw(2, D, 2 * H, seed=3)[:, :, ::2]
    options = {"norm": "layernorm", "norm_weight": draw(D, seed=4) + 1, "norm_bias": draw(D, seed=5)}
    options |= {"dt": draw(2, seed=6) + 0.5, "x0": draw(*h.shape, seed=7), "x0_scale": torch.tensor(0.3), "state_scale": 0.9}
    return op, flat(op, h, given, **options, **extra)


def check(target, arguments):
    assert opcheck(target, arguments) == dict.fromkeys(UTILITIES, "SUCCESS")


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("trajectory", [False, True], ids=["last", "trajectory"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "attention", "transformer"])
def test_forward(kind, trajectory, grad):
    op, arguments = case(kind, LAYOUTS["permuted"](), return_trajectory=trajectory, grad=grad)
    check(operator(op).default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["mlp", "attention", "transformer"])
def test_forward_of_any_layout(op, layout):
    check(operator(op).default, flat(op, LAYOUTS[layout](), parameters(op), norm="rmsnorm", grad=True))


@pytest.mark.parametrize("op", SEQUENCES)
def test_packed_sequences(op):
    offsets = torch.tensor([0, 2, 2, 6])
    check(operator(op).default, flat(op, draw(6, D), parameters(op), cu_seqlens=offsets, causal=True, grad=True))


def backward_case(op, arguments):
    """The leading inputs and parameters of a call, which of them can want a gradient, and its options."""
    inputs, names = arguments[: LEADING + 1], arguments[LEADING + 1 :]
    return inputs, [x is not None and x.requires_grad for x in (*inputs[:LEADING], *inputs[LEADING])], names


@pytest.mark.parametrize("kind", ["linear", "gated", "attention", "transformer"])
def test_backward(kind):
    """With gradients of both outputs, a saved trajectory, and everything wanted."""
    op, arguments = case(kind, LAYOUTS["permuted"](), return_trajectory=True, grad=True)
    inputs, needs, names = backward_case(op, arguments)
    with torch.no_grad():
        last, states = operator(op)(*arguments)
    grads = draw(*last.shape, seed=8).requires_grad_(), draw(*states.shape, seed=9).requires_grad_()
    check(operator(f"{op}_backward").default, (*grads, states, *inputs, needs, *names))


@pytest.mark.parametrize("op", ["linear", "mlp", "attention", "transformer"])
def test_backward_of_some_inputs(op):
    """Without a trajectory; the gradient that comes in has stride 0, as from `sum().backward()`."""
    inputs, needs, names = backward_case(op, flat(op, LAYOUTS["transposed"](), parameters(op), grad=True))
    some = [need and i % 2 == 0 for i, need in enumerate(needs)]
    grad = LAYOUTS["expanded"]().requires_grad_()
    check(operator(f"{op}_backward").default, (grad, None, None, *inputs, some, *names))


@pytest.mark.parametrize("layout", ["rows", "transposed", "permuted", "sliced"])
@pytest.mark.parametrize("kind", ["linear", "gated", "attention", "transformer"])
def test_in_place(kind, layout):
    h = LAYOUTS[layout]()
    op, arguments = case(kind, h)
    check(operator(f"{op}_").default, (torch.zeros_like(h), *arguments))
    expected, _ = operator(op)(*arguments)
    version = h._version
    operator(f"{op}_")(h, *arguments)
    torch.testing.assert_close(h, expected)
    assert h._version > version
    assert expected.is_contiguous()


def test_every_operator_is_checked_here():
    """An op that is added must be added to this file too."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("score_kernels::")}
    assert names == {
        f"{op}{suffix}" for op in ("linear", "mlp", "attention", "transformer") for suffix in ("", "_", "_backward")
    }
