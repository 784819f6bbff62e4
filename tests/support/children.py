"""Work in forked children and in threads."""

import multiprocessing

import numpy.testing  # noqa: F401  (a child forked while another thread is the first to import it would wait for that)
import pytest
import torch

import fastattn
from backward import SCORE_TENSORS

PATIENCE = 120  # seconds after which a child counts as hanging: a busy machine is slow


FORK = multiprocessing.get_context("fork")


def train(qkv, kwargs, of_bias=True):
    """(out, lse, gradient of everything that has one), with `out` as its own cotangent."""
    out, lse, leaves = graph(qkv, kwargs, of_bias)
    return out.detach(), lse.detach(), *gradients(out, leaves)


def graph(qkv, kwargs, of_bias=True):
    leaves = dict(zip("qkv", qkv, strict=True))
    leaves |= {name: kwargs[name] for name in SCORE_TENSORS if name in kwargs and (of_bias or name != "bias")}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out, lse = fastattn.attention(
        **leaves, **{name: x for name, x in kwargs.items() if name not in leaves}, return_lse=True, backend="cpu"
    )
    return out, lse, list(leaves.values())


def gradients(out, leaves, **options):
    grads = torch.autograd.grad(out, leaves, out.detach(), **options)
    assert fastattn.last_call().kernel == "cpu.backward"
    return grads


def forked(function, *arguments):
    """function(*arguments) of a forked child; fails where the child hangs or dies."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()  # or a child that died would look like one that hangs
    try:
        assert receiver.poll(PATIENCE), "the child hangs"
        return receiver.recv()
    except EOFError:
        child.join()
        pytest.fail(f"the child has died, exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()
