"""What only a GPU can show: streams, graphs, synchronization, memory, tiles of full size.

Written without one and never run. `make test-gpu` runs it, after the parity suite.
"""

import process

process.require_gpu()

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from cases import Case  # noqa: E402
from fastattn import Mask, dispatch  # noqa: E402
from on_device import assert_backward, assert_forward, on_device  # noqa: E402

(PREFILL,) = [row for row in dispatch.KERNELS if row.name == "triton.prefill"]
SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=300, head_dim=64, dtype="bfloat16", causal=True)


def attend(case: Case = SMALL, backward: bool = True, **more) -> list[torch.Tensor]:
    """out, and the gradients of q, k and v."""
    qkv, kwargs = on_device(case)
    if not backward:
        return [fastattn.attention(*qkv, **kwargs | more, backend="triton")]
    qkv = [x.requires_grad_() for x in qkv]
    out = fastattn.attention(*qkv, **kwargs | more, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tiles_of_full_size(dtype, head_dim, causal):
    """Every width of tiles, over several of them; keys by TMA where the device has it."""
    case = Case(num_heads=4, num_heads_k=2, seqlen_q=700, seqlen_k=900, head_dim=head_dim, dtype=dtype, causal=causal)
    assert_forward(PREFILL, case)
    assert_backward(case)


@pytest.mark.parametrize("more", [{}, {"dropout_p": 0.3, "seed": 5}, {"softcap": 3.0}])
def test_the_same_bits_twice(more):
    assert all(torch.equal(x, y) for x, y in zip(attend(**more), attend(**more), strict=True))


def test_a_row_does_not_depend_on_the_batch():
    (q, k, v), kwargs = on_device(SMALL._replace(batch=3))
    both = fastattn.attention(q, k, v, **kwargs, backend="triton")
    for row in range(3):
        alone = fastattn.attention(*(x[row : row + 1] for x in (q, k, v)), **kwargs, backend="triton")
        assert torch.equal(both[row : row + 1], alone)


def test_nothing_waits_for_the_device():
    """Neither a call, nor its gradients, nor a call that is refused."""
    (q, k, v), kwargs = on_device(SMALL)
    q.requires_grad_()
    starts = torch.zeros(1, 1, SMALL.seqlen_q, dtype=torch.int32, device="cuda")
    dout = torch.ones_like(q)

    def call():
        out = fastattn.attention(q, k, v, mask=Mask.intervals(starts, None), **kwargs, backend="triton")
        torch.autograd.grad(out, q, dout)

    call()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        with pytest.raises(ValueError, match="num_heads"):
            fastattn.attention(q[:, :3], k, v, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream():
    (q, k, v), kwargs = on_device(SMALL)
    expected = fastattn.attention(q, k, v, **kwargs, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(100_000_000)  # clocks: what ran on another stream would read the zeros
        late.copy_(q)
        found = fastattn.attention(late, k, v, **kwargs, backend="triton")
    stream.synchronize()
    assert torch.equal(found, expected)


def test_a_graph():
    """Captured once, replayed with other values."""
    (q, k, v), kwargs = on_device(SMALL)
    fastattn.attention(q, k, v, **kwargs, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, k, v, **kwargs, backend="triton")
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, fastattn.attention(q, k, v, **kwargs, backend="triton"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    (q, k, v), kwargs = on_device(SMALL)
    expected = fastattn.attention(q, k, v, **kwargs, backend="triton")
    found = fastattn.attention(*(x.to("cuda:1") for x in (q, k, v)), **kwargs, backend="triton")
    assert found.get_device() == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(found.cpu(), expected.cpu())


def test_memory_is_linear():
    """Forward and backward of 8192 tokens: the scores alone would be 512 MiB in bfloat16."""
    case = Case(num_heads=4, seqlen_q=8192, head_dim=64, dtype="bfloat16", causal=True)
    on_device(case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(case)
    tensor = 4 * 8192 * 64 * 2
    assert torch.cuda.max_memory_allocated() - before < 24 * tensor


def test_launches_are_triton_kernels():
    with fastattn.record() as calls:
        attend()
        attend(SMALL._replace(seqlen_q=1, seqlen_k=900), backward=False)
    assert [call.kernel for call in calls] == ["triton.prefill", "triton.backward", "triton.decode"]
