"""What all tests share: one thread for each test process, the same hypothesis examples on every run, where a GPU is needed."""

import gc
import importlib
import os
from importlib.util import find_spec

import pytest
import torch

pytest.register_assert_rewrite("cases", "row_wise", "kernels", "sequence_kernels", "stacks", "emulation")

GPU = torch.cuda.is_available()
if not GPU:
    # Triton's kernels run on the CPU then. Triton reads this when it is imported, so that is done here: not by whichever test
    # comes first, perhaps one that has taken the variable away.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton")
    importlib.import_module("quick_interpreter").apply()

torch.set_num_threads(1)
# torch.compile compiles in the test's process: a pool of its own has more to wait for than it saves here.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# A machine with a GPU need not have it: the tests that need it are not run there.
if find_spec("hypothesis"):
    settings = importlib.import_module("hypothesis").settings
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


def pytest_collection_finish():
    """What there is by now stays: it need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def plain_machine(monkeypatch):
    """As a user's machine with no GPU: nothing interprets the Triton kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def emulate():
    """The CUDA kernels' own code, for a CPU: the functions of tests/cuda/emulation.cpp."""
    return importlib.import_module("emulation").library()
