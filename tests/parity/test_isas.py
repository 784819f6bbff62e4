"""The instruction sets that the other tests do not run on, in one process for each: the choice is made once.

`make test` takes a handful of cases, of each kind, dtype and term; the slow tests of each file take all of its cases.
"""

import os

import pytest

from isas import needs_cpu, run_tests_on, running_isa, supported_isas

HANDFUL = {
    "prefill": "test_parity and (cpu.prefill and (S45x77 or S150x170 or S130) or cpu.decode and S5x2100)",
    "backward": "test_parity and not isa and (S45x77 or S150x170 or S130 or S5x2100)",
    "skipping": "what_is_skipped or test_alibi and (plain or all or float or split or tensor_per_head or blocks)",
    "dropout": "keeps_what or drops_what or derivatives_of_a_part",
}
"""File -> its tests, as `pytest -k` takes them."""


@needs_cpu
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_a_handful(isa):
    if isa == running_isa():
        return  # this process runs on it
    chosen = " or ".join(f"test_{name}.py and ({tests})" for name, tests in HANDFUL.items())
    run_tests_on(isa, *(f"tests/parity/test_{name}.py" for name in HANDFUL), "-k", chosen)
