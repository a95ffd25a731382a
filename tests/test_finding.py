"""Which runs of blocks `convert` finds, which it leaves, and why."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import Residual, Towers, build, close, fused, gradients, layers, mlp
from torch import nn
from torch.nn.utils import parametrizations

import score_kernels as sk
from score_kernels.finding import residual


def reason(entries, path):
    (entry,) = [entry for entry in entries if entry.path == path]
    return entry.reason


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


# What is put in the place of module 4 of a stack of 6 layers (a Linear), and why it ends the run there.
BREAKS = {
    "dropout": (lambda: nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1)), "4.1", "active dropout, p=0.1"),
    "alpha dropout": (lambda: nn.AlphaDropout(), "4", "active dropout"),
    "batch norm": (lambda: nn.BatchNorm1d(16), "4", "it normalises over rows"),
    "subclass": (lambda: OwnLinear(16, 16), "4", "a subclass of nn.Linear"),
    "lazy": (lambda: nn.LazyLinear(16), "4", "its parameters are not initialised"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "4", "it is parametrized"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 16)), "4", "it is parametrized"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(16, 16)), "4", "it has hooks"),
    "norm over two dimensions": (lambda: nn.LayerNorm((3, 16)), "4", "it normalises over the last 2 dimensions"),
    "another activation": (lambda: nn.Softplus(), "4", "no part of a block"),
    "a module of the user's": (lambda: Towers(), "4", "its forward does more than call its children and add"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_what_ends_a_run(name):
    make, path, why = BREAKS[name]
    model = nn.Sequential(*layers(6, 16))
    model[4] = make()
    model.eval()
    report = sk.convert(model, dry_run=True)
    assert any(entry.path.endswith(" to 11") for entry in report.replaced)
    assert "0 to 3" in {entry.path for entry in report.replaced} or path == "4.1"
    if name != "a module of the user's":
        assert reason(report.skipped, path).startswith(why)
    else:
        assert {"4.user.2 to 4.user.7", "4.item.2 to 4.item.9"} < {entry.path for entry in report.replaced}


@pytest.mark.parametrize("transparent", [nn.Identity, lambda: nn.Dropout(0.0), nn.Sequential])
def test_what_does_not_end_a_run(transparent):
    model = nn.Sequential(*(m for _ in range(3) for m in (*layers(1, 16), transparent())))
    x = torch.randn(9, 16)
    expected = model(x)
    sk.convert(model)
    assert fused(model, x) == [("linear", 3)]
    close(model(x), expected, 1e-6)


def test_dropout_that_is_switched_on_afterwards():
    model = nn.Sequential(*layers(2, 16), nn.Dropout(0.0), *layers(2, 16))
    x = torch.randn(9, 16)
    sk.convert(model)
    assert fused(model, x) == [("linear", 4)]
    model[4].p = 1.0
    assert not fused(model, x)
    assert torch.equal(model(x), nn.Sequential(*model)(x))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("change", "why"),
    [(lambda m: m[4].double(), "weight: expected dtype torch.float32"),
     (lambda m: m[4].to("meta"), "weight: expected a tensor on cpu"),
     (lambda m: m.to(torch.complex64), "h: expected a floating-point tensor")],
)  # fmt: skip
def test_parameters_that_do_not_go_together(change, why):
    model = nn.Sequential(*layers(4, 16))
    change(model)
    report = sk.convert(model)
    assert type(model) is nn.Sequential
    assert not report.replaced
    assert reason(report.skipped, "0 to 7").startswith(why)


@pytest.mark.parametrize(
    "other",
    [lambda: layers(2, 16, nn.Tanh), lambda: layers(2, 16, bias=False), lambda: layers(2, 16, norm=nn.LayerNorm),
     lambda: layers(2, 16, lambda: nn.LeakyReLU(0.2)), lambda: layers(2, 16, norm=lambda d: nn.LayerNorm(d, eps=1e-3)),
     lambda: layers(2, 16, norm=lambda d: nn.LayerNorm(d, bias=False))],
)  # fmt: skip
def test_blocks_that_differ_are_runs_of_their_own(other):
    torch.manual_seed(0)
    model = nn.Sequential(*layers(2, 16, lambda: nn.LeakyReLU(0.1)), *other(), *layers(3, 16, nn.SiLU)).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    expected = model(x)
    sk.convert(model)
    assert fused(model, x) == [("linear", 2), ("linear", 2), ("linear", 3)]
    close(model(x), expected, 1e-12)


class Straight(Residual):
    """What a residual block may do beside what `Residual` does: swap the sum, name its steps, take no Sequential."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.norm, self.up, self.act, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)

    def forward(self, x):
        y = self.up(self.norm(x))
        y = self.down(self.act(y))
        return y + x


class Random(Residual):
    def forward(self, x):
        return x if random.random() < 0.5 else x + self.block(x)


class Training(Residual):
    def forward(self, x):
        return x + self.block(x) if self.training else x


class Branching(Residual):
    def forward(self, x):
        return x + self.block(x) if self.block else x


def block(x):
    """A function with the name of a child: it may do anything."""
    return x


class Global(Residual):
    def forward(self, x):
        return x + self.block(block(x))


class InPlace(Residual):
    def forward(self, x):
        x += self.block(x)
        return x


class Scaled(Residual):
    def forward(self, x):
        return x + 2.0 * self.block(x)


class Called(Residual):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Nothing(Residual):
    def forward(self, x):
        return x


class Copied(Residual):
    def forward(self, x):
        return x + x


class Twice(Residual):
    def forward(self, x):
        return x + self.block(self.block(x))


class Doubled(Residual):
    def forward(self, x):
        return self.block(x) + self.block(x)


class Compared(Residual):
    def forward(self, x):
        return x == self.block(x)


class OfItself(Residual):
    def forward(self, x):
        y = self.block(x)
        return y + y


class Unused(Residual):
    def __init__(self, block):
        super().__init__(block)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        self.norm(x)
        return x + self.block(x)


class Inner(Residual):
    def forward(self, x):
        y = self.block(x)
        return y + self.block(y)


class Function(Residual):
    def forward(self, x):
        return x + torch.relu(self.block(x))


class Method(Residual):
    def skip(self, x):
        return x

    def forward(self, x):
        return self.skip(x) + self.block(x)


class Option(Residual):
    def forward(self, x, scale=1.0):
        return x + self.block(x)


class Dropping(Residual):
    def __init__(self, block):
        super().__init__(nn.Sequential(*block, nn.Dropout(0.1)))


def test_a_residual_block_is_one_whose_forward_adds_and_does_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(Straight(), Straight(), Residual(mlp(16, 24))).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    expected = model(x)
    sk.convert(model)
    assert fused(model, x) == [("mlp", 3)]
    close(model(x), expected, 1e-12)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Random, "does more"), (Training, "does more"), (Branching, "does more"), (Global, "does more"), (InPlace, "does more"),
     (Scaled, "does more"), (Function, "does more"), (Method, "does more"), (Option, "does more"), (Called, "does more"),
     (Copied, "is not x + chain"), (Nothing, "is not x + chain"), (Doubled, "is not x + chain"), (Inner, "is not x + chain"),
     (Twice, "is not x + chain"), (Compared, "is not x + chain"), (OfItself, "is not x + chain"),
     (Unused, "is not x + chain"),
     (Dropping, "block.4: active dropout")],
)  # fmt: skip
def test_other_residual_blocks_are_left_to_themselves(kind, why):
    assert why in residual(kind(mlp(16, 24)))


def test_square_mlps_and_layers_are_told_apart():
    """With H = D both ops have blocks of the same sizes; the activations between them tell which it is."""
    for model, expected in (
        (nn.Sequential(*(mlp(16, 16, norm=nn.Identity) for _ in range(3))), ("mlp", 3)),
        (nn.Sequential(*layers(5, 16), nn.Linear(16, 16)), ("linear", 5)),
        (nn.Sequential(nn.LayerNorm(16), *layers(4, 16)), ("linear", 4)),
        (nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), ("mlp", 1)),
    ):
        sk.convert(model)
        assert fused(model, torch.randn(9, 16)) == [expected]


def test_a_module_with_two_names_is_reported_once():
    shared = nn.Sequential(*layers(3, 16))
    model = nn.ModuleList([Residual(shared), Residual(shared)])
    assert [entry.path for entry in sk.convert(model).replaced] == ["0.block.0 to 0.block.5"]


def test_what_is_replaced_inside_is_not_reported_as_skipped():
    model, _ = build("mixer")
    report = sk.convert(model)
    assert len(report.replaced) == 4
    assert report.skipped == []
    assert [entry.path for entry in report.left] == ["0", "3"]


def test_widths_that_do_not_close():
    """A block maps D features to D: no MLP of other ends, no residual that broadcasts, no norm over something else."""
    report = sk.convert(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)))
    assert [(entry.path, entry.reason) for entry in report.left] == [("0", "not square"), ("2", "not square")]
    assert report.skipped == []
    model = nn.Sequential(*(Residual(nn.Linear(16, 1)) for _ in range(2)))
    report = sk.convert(model)
    assert (report.replaced, report.skipped, [entry.path for entry in report.left]) == ([], [], ["0", "1"])
    assert model(torch.randn(9, 16)).shape == (9, 16)


def test_a_residual_block_that_goes_twice_through_its_layers():
    """It is no block of the ops, so only the Sequential inside it is fused."""
    torch.manual_seed(0)
    model = nn.Sequential(Twice(mlp(16, 24)), Twice(mlp(16, 24)))
    x = torch.randn(9, 16)
    expected = model(x)
    sk.convert(model)
    assert fused(model, x) == [("mlp", 1)] * 4
    close(model(x), expected, 1e-6)


ACTIVATIONS = [
    nn.ReLU, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity,
    lambda: nn.ReLU(inplace=True),
]  # fmt: skip
NORMS = [None, None, nn.LayerNorm, nn.RMSNorm, lambda d: nn.LayerNorm(d, eps=1e-3, elementwise_affine=False)]


def stretch(draw, width):
    """One to three blocks of a kind, or modules that end a run."""
    act, norm, bias = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from(NORMS)), draw(st.booleans())
    hidden = draw(st.sampled_from([4, 6, 9]))
    norms = [] if norm is None else [norm]
    others = [nn.Dropout, lambda: nn.BatchNorm1d(width), lambda: nn.ReLU(inplace=True), nn.Softplus, nn.Identity]
    kinds = {
        "linear": lambda: layers(1, width, act, norm, bias),
        "mlp": lambda: [*(n(width) for n in norms), nn.Linear(width, hidden), act(), nn.Linear(hidden, width, bias=bias)],
        "residual": lambda: [Residual(nn.Sequential(*layers(1, width, act, norm, bias)))],
        "other": lambda: [draw(st.sampled_from(others))()],
    }
    kind = draw(st.sampled_from(sorted(kinds)))
    modules = [m for _ in range(draw(st.integers(1, 3))) for m in kinds[kind]()]
    return [nn.Sequential(*modules)] if draw(st.booleans()) else modules


@st.composite
def architectures(draw):
    """A stack of such stretches, of one width or with layers between them that are not square; and the width of its input."""
    torch.manual_seed(0)
    first = width = draw(st.sampled_from([4, 6]))
    modules = []
    for _ in range(draw(st.integers(1, 5))):
        modules += stretch(draw, width)
        if draw(st.booleans()):
            modules.append(nn.Linear(width, following := draw(st.sampled_from([4, 6, 9]))))
            width = following
    return nn.Sequential(*modules).double().eval(), first


@settings(max_examples=150)
@given(architectures())
def test_any_architecture(architecture):
    """The same values and gradients as the original, and a fused call for every run in the report."""
    model, width = architecture
    x = torch.randn(5, width, dtype=torch.float64)
    original = copy.deepcopy(model)
    report = sk.convert(model)
    assert len(fused(model, x)) == len(report.replaced)
    close(model(x), original(x), 1e-11)
    if any(p.requires_grad for p in model.parameters()):
        found, expected = (torch.cat([gradient.flatten() for gradient in gradients(m, x).values()]) for m in (model, original))
        close(found, expected, 1e-11)
    sk.revert(model)
    assert torch.equal(model(x), original(x))
