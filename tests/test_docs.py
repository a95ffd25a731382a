"""Documents say what the result files and the code say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import score_kernels as sk
from bench import tables
from docs import api
from score_kernels import activations, explain, functional, machine, stages

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if "<!-- table:" in path.read_text())


def test_documents_with_tables_are_found():
    assert {"README.md", "numerics.md", "benchmarks.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(path):
    text = path.read_text(encoding="utf-8")
    assert text == tables.filled(text, ROOT), f"run: python -m bench report --markdown {path.relative_to(ROOT)}"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def names_of_the_readme():
    """What its examples take as given."""
    model = torch.nn.Module()
    model.layers = torch.nn.Sequential(*(m for _ in range(3) for m in (torch.nn.Linear(16, 16), torch.nn.ReLU())))
    sizes = {"h": (5, 128), "w1": (512, 128), "b1": (512,), "w2": (128, 512), "b2": (128,)}
    return {"model": model, **{name: torch.randn(shape) / 16 for name, shape in sizes.items()}}


@pytest.mark.parametrize(("name", "given"), [("README.md", names_of_the_readme), ("docs/migration.md", dict)])
def test_code_runs(name, given, capsys):
    """In order, in one namespace; what comes from outside is given."""
    torch._dynamo.reset()
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = given()
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert "replaced" in capsys.readouterr().out


def test_the_modules_of_the_migration_table():
    """They are made as they stand there, and the row with layers of their own is a stack of layers."""
    made = re.findall(r"\| `(sk\.Score.*)` \|$", (ROOT / "docs" / "migration.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = [eval(text, {"sk": sk, "D": 8, "H": 12, "T": 3}) for text in made]
    assert [type(module) for module in modules] == 2 * [sk.ScoreLinear] + 2 * [sk.ScoreMLP]
    x = torch.randn(5, 8)
    for module in modules:
        assert module(x).shape == x.shape
    expected = x
    for weight, bias in zip(modules[0].weight, modules[0].bias, strict=True):
        expected = (expected @ weight.T + bias).relu()
    torch.testing.assert_close(modules[0](x), expected)
    m, expected = modules[2], x
    for _ in range(3):
        n = torch.nn.functional.layer_norm(expected, (8,), m.norm_weight, m.norm_bias)
        expected = expected + torch.nn.functional.gelu(n @ m.w1.T + m.b1) @ m.w2.T + m.b2
    torch.testing.assert_close(m(x), expected)


def test_the_reference_is_that_of_the_docstrings():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run: python docs/api.py"


def test_the_reference_has_every_public_name():
    listed = {name.rpartition(".")[2] for members in api.SECTIONS.values() for name, _ in members}
    functions = [f.__name__ for f in sk.autograd.FUNCTIONS.values()]
    assert listed >= {*sk.__all__, *functional.__all__, *functions} - {"autograd", "functional"}
    table = re.findall(r"^\| `(\w+)` \|", api.page(), re.MULTILINE)
    assert set(table) == set(functional.Common.__annotations__)


def test_the_diffs_in_contributing_are_those_of_the_code():
    added = re.findall(r"^\+(?!\+\+)(.*)$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    code = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (activations, stages))
    assert added
    for line in added:
        assert line in code, line


def test_the_plan_that_kernels_shows_is_the_planner_s(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    h, w, b = torch.randn(0, 64), torch.randn(64, 64) / 8, torch.randn(64)
    call = {"iterations": 8, "norm": "rmsnorm", "backend": "triton"}
    plan = str(explain(functional.score_mlp, h, w, b, w, b, **call))
    assert f"```\n{plan}\n```" in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_auto_needs_results_that_the_hardware_page_tells_of():
    row = next(line for line in (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8").splitlines() if "| Triton:" in line)
    assert ("never run on hardware" in row) == (not machine.VERIFIED)
