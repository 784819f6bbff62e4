"""What `bench/parallel.py` compares with: ring-flash-attention's algorithm, and torch's `context_parallel`.

The first is written from its description (https://github.com/zhuzilin/ring-flash-attention, and Ring Attention, arXiv
2310.01889): all keys and values go once around all ranks, in zig-zag shards with half blocks, and their gradients go
along in float32. Blocks are computed by torch's flash kernel for CPUs, or by that of fastattn.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastattn
from fastattn.backends import cpu
from fastattn.outputs import lse_parts
from fastattn.terms import TERMS, Terms

_NOT_WANTED = Terms._make([False] * len(TERMS))
_aten = torch.ops.aten


class TorchBlocks:
    """The kernel of `F.scaled_dot_product_attention` for CPUs, with its lse."""

    @staticmethod
    def forward(q, k, v, causal):
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    @staticmethod
    def backward(dout, q, k, v, out, lse, causal):
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)


class OwnBlocks:
    """`fastattn.attention`, and its gradients from an lse that is not its own."""

    @staticmethod
    def forward(q, k, v, causal):
        return fastattn.attention(q, k, v, causal=causal, return_lse=True)

    @staticmethod
    def backward(dout, q, k, v, out, lse, causal):
        _, problem, terms, _ = fastattn.api.bind(q, k, v, causal=causal)
        saved, wanted = (out, lse_parts(lse, lse.dtype, "cpu")), (True, True, True, _NOT_WANTED)
        return cpu.backward(problem, q, k, v, terms, saved, dout, None, wanted)[:3]


class Ring:
    """Sends tensors to the next rank of a group, and receives those of the one before."""

    sent = 0

    def __init__(self, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.next, self.before, self.group, self.works = (rank + 1) % size, (rank - 1) % size, group, []

    def pass_on(self, *tensors) -> list[torch.Tensor]:
        """What comes, once `wait` has returned."""
        coming = [torch.empty_like(x) for x in tensors]
        operations = [dist.P2POp(dist.irecv, x, self.before, self.group) for x in coming]
        operations += [dist.P2POp(dist.isend, x, self.next, self.group) for x in tensors]
        self.works = dist.batch_isend_irecv(operations)
        Ring.sent += sum(x.nbytes for x in tensors)
        return coming

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []


class RingFlash(torch.autograd.Function):
    """Causal attention of local rows: apply(group, blocks, zigzag, q, k, v)."""

    @staticmethod
    def forward(ctx, group, blocks, zigzag, q, k, v):
        ring, rank, size = Ring(group), dist.get_rank(group), dist.get_world_size(group)
        out, lse, keys = None, None, [k.contiguous(), v.contiguous()]
        for step in range(size):
            coming = ring.pass_on(*keys) if step + 1 < size else None
            part = _part(step, rank, q.shape[2], zigzag)
            if part is not None:
                rows, columns = part
                found = blocks.forward(q[:, :, rows], *[x[:, :, columns] for x in keys], step == 0)
                if step == 0:
                    out, lse = (x.clone() for x in found)
                else:
                    _merge(out[:, :, rows], lse[:, :, rows], *found)
            ring.wait()
            keys = coming or keys
        ctx.call = group, blocks, zigzag
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        (group, blocks, zigzag), (q, k, v, out, lse) = ctx.call, ctx.saved_tensors
        of_keys, of_gradients, rank = Ring(group), Ring(group), dist.get_rank(group)
        size, keys, sums = dist.get_world_size(group), [k.contiguous(), v.contiguous()], None
        dq = torch.zeros_like(q)
        for step in range(size):
            coming = of_keys.pass_on(*keys) if step + 1 < size else None
            part, own = _part(step, rank, q.shape[2], zigzag), [torch.zeros_like(x) for x in keys]
            if part is not None:
                rows, columns = part
                parts = [x[:, :, rows].contiguous() for x in (dout, q)]
                of_rows = [x[:, :, rows].contiguous() for x in (out, lse)]
                dq_part, *found = blocks.backward(*parts, *[x[:, :, columns] for x in keys], *of_rows, step == 0)
                dq[:, :, rows] += dq_part
                for x, y in zip(own, found, strict=True):
                    x[:, :, columns] += y
            of_gradients.wait()
            sums = own if sums is None else [x + y for x, y in zip(own, sums, strict=True)]
            sums = of_gradients.pass_on(*sums)
            of_keys.wait()
            keys = coming or keys
        of_gradients.wait()
        return None, None, None, dq, *sums


def _part(step: int, rank: int, rows: int, zigzag: bool):
    """Which queries see which keys of those that are here in a step, as slices; None: no query sees any."""
    whole, half = slice(None), rows // 2
    if step == 0:
        return whole, whole
    if step <= rank:
        return (whole, slice(half)) if zigzag else (whole, whole)
    return (slice(half, None), whole) if zigzag else None


def _merge(out, lse, block_out, block_lse) -> None:
    """As ring-flash-attention does it, in place."""
    out -= torch.sigmoid(block_lse - lse)[..., None] * (out - block_out)
    lse -= F.logsigmoid(lse - block_lse)


def train_ring(blocks, zigzag: bool, mesh, qkv) -> list[torch.Tensor]:
    """out and the gradients of q, k, v, with out as its own cotangent."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = RingFlash.apply(mesh.get_group(), blocks, zigzag, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def train_context_parallel(mesh, whole) -> list[torch.Tensor]:
    """The same by torch's own, which cuts whole tensors itself, in zig-zag shards."""
    from torch.distributed.tensor.experimental import context_parallel

    buffers = [x.clone() for x in whole]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 3):
        leaves = [x.clone().requires_grad_() for x in buffers]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]
