"""Every test starts from the same seed, and reads NaN from memory that nobody wrote."""

import gc
import os
from pathlib import Path

import pytest
import torch

# An assertion there shows its values when it fails, as one in a test does.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("support/*.py")))

# The tests set these themselves. FASTATTN_CPU_ISA stays: the whole suite can run on a narrower instruction set.
for name in ("FASTATTN_BACKEND", "FASTATTN_FALLBACK"):
    os.environ.pop(name, None)

from fastattn import plans  # noqa: E402  (after the environment is clean)
from fastattn.calls import fallbacks  # noqa: E402


def pytest_configure(config):
    # Most calls here run on the reference on purpose; a test that means the warning asserts it with pytest.warns.
    config.addinivalue_line("filterwarnings", "ignore::fastattn.FallbackWarning")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what is imported and collected stays: the collections that tests ask for need not look at it


def pytest_collectstart():
    """Random tensors that a module makes as it is imported are the same each time, too."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def deterministic_torch():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is full of NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def plans_of_the_test():
    """What is known of kinds of calls ends with the test, which may change the table of kernels."""
    yield
    plans.forget()


@pytest.fixture
def fresh_fallbacks():
    """No fallback has been counted or warned about yet; also afterwards."""
    fallbacks.clear()
    yield fallbacks
    fallbacks.clear()


@pytest.fixture
def one_thread():
    """On a busy machine two threads wait for each other longer than they work; also afterwards as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
