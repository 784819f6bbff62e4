"""Modules of examples/, imported as a script there would import them."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def example_module(name: str) -> Iterator[ModuleType]:
    """The module examples/`name`.py; afterwards it and what it imports from there are forgotten."""
    path = list(sys.path)
    sys.path.append(str(EXAMPLES))
    try:
        try:
            module = importlib.import_module(name)
        except SystemExit as missing:  # how an example says that it needs more packages
            pytest.skip(str(missing))
        if hasattr(module, "time_in_turn"):
            module.time_in_turn = briefly(module.time_in_turn)
        yield module
    finally:
        sys.path[:] = path
        for known, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == EXAMPLES:
                del sys.modules[known]


def briefly(time_in_turn: Callable) -> Callable:
    """In as few rounds as it may take: no test reads the seconds."""
    return lambda functions, budget, **options: time_in_turn(functions, 0.0, **options)
