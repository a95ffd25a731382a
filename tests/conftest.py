"""What all tests share: one thread for each test process, and hypothesis examples that are the same on every run."""

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("cases", "row_wise")

torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")
