"""Activations as data: one row of `ACTIVATIONS` is all that a new activation needs.

`forward(a, slope)` is the formula, differentiable, used by every pure-PyTorch backend and by the oracle.
`backward(g, a, slope)` is `g * activation'(a)`, one fused PyTorch call where PyTorch has one.
`slope` is `negative_slope`; only leaky ReLU reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation and its derivative, both elementwise over tensors of any shape and floating dtype."""

    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda a, slope: a, lambda g, a, slope: g),
    "relu": Activation(lambda a, slope: F.relu(a), lambda g, a, slope: aten.threshold_backward(g, a, 0)),
    "relu2": Activation(lambda a, slope: F.relu(a).square(), lambda g, a, slope: F.relu(a).mul_(2).mul_(g)),
    "leaky_relu": Activation(
        lambda a, slope: F.leaky_relu(a, slope), lambda g, a, slope: aten.leaky_relu_backward(g, a, slope, False)
    ),
    "gelu": Activation(lambda a, slope: F.gelu(a), lambda g, a, slope: aten.gelu_backward(g, a)),
    "gelu_tanh": Activation(
        lambda a, slope: F.gelu(a, approximate="tanh"),
        lambda g, a, slope: aten.gelu_backward(g, a, approximate="tanh"),
    ),
    "silu": Activation(lambda a, slope: F.silu(a), lambda g, a, slope: aten.silu_backward(g, a)),
    "tanh": Activation(lambda a, slope: torch.tanh(a), lambda g, a, slope: aten.tanh_backward(g, torch.tanh(a))),
    "sigmoid": Activation(lambda a, slope: torch.sigmoid(a), lambda g, a, slope: aten.sigmoid_backward(g, torch.sigmoid(a))),
}
