"""The experiments: they run, go on where they were interrupted, compare like with like, and the page is that of the results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from examples import graphs, language, mlp, molecules, report
from examples.shared import data, experiment, plain, runner, speed, tables
from examples.shared.results import Results
from score_kernels import settings

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {"language": language.Language, "molecules": molecules.MoleculeExperiment, "mlp": mlp.Mlp}
SMILES = ("CCO", "c1ccccc1", "CC(=O)O", "C#N", "O=C=O", "CCN", "C1CCCCC1", "ClCCl", "CC(C)C", "[Na+].[Cl-]", "S", "CCCCCCO")

pytestmark = pytest.mark.usefixtures("plain_machine", "small_data")


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """Data sets of a few lines in the place of the real ones, in a folder that SCORE_KERNELS_DATA names."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [f"{graphs.SMILES},{graphs.TARGET}", *(f"{text},{i / 7}" for i, text in enumerate(SMILES * 6))]
    texts = {
        language.Language: "To be, or not to be, that is the question.\n" * 30,
        molecules.MoleculeExperiment: "\n".join(lines),
    }
    for owner, text in texts.items():
        (folder / owner.data.file).write_text(text)
        monkeypatch.setattr(owner, "data", replace(owner.data, sha256=hashlib.sha256(text.encode()).hexdigest()))
    monkeypatch.setenv("SCORE_KERNELS_DATA", str(folder))
    return folder


def tiny(name, **sizes):
    owner = EXPERIMENTS[name]
    return owner(replace(owner.presets["tiny"], **sizes), owner.data and data.find(owner.data), "cpu")


def run(name, out, *arguments):
    return runner.main(EXPERIMENTS[name], ["--preset", "tiny", "--out", str(out), *arguments])


def failing(capsys, name, out, *arguments):
    with pytest.raises(SystemExit, match="2"):
        run(name, out, *(arguments if "--part" in arguments else ("--part", "train", *arguments)))
    return capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_example_trains_every_variant(name, tmp_path):
    assert run(name, tmp_path, "--part", "train") == 0
    path = tmp_path / f"{name}-tiny-train.json"
    results, wanted = Results.load(path), tiny(name)
    assert [row["variant"] for row in results.rows] == wanted.variants
    assert all(row["curve"][-1]["step"] == row["steps"] == wanted.steps(row["variant"]) for row in results.rows)
    assert not list(results.checkpoints.glob("*"))
    before = path.read_text()
    assert run(name, tmp_path, "--part", "train") == 0
    assert path.read_text() == before  # what is there is not trained again


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_interrupted_run_has_the_same_losses(name, tmp_path, monkeypatch, capsys):
    owner = EXPERIMENTS[name]
    monkeypatch.setattr(owner, "every", lambda self, variant: 1)
    only = ["--part", "train", "--variant", tiny(name).variants[-1]]
    assert run(name, tmp_path / "straight", *only) == 0
    loss, seen = owner.loss, []

    def with_ctrl_c(self, model, wanted, step):
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, wanted, step)

    monkeypatch.setattr(owner, "loss", with_ctrl_c)
    assert run(name, tmp_path / "interrupted", *only) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert run(name, tmp_path / "interrupted", *only) == 0
    steps = tiny(name).steps(tiny(name).variants[-1])
    assert seen == list(range(steps))  # no step was lost, none was done twice
    straight, interrupted = (
        Results.load(tmp_path / folder / f"{name}-tiny-train.json").rows[0] for folder in ("straight", "interrupted")
    )
    times = ("seconds", "cpu_seconds")
    assert {k: v for k, v in straight.items() if k not in times} == {k: v for k, v in interrupted.items() if k not in times}
    assert len(straight["curve"]) == steps


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_plain_loop_is_the_same_model(name):
    wanted = tiny(name)
    for variant in dict.fromkeys([*wanted.variants, *wanted.timed]):
        one = experiment.Run(variant, 0)
        ours, _ = experiment.start(wanted, one)
        loop = plain.plainly(ours)
        assert any(isinstance(part, plain.Plain) for part in loop.modules())
        assert not any(isinstance(part, plain.Plain) for part in ours.modules())
        losses = []
        for model in (ours, loop):
            torch.manual_seed(1)
            losses.append(wanted.loss(model, one, 0))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for (parameter, p), q in zip(ours.named_parameters(), loop.parameters(), strict=True):
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=partial("{} {}: {}".format, variant, parameter)
            )


def test_speed_is_measured_against_the_plain_loop(tmp_path, capsys, monkeypatch):
    assert run("language", tmp_path, "--part", "speed", "--rounds", "3", "--variant", "*learned dt") == 0
    (row,) = Results.load(tmp_path / "language-tiny-speed.json").rows
    assert {how: len(samples) for how, samples in row["samples_ms"].items()} == {"ours": 3, "plain": 3}
    assert all(peak >= 0 for peak in row["peak_mb"].values())
    assert row["backends"] == ["blas"]
    monkeypatch.setitem(plain.BLOCKS, "linear", lambda m, p, mask, y: 2 * y)
    said = failing(capsys, "mlp", tmp_path / "wrong", "--part", "speed", "--variant", "*SCORE, depth 2")
    assert "expected one loss of our path and of the plain loop" in said


@pytest.mark.parametrize(("name", "variant"), [("mlp", "*rows: SCORE, depth 2"), ("molecules", "*dt 0.25")])
def test_speed_of_the_others(name, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "peak_in_child", lambda target, *arguments: speed.in_child(*arguments) and 1.5)
    assert run(name, tmp_path, "--part", "speed", "--rounds", "1", "--variant", variant) == 0
    row = Results.load(tmp_path / f"{name}-tiny-speed.json").rows[0]
    assert row["steps"] == tiny(name).sample_steps
    assert row["peak_mb"] == {"ours": 1.5, "plain": 1.5}


def test_explain_tells_who_computes(tmp_path, capsys):
    assert run("molecules", tmp_path, "--explain", "--variant", "attention: SCORE, dt 0.5") == 0
    assert re.search(r"op +attention\nbackend +blas", capsys.readouterr().out)
    assert not list(tmp_path.glob("*.json"))


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    only = ["--part", "train", "--variant", "digits: SCORE, depth 1"]
    assert run("mlp", tmp_path, *only) == 0
    assert "steps 3, this is 2: --fresh begins anew" in failing(capsys, "mlp", tmp_path, *only, "--steps", "2")
    assert run("mlp", tmp_path, *only, "--steps", "2", "--fresh") == 0
    assert Results.load(tmp_path / "mlp-tiny-train.json").rows[0]["steps"] == 2
    assert "expected one of digits: plain stack" in failing(capsys, "mlp", tmp_path / "new", "--variant", "nothing")


def test_data_that_is_not_there_or_not_whole(small_data, tmp_path, capsys, monkeypatch):
    file = small_data / language.Language.data.file
    assert f"--data: expected {file.name} or a folder with it" in failing(capsys, "language", tmp_path, "--data", str(tmp_path))
    assert data.find(language.Language.data, file) == data.find(language.Language.data, small_data) == file
    text = file.read_text()
    file.write_text(text[:-1])
    said = failing(capsys, "language", tmp_path)
    assert "SCORE_KERNELS_DATA: expected tinyshakespeare.txt with SHA-256" in said
    assert "delete it, then save https://" in said
    file.write_text(text)
    monkeypatch.delenv("SCORE_KERNELS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(language.Language, "data", replace(language.Language.data, url=file.as_uri()))
    assert data.find(language.Language.data) == settings.cache_folder() / "data" / file.name
    file.unlink()
    assert data.find(language.Language.data).read_text() == text  # from the cache
    data.find(language.Language.data).unlink()
    assert "cannot be downloaded" in failing(capsys, "language", tmp_path)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_molecules_that_cannot_be_read(small_data, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.csv"
    broken.write_text(f"{graphs.SMILES},{graphs.TARGET}\nCCO,1\nC1CC,2\n")
    with pytest.raises(data.DataError, match="line 3: expected a SMILES string that RDKit reads, got 'C1CC'"):
        graphs.read(broken)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert "pip install rdkit" in failing(capsys, "molecules", tmp_path)


def test_a_batch_is_padded_to_its_largest_molecule(small_data):
    found = graphs.read(small_data / "esol.csv")
    batch = found.batch(torch.tensor([0, 1, 3]), "cpu")  # ethanol, benzene, hydrogen cyanide
    assert batch.atoms.shape[:2] == batch.real.shape[:2] == (3, 6)
    assert batch.real.sum((1, 2)).tolist() == [3, 6, 2]
    bonds = batch.neighbours.float() - torch.eye(6)
    assert bonds.sum((1, 2)).tolist() == [4, 12, 2]  # either way
    assert torch.equal(bonds, bonds.mT)
    assert not batch.atoms[batch.real[..., 0] == 0].any()


def test_padding_changes_nothing():
    wanted = tiny("molecules")
    for variant in wanted.variants:
        model, _ = experiment.start(wanted, experiment.Run(variant, 0))
        alone = model(wanted.molecules.batch(torch.tensor([0]), "cpu"))
        torch.testing.assert_close(model(wanted.molecules.batch(torch.tensor([0, 1]), "cpu"))[:1], alone)


def test_an_epoch_has_every_molecule_once():
    wanted = tiny("molecules", batch=4)
    train, validation, test = wanted.split(3)
    assert sorted(torch.cat([train, validation, test]).tolist()) == list(range(len(wanted.molecules.targets)))
    for epoch in (0, 1):
        assert sorted(torch.cat(wanted.batches(3, epoch)).tolist()) == sorted(train.tolist())
        assert len(wanted.batches(3, epoch)) == wanted.per_epoch
    assert not torch.equal(torch.cat(wanted.batches(3, 0)), torch.cat(wanted.batches(3, 1)))


def test_the_real_data(monkeypatch):
    monkeypatch.undo()
    folder = settings.data_folder() or ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    assert len(data.find(data.TINY_SHAKESPEARE, folder).read_text()) == 1_115_394
    found = graphs.read(data.find(data.ESOL, folder))
    assert len(found.targets) == 1128
    assert found.graphs.real.sum((1, 2)).long().tolist() == found.sizes.tolist()


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert "<!-- experiment: " in text
    assert text == report.filled(text), "run: python -m examples.report"


def test_figures_show_what_the_results_say():
    for path, svg in report.drawn().items():
        assert path.read_text(encoding="utf-8") == svg, f"{path.name}: run python -m examples.report"
    assert {path.name for path in report.FIGURES.glob("*.svg")} == {path.name for path in report.drawn()}


def test_a_changed_result_changes_the_page(tmp_path, monkeypatch):
    """Tables and findings are computed."""
    for path in report.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            if path.name == "molecules-cpu-train.json" and "SCORE" in row["variant"]:
                row["rmse"] += 9
        (tmp_path / path.name).write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.filled(report.DOCUMENTS[0].read_text(encoding="utf-8"))
    assert re.search(r"SCORE, dt 0.5 \| [\d,]+ \| 9\.", page)
    assert re.search(r"RMSE \+(8\.9|9\.)", page)


def test_the_page_with_speed(tmp_path, monkeypatch):
    """Rows as the speed part writes them become tables, and an axis of time."""
    for path in report.RESULTS.glob("*-train.json"):
        trained = Results.load(path)
        row = {"seed": 0, "steps": 1, "backends": ["blas"], "peak_mb": {"ours": 1.0, "plain": None}}
        row["samples_ms"] = {"ours": [10.0, 11.0, 12.0], "plain": [20.0, 22.0, 24.0]}
        timed = Results(tmp_path / path.name.replace("train", "speed"), trained.environment, trained.settings)
        timed.rows = [{**row, "variant": variant} for variant in trained.variants]
        timed.write()
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.filled(report.DOCUMENTS[0].read_text(encoding="utf-8"))
    assert page.count("backend: blas.") == 3
    assert "| attention: T layers | 22.0 | 11.0 | **2.00** (2.00 to 2.00) | - | 1.0 |" in page
    assert "Not measured" not in page
    assert "seconds of training steps" in report.drawn()[report.FIGURES / "language.svg"]


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ((2.0, 2.1, 2.0), "+1.03 ± 0.03 (standard error over 3 seeds: that is worse)"),
        ((0.0, 0.1, 0.0), "-0.97 ± 0.03 (standard error over 3 seeds: that is better)"),
        ((1.0, 1.3, 0.8), "+0.03 ± 0.15 (standard error over 3 seeds: no more than chance would do)"),
        ((1.1, 1.2, 1.3), "+0.20 ± 0.06 (standard error over 3 seeds: no more than chance would do)"),
        ((2.0,), "+1.00"),
    ],
)
def test_differences_are_told_with_what_chance_does(errors, told):
    rows = [{"variant": "base", "seed": seed, "rmse": 1.0} for seed in range(3)]
    rows += [{"variant": "other", "seed": seed, "rmse": error} for seed, error in enumerate(errors)]
    assert tables.difference(Results(Path(), {}, {}, rows), "other", "base", "rmse", 2) == told
