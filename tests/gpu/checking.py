"""The self-check in the interpreter: launches count as code that was loaded, as on a device; calls; faults."""

import contextlib

import pytest
import torch

import fastattn
from cases import Case
from fastattn import dispatch, plans
from fastattn.backends import proven, selfcheck, triton
from fastattn.kernels import launch, tuning
from on_device import on_device

BASE = Case(batch=2, num_heads=2, num_heads_k=1, seqlen_q=40, seqlen_k=50, head_dim=16, dtype="bfloat16", causal=True)


@contextlib.contextmanager
def compiling_device(folder):
    """A device that compiles, and a folder for what is proven."""
    prepare = launch._prepare

    def load(tensors, plan):
        described = plan.describe(*tensors[1:3]) if plan.describe else ()
        kinds = tuple(launch._kind_of(x, True) for x in (*tensors, *described, *plan.arguments))
        key = (plan.kernel, -1, kinds, tuple(plan.constexprs.items()), tuple(plan.options.items()))
        if key not in launch._loaded:
            launch._loaded[key] = None
            launch._history.append(key)
        return prepare(tensors, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_prepare", load)
        patch.setattr(selfcheck, "DEVICES", ["cpu"])
        patch.setenv("FASTATTN_TUNED", str(folder))
        begin_process()
        yield
        begin_process()


def begin_process() -> None:
    launch.forget(), plans.forget(), tuning._read.cache_clear(), proven._read.cache_clear(), triton.postponed.clear()
    selfcheck._looks.clear()


def without_cpu() -> tuple[dispatch.Row, ...]:
    """The kernels without those that would come first."""
    return tuple(row for row in dispatch.KERNELS if row.backend != "cpu")


def note_checks(patch: pytest.MonkeyPatch) -> list[str]:
    """What is compared, from now on."""
    found, complaint = [], selfcheck._complaint

    def note(compared):
        compared = list(compared)
        found.extend(x.where for x in compared)
        return complaint(compared)

    patch.setattr(selfcheck, "_complaint", note)
    return found


def attend(case: Case = BASE, needs_grad: bool = False, backend="triton", **more) -> list[torch.Tensor]:
    """out, lse and gradients of q, k and v."""
    qkv, kwargs = on_device(case)
    qkv = [x.requires_grad_(needs_grad) for x in qkv]
    out, lse = fastattn.attention(*qkv, **kwargs | more, return_lse=True, backend=backend)
    if not needs_grad:
        return [out, lse]
    douts = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype) for x in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), qkv, douts)]


def wrong(module, name: str, change):
    """`module.name` whose results are changed in place before anybody sees them."""
    function = getattr(module, name)

    def run(*args, **kwargs):
        found = function(*args, **kwargs)
        change(found)
        return found

    return run


def add_to(place: int, index: tuple, value: float = 0.5):
    """A fault that changes one row of a result."""

    def change(found) -> None:
        found[place][index] += value

    return change
