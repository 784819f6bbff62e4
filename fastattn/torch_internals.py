"""The private names of torch that fastattn asks. Tried with torch 2.4 to 2.14; where one is missing, its question is
answered as an ordinary call would answer it."""

import functools
import sys

import torch
from torch.autograd import forward_ad

_functorch = getattr(torch._C, "_functorch", None)
_transform_on_top = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_tangents = forward_ad if hasattr(forward_ad, "_current_level") else type("_NoTangents", (), {"_current_level": -1})

is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether torch.autocast is on for some device: cheaper than asking for one."""

num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""How many TorchDispatchModes are on."""


def is_transformed() -> bool:
    """Whether a forward-mode derivative or a torch.func transform is going on: tangents may hide in any tensor then,
    and tensors may have no memory."""
    return _tangents._current_level >= 0 or _transform_on_top() is not None


def outside_of_graphs(function):
    """`function`, at whose calls Dynamo breaks its graph, and which it runs as it stands, whatever it calls."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:  # torch.compiler.disable would import it
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    run._torchdynamo_disable = True  # what torch.compiler.disable sets
    run._torchdynamo_disable_msg = (
        "the lists of a BlockMask depend on the values of tensors: build it outside of torch.compile and pass it in"
    )
    return run
