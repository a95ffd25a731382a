"""The compiled module of the CUDA kernels: csrc/bindings.cpp. It is there where the package was built with nvcc.

A tensor is (address, number of elements), or None where it may be left out. A wrong argument is a TypeError or a ValueError
that names it; what CUDA says no to, a RuntimeError.
"""

from typing import Literal, TypeAlias, TypedDict

_Tensor: TypeAlias = tuple[int, int]
_Family: TypeAlias = Literal["relu", "piecewise", "gelu", "sigmoidal"]
_Activation: TypeAlias = Literal["identity", "relu", "relu2", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]

class _Kernel(TypedDict):
    direction: Literal["forward", "backward"]
    op: Literal["linear", "mlp"]
    arch: Literal[80, 90]
    dtype: Literal["float16", "bfloat16"]
    columns: int
    gated: bool
    family: _Family
    chunk: int
    rows: int
    threads: int
    shared: int
    stages: int
    accumulates: bool

def architectures() -> list[str]: ...
def kernels() -> list[_Kernel]: ...
def family(*, activation: _Activation) -> _Family: ...
def packed_bytes(*, kernel: int, features: int, hidden: int, sets: int) -> int: ...
def forward(
    *,
    kernel: int,
    device: int,
    stream: int,
    rows: int,
    features: int,
    hidden: int,
    iterations: int,
    first: int,
    sets: int,
    order: Literal["consecutive", "cyclic"],
    norm: Literal["none", "layernorm", "rmsnorm"],
    norm_float32: bool,
    activation: _Activation,
    negative_slope: float,
    eps: float,
    h: _Tensor | None,
    x0: _Tensor | None,
    out: _Tensor | None,
    states: _Tensor | None,
    coefficients: _Tensor | None,
    state_scale: _Tensor | None,
    x0_scale: _Tensor | None,
    table: _Tensor | None,
    packed: _Tensor | None,
) -> None: ...
def backward(
    *,
    kernel: int,
    device: int,
    stream: int,
    rows: int,
    features: int,
    hidden: int,
    iterations: int,
    first: int,
    sets: int,
    order: Literal["consecutive", "cyclic"],
    norm: Literal["none", "layernorm", "rmsnorm"],
    norm_float32: bool,
    activation: _Activation,
    negative_slope: float,
    eps: float,
    states_rows: int,
    grad_rows: int,
    states: _Tensor | None,
    grad_out: _Tensor | None,
    grad_states: _Tensor | None,
    grad_h: _Tensor | None,
    grad_x0: _Tensor | None,
    scalars: _Tensor | None,
    ring: _Tensor | None,
    blocks: int,
    partials: _Tensor | None,
    x0: _Tensor | None,
    coefficients: _Tensor | None,
    state_scale: _Tensor | None,
    x0_scale: _Tensor | None,
    table: _Tensor | None,
    packed: _Tensor | None,
) -> None: ...
