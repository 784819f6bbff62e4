"""What a FlexAttention score_mod does, read off the operators that it calls, so that the fused kernels can do it.

A score_mod is run once on five numbers; what it does with them is recorded and taken apart. Only operators that act on
each number for itself, and look-ups of single entries, are understood: on those a function of numbers is the same as
the function of tensors that broadcast. Whatever else happens, there is no form, and nothing is guessed from values.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checks import one_line
from ..torch_internals import is_transformed

_aten = torch.ops.aten
_INDICES = ("b", "h", "q", "kv")
_UNTAGGED = (_aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.detach.default, _aten.alias.default)
_COMPARISONS = tuple(getattr(_aten, name) for name in ("lt", "le", "gt", "ge", "eq", "ne"))


class Node(NamedTuple):
    """A number that a score_mod computes.

    func, args, kwargs  its operator and what it was called with, nodes in the place of tensors; func is None for an
                        argument of the score_mod and for what depends on none
    deps   names of the arguments that it depends on
    value  a tensor, where it depends on none
    drift  by how much it grows where q and kv both grow by 1; 0: it depends on q - kv alone; None: not known
    """

    func: object
    args: tuple
    kwargs: dict
    deps: frozenset
    value: torch.Tensor | None
    drift: int | None


class Form(NamedTuple):
    """where(masks, softcap(score * factors) + biases, -inf).

    factors  numbers and nodes of heads; biases: (sign, node); masks: (node, what it is where a key is seen)
    """

    factors: list
    softcap: float
    biases: list
    masks: list


class LookUps(TorchFunctionMode):
    """x[i] and x[i, j] for indices that are tensors of one number each, which Python would ask for their values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, torch.Tensor) for x in places) and all(_is_place(x) for x in places):
                device = args[0].device
                places = [x if isinstance(x, torch.Tensor) else torch.tensor(x, device=device) for x in places]
                return _aten.index.Tensor(args[0], places)
        return func(*args, **(kwargs or {}))


def _is_place(x) -> bool:
    if isinstance(x, torch.Tensor):
        return x.dtype not in (torch.bool, torch.uint8)
    return isinstance(x, int) and not isinstance(x, bool)


def read(score_mod: Callable, dtype: torch.dtype, device: torch.device) -> tuple[Form | None, list[torch.Tensor]]:
    """(what `score_mod` does, None if that is not understood; the tensors that it captures and that want gradients)"""
    has_grad = torch.is_grad_enabled()
    # In inference mode, operators are recorded before they are taken apart.
    with torch.inference_mode(False), torch.set_grad_enabled(has_grad):
        score = torch.full((), 0.5, dtype=dtype, device=device)
        indices = [torch.zeros((), dtype=torch.int64, device=device) for _ in _INDICES]
        recorder = _Recorder(dict(zip(("score", *_INDICES), (score, *indices), strict=True)))
        with LookUps(), recorder:
            out = score_mod(score, *indices)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"score_mod returned {one_line(out)}; it must return a score, a tensor of one number")
    if recorder.captures and is_transformed():
        raise NotImplementedError(
            "a score_mod that captures tensors cannot be read inside of torch.func or forward-mode transforms: say it "
            "in arguments of fastattn.attention"
        )
    form = None if recorder.failed else _taken_apart(recorder.node_of(out))
    return form, recorder.captured


def evaluated(node: Node, given: dict) -> torch.Tensor:
    """The value of a node for tensors by name that broadcast, with the gradients of what the score_mod has captured."""
    done: dict[int, torch.Tensor] = {}

    def value(x):
        if isinstance(x, list):
            return [value(y) for y in x]
        if not isinstance(x, Node):
            return x
        if x.value is not None:
            return x.value
        if x.func is None:
            (name,) = x.deps
            return given[name]
        if id(x) not in done:
            done[id(x)] = x.func(*map(value, x.args), **x.kwargs)
        return done[id(x)]

    return value(node)


def has_gradient(node: Node) -> bool:
    """Whether a node depends on a captured tensor that wants a gradient."""
    if node.value is not None:
        return node.value.requires_grad
    return any(has_gradient(x) for x in _nodes(node.args))


def _nodes(args) -> list[Node]:
    found = []
    for x in args:
        if isinstance(x, Node):
            found.append(x)
        elif isinstance(x, list):
            found += _nodes(x)
    return found


class _Recorder(TorchDispatchMode):
    """Notes each operator that is called."""

    def __init__(self, leaves: dict[str, torch.Tensor]):
        super().__init__()
        self.failed, self.captures, self.captured = False, False, []
        self._nodes, self._kept = {}, {}  # by id, which is good while its tensor is kept
        for name, x in leaves.items():
            self._keep(x, Node(None, (), {}, frozenset({name}), None, int(name in ("q", "kv"))))

    def _keep(self, x: torch.Tensor, node: Node) -> None:
        self._nodes[id(x)], self._kept[id(x)] = node, x

    def node_of(self, x: torch.Tensor) -> Node:
        if id(x) not in self._nodes:
            self._keep(x, Node(None, (), {}, frozenset(), x, 0))
        return self._nodes[id(x)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and id(x) not in self._kept:
                self._kept[id(x)], self.captures = x, True
                if x.requires_grad:
                    self.captured.append(x)
        out = func(*args, **(kwargs or {}))
        self._kept |= {id(x): x for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if not isinstance(out, torch.Tensor) or func._schema.is_mutable:
            self.failed = True
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.failed = True
        else:
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func, args, kwargs, out) -> None:
        args = tuple(self._as_node(x) for x in args)
        inputs = _nodes(args)
        deps = frozenset().union(*[x.deps for x in inputs])
        if any(isinstance(x, torch.Tensor) for x in kwargs.values()):
            self.failed = True
        elif not deps:
            self._keep(out, Node(None, (), {}, deps, out, 0))
        elif out.dim() == 0 and (_is_look_up(func, args) or torch.Tag.pointwise in func.tags or func in _UNTAGGED):
            self._keep(out, Node(func, args, kwargs, deps, None, _drift(func, args, kwargs)))
        else:
            self.failed = True

    def _as_node(self, x):
        if isinstance(x, (list, tuple)):
            return [self._as_node(y) for y in x]
        return self.node_of(x) if isinstance(x, torch.Tensor) else x


def _is_look_up(func, args) -> bool:
    """One entry of a captured tensor, by a number for each of its dimensions."""
    if func is not _aten.index.Tensor:
        return False
    table, places = args
    return not table.deps and len(places) == table.value.dim() and all(isinstance(x, Node) for x in places)


def _drift(func, args, kwargs) -> int | None:
    drifts = [x.drift if isinstance(x, Node) else 0 for x in _flat(args)]
    if all(x == 0 for x in drifts):
        return 0
    if None in drifts or kwargs.get("alpha", 1) != 1 or len(args) > 2:
        return None
    if func in (_aten.add.Tensor, _aten.sub.Tensor):
        return drifts[0] + drifts[1] if func is _aten.add.Tensor else drifts[0] - drifts[1]
    if func.overloadpacket in _COMPARISONS and drifts[0] == drifts[1]:
        return 0
    if func is _aten.neg.default:
        return -drifts[0]
    return drifts[0] if func in _UNTAGGED else None


def _flat(args) -> list:
    return [y for x in args for y in (x if isinstance(x, list) else [x])]


# --- taking apart ----------------------------------------------------------------------------------------------------


def _taken_apart(node: Node) -> Form | None:
    masks, biases = [], []
    while node.func in (_aten.where.self, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor):
        if node.func is _aten.where.self:
            seen, yes, no = node.args
        else:
            no, seen, yes = node.args
        if _depends_on_score(seen):
            return None
        if _depends_on_score(yes) and _is_minus_infinity(no):
            masks.append((seen, True))
            node = yes
        elif _depends_on_score(no) and _is_minus_infinity(yes):
            masks.append((seen, False))
            node = no
        else:
            return None
    while node.func in (_aten.add.Tensor, _aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
        a, b = node.args[:2]
        if _depends_on_score(a) and not _depends_on_score(b):
            biases.append((1 if node.func is _aten.add.Tensor else -1, b))
            node = a
        elif node.func is _aten.add.Tensor and _depends_on_score(b) and not _depends_on_score(a):
            biases.append((1, a))
            node = b
        else:
            return None
    node, softcap = _without_softcap(node)
    factors = []
    while node.func in (_aten.mul.Tensor, _aten.div.Tensor):
        a, b = node.args
        if node.func is _aten.mul.Tensor and not _depends_on_score(a):
            a, b = b, a
        number = _number(b)
        is_of_heads = isinstance(b, Node) and b.deps <= {"h"} and node.func is _aten.mul.Tensor
        if not _depends_on_score(a) or _depends_on_score(b) or (number is None and not is_of_heads):
            return None
        factors.append(b if number is None else number if node.func is _aten.mul.Tensor else 1.0 / number)
        node = a
    is_score = node.func is None and node.deps == {"score"}
    return Form(factors, softcap, biases, masks) if is_score else None


def _without_softcap(node: Node) -> tuple[Node, float]:
    """(x, c) of c * tanh(x / c); (node, 0.0) where there is none."""
    cap, inner = 1.0, node
    if node.func is _aten.mul.Tensor:
        for tanh, number in (node.args, node.args[::-1]):
            if isinstance(tanh, Node) and tanh.func is _aten.tanh.default and _number(number) is not None:
                cap, inner = _number(number), tanh
    if inner.func is not _aten.tanh.default or not cap > 0.0:
        return node, 0.0
    x = inner.args[0]
    if x.func is _aten.div.Tensor and _number(x.args[1]) == cap:
        return x.args[0], cap
    if x.func is _aten.mul.Tensor:
        for inside, number in (x.args, x.args[::-1]):
            if _depends_on_score(inside) and _number(number) == 1.0 / cap:
                return inside, cap
    return (x, cap) if cap == 1.0 else (node, 0.0)


def _depends_on_score(x) -> bool:
    return isinstance(x, Node) and "score" in x.deps


def _number(x) -> float | None:
    """A number, also one that was captured as a tensor that wants no gradient."""
    if isinstance(x, Node) and x.value is not None and x.value.numel() == 1 and not x.value.requires_grad:
        x = x.value.item()
    return float(x) if isinstance(x, (int, float)) and x != 0 else None


def _is_minus_infinity(x) -> bool:
    return _number(x) == -torch.inf
