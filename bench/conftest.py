"""Where the shared cases are, and what pytest-benchmark's JSON says about the machine."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]  # last: an installed one wins


def pytest_benchmark_update_machine_info(config, machine_info):
    import report

    machine_info["fastattn"] = report.header([])
