"""Where transformers decides which models may run on an attention implementation, and knows its own names only.

transformers leaves both questions open to no registration, so `admit` puts a function in front of three of its methods.
A call that is not about an implementation of ours goes through unchanged.
"""

import functools
import inspect
from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager


def admit(is_ours: Callable[[object], bool]) -> None:
    """From now on transformers asks about implementations that `is_ours`. Calling it again changes nothing.

    - A model that computes attention itself raises ValueError when it is built, `from_pretrained` included, and at
      `set_attn_implementation`. By itself transformers builds such a model, whose masks are then of the wrong kind,
      and answers `set_attn_implementation` with a line in the log.
    - Continuous batching (`generate_batch`) runs on the implementation. By itself transformers admits its own alone.
    """

    def check(self, attn_implementation, *args, **kwargs):
        names = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if is_ours(names.get("")) and not self._can_set_attn_implementation():
            raise refusal(type(self).__name__, names[""])

    def is_admitted(self, model, *args, **kwargs):
        return is_ours(model.config._attn_implementation)

    _put_before(PreTrainedModel, "get_correct_attn_implementation", check)
    _put_before(PreTrainedModel, "set_attn_implementation", check)
    _put_before(ContinuousBatchingManager, "switch_to_cb_friendly_attn", is_admitted)


def refusal(model: str, name: str) -> ValueError:
    """The error of a class of models that compute attention themselves."""
    return ValueError(
        f"attn_implementation={name!r}: {model} computes attention by itself and takes no other implementation; "
        "use attn_implementation='eager', and set this one on the parts of the model that take it"
    )


def _put_before(owner: type, method: str, first: Callable) -> None:
    """`method` does nothing more if `first`, called with its arguments, returns True."""
    original = inspect.getattr_static(owner, method)
    if getattr(original, "admits", False):
        return

    @functools.wraps(original)
    def both(self, *args, **kwargs):
        return None if first(self, *args, **kwargs) else original(self, *args, **kwargs)

    both.admits = True
    setattr(owner, method, both)
