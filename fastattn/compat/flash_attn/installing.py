"""`install_flash_attn()`: `import flash_attn` without flash-attn."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import __version__, bert_padding, flash_attn_interface, rotary

_PACKAGE = sys.modules[__package__]
_MODULES = {
    "flash_attn": _PACKAGE,
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": rotary,
}
"""Name under which a module can be imported then -> where its names come from."""

_undo: list[Callable[[], None]] = []


def install_flash_attn() -> Callable[[], None]:
    """Make `import flash_attn` find these functions, for code that asks for flash-attn; returns what undoes it.

    Importable are flash_attn, flash_attn.flash_attn_interface, flash_attn.bert_padding and flash_attn.layers.rotary;
    any other part of it is a ModuleNotFoundError, as where flash-attn is not installed. importlib.metadata finds a
    distribution "flash-attn" of the version whose functions these are. Call it before the code that imports flash_attn.
    A second call changes nothing and returns the same.

    Undoing restores sys.modules and importlib.metadata; functions that were imported meanwhile go on working.

    Raises RuntimeError if a flash_attn is importable already: nothing of it is replaced.
    """
    if _undo:
        return _undo[0]
    if (place := _place_of_another()) is not None:
        raise RuntimeError(
            f"flash_attn is installed already, at {place}; uninstall it, or import fastattn.compat.flash_attn under "
            "its own name"
        )
    finder, before = _Finder(), {name: sys.modules.get(name, _absent) for name in _MODULES}
    for name, source in _MODULES.items():
        sys.modules[name] = _module(name, source)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    sys.meta_path.append(finder)

    def undo() -> None:
        if undo not in _undo:
            return
        _undo.remove(undo)
        sys.meta_path.remove(finder)
        for name, module in before.items():
            if module is _absent:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module

    _undo.append(undo)
    return undo


_absent = object()  # not in sys.modules, where None means that the import is to fail


def _place_of_another():
    """Where a flash_attn that is none of ours would be imported from; None if there is none."""
    try:
        spec = importlib.util.find_spec("flash_attn")
    except ValueError:  # a module that somebody made by hand and put into sys.modules
        return "sys.modules['flash_attn']"
    return spec and (spec.origin or spec.submodule_search_locations)


def _module(name: str, source: ModuleType | None) -> ModuleType:
    """A module `name` with the public names of `source`."""
    module = ModuleType(name, source.__doc__ if source else None)
    is_package = any(other.startswith(name + ".") for other in _MODULES)
    module.__spec__ = ModuleSpec(name, None, origin=(source or _PACKAGE).__file__, is_package=is_package)
    module.__file__, module.__package__ = module.__spec__.origin, name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []  # nothing else is found below it
    for public in source.__all__ if source else ():
        setattr(module, public, getattr(source, public))
    return module


class _Distribution(importlib.metadata.Distribution):
    """flash-attn's metadata, as far as others ask for its name, version and module."""

    def read_text(self, filename):
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {__version__}\nSummary: from fastattn\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path):
        return path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds that distribution, and no module."""

    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008 (as its base)
        wanted = (context.name or "flash-attn").lower().replace("_", "-").replace(".", "-")
        return [_Distribution()] if wanted == "flash-attn" else []
