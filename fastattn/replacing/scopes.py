"""Scopes: which attention calls belong to a model. The forward of its modules says so, for the time that it runs.

A module's forward becomes an attribute of that one module, never of its class. A recompute in a backward pass enters it
again, and threads keep apart. A method is copied and pickled with its module as it should be: a deep copy's is bound to
the copy, a pickled model is the model without fastattn.
"""

import functools
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ..compat.sdpa import scaled_dot_product_attention
from .multihead import forward_with_weights
from .routes import OFF, Route, Scope, close_routes, here, open_routes

_torch_sdpa = torch.nn.functional.scaled_dot_product_attention
_torchs_operator = torch.ops.aten.scaled_dot_product_attention.default
_lock = threading.RLock()
_OWN, _BEFORE = "_fastattn_claims", "_forward_before_fastattn"


class Claim(NamedTuple):
    """A handle's word on a module: its scope, or None where the handle leaves the module out."""

    owner: Route
    scope: Scope | None


class Claims:
    """What handles say of one module (the latest of those that take it counts), and who wants to see its results."""

    def __init__(self, module: nn.Module):
        self.of_module = id(module)
        self.claims: tuple[Claim, ...] = ()
        self.watches: tuple[tuple[Watcher, str], ...] = ()
        self.scope: Scope | None = None

    def change(self, claims, watches) -> None:
        self.claims, self.watches = tuple(claims), tuple(watches)
        scopes = [claim.scope for claim in self.claims if claim.scope is not None]
        self.scope = scopes[-1] if scopes else OFF if self.claims else None


class Watcher(Protocol):
    """Who sees what modules return."""

    def returned(self, name: str, result) -> None:
        """The forward of the module of this name has returned `result`."""


class InGraph(torch.overrides.TorchFunctionMode):
    """What the routes do, in the forward that Dynamo traces: graphs hold fastattn's operators then.

    Not for nn.MultiheadAttention: a mode sees it as one function, in which torch computes.
    """

    def __init__(self, on: bool):
        super().__init__()
        self.on = on

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is _torch_sdpa:
            return (scaled_dot_product_attention if self.on else _torchs_operator)(*args, **kwargs)
        return function(*args, **kwargs)


def claim(module: nn.Module, owner: Route, scope: Scope | None) -> None:
    """Let attention calls inside of `module` belong to `scope` from now on (None: not to this owner)."""
    with _lock:
        claims = _claims_of(module)
        claims.change([*claims.claims, Claim(owner, scope)], claims.watches)


def watch(module: nn.Module, watcher: Watcher, name: str) -> None:
    """Let `watcher` see what `module` returns from now on."""
    with _lock:
        claims = _claims_of(module)
        claims.change(claims.claims, [*claims.watches, (watcher, name)])


def release(module: nn.Module, owner: Route | Watcher) -> None:
    """Undo what `owner` claimed and watched of a module; its forward is what it was when nobody is left."""
    with _lock:
        claims = _claims_in(module)
        if claims is None:  # somebody has put another forward over ours
            return
        left = [[x for x in those if x[0] is not owner] for those in (claims.claims, claims.watches)]
        claims.change(*left)
        if not claims.claims and not claims.watches:
            before = module.__dict__.pop(_BEFORE, None)
            if before is None:
                del module.forward
            else:
                module.forward = before


def _claims_of(module: nn.Module) -> Claims:
    """The claims on a module, whose forward is wrapped unless it is."""
    claims = _claims_in(module)
    return _wrap(module) if claims is None or claims.of_module != id(module) else claims


def _claims_in(module: nn.Module) -> Claims | None:
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), _OWN, None)


def _wrap(module: nn.Module) -> Claims:
    claims, before = Claims(module), module.__dict__.get("forward")
    if before is not None:
        module.__dict__[_BEFORE] = before
    inner = _forward_of(module, before)

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        scope = claims.scope
        if is_dynamo_compiling():
            if scope is None:
                return inner(self, *args, **kwargs)
            with InGraph(scope.route is not None):
                return inner(self, *args, **kwargs)
        if scope is None:  # it is watched, or nobody is left
            scope = here.scope
        outside, here.scope = here.scope, scope
        route = None if scope is None else scope.route
        is_outermost = route is not None and (outside is None or outside.route is not route)
        begin = perf_counter_ns() if is_outermost else 0
        try:
            result = inner(self, *args, **kwargs)
            for watcher, name in claims.watches:
                watcher.returned(name, result)
            return result
        finally:
            here.scope = outside
            if is_outermost:
                route.left(perf_counter_ns() - begin)

    forward.__name__ = "forward"  # by this name a pickled method is found again
    setattr(forward, _OWN, claims)
    module.forward = types.MethodType(forward, module)
    return claims


def _forward_of(module: nn.Module, before):
    """The forward that a module has, as a function of the module."""
    if before is not None and getattr(getattr(before, "__func__", None), _OWN, None) is None:
        return functools.wraps(before)(lambda self, *args, **kwargs: self.__dict__[_BEFORE](*args, **kwargs))
    of_class = type(module).forward
    return forward_with_weights if of_class is nn.MultiheadAttention.forward else of_class


_WITH_ATTENTION = (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
                   nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # fmt: skip


def attending(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model, by name, whose own code may call attention: not torch's linear maps, norms and the like;
    always the model itself."""
    return {
        name: module
        for name, module in model.named_modules()
        if module is model
        or isinstance(module, _WITH_ATTENTION)
        or not type(module).__module__.startswith("torch.nn.modules.")
    }


def unreachable(module: nn.Module) -> str | None:
    """Why a module's forward cannot be wrapped."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript; apply before scripting, or use fastattn.patch_sdpa()"
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        return "it has no forward"
    return None


@contextmanager
def observed(model: nn.Module, route: Route | None = None, watcher: Watcher | None = None) -> Iterator[None]:
    """Inside the block `route` answers all attention calls of a model, and `watcher` sees what its modules return."""
    modules = {name: module for name, module in attending(model).items() if unreachable(module) is None}
    open_routes()
    try:
        for name, module in modules.items():
            if route is not None:
                claim(module, route, Scope(route, name))
            if watcher is not None:
                watch(module, watcher, name)
        yield
    finally:
        for module in modules.values():
            release(module, route)
            release(module, watcher)
        close_routes()
