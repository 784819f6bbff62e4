"""transformers' attn_implementation="flash_attention_2" without flash-attn and, on a CPU, without a GPU."""

from collections.abc import Callable
from unittest.mock import patch

from transformers import modeling_flash_attention_utils as flash_utils

from ..compat import install_flash_attn


def enable_flash_attention_2() -> Callable[[], None]:
    """Let transformers run attn_implementation="flash_attention_2" on `fastattn.compat.flash_attn`; returns what undoes
    it. For models and scripts that ask for that name; with one of your own, `register` (fastattn's name) does more: it
    takes every mask, ALiBi, float biases and sinks.

    It calls `install_flash_attn`, and then answers three questions of transformers with yes, which it answers with no
    where there is no GPU: whether flash-attn can be used, whether it is installed, and whether "cpu" is a device for
    it. Its remark that the model is not on a GPU stays, once in the log. Set models to another implementation before
    you undo it: one that is still set to "flash_attention_2" raises at its next forward pass.

    float32 works too, which flash-attn does not take; transformers says in its log that it does not.

    Raises RuntimeError if flash-attn itself is installed.
    """
    undo_install = install_flash_attn()
    matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    answers = {
        "general_availability_check": _yes,
        "pkg_availability_check": _yes,
        "supported_devices": (*matrix[2]["supported_devices"], (_yes, "cpu")),
    }
    patches = (
        patch.dict(matrix, {2: matrix[2] | answers}),
        patch.object(flash_utils, "is_flash_attn_2_available", _yes),
    )
    for each in patches:
        each.start()
    _look_again()
    pending = [_look_again, undo_install, *(each.stop for each in patches)]

    def undo() -> None:
        while pending:
            pending.pop()()

    return undo


def _look_again() -> None:
    """transformers imports the functions at their first use."""
    flash_utils._loaded_implementation = None


def _yes(*args, **kwargs) -> bool:
    return True
