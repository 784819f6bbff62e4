"""The private names of torch that fastattn asks. Tried with torch 2.4 to 2.14; where one is missing, its question is
answered as an ordinary call would answer it."""

import contextlib
import functools
import re
import sys
from pathlib import Path

import torch
from torch.autograd import forward_ad

_functorch = getattr(torch._C, "_functorch", None)
_transforms = getattr(_functorch, "get_interpreter_stack", lambda: ())
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


def is_in_functorch() -> bool:
    """Whether a torch.func transform is going on."""
    return _transform_on_top() is not None


def numbers_of(x: torch.Tensor) -> list:
    """x.tolist(), also inside of a torch.func transform, where torch 2.4 cannot do that."""
    if x.dim() == 0:
        return x.item()
    return [numbers_of(part) for part in x.unbind()] if is_in_functorch() else x.tolist()


def direct_apply(function: type[torch.autograd.Function]):
    """`function.apply` for plain tensors outside of torch.func, without asking each time whether they are."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def shorten_backward(function: type[torch.autograd.Function]) -> None:
    """Has autograd call `function.backward` itself, which two of torch's own functions would look up at each call."""
    if hasattr(function, "_backward_cls"):
        function._backward_cls.apply = function.backward


_mode_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
_mode = getattr(torch._C, "_get_dispatch_mode", lambda key: None)

is_in_old_vmap = getattr(_functorch, "is_legacy_batchedtensor", lambda x: False)
"""Whether a tensor is one of the vmap that `is_grads_batched` and torch.autograd.functional still use."""


_Tensor, _plain = torch.Tensor, torch.Tensor.__torch_dispatch__


def is_memoryless(x) -> bool:
    """Whether a tensor is on the meta device, or of a subclass that takes operators apart itself: fake, functional and
    other wrappers."""
    return x.is_meta or (type(x) is not _Tensor and type(x).__torch_dispatch__ is not _plain)


def is_traced() -> bool:
    """Whether make_fx records what torch's operators do, as torch.func.linearize has it do: it would miss a kernel; or
    tensors are fake ones and have no values."""
    return _mode_keys is not None and (_mode(_mode_keys.PROXY) or _mode(_mode_keys.FAKE)) is not None


_current_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def is_in_backward() -> bool:
    """Whether this thread is inside of a backward pass, where checkpointing runs the forward pass once more."""
    return _current_graph_task() != -1


def out_of_old_vmap(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the innermost old vmap with its samples along dimension 0."""
    return torch._remove_batch_dim(x, _level_of_old_vmap(), 0, 0)


def into_old_vmap(x: torch.Tensor) -> torch.Tensor:
    """What `out_of_old_vmap` undoes."""
    return torch._add_batch_dim(x, 0, _level_of_old_vmap())


def _level_of_old_vmap() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def may_want_gradients(tensors: list[torch.Tensor]) -> bool:
    """Whether a gradient may be asked of what is computed from these tensors inside of transforms."""
    if any(transform.key() == _functorch.TransformType.Grad for transform in _transforms() or ()):
        return True
    return torch.is_grad_enabled() and any(_unwrapped(x).requires_grad for x in tensors)


def _unwrapped(x: torch.Tensor) -> torch.Tensor:
    """A tensor without the wrappers of transforms, which do not say that what is inside requires a gradient."""
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


sdpa_choice = getattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: -1)
"""The number of the backend that F.scaled_dot_product_attention takes for arguments: 0 math, 1 flash, ..."""


def kernel_of(operator: str, key: str):
    """A function that calls the kernel which this operator now has under a dispatch key, also when it has another one
    later; None where torch (before 2.9) cannot tell."""
    if not hasattr(torch.library, "get_kernel"):
        return None
    kernel, keys = torch.library.get_kernel(operator, key), torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key))
    return functools.partial(kernel.call_boxed, keys)


def above_autograd():
    """A context inside the kernel of an operator, below which torch's operators have no gradients otherwise."""
    try:
        keys, included = torch._C.DispatchKey.__members__, torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
            excluded = excluded.remove(keys[name])
        return torch._C._ForceDispatchKeyGuard(included, excluded)
    except AttributeError:
        return contextlib.nullcontext()


def outside_of_graphs(function, why: str):
    """`function`, at whose calls Dynamo breaks its graph, for this reason, and which it runs as it stands, whatever it
    calls."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:  # torch.compiler.disable would import it
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    run._torchdynamo_disable = True  # what torch.compiler.disable sets
    run._torchdynamo_disable_msg = why
    return run


def new_dynamic_size() -> torch.SymInt:
    """A size that a graph learns when it runs, for the fake of an operator; also where torch would rather break the
    graph than have one, as it does unless asked for fullgraph=True."""
    context = torch.library.get_ctx()
    shapes, module = getattr(context, "_shape_env", None), getattr(torch._library, "fake_impl", None)
    if shapes is None or shapes.allow_dynamic_output_shape_ops or not hasattr(module, "allocate_size"):
        return context.new_dynamic_size()
    return module.allocate_size(shapes)


def store_of(group):
    """The store of a process group of torch.distributed, in which its ranks can leave words for each other."""
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def group_of(name: str):
    """The process group of torch.distributed whose `group_name` this is."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def add_to_keys_of_compiled_graphs(text: str) -> None:
    """Makes `text` part of the keys under which torch keeps compiled graphs on disk."""
    config = getattr(torch.compiler, "config", None)
    tag = getattr(config, "cache_key_tag", None)
    if tag is not None and text not in tag.split():
        config.cache_key_tag = f"{tag} {text}".strip()


_precision_of = getattr(torch._C, "_get_fp32_precision_getter", None)


def are_products_exact() -> bool:
    """Whether torch's own products of float32 on a GPU keep all bits of their factors: by its newer setting, which the
    older ones set, too, and where there is none (before torch 2.9) by those."""
    if _precision_of is None:
        return torch.get_float32_matmul_precision() == "highest"
    return _precision_of("cuda", "matmul") != "tf32"  # the older question raises where the settings disagree


_cuda_version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)
_DRIVERS = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")


@functools.cache
def driver_version() -> str:
    """Of the GPU's driver: what the system says, else the version of CUDA that it speaks."""
    for file in _DRIVERS:
        if file.exists() and (version := re.search(r"\d+(\.\d+)+", file.read_text())):
            return version[0]
    return f"cuda-{_cuda_version()}"
