"""score_linear: values and gradients in float64."""

from __future__ import annotations

import pytest
from cases import assert_close, build, gradients, planned
from row_wise import RowWise, random_shapes


class TestLinear(RowWise):
    op = "linear"
    test_random_shapes = random_shapes("linear")


@pytest.mark.parametrize("features", [1, 2, 8, 33, 64])
def test_features_of_any_size(features):
    case = build("linear", rows=13, features=features, norm="rmsnorm gain", dt="vector")
    with planned(rows=8, backward_rows=8, interval=2):
        assert_close(gradients(case, "blas"), gradients(case, "oracle"))
