"""pytest-benchmark over the same grid as run.py: `pytest bench --benchmark-only`, on one thread."""

import pytest
import torch

import fastattn
from cases import GRID, inputs, visited_pairs
from oracle import above_ceiling, errors, truth, wrong
from peers import SDPA


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("contender", ["fastattn", "sdpa"])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(benchmark, case, contender):
    (q, k, v), kwargs = inputs(case)
    exact, plain = truth(case)
    if contender == "fastattn":

        def run():
            return fastattn.attention(q, k, v, **kwargs)

        error = errors(run(), exact)
        assert wrong(error, plain, case.dtype) is None
        call = fastattn.last_call()
        benchmark.extra_info |= {"kernel": call.kernel, "isa": call.isa}
    else:
        run = SDPA.prepare(case, q, k, v, kwargs)
        error = errors(run(), exact)
        assert above_ceiling(error, case.dtype) is None
    pairs = visited_pairs(case)
    benchmark.group = str(case)
    benchmark.extra_info |= {
        "case": str(case),
        "flops": 2 * pairs * (q.shape[3] + v.shape[3]),
        "threads": 1,
        "max_error": error.max,
    }
    benchmark(run)
