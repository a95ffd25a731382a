"""Documents say what the result files and the code say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import tables
from score_kernels import activations, stages

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if "<!-- table:" in path.read_text())


def test_documents_with_tables_are_found():
    assert {"README.md", "numerics.md"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(path):
    text = path.read_text(encoding="utf-8")
    assert text == tables.filled(text, ROOT), f"run: python -m bench.tables {path.relative_to(ROOT)}"


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
