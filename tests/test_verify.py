"""`doctor --verify` and its record: what it runs, that it finds a wrong kernel, who reads the record and when nobody does."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from score_kernels import machine, ops, verification, verified
from score_kernels.__main__ import main
from score_kernels.problem import NORMS
from score_kernels.stages import SOLVERS
from score_kernels.triton_kernels import launch
from score_kernels.verification import VARIANTS, Call, Check

CPU = torch.device("cpu")
CALLS = [
    Call("linear", 20, torch.float16, "tanh", "none", "euler"),
    Call("mlp", 20, torch.float32, "gelu", "layernorm", "heun"),
    Call("gated mlp", 20, torch.float16, "silu", "rmsnorm", "euler"),
]
SEQUENCES = {
    kind: [Call(kind, 20, torch.float16, variant, "layernorm", "euler") for variant in VARIANTS[kind]]
    for kind in ("attention", "transformer", "gated transformer")
}
GPU = SimpleNamespace(
    name="a GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verification, "SEQUENCES", 2)  # for the interpreter's sake
    monkeypatch.setattr(verification, "TOKENS", 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPU)
    return tmp_path / "score_kernels" / "verified"


def verified_of_the_gpu():
    return ops._gpu.__wrapped__(0, False, None).verified


def test_calls_have_every_option_with_every_block():
    every = list(verification.calls())
    for kind in verification.KINDS:
        of_kind = [call for call in every if call.kind == kind]
        assert {call.variant for call in of_kind} == set(verification.VARIANTS[kind])
        assert {call.solver for call in of_kind} == set(SOLVERS)
        assert {call.norm for call in of_kind} == set(NORMS)
        assert {(call.features, call.dtype) for call in of_kind} >= {
            (d, dtype) for d in verification.WIDTHS for dtype in verification.DTYPES
        }
    assert len(set(every)) == len(every)


def test_square_calls_have_one_set_as_wide_as_the_features():
    squares = [call for call in verification.calls() if call.square]
    assert {(call.kind, call.features) for call in squares} == {("mlp", d) for d in (20, 64, 100, 128)}
    for call in squares:
        d, inputs = call.features, verification._inputs(call, CPU)
        assert (inputs["w1"].shape, inputs["w2"].shape, inputs["norm_weight"].shape) == ((1, d, d), (1, d, d), (1, d))


def test_kernels_that_are_right():
    told = []
    found = verification.verify(CPU, told.append, CALLS)
    assert [check.backend for check in found] == 3 * ["triton"]
    assert all(check.passed for check in found), found
    assert told[1] == "2 of 3: triton, mlp, D = 20, float32, gelu, layernorm, heun"


def test_attention_that_is_right(monkeypatch):
    monkeypatch.setattr(verification, "ITERATIONS", 2)
    calls = [*SEQUENCES["attention"], SEQUENCES["transformer"][0], SEQUENCES["gated transformer"][0]]
    found = verification.verify(CPU, lambda text: None, calls)
    assert len(found) == len(calls)
    assert all(check.passed for check in found), found


@pytest.mark.parametrize("kind", SEQUENCES)
def test_each_variant_of_attention_is_its_own(kind):
    """None of them computes what another one does."""
    inputs = verification._inputs(SEQUENCES[kind][0], CPU)
    outputs = []
    for call in SEQUENCES[kind]:
        shape = verification._inputs(call, CPU)["h"].shape
        same = {name: x.view(shape) if name in ("h", "x0") else x for name, x in inputs.items()}
        outputs.append(verification._run("reference", call, same, torch.float64)["output"].flatten())
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_wrong_kernel_is_found(broken, monkeypatch):
    original = getattr(launch, broken)

    def off(*given):
        result = original(*given)
        if broken == "forward":
            given[2].mul_(1.01)
        else:
            result[3].mul_(1.2)
        return result

    monkeypatch.setattr(launch, broken, off)
    (found,) = verification.verify(CPU, lambda text: None, CALLS[2:])
    assert not found.passed
    assert not found.refused
    assert found.share > 1


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(launch, "forward", lambda problem, plan, out: out.fill_(float("nan")) * 0)
    (found,) = verification.verify(CPU, lambda text: None, CALLS[:1])
    assert not found.passed


def test_what_the_planner_refuses_is_not_wrong(monkeypatch):
    gpu = dataclasses.replace(machine.INTERPRETER, device="cuda", arch=90, shared_memory=1)
    monkeypatch.setattr(ops, "machine_of", lambda device: gpu)
    monkeypatch.setattr(verification, "machine_of", lambda device: gpu)
    (found,) = verification.verify(CPU, lambda text: None, CALLS[:1])
    assert found.refused
    assert "shared memory" in found.reason


def test_the_record_is_what_auto_takes(cache):
    assert verified_of_the_gpu() == machine.VERIFIED
    right, refused = Check("triton", "a", 0.5), Check("cuda", "a", None, "backend='cuda' cannot run this call: it is wide")
    wrong = Check("cuda", "b", 1.5)
    assert verification.record([right, refused], CPU) == ["triton"]
    assert verified_of_the_gpu() == machine.VERIFIED | {("triton", 90)}
    (entry,) = json.loads(verified.path().read_text())["verified"]
    assert (entry["gpu"], entry["checks"]) == ("a GPU", 1)
    # Whoever was wrong once is not taken, and a new record replaces the old one.
    assert verification.record([right, Check("cuda", "a", 0.5), wrong], CPU) == ["triton"]
    assert verification.record([wrong], CPU) == []
    assert verified_of_the_gpu() == machine.VERIFIED


@pytest.mark.parametrize("change", ["another build", "not JSON", "another form", "{}"])
def test_what_is_no_record_of_this_build_is_not_read(change, cache, monkeypatch):
    verified.write([{"backend": "triton", "arch": 90}])
    assert verified.recorded() == {("triton", 90)}
    if change == "another build":
        monkeypatch.setattr(verified, "build", lambda: "0123")
    else:
        verified.path().write_text('{"verified": [{"backend": "triton"}]}' if change == "another form" else change)
    assert verified.recorded() == frozenset()


def test_a_build_is_its_sources_and_its_torch_and_triton(tmp_path, monkeypatch):
    def build():
        return verified.build.__wrapped__()

    before = build()
    assert build() == before
    monkeypatch.setattr(verified, "PACKAGE", tmp_path)
    (tmp_path / "triton_kernels").mkdir()
    source = tmp_path / "triton_kernels" / "mlp.py"
    source.write_text("1")
    one = build()
    source.write_text("2")
    two = build()
    (tmp_path / "_cuda.cpython-311.so").write_text("3")
    three = build()
    monkeypatch.setattr(verified.importlib.metadata, "version", lambda name: f"{name} 9")
    assert len({before, one, two, three, build()}) == 5


def test_ranks_agree_on_the_first_one_s_record(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(verified, "_store", lambda: store)
    verified.write([{"backend": "triton", "arch": 90}])
    assert verified.recorded() == {("triton", 90)}
    verified.write([{"backend": "cuda", "arch": 90}])
    assert verified.recorded() == {("triton", 90)}
    monkeypatch.setattr(verified, "_store", lambda: torch.distributed.HashStore())
    assert verified.recorded() == {("cuda", 90)}


def test_the_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--verify"]) == 1
    assert "verify             there is no GPU to compare kernels on" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_the_command(share, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    checks = [
        Check("triton", "a call", 0.5),
        Check("triton", "another", share),
        Check("cuda", "a call", None, "backend='cuda' ..."),
    ]
    monkeypatch.setattr(verification, "verify", lambda device, tell: checks)
    found = verification.run(lambda text: None)
    assert found["passed"] == (share < 1)
    assert f"{1 + (share < 1)} of 2 calls are right; auto takes {'triton' if share < 1 else 'no kernels'}" in found["says"][0]
    assert found["says"][1:] == ([] if share < 1 else ["wrong: triton, another: 3.0 times the error that is allowed"])
    assert verified.recorded() == ({("triton", 90)} if share < 1 else frozenset())
