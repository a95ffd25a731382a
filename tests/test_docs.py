"""Documents say what the result files and the code say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import tables
from score_kernels import activations, explain, functional, planner, stages

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
    assert ("never run on hardware" in row) == (not planner.VERIFIED)
