"""Names of a package whose modules are imported when somebody asks for them (PEP 562)."""

import sys
from collections.abc import Callable
from importlib import import_module


def later(package: str, places: dict[str, str]) -> tuple[Callable, Callable]:
    """(__getattr__, __dir__) of `package`. places: name -> "module" below it that has it, or "module:" that it is."""

    def __getattr__(name: str):
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, colon, _ = places[name].partition(":")
        found = import_module(f"{package}.{module}")
        found = found if colon else getattr(found, name)
        setattr(sys.modules[package], name, found)
        return found

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return __getattr__, __dir__
