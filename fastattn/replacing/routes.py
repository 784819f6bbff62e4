"""Where attention of torch goes: the operators behind it get kernels of ours, for as long as somebody asks for that.

Every way to torch's attention ends in two operators of its dispatcher: aten::scaled_dot_product_attention, however the
function was imported, and aten::_native_multi_head_attention, the fast path of nn.MultiheadAttention and of
nn.TransformerEncoderLayer. Both have a kernel here that looks up the scope of its thread: inside of one the scope's
route answers the call, elsewhere torch's own kernel runs, 6 to 8 us later.
"""

import threading
import warnings
from typing import NamedTuple, Protocol

import torch

from ..torch_internals import kernel_of

_SDPA, _NATIVE = "aten::scaled_dot_product_attention", "aten::_native_multi_head_attention"
_torchs_sdpa = torch.ops.aten.scaled_dot_product_attention.default._op_dk
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Route(Protocol):
    """Who answers the attention calls of a scope."""

    replaces: bool
    """Whether it is fastattn, and not somebody who watches what torch does."""

    def answer(self, name: str, call: "SdpaCall | NativeCall"):
        """What `call`, made in the module of this name, returns: `call.torchs()`, or the same computed otherwise."""

    def left(self, nanoseconds: int) -> None:
        """A forward that led into this route's scopes has returned."""


class Scope(NamedTuple):
    """Who answers attention calls now (None: torch), and the name of the module that makes them."""

    route: Route | None
    name: str


OFF = Scope(None, "")


class _Here(threading.local):
    scope = None
    """The Scope of the module whose forward this thread is in, None outside."""
    weights = None
    """A list, where the attention weights of the next call are to go as well."""


here = _Here()
_everywhere: list[Scope] = []
"""Scopes of the whole process, the latest last."""


class SdpaCall(NamedTuple):
    """A call of F.scaled_dot_product_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def torchs(self) -> torch.Tensor:
        """The result of torch's own kernel."""
        return _torchs_sdpa(_COMPOSITE, *self[:6], scale=self.scale, enable_gqa=self.enable_gqa)


class NativeCall(NamedTuple):
    """A call of the fast path of nn.MultiheadAttention: projections and attention in one operator."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    embed_dim: int
    num_heads: int
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    mask: torch.Tensor | None
    need_weights: bool
    average_attn_weights: bool
    mask_type: int | None

    def torchs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of torch's own kernel."""
        key = "NestedTensorCPU" if self.query.is_nested else "CPU"
        return _native_kernels[key](*self)


def _sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> torch.Tensor:
    """The kernel of aten::scaled_dot_product_attention."""
    scope = here.scope
    if scope is None and _everywhere:
        scope = _everywhere[-1]
    if scope is None or scope.route is None:
        return _torchs_sdpa(
            _COMPOSITE, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    call = SdpaCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return scope.route.answer(scope.name, call)


def _native(
    query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask=None, need_weights=True,
    average_attn_weights=True, mask_type=None,
):  # fmt: skip
    """The kernel of aten::_native_multi_head_attention."""
    scope = here.scope
    if scope is None and _everywhere:
        scope = _everywhere[-1]
    call = NativeCall(
        query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, need_weights,
        average_attn_weights, mask_type,
    )  # fmt: skip
    return call.torchs() if scope is None or scope.route is None else scope.route.answer(scope.name, call)


_lock = threading.RLock()  # garbage collection may close routes in the middle of anything
_users = 0
_library: torch.library.Library | None = None
_native_kernels: dict = {}
_kept: list = []  # an operator that is being called in another thread must not lose its kernel: a few bytes each time
_fast_path: bool | None = None
"""Whether torch's fast path was on, where it had to be turned off."""


def open_routes() -> None:
    """Put our kernels behind the two operators, unless they are there; once for each later `close_routes`."""
    global _users, _library, _fast_path
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of torch is overridden
        _users += 1
        if _users > 1:
            return
        kernels = {key: kernel_of(_NATIVE, key) for key in ("CPU", "NestedTensorCPU")}
        _library = torch.library.Library("aten", "IMPL")
        for key in ("CPU", "AutogradCPU"):
            _put(_SDPA, _sdpa, key)
        if None in kernels.values():  # this torch would not give its kernels back: do without its fast path
            _fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            return
        _native_kernels.update(kernels)
        for key in kernels:
            _put(_NATIVE, _native, key)


def _put(operator: str, function, key: str) -> None:
    _library.impl(operator.removeprefix("aten::"), function, key)
    _kept.append(kernel_of(operator, key))


def close_routes() -> None:
    """Take our kernels out again, when the last of those who opened routes closes them."""
    global _users, _library, _fast_path
    with _lock:
        _users -= 1
        if _users == 0 and _library is not None:
            _library._destroy()
            _library = None
            if _fast_path is not None:
                torch.backends.mha.set_fastpath_enabled(_fast_path)
                _fast_path = None


def enter_everywhere(scope: Scope) -> None:
    """Let calls outside of all modules' scopes, in every thread, go to `scope`."""
    open_routes()
    _everywhere.append(scope)


def leave_everywhere(scope: Scope) -> None:
    """What `enter_everywhere` undoes; in any order."""
    _everywhere.remove(scope)
    close_routes()
