"""The tests of the Triton kernels can fail: a mutant is a copy of the package with one mistake, which its test has to find.

It finds it by a wrong number: a mutant that crashes proves nothing. Where a change to a kernel takes the text of a mutant away,
make the same mistake in the new text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU test_triton.py is skipped"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that has imported torch may not survive a fork"),
]

ROOT = Path(__file__).parents[1]

# How pytest shows that a number (an error, a count, an address in a list) or a tensor is not what it should be.
WRONG = re.compile(
    r"^E +(AssertionError: )?assert \[?(\d\S*|nan|inf) .*(<=|==) "
    r"|^E +AssertionError: .*: differs in \d+ elements$"
    r"|^E +\+ +where False = <built-in method equal ",
    re.MULTILINE,
)

# Each line of its input is a folder, a test and a file for the output; it answers with pytest's exit status. A test runs in a
# process forked from this one: what it imports, but for the package, is imported once for all mutants. Memory that a mutant
# leaves unwritten may hold anything, of which NumPy would warn before the test compares it.
RUNNER = """
import gc, json, os, signal, sys
import hypothesis, pytest, torch._dynamo, triton.runtime.interpreter

# What is there now stays out of the way of a child's garbage collection, and its pages stay shared.
gc.freeze()
for line in sys.stdin:
    folder, test, output = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        os.chdir(folder)
        file = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Not with what collects garbage at the end, which takes longer than some of the tests.
        without = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
        status = pytest.main(["-q", "-x", *without, "-W", "ignore::RuntimeWarning", test])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Mutant(NamedTuple):
    """One mistake: `old`, which is in `file` exactly once, becomes `new`; then `test` of the suite fails. Paths are from
    triton_kernels."""

    name: str
    file: str
    old: str
    new: str
    test: str
    suite: str = "test_triton"


def alone(op: str, choice: str) -> str:
    return f"test_options_alone_and_in_pairs[{op}-torch.float32-{choice}]"


def sizes(op: str) -> str:
    """Everything that the op can have, in several launches."""
    return f"test_failure_case_10_sizes_of_no_power_of_two[torch.float32-33-17-31-{op}]"


def of_attention(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(name, file, old, new, test, "test_triton_attention")


def of_transformer(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(name, file, old, new, test, "test_triton_transformer")


# A sequence of several tiles, with three heads, all masks and all else.
HEADS = "test_failure_case_10_sizes_of_no_power_of_two[torch.float32-17-6-3]"
NOTHING = "test_failure_case_11_rows_with_nothing_to_attend_to[torch.float32]"
# Two sets of a transformer's parameters.
PRE = "test_everything_at_once[sets=2_list]"
POST = "test_everything_at_once[sequences=packed,order=cyclic,sets=2_stacked,placement=post]"
OTHERS = "test_failure_case_18_nan_and_inf_stay_in_their_sequence[none-nan]"

COEFFICIENTS = "test_gradient_of_every_coefficient[torch.float32-linear]"

# fmt: off
MUTANTS = [
    # Masks: rows, hidden features, columns beyond D.
    Mutant("last row", "iterate.py", "return (row < rows) &", "return (row < rows - 1) &", alone("linear", "activation=silu")),
    Mutant(
        "last row as it is read", "iterate.py", "tl.minimum(row, rows - 1)", "tl.minimum(row, rows - 2)",
        alone("linear", "activation=silu"),
    ),
    Mutant(
        "last row of the scalars' gradients", "iterate.py", "alive = tl.arange(0, S.tile) < ring_rows - ring_row",
        "alive = tl.arange(0, S.tile) < ring_rows - ring_row - 1", alone("linear", "dt=vector"),
    ),
    Mutant(
        "last hidden feature", "mlp.py", "S.hidden + j[:, None]\n    return tl.load(at, mask=(j[:, None] < S.hidden)",
        "S.hidden + j[:, None]\n    return tl.load(at, mask=(j[:, None] < S.hidden - 1)", alone("mlp", "activation=silu"),
    ),
    Mutant(
        "last hidden feature in the ring", "mlp.py", "(j[None, :] < S.hidden)", "(j[None, :] < S.hidden - 1)",
        alone("mlp", "activation=silu"),
    ),
    Mutant(
        "padding of a state", "iterate.py", "tl.load(at, mask=tl.arange(0, S.columns)[None, :] < S.features, other=0.0)",
        "tl.load(at, mask=tl.arange(0, S.columns)[None, :] < S.features, other=1.0)", alone("mlp", "norm=layernorm"),
    ),
    Mutant(
        "padding of a bias", "iterate.py", "mask=offsets < size, other=0.0", "mask=offsets < size, other=1.0",
        alone("mlp", "norm=rmsnorm"),
    ),
    Mutant(
        "padding less the mean", "iterate.py",
        "y = tl.where(tl.arange(0, S.columns)[None, :] < S.features, y - mean[:, None], 0.0)", "y = y - mean[:, None]",
        alone("linear", "norm=layernorm"),
    ),
    Mutant(
        "padding less the mean, backward", "iterate.py",
        "dx = tl.where(tl.arange(0, S.columns)[None, :] < S.features, dx - (tl.sum(dx, 1) / S.features)[:, None], 0.0)",
        "dx = dx - (tl.sum(dx, 1) / S.features)[:, None]", sizes("linear"),
    ),
    Mutant(
        "act(0) in the padding", "linear.py", "tl.where(tl.arange(0, S.columns)[None, :] < S.features, w * u, 0.0)", "w * u",
        sizes("linear"),
    ),
    # Parameter sets, iterations, stages.
    Mutant(
        "order of sets", "iterate.py", "t % sets if S.cyclic", "t % sets if not S.cyclic", alone("linear", "sets=2_stacked"),
    ),
    Mutant(
        "row of the table", "iterate.py", "table + index * (S", "table + (sets - 1 - index) * (S",
        alone("linear", "sets=2_stacked"),
    ),
    Mutant(
        "iterations of a set in cyclic order", "ring.py", "if found and found[-1] - found[0] == len(found) - 1:", "if found:",
        "test_any_depth_with_any_sets[torch.float32-cyclic-linear]",
    ),
    Mutant(
        "order of records", "iterate.py", "((t - first) * S.stages + s) * ring_rows",
        "((iterations - 1 - t) * S.stages + s) * ring_rows", alone("linear", "sets=2_stacked"),
    ),
    Mutant(
        "order of records in an iteration", "iterate.py", "((t - first) * S.stages + s) * ring_rows",
        "((t - first) * S.stages + done) * ring_rows", alone("mlp", "solver=rk4"),
    ),
    Mutant(
        "trajectory off by one", "iterate.py", "record = states + ((t - first) *", "record = states + ((t - first + 1) *",
        alone("linear", "trajectory=return"),
    ),
    Mutant(
        "trajectory off by one, backward", "iterate.py", "grad_states + ((t + 1) * grad_size", "grad_states + (t * grad_size",
        alone("linear", "trajectory=return"),
    ),
    Mutant(
        "saved trajectory from its start", "launch.py", "trajectory.view(shape)[self.first :]", "trajectory.view(shape)",
        "test_saved_trajectory_gives_the_same_bits[torch.float32-linear]",
    ),
    Mutant(
        "grad_iterations off by one", "iterate.py", "for back in range(iterations - first):",
        "for back in range(iterations - first - 1):", alone("linear", "grad_iterations=2"),
    ),
    Mutant(
        "gradient before grad_iterations", "iterate.py", "tl.where(first == 0, g, 0.0)", "g",
        alone("linear", "grad_iterations=2"),
    ),
    # Coefficients (p, q, v, w, e): in forward, in backward, and their gradients.
    Mutant("p", "iterate.py", "y += tl.load(c) * z", "y += z", alone("linear", "solver=heun")),
    Mutant("q", "iterate.py", "y = y * tl.load(c + 1)", "y = y * tl.load(c)", alone("linear", "solver=euler")),
    Mutant("v", "iterate.py", "y += tl.load(c + 2) * total", "y += total", alone("linear", "solver=rk4")),
    Mutant("w", "iterate.py", "UPDATE(x, y, tl.load(c + 3),", "UPDATE(x, y, tl.load(c + 4),", alone("linear", "solver=euler")),
    Mutant("e", "iterate.py", "total += tl.load(c + 4) * y", "total += y", alone("linear", "solver=rk4")),
    Mutant("p, backward", "iterate.py", "gz = tl.load(c) * g", "gz = g", alone("linear", "solver=heun")),
    Mutant("q, backward", "iterate.py", "g = tl.load(c + 1) * g", "g = tl.load(c) * g", alone("linear", "solver=euler")),
    Mutant("v, backward", "iterate.py", "gtotal = tl.load(c + 2) * g", "gtotal = g", alone("linear", "solver=rk4")),
    Mutant(
        "w, backward", "iterate.py", "own + 4 * slot, tl.load(c + 3)", "own + 4 * slot, tl.load(c + 4)",
        alone("linear", "solver=euler"),
    ),
    Mutant(
        "e, backward", "iterate.py", "g += tl.load(c + 4) * tl.load(own + 2 * slot)", "g += tl.load(own + 2 * slot)",
        alone("linear", "solver=rk4"),
    ),
    Mutant("gradient of p", "iterate.py", "tl.store(field, tl.sum(g * z, 1)", "tl.store(field, tl.sum(g * x, 1)", COEFFICIENTS),
    Mutant(
        "gradient of q", "iterate.py", "tl.store(field + ring_rows, tl.sum(g * y, 1)",
        "tl.store(field + ring_rows, tl.sum(g * z, 1)", COEFFICIENTS,
    ),
    Mutant(
        "gradient of v", "iterate.py", "tl.load(coefficients + i * 5 + 4) * tl.sum(g * y_i, 1)", "tl.sum(g * y_i, 1)",
        COEFFICIENTS,
    ),
    Mutant(
        "gradient of w, linear", "linear.py", "dw += tl.sum(g * activate(a, slope, S), 1)", "dw += tl.sum(g * a, 1)",
        alone("linear", "dt=vector"),
    ),
    Mutant("gradient of w, mlp", "mlp.py", "dw += tl.sum(du * u, 1)", "dw = tl.sum(du * u, 1)", alone("mlp", "dt=vector")),
    Mutant("gradient of e", "iterate.py", "tl.sum(tl.load(own + 2 * slot) * y, 1)", "tl.sum(g * y, 1)", COEFFICIENTS),
    Mutant(
        "stage of the coefficients' gradients", "iterate.py", "field = scalars + s * 5 * ring_rows",
        "field = scalars + done * 5 * ring_rows", COEFFICIENTS,
    ),
    Mutant(
        "scalars of several launches", "launch.py", "self.totals[self.first :] += sums.sum(-1",
        "self.totals[self.first :] = sums.sum(-1", sizes("linear"),
    ),
    # Scales of x0, of the state, of a bias.
    Mutant(
        "scale of x0", "iterate.py", "injected * tl.load(x0_scale + t)", "injected * tl.load(x0_scale)",
        alone("linear", "x0=vector"),
    ),
    Mutant(
        "scale of x0, backward", "iterate.py", "g * tl.load(x0_scale + t) if S.x0_scale else g", "g",
        alone("linear", "x0=vector"),
    ),
    Mutant(
        "gradient of x0's scale", "iterate.py", "tl.sum(g * load_tile(x0, S), 1)", "tl.sum(g * load_tile(state, S), 1)",
        alone("linear", "x0=vector"),
    ),
    Mutant(
        "rows of x0 in a later launch", "launch.py", "self.x0[chunk], states, self.grad_out[chunk]",
        "self.x0, states, self.grad_out[chunk]", alone("linear", "x0=vector"),
    ),
    Mutant(
        "scale of the state", "iterate.py", "y = y * tl.load(state_scale + t)", "y = y * tl.load(state_scale)",
        alone("linear", "state_scale=vector"),
    ),
    Mutant(
        "scale of the state, backward", "iterate.py", "g = g * tl.load(state_scale + t)", "g = g * tl.load(state_scale)",
        alone("linear", "state_scale=vector"),
    ),
    Mutant("w of the last bias", "mlp.py", "y += w * vector(row, 3", "y += vector(row, 3", alone("mlp", "bias=last")),
    Mutant(
        "w of the last bias, backward", "ring.py", "sums * scale[block] if layer.unscaled else sums", "sums",
        alone("mlp", "bias=last"),
    ),
    # Norms.
    Mutant(
        "divisor of the deviation", "iterate.py", "tl.sum(y * y, 1) / S.features", "tl.sum(y * y, 1) / S.columns",
        alone("linear", "norm=rmsnorm"),
    ),
    Mutant(
        "divisor of the deviation, backward", "iterate.py", "along = tl.sum(dx * x, 1) / S.features",
        "along = tl.sum(dx * x, 1) / S.columns", alone("linear", "norm=rmsnorm"),
    ),
    Mutant(
        "divisor of the mean", "iterate.py", "mean = tl.sum(y, 1) / S.features", "mean = tl.sum(y, 1) / S.columns",
        alone("linear", "norm=layernorm"),
    ),
    Mutant(
        "divisor of the mean, backward", "iterate.py", "(tl.sum(dx, 1) / S.features)", "(tl.sum(dx, 1) / S.columns)",
        alone("linear", "norm=layernorm"),
    ),
    # Gradients of parameters.
    Mutant(
        "normed state with gain and bias", "iterate.py", "x.to(dtype), mask=live)", "affine(x, row, dtype, S), mask=live)",
        alone("linear", "norm=layernorm_gain_bias"),
    ),
    Mutant(
        "gain of a product", "ring.py", "product if gain is None else product * gain[:, None]", "product",
        alone("linear", "norm=rmsnorm_gain"),
    ),
    Mutant(
        "bias of a product", "ring.py", "product if bias is None else product + total[:, :, None] * bias[:, None]", "product",
        alone("linear", "norm=layernorm_bias"),
    ),
    Mutant("norm's bias before two layers", "ring.py", 'found.get("norm_bias", 0) + (weight', "(weight", sizes("mlp")),
    Mutant(
        "operand of a product", "ring.py", 'Layer("w2", "b2", "g", "u", ', 'Layer("w2", "b2", "g", "dz", ',
        alone("mlp", "activation=silu"),
    ),
    Mutant(
        "w of a product's operand", "mlp.py", "(w * u).to(dtype), mask=alive", "u.to(dtype), mask=alive",
        alone("mlp", "activation=silu"),
    ),
    Mutant(
        "products of several launches", "ring.py", "self.products[layer.weight][index] += product",
        "self.products[layer.weight][index] = product", sizes("linear"),
    ),
    # Activations.
    Mutant(
        "gate and up in the derivative", "mlp.py", "up * derivative(gate, slope, S)", "gate * derivative(up, slope, S)",
        alone("mlp", "gate=gate"),
    ),
    Mutant(
        "derivative of relu at 0", "activations.py", "tl.where(a <= 0, 0.0, 1.0)", "tl.where(a < 0, 0.0, 1.0)",
        "test_derivative_at_a_kink[relu-linear]",
    ),
    Mutant(
        "derivative of leaky_relu at 0", "activations.py", "tl.where(a <= 0, slope, 1.0)", "tl.where(a < 0, slope, 1.0)",
        "test_derivative_at_a_kink[leaky_relu-linear]",
    ),
    Mutant(
        "derivative of gelu", "activations.py", "0.3989422804014327 * tl.exp(-0.5 * a * a)",
        "0.3989422804014327 * tl.exp(-a * a)", alone("linear", "dt=float"),
    ),
    Mutant(
        "derivative of gelu_tanh", "activations.py", "0.134145 * a * a", "0.044715 * a * a",
        alone("linear", "activation=gelu_tanh"),
    ),
    Mutant(
        "relu of NaN", "activations.py", "tl.where(a < 0, 0.0, a)", "tl.where(a > 0, a, 0.0)",
        "test_failure_case_18_nan_and_inf_stay_in_their_row[none-relu-nan-linear]",
    ),
    # Copies that make tensors contiguous and addresses aligned.
    Mutant(
        "contiguous parameters", "../pointers.py", "p = p.to(dtype).contiguous()", "p = p.to(dtype)",
        "test_failure_case_06_non_contiguous[transposed-mlp]",
    ),
    Mutant(
        "aligned parameters", "../pointers.py", "p.clone() if p.data_ptr() % alignment else p", "p",
        "test_failure_case_05_addresses_in_the_table_are_aligned[torch.float32-1-linear]",
    ),
    Mutant(
        "contiguous coefficients", "../pointers.py", "problem.coefficients.contiguous()", "problem.coefficients",
        "test_failure_case_06_non_contiguous_in_the_flat_form[every second element-linear]",
    ),
    Mutant(
        "contiguous scales", "../pointers.py", "s.contiguous() for s in", "s for s in",
        "test_failure_case_06_non_contiguous_in_the_flat_form[every second element-linear]",
    ),
    Mutant(
        "contiguous states", "launch.py", "reshape(-1, problem.features).contiguous()", "reshape(-1, problem.features)",
        "test_failure_case_06_non_contiguous[transposed-linear]",
    ),
    Mutant(
        "out of another layout", "../ops.py", "                out.copy_(written)", "                pass",
        "test_in_place_and_into_any_layout[torch.float32-linear]",
    ),
    # Attention.
    of_attention("causal mask", "sequences.py", "row[:, None] >= key[None, :]", "row[:, None] > key[None, :]", HEADS),
    of_attention(
        "keys of a group", "sequences.py", "(number[:, None] == key_number[None, :]) & seen[None, :]",
        "(number[:, None] >= key_number[None, :]) & seen[None, :]", OTHERS,
    ),
    of_attention(
        "sentinels in a mask", "sequences.py", 'tl.where(largest == float("-inf"), 0.0, largest)[:, None]', "0.0",
        "test_failure_case_12_infinities_and_finite_sentinels[torch.float32]",
    ),
    of_attention(
        "rows of a head", "attention.py", "(part * S.features + head * size + j[:, None]) * S.features",
        "(part * S.features + j[:, None]) * S.features", HEADS,
    ),
    of_attention("scale of the scores", "attention.py", "* sequences.scale + added", "+ added", HEADS),
    of_attention(
        "sum of nothing", "attention.py", "return e, tl.where(total == 0.0, 1.0, total)", "return e, total",
        NOTHING,
    ),
    of_attention(
        "NaN of another sequence", "attention.py", "x = tl.where(x - x == 0.0, x, 0.0)", "x = x + 0.0",
        OTHERS,
    ),
    of_attention(
        "q of attention", "iterate_sequences.py", "land(_carried(q, c, here, sequences, S)",
        "land(_carried(w, c, here, sequences, S)", HEADS,
    ),
    of_attention("w of the scores, backward", "attention.py", "* (w * sequences.scale)", "* sequences.scale", HEADS),
    of_attention(
        "rotation back", "attention.py", "g = _rotate(g, block, place, sequences, True, S)",
        "g = _rotate(g, block, place, sequences, False, S)", HEADS,
    ),
    # Both halves of a transformer.
    of_transformer("decay before the halves", "iterate_sequences.py", 'q + w if S.placement == "pre" else q', "q", PRE),
    of_transformer("sets of a table of two halves", "iterate.py", "(S.parameters + S.others)", "S.parameters", PRE),
    of_transformer("gradient past the mlp", "transformer.py", "w * g + normalise", "normalise", PRE),
    of_transformer("<g, F(x)> past the mlp", "transformer.py", "dw + tl.sum(g * middle, 1)", "dw", PRE),
    of_transformer("w of biases behind norms", "ring.py", 'weighted=post or op == "attention"', "weighted=post", PRE),
    of_transformer("w of a norm that follows", "transformer.py", "    g = w * g\n", "", POST),
    of_transformer(
        "norm behind attention, backward", "transformer.py", "normalise_backward(g, attended, row, dtype, eps, S), dw", "g, dw",
        POST,
    ),
    of_transformer("gain of a norm that follows", "transformer.py", "(g * x).to(dtype)", "g.to(dtype)", POST),
]
# fmt: on


@pytest.fixture(scope="module")
def run_test():
    """run_test(folder, test, suite): pytest's exit status in the folder's copy of the package, and its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # One thread: a process with several cannot be forked safely.
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as runner:

        def run(folder: Path, test: str, suite: str = "test_triton") -> tuple[int, str]:
            output = folder / "output.txt"
            request = [str(folder), f"tests/{suite}.py::TestInterpreter::{test}", str(output)]
            print(json.dumps(request), file=runner.stdin, flush=True)
            answer = runner.stdout.readline()
            assert answer, "the runner has ended"
            return int(answer), output.read_text(encoding="utf-8")

        yield run


@pytest.fixture
def copied(tmp_path):
    """A copy of the package, the kernels as files in it and what Python has compiled of them, beside the tests as they are."""
    shutil.copytree(ROOT / "score_kernels", tmp_path / "score_kernels", ignore=shutil.ignore_patterns("_cuda.*", "demo"))
    (tmp_path / "tests").symlink_to(ROOT / "tests", target_is_directory=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def change(folder: Path, mutant: Mutant) -> None:
    path = folder / "score_kernels" / "triton_kernels" / mutant.file
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    assert count == 1, f"{mutant.old!r} is {count} times in triton_kernels/{mutant.file}: bring the table MUTANTS up to date"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    # Python tells by the second and the size whether it is of the text, which may be the same for a mistake.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def test_without_a_mistake_the_test_passes(run_test, copied):
    status, output = run_test(copied, alone("mlp", "activation=silu"))
    assert status == 0, output
    assert "1 passed" in output


def test_a_crash_is_not_taken_for_a_wrong_number(run_test, copied):
    change(copied, Mutant("no such function", "linear.py", "u = activate(", "u = activated(", alone("linear", "dt=float")))
    status, output = run_test(copied, alone("linear", "dt=float"))
    assert status == 1, output
    assert "NameError" in output
    assert not WRONG.search(output)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found(mutant, run_test, copied):
    change(copied, mutant)
    status, output = run_test(copied, mutant.test, mutant.suite)
    assert status == 1, f"not found by {mutant.test}:\n{output}"
    shown = WRONG.search(output)
    assert shown, f"{mutant.test} shows no wrong number, something else has failed:\n{output}"
