"""The stage program: its coefficients, its order of accuracy, which parameter set an iteration uses."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from score_kernels import stages
from score_kernels.activations import ACTIVATIONS

CPU = torch.device("cpu")
F64 = torch.float64


def table(dt, iterations=1, update="contractive", solver="euler", dtype=F64):
    return stages.coefficient_table(dt, iterations, update, solver, dtype, CPU)


def run(coefficients, f, z):
    """The stage program of one iteration, as the module's docstring reads."""
    y, total = z, torch.zeros_like(z)
    for p, q, v, w, e in coefficients.tolist():
        total = total + e * y
        y = p * z + q * y + v * total + w * f(y)
    return y


def test_every_table_entry_has_an_oracle():
    for name, here, there in (
        ("stages.SOLVERS", stages.SOLVERS, oracle.TABLEAUS),
        ("activations.ACTIVATIONS", ACTIVATIONS, oracle.ACTIVATIONS),
    ):
        different = set(here) ^ set(there)
        assert not different, f"{name}: an entry needs its twin of the same name in tests/oracle.py, and has none: {different}"


@pytest.mark.parametrize("update", stages.UPDATES)
@pytest.mark.parametrize("solver", stages.SOLVERS)
def test_program_is_the_textbook_method(solver, update):
    z = torch.linspace(-2, 2, 9, dtype=F64)
    dt = 0.37

    def k(y):
        return torch.sin(3 * y) + 0.2 - (y if update == "contractive" else 0)

    expected = oracle.runge_kutta(oracle.TABLEAUS[solver], k, z, dt)
    found = run(table(dt, update=update, solver=solver)[0], lambda y: torch.sin(3 * y) + 0.2, z)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", stages.SOLVERS)
def test_order_of_accuracy(solver):
    """dy/dt = -y^2 has y(1) = 1/2 from y(0) = 1: halving dt divides the error by 2^order."""

    def error(steps):
        y = torch.ones((), dtype=F64)
        for _ in range(steps):
            y = run(table(1 / steps, update="residual", solver=solver)[0], lambda x: -(x**2), y)
        return abs(y.item() - 0.5)

    assert math.log2(error(32) / error(64)) == pytest.approx(oracle.TABLEAUS[solver].order, abs=0.15)


def test_coefficients_of_the_design():
    dt = 0.3
    written = {
        "euler": [[0, 1 - dt, 0, dt, 0]],
        "midpoint": [[0, 1 - dt / 2, 0, dt / 2, 0], [1, -dt, 0, dt, 0]],
        "heun": [[0, 1 - dt, 0, dt, 0], [1 / 2, (1 - dt) / 2, 0, dt / 2, 0]],
    }
    for solver, rows in written.items():
        torch.testing.assert_close(table(dt, solver=solver)[0], torch.tensor(rows, dtype=F64), rtol=0, atol=1e-15)
    last = table(dt, solver="rk4")[0, 3]
    torch.testing.assert_close(last, torch.tensor([0, -dt / 6, 1, dt / 6, 1 / 3], dtype=F64), rtol=0, atol=1e-15)


def test_default_dt_and_replace():
    assert torch.equal(table(None), table(0.5))
    assert torch.equal(table(None, update="residual"), table(1.0, update="residual"))
    assert table(None, 3, "replace").tolist() == [[[0, 0, 0, 1, 0]]] * 3


def test_dt_of_every_form():
    numbers = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    per_iteration = table(numbers, 3, solver="rk4")
    assert per_iteration.shape == (3, 4, 5)
    for t, dt in enumerate(numbers.tolist()):
        assert torch.equal(per_iteration[t], table(dt, solver="rk4")[0])
    assert torch.equal(table(numbers[1], 3), table(0.2, 3))
    assert torch.equal(table(numbers[1:2], 3), table(0.2, 3))
    assert table(0.5, 0).shape == (0, 1, 5)
    assert table(numbers.half(), 3, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("update", stages.UPDATES)
@pytest.mark.parametrize("solver", stages.SOLVERS)
def test_table_is_differentiable_in_dt(solver, update):
    for shape in ((), (3,)):
        dt = torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: table(x, 3, update, solver), (dt,))


def test_failure_case_27_a_table_that_is_kept_is_never_dropped(monkeypatch):
    """A CUDA graph that recorded a call reads it at every replay."""
    kept = table(0.123)
    monkeypatch.setattr(stages, "MOST_KEPT", len(stages._KEPT) + 2)
    others = [table(dt / 64) for dt in range(64)]
    assert table(0.123) is kept
    assert table(0.0) is others[0]
    assert table(63 / 64) is not others[63]
    assert torch.equal(table(63 / 64), others[63])


@pytest.mark.parametrize("solver", stages.SOLVERS)
def test_tiles_of_state_that_a_solver_says_it_needs(solver):
    """A backend keeps z and S only if these say so: their coefficients are zero where they say no."""
    p, _, v, _, e = table(0.3, solver=solver)[0].unbind(-1)
    assert bool(p.any()) == stages.uses_z(solver)
    assert bool(e.any()) == bool(v.any()) == stages.uses_sum(solver)


@pytest.mark.parametrize(
    ("order", "iterations", "sets", "expected"),
    [
        ("consecutive", 6, 3, [0, 0, 1, 1, 2, 2]),
        ("consecutive", 7, 3, [0, 0, 0, 1, 1, 2, 2]),
        ("consecutive", 5, 1, [0] * 5),
        ("consecutive", 4, 4, [0, 1, 2, 3]),
        ("cyclic", 6, 3, [0, 1, 2, 0, 1, 2]),
        ("cyclic", 7, 3, [0, 1, 2, 0, 1, 2, 0]),
        ("cyclic", 4, 4, [0, 1, 2, 3]),
    ],
)
def test_parameter_set(order, iterations, sets, expected):
    assert [stages.parameter_set(t, iterations, sets, order) for t in range(iterations)] == expected
