"""`patch_sdpa`: torch's attention on fastattn in the whole process, with undo."""

from .apply import Replacement
from .report import Report
from .routes import Scope, enter_everywhere, leave_everywhere


class Patch:
    """What `patch_sdpa` returns: `report` tells what happened, `remove` undoes it; `with` removes at its end."""

    def __init__(self, route: Replacement):
        self._route, self._scope, self.is_active = route, Scope(route, "(process)"), True
        enter_everywhere(self._scope)

    def remove(self) -> None:
        """Give torch its attention back. Once is enough; a second time does nothing."""
        if self.is_active:
            self.is_active = False
            leave_everywhere(self._scope)

    def report(self) -> Report:
        """Calls so far: how many ran on which kernel, and which fell back and why."""
        return Report(self._route.counts.rows(), (), {}, 0.0)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error) -> None:
        self.remove()


def patch_sdpa(*, backend: str | None = None, on_unsupported: str = "fallback") -> Patch:
    """Compute torch's attention by fastattn in the whole process, in all threads, until the patch's `remove`.

    Reached are torch.nn.functional.scaled_dot_product_attention, however and whenever it was imported, and the fast
    path of nn.MultiheadAttention. Outside of that path nn.MultiheadAttention with need_weights=True writes its softmax
    out: `fastattn.apply` replaces it, this does not. Models that `apply` holds count at their own handles.

    backend, on_unsupported   as in `fastattn.apply`

    Returns a `Patch`, also a context manager. Graphs of torch.compile are not reached.
    """
    return Patch(Replacement(backend, on_unsupported))
