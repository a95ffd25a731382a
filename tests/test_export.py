"""What leaves eager mode, as recipes: torch.export, torch.compile, AOTInductor, torch.func; and TorchScript, which refuses."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from stacks import BODIES, every_body
from test_compile import compiled
from torch import nn

import score_kernels as sk

ROOT = Path(__file__).parents[1]
ROWS = torch.export.Dim("rows", min=1, max=4096)


def model(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), BODIES[name][0](), nn.Linear(16, 3))


def batch(rows):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@every_body
def test_export_save_load(name):
    """With any number of rows; the loaded program has the fused calls, is trained like a module and takes a state_dict."""
    original = model(name)
    program = saved_and_loaded(torch.export.export(original, (batch(6),), dynamic_shapes=({0: ROWS},)))
    calls = [node for node in program.graph.nodes if str(node.target).startswith("score_kernels")]
    assert len(calls) == 1
    loaded = program.module()
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(1.1)
    assert not torch.allclose(loaded(batch(3)), original(batch(3)))
    loaded.load_state_dict(original.state_dict())
    for rows in (3, 50):
        torch.testing.assert_close(loaded(batch(rows)), original(batch(rows)))
    for run in (original, loaded):
        run(batch(7)).square().sum().backward()
    gradients = dict(loaded.named_parameters())
    for key, p in original.named_parameters():
        torch.testing.assert_close(gradients[key].grad, p.grad)


@every_body
def test_compile_with_any_number_of_rows(name):
    torch._dynamo.reset()
    original = model(name)
    run, counter = compiled(original)
    for rows in (6, 9, 33, 5):
        torch.testing.assert_close(run(batch(rows)), original(batch(rows)))
    assert counter.frame_count <= 2


def test_compile_reduce_overhead():
    """CUDA graphs, on a GPU (test_gpu.py); on a CPU the mode has to change nothing."""
    torch._dynamo.reset()
    original = model("converted")
    run = torch.compile(original, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        torch.testing.assert_close(run(batch(6)), original(batch(6)))


@every_body
def test_gradients_of_each_sample(name):
    """vmap over grad over functional_call."""
    original = model(name).double()
    weights, samples = dict(original.named_parameters()), batch(4).double()

    def loss(weights, x):
        return torch.func.functional_call(original, weights, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, samples)
    for i, x in enumerate(samples):
        expected = torch.autograd.grad(original(x).square().sum(), list(weights.values()))
        torch.testing.assert_close([found[key][i] for key in weights], list(expected))


# Loads a package in a process that knows nothing of the model, nor, as "", of this package.
LOAD = """
import sys, torch
{}
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in torch.load(sys.argv[2])], sys.argv[2])
"""


def loaded_elsewhere(package, inputs, imports=""):
    """The results of a package in another process, or what it said when it failed."""
    file = package.with_suffix(".results")
    torch.save(inputs, file)
    told = subprocess.run(
        [sys.executable, "-c", LOAD.format(imports), str(package), str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return torch.load(file) if told.returncode == 0 else told.stderr


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_aot_inductor(backend, tmp_path):
    """A package with fused calls needs this package where it is loaded; one of the reference's formulas needs torch alone."""
    module = sk.ScoreMLP(5, 7, iterations=2, norm="layernorm", learn_dt="scalar", backend=backend)
    program = torch.export.export(module, (batch(6),), dynamic_shapes={"h": {0: ROWS}})
    package = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    inputs = [batch(rows) for rows in (3, 50)]
    expected = [module(x).detach() for x in inputs]
    if backend == "auto":
        assert "Could not find schema for score_kernels::mlp" in loaded_elsewhere(package, inputs)
    imports = "import score_kernels.functional" if backend == "auto" else "sys.modules['score_kernels'] = None"
    torch.testing.assert_close(loaded_elsewhere(package, inputs, imports), expected)


@every_body
def test_torchscript_is_refused(name):
    """And `revert` makes the model one that TorchScript takes, where it was one before."""
    original = model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises((torch.jit.frontend.NotSupportedError, ValueError)):
            torch.jit.script(original)
        if name == "converted":
            expected = original(batch(6))
            sk.revert(original)
            torch.testing.assert_close(torch.jit.script(original)(batch(6)), expected)
