"""pytest-benchmark over the same work as run.py: `pytest bench --benchmark-only`, on one thread."""

import pytest
import torch

from peers import SDPA
from suites import _checked_row, _prepared
from work import FORWARD, TRAINING


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("contender", ["fastattn", "sdpa"])
@pytest.mark.parametrize("work", FORWARD + TRAINING, ids=str)
def test_grid(benchmark, work, contender):
    row, run = _checked_row("grid", str(work), work, 1)
    assert row.wrong is None
    if contender == "sdpa":
        run = _prepared(row, (SDPA,), work)["sdpa"]
    benchmark.group = row.name
    benchmark.extra_info |= {
        "work": row.name,
        "flops": row.flops,
        "threads": 1,
        "kernel": row.kernel if contender == "fastattn" else "sdpa",
        "isa": row.isa,
        "max_error": row.results[contender].max_error,
    }
    benchmark(run)
