"""A module of the user's own, as it is and after `score_kernels.convert`: `python -m bench run --module model.py:build`.

The factory returns an `nn.Module`, or (module, example input). In forward the module is measured in evaluation mode, with
gradients in training mode.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from score_kernels import convert

from .flops import PASSES
from .inputs import Inputs, step, tolerance
from .measure import Prepared
from .precision import DTYPES
from .providers import Provider
from .targets import SETUP_FLOPS, Absent, Row

MODES = ("forward", "training")


def converted(module: nn.Module) -> nn.Module:
    """The module after `convert`, in place; raises Absent with its report where that finds nothing to replace."""
    before = [type(part) for part in module.modules()]
    try:
        report = convert(module)
    except Exception as error:
        raise Absent(f"score_kernels.convert raised {type(error).__name__}: {error}") from error
    if [type(part) for part in module.modules()] == before:
        raise Absent(f"score_kernels.convert replaced nothing: {report}")
    return module


# A provider of modules builds from the module what is measured; "eager" is the one that the others are compared with.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", "peer", "the module as it is", build=lambda module: module),  # type: ignore[arg-type, return-value]
        Provider("converted", "ours", "the module after score_kernels.convert", build=converted),  # type: ignore[arg-type]
    )
}


def load(path: str, shape: Sequence[int] | None) -> tuple[nn.Module, Tensor]:
    """The module of "file.py:factory" and its input: the factory's, or random numbers of this shape.

    Raises ValueError when the file, the factory or an input is missing, or the factory returns something else.
    """
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--module: expected FILE.py:FACTORY with a file that exists, got {path!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--module: expected a Python file, got {file!r}")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    factory: Callable[[], Any] | None = getattr(source, name, None)
    if factory is None:
        raise ValueError(f"--module: {file} has no {name!r}; expected the name of a function that returns an nn.Module")
    torch.manual_seed(0)
    made = factory()
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not isinstance(example, Tensor | None):
        raise ValueError(f"--module: expected {name} to return an nn.Module, or (module, example tensor), got {made!r}")
    if shape is not None:
        example = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    if example is None:
        raise ValueError(f"--module: {name} returns no example input; return (module, input), or give --input-shape 4096,128")
    return module, example


def problems(path: str, shape: Sequence[int] | None, modes: Sequence[str], dtypes: Sequence[str]) -> list[ModuleProblem]:
    """The module in these modes and dtypes; none given: forward and training in float32."""
    module, example = load(path, shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module.eval()(example)
    if not isinstance(out, Tensor):
        raise ValueError(f"--module: expected a module that returns a tensor, {path} returns {type(out).__name__}")
    forward, elements = counter.get_total_flops(), sum(p.numel() for p in module.parameters())
    states = (example.numel() if example.is_floating_point() else 0, out.numel())
    work = Work(tuple(example.shape), forward, elements, *states)
    named = None if shape is None else tuple(shape)
    return [ModuleProblem(path, named, mode, dtype, work) for mode in modes or MODES for dtype in dtypes or ("float32",)]


@dataclass(frozen=True)
class Work:
    """What a forward pass reads and does. shape: of the input. flops: of its products, as torch counts them."""

    shape: tuple[int, ...]
    flops: int
    parameters: int
    inputs: int
    outputs: int

    def traffic(self, mode: str, itemsize: int) -> int:
        """Bytes that any implementation has to move, as `flops.traffic` has them for cases."""
        forward = self.inputs + self.outputs + self.parameters
        backward = 2 * self.inputs + self.outputs + 2 * self.parameters
        return itemsize * {"forward": forward, "backward": backward, "training": forward + backward}[mode]


@dataclass(frozen=True)
class ModuleProblem:
    """A module in one mode and dtype. shape: of a random input, None for the factory's own."""

    path: str
    shape: tuple[int, ...] | None
    mode: str
    dtype: str
    size: Work
    graph: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.mode} {self.dtype}"

    @property
    def name(self) -> str:
        return Path(self.path).name

    def provider(self, name: str) -> Provider:
        return PROVIDERS[name]

    @property
    def flops(self) -> int:
        return sum(PASSES[self.mode]) * self.size.flops

    def work(self, providers: int, rounds: int) -> float:
        return providers * (SETUP_FLOPS + (rounds + 4) * self.flops)

    def row(self, provider: Provider) -> Row:
        shape = self.size.shape or (1,)
        return {
            "op": "module",
            "rows": max(torch.Size(shape[:-1]).numel(), 1),
            "features": max(shape[-1], 1),
            "hidden": None,
            "iterations": None,
            "params": {"input_shape": list(self.size.shape)},
            "flops": self.flops,
            "bytes": self.size.traffic(self.mode, DTYPES[self.dtype].dtype.itemsize),
        }

    def on(self, device: str) -> ModuleBench:
        return ModuleBench(self, device)


class ModuleBench:
    """The module and its input on a device, with their float64 answer."""

    def __init__(self, problem: ModuleProblem, device: str) -> None:
        self.problem, self.device = problem, device
        module, self.example = load(problem.path, problem.shape)
        self.module = module.train(problem.mode != "forward").to(device)

    def step(self, provider: Provider) -> Prepared:
        return self._step(DTYPES[self.problem.dtype].dtype, provider.build)

    def expected(self, provider: Provider) -> list[Tensor]:
        return self._answer

    def tolerance(self, provider: Provider) -> float:
        return tolerance(DTYPES[self.problem.dtype].eps, self.problem.mode)

    @functools.cached_property
    def _answer(self) -> list[Tensor]:
        prepare, run = self._step(torch.float64, lambda module: module)
        results = run(prepare())
        assert isinstance(results, list)
        return results

    def _step(self, dtype: torch.dtype, build: Callable[[Any], Any]) -> Prepared:
        gradients = self.problem.mode != "forward"
        # What is rounded to the dtype is what the float64 answer starts from.
        narrow = DTYPES[self.problem.dtype].dtype
        module = copy.deepcopy(self.module).to(narrow).to(dtype)
        example = self.example.to(self.device)
        if example.is_floating_point():
            example = example.to(narrow).to(dtype).requires_grad_(gradients)
        names = [name for name, _ in module.named_parameters()]
        module = build(module)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            shape = module(example).shape
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device, narrow).to(dtype)
        given = Inputs(example, {name: parameters[name] for name in names}, cotangent)
        return step(lambda h, _: module(h), given, self.problem.mode)
