"""The benchmark on a case or a module of the user's own."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace

import jsonschema
import pytest
import torch
from bench_rows import SCHEMA, SETTINGS, TIMES, quiet
from torch import nn

from bench import user_module
from bench.__main__ import _parser, main
from bench.cases import Case
from bench.own import case_of
from bench.run import measure, memory_step

pytestmark = pytest.mark.usefixtures("plain_machine")

SIZES = ["--op", "mlp", "--rows", "40", "--features", "16", "--hidden", "24", "--iterations", "3"]
SEQUENCES = ["--op", "attention", "--rows", "40", "--features", "8", "--iterations", "2"]

MODULE = """
import torch
from torch import nn

def stack():
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]), torch.randn(8, 16)

def bare():
    return nn.Linear(16, 16)

def tokens():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Dropout(0.0))
    model[1].bias.requires_grad_(False)
    return model, torch.arange(10)

def number():
    return 3

def pair():
    return nn.LSTM(4, 4), torch.randn(2, 4)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODULE)
    return path


def own(*flags: str) -> Case | None:
    return case_of(_parser().parse_args(["run", *flags]))


def test_flags_become_a_case():
    assert own() is None
    assert own(*SIZES) == Case("mlp-40x16x24-t3", "mlp", 40, 16, 24, 3, "the command line")
    flags = [
        "--activation",
        "silu",
        "--norm",
        "none",
        "--gated",
        "--no-bias",
        "--solver",
        "heun",
        "--dt",
        "0.25",
        "--sets",
        "2",
    ]
    flags += ["--order", "cyclic", "--grad-iterations", "2"]
    case = own(*SIZES, *flags)
    assert case == replace(
        own(*SIZES), name=case.name, activation="silu", norm=None, gated=True, bias=False, solver="heun", dt=0.25, sets=2,
        order="cyclic", grad_iterations=2,
    )  # fmt: skip
    assert case.name.startswith("mlp-40x16x24-t3-activation=silu-norm=None-gated=True")
    assert own(*SIZES, "--update", "replace").dt is None
    assert own("--op", "linear", "--rows", "4", "--features", "8", "--iterations", "2").hidden == 8
    case = own(*SEQUENCES, "--heads", "2", "--tokens", "10", "--causal")
    assert (case.hidden, case.activation, case.batch) == (8, "identity", (4, 10))
    assert {"heads": 2, "tokens": 10, "causal": True}.items() <= case.params.items()
    case = own(*SIZES, "--op", "transformer", "--heads", "2", "--tokens", "10", "--norm-placement", "post")
    assert (case.hidden, case.norm_placement, case.batch, case.params["heads"]) == (24, "post", (4, 10), 2)
    assert not {"heads", "tokens", "causal"} & own(*SIZES).params.keys()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gated"], "needs --op, --rows, --features, --hidden, --iterations too"),
        ([*SIZES, "--op", "linear"], "--op linear: expected no --gated, and no --hidden"),
        ([*SIZES, "--rows", "0"], "--rows: expected 1 or more, got 0"),
        ([*SIZES, "--op", "attention"], "--op attention: expected no --gated, and no --hidden"),
        ([*SIZES, "--op", "transformer", "--tokens", "7"], "--tokens: expected a divisor of --rows"),
        ([*SEQUENCES, "--tokens", "7"], "--tokens: expected a divisor of --rows"),
        ([*SEQUENCES, "--tokens", "10", "--heads", "3"], "num_heads: expected a divisor of the number of features, 8, got 3"),
        ([*SIZES, "--sets", "0"], "--features, --hidden, --sets: expected 1 or more, got 16, 24, 0"),
        ([*SIZES, "--sets", "5"], "at most one set for each of the 3 iterations, got L = 5"),
        ([*SIZES, "--update", "replace", "--dt", "0.5"], "dt"),
        ([*SIZES, "--solver", "simpson"], "invalid choice: 'simpson'"),
        ([*SIZES, "--suite", "quick"], "expected one of --module, a case of your own (--op ...), and --suite or --case"),
    ],
)
def test_flags_that_make_no_case_are_told(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--device", "cpu", *flags])
    assert said in capsys.readouterr().err


def test_run_of_an_own_case_writes_json_and_csv(tmp_path):
    paths = [tmp_path / "result.json", tmp_path / "result.csv"]
    flags = ["--rounds", "2", "--device", "cpu", "--json", str(paths[0]), "--csv", str(paths[1])]
    assert main(["run", *SIZES, *flags, "--provider", "eager", "--provider", "blas", "--provider", "triton"]) == 0
    result = json.loads(paths[0].read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["environment"]["clocks"] == {"before": None, "after": None}
    with paths[1].open() as table:
        rows = list(csv.DictReader(table))
    assert [row["key"] for row in rows] == [row["key"] for row in result["rows"]]
    for flat, row in zip(rows, result["rows"], strict=True):
        assert flat["params.activation"] == "gelu"
        assert flat["rows"] == "40"
        assert flat["plan.backend"] == ("blas" if row["provider"] == "blas" else "")
        assert flat["error"] == (row["error"] or "")
        assert not {"plan", "params", "speedup_vs_eager"} & flat.keys()
        if row["status"] == "ok":
            assert float(flat["ms_median"]) == row["ms_median"]
            assert json.loads(flat["samples"]) == row["samples"]
            assert float(flat["speedup_vs_eager.low"]) == row["speedup_vs_eager"]["low"]
        else:
            assert flat["ms_median"] == flat["samples"] == ""


class Fused(nn.Linear):
    """What a conversion puts in a Linear's place."""


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def converting(kind):
    def convert(model):
        for part in list(model.modules()):
            if type(part) is nn.Linear:
                part.__class__ = kind
        return "report: done"

    return convert


def refusing(model):
    raise ValueError("planted")


def rows_of_module(monkeypatch, path, convert, **options):
    monkeypatch.setattr(user_module, "convert", convert)
    problems = user_module.problems(str(path), options.get("shape"), options.get("modes", ()), options.get("dtypes", ()))
    providers = list(user_module.PROVIDERS.values())
    rows = [row for problem in problems for row in measure(problem, providers, SETTINGS, quiet)]
    jsonschema.validate(rows, {"items": SCHEMA["properties"]["rows"]["items"], "$defs": SCHEMA["$defs"]})
    return rows


def test_module_is_compared_with_its_conversion(monkeypatch, file):
    rows = rows_of_module(monkeypatch, f"{file}:stack", converting(Fused))
    assert [row["key"] for row in rows] == [
        f"model.py:stack/{mode}/float32/{name}" for mode in ("forward", "training") for name in ("eager", "converted")
    ]
    for row in rows:
        assert (row["status"], row["error"]) == ("ok", None)
        assert (row["op"], row["rows"], row["features"], row["hidden"], row["iterations"]) == ("module", 8, 16, None, None)
        assert 0 < row["rel_error"] < 1e-6
        assert row["speedup_vs_eager"]["low"] <= row["speedup_vs_eager"]["high"]
        # Three products of 8 x 16 x 16; the weights, biases and two states, which training reads and writes again.
        passes = 1 if row["mode"] == "forward" else 3
        state, weights = 8 * 16, 3 * (16 * 16 + 16)
        assert row["flops"] == passes * 3 * 2 * 8 * 16 * 16
        assert row["bytes"] == 4 * (2 * state + weights if passes == 1 else 5 * state + 3 * weights)


@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
def test_wrong_conversion_gets_no_times(monkeypatch, file, mode):
    eager, converted = rows_of_module(monkeypatch, f"{file}:stack", converting(Halved), modes=[mode])
    assert eager["status"] == "ok"
    assert converted["status"] == "wrong"
    assert "expected at most" in converted["error"]
    assert all(converted[key] is None for key in TIMES)


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda model: "report: no stack found", "score_kernels.convert replaced nothing: report: no stack found"),
        (refusing, "score_kernels.convert raised ValueError: planted"),
    ],
)
def test_conversion_that_replaces_nothing_is_absent_with_its_report(monkeypatch, file, convert, reason):
    eager, converted = rows_of_module(monkeypatch, f"{file}:stack", convert, modes=["forward"])
    assert eager["status"] == "ok"
    assert (converted["status"], converted["error"]) == ("absent", reason)


def test_the_package_s_own_conversion_is_what_is_measured(file):
    (problem,) = user_module.problems(f"{file}:stack", None, ["training"], [])
    eager, converted = measure(problem, list(user_module.PROVIDERS.values()), SETTINGS, quiet)
    assert (eager["status"], converted["status"]) == ("ok", "ok"), converted["error"]
    assert (eager["plan"], converted["plan"]["backend"]) == (None, "blas")


def test_module_may_take_tokens_and_have_frozen_parameters(monkeypatch, file):
    rows = rows_of_module(monkeypatch, f"{file}:tokens", converting(Fused), modes=["training"], dtypes=["bfloat16"])
    assert [row["status"] for row in rows] == ["ok", "ok"]
    # Tokens are no states: 10 x 8 outputs only, which backward reads; 10 x 8 + 8 x 8 + 8 parameters.
    assert rows[0]["bytes"] == 2 * (2 * 80 + 3 * 152)


def test_input_shape_takes_the_place_of_the_factory_s(monkeypatch, file):
    rows = rows_of_module(monkeypatch, f"{file}:bare", converting(Fused), shape=(2, 3, 16), modes=["forward"])
    assert (rows[0]["rows"], rows[0]["features"], rows[0]["params"]) == (6, 16, {"input_shape": [2, 3, 16]})


def test_memory_of_a_module_can_be_measured_in_a_child(monkeypatch, file):
    (problem,) = pickle.loads(pickle.dumps(user_module.problems(f"{file}:stack", None, ["training"], ["float32"])))
    out, grad_h, *gradients = memory_step(problem, "eager", "cpu")()
    assert out.shape == grad_h.shape == torch.Size([8, 16])
    assert len(gradients) == 6


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        ("nowhere.py:stack", [], "expected FILE.py:FACTORY with a file that exists, got"),
        ("{file}:absent", [], "has no 'absent'"),
        ("{file}:number", [], "expected number to return an nn.Module, or (module, example tensor), got 3"),
        ("{file}:bare", [], "bare returns no example input; return (module, input), or give --input-shape 4096,128"),
        ("{file}:pair", [], "expected a module that returns a tensor"),
        ("{file}:stack", ["--provider", "blas"], "--provider: a module is compared with itself, eager and converted only"),
        ("{file}:stack", ["--case", "*"], "expected one of --module"),
        ("{file}:stack", ["--input-shape", "4,0"], "expected 1 or more, got 0"),
    ],
)
def test_module_that_cannot_be_measured_is_told(file, module, flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--device", "cpu", "--module", module.format(file=file), *flags])
    assert said in capsys.readouterr().err


def test_run_of_a_module_writes_a_valid_result(monkeypatch, file, tmp_path):
    monkeypatch.setattr(user_module, "convert", converting(Fused))
    path = tmp_path / "result.json"
    flags = ["--module", f"{file}:bare", "--input-shape", "4,16", "--rounds", "1", "--device", "cpu", "--json", str(path)]
    assert main(["run", *flags]) == 0
    first = path.read_text()
    jsonschema.validate(json.loads(first), SCHEMA)
    assert [row["status"] for row in json.loads(first)["rows"]] == ["ok"] * 4
    assert main(["run", *flags, "--resume"]) == 0
    assert path.read_text() == first
