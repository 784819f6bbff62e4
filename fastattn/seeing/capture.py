"""`capture()`: weights and statistics of the attention calls of a model, while it runs."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from ..calls import recording
from ..checks import check_int, one_line
from ..problem import Problem
from ..torch_internals import is_in_backward, is_transformed
from .choice import part_of
from .stats import TopK, check_stats, stats_of
from .weights import weights_of


class Seen(NamedTuple):
    """What was seen of one attention call.

    layer    its number among the attention calls of a forward pass of the model
    name     the module that made the call, as in model.named_modules(); "" where it is not known
    problem  sizes and terms of the call
    weights  [batch, heads, rows, seqlen_k] as of `attention_weights`, or None
    stats    as of `attention_stats`; {} if none were asked for
    """

    layer: int
    name: str
    problem: Problem
    weights: torch.Tensor | None
    stats: dict[str, torch.Tensor | TopK]


class SeenCalls(list):
    """A `Seen` for each call, in their order."""

    def of(self, layer: int | str) -> list[Seen]:
        """Those of one layer, by its number or its name."""
        return [seen for seen in self if _is_of(seen, layer)]


@contextmanager
def capture(
    model: torch.nn.Module | None = None,
    *,
    layers: Iterable[int | str] | None = None,
    heads=None,
    rows=None,
    stats: Iterable[str] = (),
    top_k: int = 8,
) -> Iterator[SeenCalls]:
    """`with capture(model, rows=[-1]) as seen:` records what the attention calls of a model attend to, while it runs.

    model   whose calls are recorded, however they reach fastattn: `attention`, `scaled_dot_product_attention`, the
            transformers integration, an operator of a compiled graph. None: every call of this context (thread, task)
    layers  numbers (of the call in a forward pass of the model) and names of modules (one of which the calling module
            is part) to record; None: all
    heads   as in `attention_weights`
    rows    query rows whose weights are recorded, as in `attention_weights`; None: all of them, **n x n for each
            layer**, or none where `stats` is given
    stats   names of statistics of all rows, as in `attention_stats`, with its top_k

    Yields a list of `Seen`, which grows with each call and stays when the block ends; `seen.of(layer)` are those of one
    layer. Results are computed before the call runs, without gradients, and nothing of the call is kept.

    The model's results keep their bits: nothing is put into its place, and no random number is drawn. It may be in
    training, with dropout (weights are those before it) and checkpointing (what the backward pass computes again is
    not recorded again). Under torch.compile, pass what it returned as the model: its calls are recorded as they run,
    and have numbers but no names. After model.compile() pass model=None, which numbers all calls of the block.

    Not seen, with a RuntimeWarning: layouts other than dense, such as `attention_csr`, and calls inside torch.func
    transforms or forward mode; a block in which there was no call warns too. Outside of a block, a call costs nothing.

    Raises TypeError or ValueError that names the argument, for rows and heads when a call has not so many.
    """
    names = check_stats(stats)
    check_int("top_k", top_k, 1)
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    recorder = _Recorder(_checked_layers(layers), heads, rows, names, top_k, model is not None)
    with ExitStack() as stack:
        for name, module in () if model is None else model.named_modules():
            for handle in recorder.hooks(name, module):
                stack.callback(handle.remove)
        stack.enter_context(recording(recorder))
        yield recorder.seen
    if not recorder.count:
        hint = "; one that is compiled shows as what torch.compile returned, or as model=None" if model else ""
        warnings.warn(f"fastattn.capture saw no attention call of the model{hint}", RuntimeWarning, 3)


class _Recorder:
    def __init__(self, layers, heads, rows, stats: tuple[str, ...], top_k: int, has_model: bool):
        self.layers, self.heads, self.rows, self.stats, self.top_k = layers, heads, rows, stats, top_k
        self.has_model, self.seen, self.count = has_model, SeenCalls(), 0
        self.inside: list[str] = []  # names of the modules that are running, outermost first

    def hooks(self, name: str, module: torch.nn.Module) -> tuple:
        """Hooks of a module that tell who is running."""

        def enter(*_):
            if torch.compiler.is_compiling() or is_in_backward():
                return
            if not self.inside:
                self.count = 0
            self.inside.append(name)

        def leave(*_):
            if self.inside and not (torch.compiler.is_compiling() or is_in_backward()):
                self.inside.pop()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)

    def __call__(self, _, bound, q, k) -> None:
        _, problem, terms, _ = bound
        if problem.direction != "forward" or is_in_backward() or (self.has_model and not self.inside):
            return
        layer, name = self.count, self.inside[-1] if self.inside else ""
        self.count += 1
        if q is None or is_transformed():
            is_dense = problem.layout == "dense"
            what = "torch.func transforms and forward mode" if is_dense else f"layout {problem.layout}"
            warnings.warn(f"fastattn.capture does not see calls of {what}: [{problem}]", RuntimeWarning, 4)
            return
        found = Seen(layer, name, problem, None, {})
        if self.layers is None or any(_is_of(found, x) for x in self.layers):
            with torch.no_grad(), recording(None):
                self.seen.append(self._look(found, terms, q.detach(), k.detach()))

    def _look(self, found: Seen, terms, q, k) -> Seen:
        problem = found.problem
        if self.stats:
            call, tensors = part_of(problem, terms, q, k, None, None, self.heads, self.top_k)
            found = found._replace(stats=stats_of(call, tensors, self.stats))
        if self.rows is not None or not self.stats:
            found = found._replace(weights=weights_of(*part_of(problem, terms, q, k, None, self.rows, self.heads)))
        return found


def _is_of(seen: Seen, layer: int | str) -> bool:
    if isinstance(layer, int):
        return seen.layer == layer
    return seen.name == layer or seen.name.startswith(f"{layer}.")


def _checked_layers(layers) -> tuple[int | str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers={one_line(layers)} must be a list of numbers and names of layers")
    layers = tuple(layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"layers={one_line(layers)}: {one_line(layer)} must be an int or the name of a module")
    return layers
