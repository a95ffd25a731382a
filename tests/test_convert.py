"""`convert` and `revert`: a model computes, trains, saves and copies as before, its runs of equal blocks in one call each."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import time

import pytest
import torch
from stacks import MODELS, Residual, Towers, build, close, every_model, fused, gradients, layers, mlp
from test_compile import compiled
from torch import nn

import score_kernels as sk
from score_kernels.fused import Run


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_computes_the_same(name, dtype, tolerance):
    model, x = build(name, dtype)
    original = copy.deepcopy(model)
    sk.convert(model)
    assert fused(model, x) == MODELS[name][2]
    close(model(x), original(x), tolerance)
    expected = gradients(original, x)
    for parameter, gradient in gradients(model, x).items():
        close(gradient, expected[parameter], 10 * tolerance)


@every_model
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.Adam(p, lr=1e-3), lambda p: torch.optim.SGD(p, lr=1e-2)])
def test_an_optimizer_made_before_goes_on_training(name, optimizer):
    model, x = build(name)
    original = copy.deepcopy(model)
    models = {"converted": (model, optimizer(model.parameters())), "original": (original, optimizer(original.parameters()))}
    sk.convert(model)
    losses = {key: [] for key in models}
    for key, (trained, steps) in models.items():
        for _ in range(20):
            steps.zero_grad()
            loss = (trained(x) - 1).square().mean()
            loss.backward()
            steps.step()
            losses[key].append(loss.item())
    assert losses["converted"] == pytest.approx(losses["original"], rel=1e-5)
    assert losses["converted"][-1] < losses["converted"][0]


@every_model
def test_state_dict_both_ways(name):
    """The same names and tensors; each loads the other's, strictly."""
    model, x = build(name)
    original = copy.deepcopy(model)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    sk.convert(model)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    original.load_state_dict(model.state_dict(), strict=True)
    close(original(x), model(x), 1e-6)
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(0.9)
    model.load_state_dict(original.state_dict(), strict=True)
    close(model(x), original(x), 1e-6)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@every_model
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deepcopy", "pickle", "torch.save"]
)
def test_copies_are_equal_and_apart(name, copier):
    model, x = build(name)
    sk.convert(model)
    other = copier(model)
    expected = model(x).detach()
    assert torch.equal(other(x), expected)
    assert repr(other) == repr(model)
    assert fused(other, x) == MODELS[name][2]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert torch.equal(model(x), expected)
    assert not torch.equal(other(x), expected)


@every_model
def test_revert_undoes_all_of_it(name):
    model, x = build(name)
    modules = [(path, module, type(module), dict(module.__dict__)) for path, module in model.named_modules()]
    expected = model(x)
    sk.convert(model)
    sk.revert(model)
    assert [(path, module, type(module), module.__dict__) for path, module in model.named_modules()] == modules
    assert torch.equal(model(x), expected)
    assert not fused(model, x)


@every_model
def test_dry_run_and_converting_twice(name):
    model, x = build(name)
    types = [type(module) for module in model.modules()]
    expected = sk.convert(model, dry_run=True)
    assert [type(module) for module in model.modules()] == types
    assert sk.convert(model) == expected
    assert sk.convert(model) == expected
    assert fused(model, x) == MODELS[name][2]


@every_model
def test_torch_compile(name):
    torch._dynamo.reset()
    model, x = build(name)
    expected = gradients(model, x)
    sk.convert(model)
    run, counter = compiled(model)
    close(run(x), model(x), 1e-6)
    for parameter, gradient in gradients(model, x, run).items():
        close(gradient, expected[parameter], 1e-5)
    assert counter.frame_count == 1
    assert sum("score_kernels" in str(node.target) for node in counter.graphs[0].graph.nodes) == len(MODELS[name][2])


def test_compile_after_a_hook_was_added():
    torch._dynamo.reset()
    model, x = build("12 layers")
    sk.convert(model)
    model[3].register_forward_hook(lambda module, inputs, out: 2 * out)
    run, _ = compiled(model)
    close(run(x), model(x), 1e-6)


@every_model
def test_export_and_symbolic_trace(name):
    """torch.export keeps the fused calls; torch.fx, which traces with no tensors, sees the modules."""
    model, x = build(name)
    original = copy.deepcopy(model)
    sk.convert(model)
    program = torch.export.export(model, (x,))
    calls = [node for node in program.graph.nodes if str(node.target).startswith("score_kernels")]
    assert len(calls) == len(MODELS[name][2])
    close(program.module()(x), model(x), 1e-6)
    traced = [[(node.op, node.target) for node in torch.fx.symbolic_trace(m).graph.nodes] for m in (model, original)]
    assert traced[0] == traced[1]


def test_torch_func():
    """Parameters from outside, batches of inputs, and forward mode, which the fused ops do not have."""
    model, x = build("residual", torch.float64)
    original = copy.deepcopy(model)
    sk.convert(model)
    other = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    outputs = [torch.func.functional_call(m, other, (x,)) for m in (model, original)]
    close(*outputs, 1e-12)
    assert not torch.allclose(outputs[0], model(x))
    close(torch.func.vmap(model)(x.expand(3, *x.shape)), original(x.expand(3, *x.shape)), 1e-12)
    close(torch.func.jvp(model, (x,), (x,))[1], torch.func.jvp(original, (x,), (x,))[1], 1e-12)


def test_autocast():
    """bfloat16, with the output's dtype of the modules: a residual that PyTorch adds in float32 stays with the modules."""
    for name, rows in {"12 layers": torch.float32, "residual": torch.bfloat16}.items():
        model, x = build(name)
        original = copy.deepcopy(model)
        sk.convert(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused(model, x.to(rows)) == MODELS[name][2]
            assert model(x.to(rows)).dtype == original(x.to(rows)).dtype == torch.bfloat16
            close(model(x.to(rows)).float(), original(x.to(rows)).float(), 2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused(model, x)
        assert torch.equal(model(x), original(x))
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_model_moves(dtype):
    model, x = build("mlps")
    original = copy.deepcopy(model).to(dtype)
    sk.convert(model)
    model.to(dtype)
    assert fused(model, x.to(dtype)) == MODELS["mlps"][2]
    assert model(x.to(dtype)).dtype == dtype
    close(model(x.to(dtype)), original(x.to(dtype)), {torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype])
    assert model.to("meta")(x.to(dtype).to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rmsnorm_with_the_eps_of_the_dtype(dtype):
    """`nn.RMSNorm(D)` has eps=None: rows of the size of its square root tell."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers(1, 16, nn.Identity, nn.RMSNorm, bias=False) * 2).to(dtype)
    x = 1e-8 * torch.randn(9, 16, dtype=torch.float64) if dtype == torch.float64 else 3e-4 * torch.randn(9, 16)
    x = x.to(dtype)
    expected = model(x)
    sk.convert(model)
    assert fused(model, x) == [("linear", 2)]
    close(model(x), expected, {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype])
    model[0].eps = model[3].eps = 1e-2
    assert not fused(model, x)


def test_train_and_eval():
    model, _ = build("mixer")
    sk.convert(model)
    assert model.training
    assert not any(module.training for module in model.eval().modules())
    assert all(module.training for module in model.train().modules())


def test_frozen_parameters_get_no_gradient():
    model, x = build("12 layers")
    for p in model[4].parameters():
        p.requires_grad_(False)
    original = copy.deepcopy(model)
    sk.convert(model)
    found, expected = gradients(model, x), gradients(original, x)
    assert {name for name, gradient in found.items() if gradient is None} == {"4.weight", "4.bias"}
    for name in found.keys() - {"4.weight", "4.bias"}:
        close(found[name], expected[name], 1e-5)


def test_tied_layers():
    """The same Linear three times, and the same nested Sequential twice: their gradients add up."""
    torch.manual_seed(0)
    linear, inner = nn.Linear(16, 16), nn.Sequential(*layers(2, 16))
    model = nn.Sequential(linear, nn.ReLU(), linear, nn.ReLU(), inner, inner, linear, nn.ReLU()).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    original = copy.deepcopy(model)
    sk.convert(model)
    assert fused(model, x) == [("linear", 7)]
    close(model(x), original(x), 1e-12)
    found, expected = gradients(model, x), gradients(original, x)
    assert len(found) == 6
    for name in found:
        close(found[name], expected[name], 1e-12)


def test_only_the_given_instance():
    towers, other = Towers(), Towers()
    sk.convert(towers.user)
    assert type(towers.user) is sk.FusedSequential
    assert type(towers.item) is type(other.user) is type(other.item) is nn.Sequential
    sk.revert(other)
    assert type(towers.user) is sk.FusedSequential


# Everything that a hook can be, each doubling what it sees.
HOOKS = {
    "forward": lambda m, calls: m.register_forward_hook(lambda module, inputs, out: calls.append(1) or 2 * out),
    "forward pre": lambda m, calls: m.register_forward_pre_hook(lambda module, inputs: calls.append(1) or (2 * inputs[0],)),
    "backward": lambda m, calls: m.register_full_backward_hook(lambda module, gi, go: calls.append(1) or (2 * gi[0],)),
    "backward pre": lambda m, calls: m.register_full_backward_pre_hook(lambda module, go: calls.append(1) or (2 * go[0],)),
    "a forward of its own": lambda m, calls: setattr(
        m, "forward", lambda x, old=m.forward: calls.append(1) or 2 * old(x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("name", "place"),
    [("12 layers", "6"), ("12 layers", "7"), ("nested", "0"), ("nested", "1.0"), ("residual", "1"), ("residual", "1.block"),
     ("residual", "1.block.1"), ("mixer", "1.token_mixing")],
)  # fmt: skip
def test_hooks(hook, name, place):
    """Set before or after: honoured, and the same as without `convert`; away again: fused again."""
    model, x = build(name)
    converted, before = copy.deepcopy(model), copy.deepcopy(model)
    sk.convert(converted)
    calls = []
    x.requires_grad_()
    for m in (model, converted, before):
        HOOKS[hook](m.get_submodule(place), calls)
    sk.convert(before)
    expected, out = gradients(model, x), model(x)
    for m in (converted, before):
        calls.clear()
        found = gradients(m, x)
        assert calls == [1]
        close(m(x), out, 1e-6)
        for parameter in found:
            close(found[parameter], expected[parameter], 1e-5)


def test_a_hook_that_is_removed():
    model, x = build("12 layers")
    sk.convert(model)
    handle = model[6].register_forward_hook(lambda module, inputs, out: None)
    assert not fused(model, x)
    handle.remove()
    assert fused(model, x) == [("linear", 12)]


def test_a_sequential_with_a_forward_of_its_own():
    model, x = build("12 layers")
    model.forward = lambda x: x + 1
    assert not sk.convert(model).replaced
    assert type(model) is nn.Sequential
    assert torch.equal(model(x), x + 1)


def test_repr_shows_the_runs():
    model, _ = build("towers")
    sk.convert(model)
    assert "(user): FusedSequential(\n    from 2: 3 x linear 16 -> 16, relu\n" in repr(model)


def test_a_hook_beside_the_runs_and_on_the_sequential():
    model, x = build("towers")
    sk.convert(model)
    seen = []
    model.user[0].register_forward_hook(lambda *_: seen.append("head"))
    model.user.register_forward_hook(lambda *_: seen.append("tower"))
    assert fused(model, x) == MODELS["towers"][2]
    assert seen == ["head", "tower"]


def test_global_hooks_see_every_module():
    model, x = build("12 layers")
    sk.convert(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == [nn.Linear, nn.ReLU] * 12 + [sk.FusedSequential]


class Subtracting(Residual):
    def forward(self, x):
        return x - self.block(x)


def test_a_residual_block_of_another_class_in_its_place():
    model, x = build("residual")
    sk.convert(model)
    model[1].__class__ = Subtracting
    assert fused(model, x) == [("linear", 2)]
    close(model(x), nn.Sequential(*model)(x), 1e-6)


def test_a_layer_of_other_sizes_in_its_place():
    model = nn.Sequential(*layers(3, 16))
    sk.convert(model)
    model[2], model[4] = nn.Linear(16, 24), nn.Linear(24, 16)
    x = torch.randn(9, 16)
    assert not fused(model, x)
    assert torch.equal(model(x), nn.Sequential(*model)(x))


def test_sequential_as_a_container():
    """Length, indices, iteration, names, apply, slices, appending: as of the nn.Sequential that it was."""
    model, x = build("12 layers")
    original, names = list(model), [name for name, _ in model.named_modules()]
    expected = [model[4:10](x), model[5:](x)]
    sk.convert(model)
    assert len(model) == 24
    assert list(model) == original
    assert [model[i] for i in (0, 5, -1)] == [original[i] for i in (0, 5, -1)]
    assert [name for name, _ in model.named_modules()] == names
    visited = []
    model.apply(visited.append)
    assert visited == [*original, model]
    assert isinstance(model, nn.Sequential)
    for part, out in zip((model[4:10], model[5:]), expected, strict=True):
        assert list(part) in (original[4:10], original[5:])
        close(part(x), out, 1e-6)
    assert not fused(model[4:10], x)
    assert torch.equal(model[:10](x), nn.Sequential(*model[:10])(x))
    assert fused(model[:], x) == fused(nn.Sequential(nn.Identity(), model), x) == [("linear", 12)]
    assert type(model + nn.Sequential(nn.Tanh())) is nn.Sequential
    assert fused(model.append(nn.Tanh()), x) == [("linear", 12)]
    close(model(x), nn.Sequential(*model)(x), 1e-6)
    del model[0]
    assert list(model)[:23] == original[1:]
    assert torch.equal(model(x), nn.Sequential(*model)(x))


def test_a_fused_sequential_of_ones_own():
    """Made by hand it has no runs until it is converted."""
    model = sk.FusedSequential(*layers(3, 16))
    x = torch.randn(9, 16)
    assert not fused(model, x)
    sk.convert(model)
    assert fused(model, x) == [("linear", 3)]


def test_report():
    model = nn.Sequential(
        nn.Linear(7, 16), nn.ReLU(), *layers(2, 16, nn.SiLU, nn.RMSNorm), nn.Dropout(0.1), nn.Linear(16, 16), mlp(16, 24),
        *(Residual(nn.Linear(16, 16)) for _ in range(2)), nn.Linear(16, 3), nn.Softmax(-1),
    )  # fmt: skip
    assert str(sk.convert(model, dry_run=True)).splitlines() == [
        "replaced  2 to 7        2 x linear 16 -> 16, rmsnorm, silu       blas",
        "replaced  10.0 to 10.3  1 x mlp 16 -> 24 -> 16, layernorm, gelu  blas",
        "replaced  11 to 12      2 x residual linear 16 -> 16, identity   blas",
        "skipped   8             Dropout                                  active dropout, p=0.1",
        "skipped   14            Softmax                                  no part of a block",
        "left      0             Linear(7, 16)                            not square",
        "left      9             Linear(16, 16)                           no second block like it beside it",
        "left      13            Linear(16, 3)                            not square",
    ]


def test_report_of_nothing():
    for model in (nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential()):
        before = type(model)
        report = sk.convert(model)
        assert (report.replaced, report.skipped, report.left) == ([], [], [])
        assert str(report) == "nothing is replaced: no run of equal blocks in an nn.Sequential"
        assert type(model) is before


def test_min_speedup(monkeypatch):
    """Only runs that are measured to be so much faster; the measure is the modules' time over the fused call's."""
    model, x = build("12 layers")
    state = torch.get_rng_state()
    report = sk.convert(model, min_speedup=1e6)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is nn.Sequential
    assert not report.replaced
    assert 0 < report.skipped[0].gain < 1e6
    assert report.skipped[0].reason.endswith("times as fast, min_speedup=1000000.0")

    # A clock on which each of the 12 activations takes a second, and the fused call 4.
    clock = [0.0]

    def taking(seconds, function):
        return lambda *arguments: clock.__setitem__(0, clock[0] + seconds) or function(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(nn.ReLU, "forward", taking(1, nn.ReLU.forward))
    monkeypatch.setattr(Run, "__call__", taking(4, Run.__call__))
    report = sk.convert(model, min_speedup=3)
    assert report.replaced[0].gain == 3
    assert str(report).endswith("blas, measured 3.00 times as fast")
    assert fused(model, x) == [("linear", 12)]
    assert sk.convert(model, min_speedup=3.5).skipped[0].gain == 3
    assert not fused(model, x)


def test_arguments():
    model = nn.Sequential(*layers(2, 16))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
        sk.convert([model])
    with pytest.raises(TypeError, match="min_speedup: expected a number, or None for no measurement, got str"):
        sk.convert(model, min_speedup="2")
    with pytest.raises(ValueError, match="min_speedup: expected a number above 0, or None for no measurement, got -1"):
        sk.convert(model, min_speedup=-1)
    with pytest.raises(ValueError, match="min_speedup: expected parameters on a device that computes, got them on meta"):
        sk.convert(model.to("meta"), min_speedup=1)
    assert sk.convert(model).replaced


def test_the_public_names_are_the_functions():
    """Whatever was imported before: no module has the name of a function."""
    for name, holder in (("convert", "conversion"), ("revert", "conversion"), ("share", "sharing")):
        module = importlib.import_module(f"score_kernels.{holder}")
        assert getattr(sk, name) is getattr(module, name)
        assert module.__doc__
    function = importlib.import_module("score_kernels.conversion").convert
    assert sk.convert(nn.Sequential(*layers(2, 16))) == function(nn.Sequential(*layers(2, 16)))
