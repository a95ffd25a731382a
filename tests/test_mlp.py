"""score_mlp, plain and gated: values and gradients in float64."""

from __future__ import annotations

import pytest
from cases import assert_close, build, gradients, planned
from row_wise import RowWise, random_shapes


class TestMLP(RowWise):
    op = "mlp"
    test_random_shapes = random_shapes("mlp")


@pytest.mark.parametrize("gate", ["none", "gate", "gate bias"])
@pytest.mark.parametrize(("features", "hidden"), [(1, 1), (1, 9), (9, 1), (8, 32), (33, 17)])
def test_features_and_hidden_features_of_any_size(features, hidden, gate):
    case = build("mlp", rows=13, features=features, hidden=hidden, gate=gate, norm="rmsnorm gain", dt="vector")
    with planned(rows=8, backward_rows=8, interval=2):
        assert_close(gradients(case, "blas"), gradients(case, "oracle"))
