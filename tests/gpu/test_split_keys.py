"""Few queries against many keys: when keys are split, and what comes out, beside the reference in float64."""

import process

process.require_runnable()

import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import fastattn  # noqa: E402
from cases import Case  # noqa: E402
from fastattn import BlockMask, Mask, dispatch  # noqa: E402
from fastattn.kernels import config, decode, launch, lists  # noqa: E402
from fastattn.problem import Problem  # noqa: E402
from on_device import DEVICE, assert_forward, on_device  # noqa: E402

if process.INTERPRETED:
    from strict_interpreter import harden

    harden()

(ROW,) = [row for row in dispatch.KERNELS if row.name == "triton.decode"]
H100 = config.Device("sm_90", 227 * 1024, 132)
CHUNK = Problem("cuda", "bfloat16", 1, 32, 100_000, 32, 8, 128, 128)


@pytest.fixture(autouse=True)
def a_small_device(monkeypatch):
    """As many multiprocessors as the interpreter says, so that a GPU splits these, too."""
    device_facts = launch.device_facts
    monkeypatch.setattr(launch, "device_facts", lambda index: device_facts(index)._replace(num_sms=8))
    launch.forget()
    yield
    launch.forget()


@pytest.mark.parametrize("changed, prefill", [
    ({}, False),
    ({"seqlen_q": 16}, False),
    ({"seqlen_q": 256}, False),  # 64 programs of 128 queries, of 132
    ({"num_heads": 64, "seqlen_q": 256}, True),  # 128
    ({"num_heads": 128, "seqlen_q": 17}, True),
    ({"seqlen_k": 500}, True),  # too few for more than two splits
    ({"seqlen_q": 256, "num_heads": 4, "num_heads_k": 2, "seqlen_k": 256}, True),  # one split, of smaller tiles
    ({"batch": 1000}, False),  # the bits of one sequence are those of any batch
])  # fmt: skip
def test_prefill_where_it_keeps_multiprocessors_busy(changed, prefill):
    problem = CHUNK._replace(**changed)
    if problem.seqlen_q > 16:
        assert (decode.declines(problem, H100) is not None) == prefill
    _, num_splits = decode.split_keys(problem, H100)
    assert prefill or num_splits > 1


def test_explain_and_last_call_say_which():
    """Of 8 multiprocessors, 2 heads of 64 queries keep 2 busy, and 8 heads all."""
    (q, k, v), _ = on_device(Case(num_heads=8, seqlen_q=40, seqlen_k=600, head_dim=16))
    fastattn.attention(q[:, :2], k[:, :2], v[:, :2], backend="triton")
    assert fastattn.last_call().kernel == "triton.decode"
    text = fastattn.explain(q, k, v, backend="triton")
    assert "refused: seqlen_q=40 (8 programs of prefill for 8 multiprocessors)" in text
    text = fastattn.explain(q[:, :2], k[:, :2, :200], v[:, :2, :200], backend="triton")
    assert "refused: seqlen_k=200 (split, 2 programs; in prefill, 2)" in text


def test_the_device_of_the_tensors_decides(monkeypatch):
    """Whichever is current: of 132 multiprocessors, 8 programs leave most idle; of 8, none."""
    monkeypatch.setattr(launch, "device_facts", lambda index: H100._replace(num_sms=(132, 8)[index]))
    for index, name in enumerate(("triton.decode", "triton.prefill")):
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 8, s, 64, dtype=torch.half, device=f"cuda:{index}") for s in (40, 4000, 4000))
            assert fastattn.api.bind(q, k, v, backend="triton").choice.row.name == name
            refused = "(8 programs of prefill for 8 multiprocessors)" in fastattn.explain(q, k, v, backend="triton")
            assert refused == (index == 1)


CHUNKS = Case(num_heads=2, num_heads_k=1, seqlen_q=40, seqlen_k=601, head_dim=32)
CASES = [
    CHUNKS._replace(causal=True, dtype="bfloat16"),
    CHUNKS._replace(window_size=(300, 3), dtype="float16", head_dim_v=24),
    CHUNKS._replace(num_heads=1, seqlen_q=129, seqlen_k=1100, causal=True, sinks=True),
    CHUNKS._replace(num_heads=4, num_heads_k=2, mask="intervals", bias="per_head"),
    CHUNKS._replace(batch=2, mask="tensor_per_head", softcap=5.0, seqlen_q=18, seqlen_k=800),
    CHUNKS._replace(seqlen_q=20, seqlen_k=800, dropout_p=0.2, alibi=True, dtype="float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case):
    assert_forward(ROW, case)


@pytest.mark.parametrize("seqlen_q", [3, 40])
def test_nan_of_a_key_that_one_query_sees(seqlen_q):
    """The last one: no other query has it in any split."""
    (q, k, v), _ = on_device(CHUNKS._replace(seqlen_q=seqlen_q))
    k[:, :, -1], v[:, :, -1] = float("nan"), float("inf")
    out = fastattn.attention(q, k, v, causal=True, backend="triton")
    assert fastattn.last_call().kernel == "triton.decode" and out[:, :, :-1].isfinite().all()
    expected = fastattn.attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_a_batch_changes_no_bits():
    (q, k, v), _ = on_device(CHUNKS._replace(batch=2))
    both = fastattn.attention(q, k, v, causal=True, backend="triton")
    alone = fastattn.attention(*(x[1:] for x in (q, k, v)), causal=True, backend="triton")
    assert torch.equal(alone, both[1:])


# --- block masks -----------------------------------------------------------------------------------------------------

BLOCKS = Case(num_heads=4, num_heads_k=2, seqlen_q=40, seqlen_k=700, head_dim=32, mask="shared_blocks")
LISTED = [  # "blocks": of each head, in lines of 32 queries; "shared_blocks": of all, in lines of 64
    BLOCKS._replace(mask="blocks", num_heads=2, num_heads_k=1),
    BLOCKS._replace(mask="blocks", num_heads=2, num_heads_k=1, batch=2, seqlen_q=3, dtype="bfloat16", causal=True),
    BLOCKS._replace(mask="blocks", seqlen_q=1, seqlen_k=90),  # one split
    BLOCKS._replace(window_size=(600, 3), dtype="float16", head_dim_v=24, seqlen_k=1100),
    BLOCKS._replace(seqlen_q=16, bias="per_head", sinks=True, alibi=True),
    BLOCKS._replace(seqlen_q=2, learned_scale="per_head", dtype="bfloat16"),
    BLOCKS._replace(num_heads=2, num_heads_k=1, seqlen_q=70, dropout_p=0.2, softcap=5.0),
]


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_parity_of_block_masks(case):
    assert_forward(ROW, case)


@pytest.mark.parametrize("changed, heads_in_tile", [
    ({}, 2),
    ({"mask": "blocks"}, 1),
    ({"mask": "blocks", "seqlen_q": 3}, 1),
    ({"seqlen_q": 70}, 1),  # two lines
])  # fmt: skip
def test_heads_share_tiles_where_they_share_one_line(changed, heads_in_tile):
    (q, k, v), kwargs = on_device(BLOCKS._replace(**changed))
    problem, of_mask = fastattn.api.bind(q, k, v, **kwargs).problem, lists.lists_of(kwargs["mask"])
    assert decode.as_shared(problem, of_mask).group_size == heads_in_tile


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_lists_of_one_kind(share):
    """No blocks, partial ones alone, full ones alone, of which the last reaches past the keys."""
    (q, k, v), _ = on_device(BLOCKS._replace(num_heads=2, num_heads_k=1, mask=None))
    seen = torch.rand(1, 1, 40, 700, generator=torch.Generator().manual_seed(0)) < share
    mask = BlockMask.from_dense(seen, block_size=64).to(DEVICE)
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend="triton")
    assert fastattn.last_call().kernel == "triton.decode"
    expected = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    torch.testing.assert_close((out, lse), expected)


def test_a_batch_changes_no_bits_of_block_masks():
    """Not even another sequence whose lists are longer."""
    (q, k, v), _ = on_device(BLOCKS._replace(num_heads=2, num_heads_k=1, batch=2, seqlen_q=3, mask=None))
    seen = torch.rand(2, 1, 3, 700, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[0, :, :, 130:] = False
    both, alone = (BlockMask.from_dense(x, block_size=64).to(DEVICE) for x in (seen, seen[:1]))
    assert alone.kv_indices.shape[-1] < both.kv_indices.shape[-1]
    options = {"dropout_p": 0.2, "seed": 1, "backend": "triton"}
    expected = fastattn.attention(q, k, v, mask=both, **options)[:1]
    assert fastattn.last_call().kernel == "triton.decode"
    assert torch.equal(fastattn.attention(*(x[:1] for x in (q, k, v)), mask=alone, **options), expected)


@pytest.mark.parametrize("block_size", [64, (16, 32)])
def test_nan_of_keys_that_few_queries_see_in_blocks(block_size):
    """The last one, which one query sees, and those before 270, which none does."""
    (q, k, v), _ = on_device(BLOCKS._replace(num_heads=2, num_heads_k=1, mask=None))
    mask = BlockMask.from_mask(Mask.window(390, 0), seqlen_q=40, seqlen_k=700, block_size=block_size).to(DEVICE)
    k[:, :, -1], v[:, :, -1] = float("nan"), float("inf")
    k[:, :, :270], v[:, :, :270] = float("inf"), float("nan")  # of blocks that are visited, and that are not
    out = fastattn.attention(q, k, v, mask=mask, backend="triton")
    assert fastattn.last_call().kernel == "triton.decode" and out[:, :, :-1].isfinite().all()
    expected = fastattn.attention(q, k, v, mask=mask, backend="reference")
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_packed_sequences():
    """Few queries in all: one sequence in several, each against keys of its own."""
    (q, k, v), _ = on_device(CHUNKS._replace(seqlen_q=20, seqlen_k=700))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    lengths = torch.tensor([0, 3, 20], dtype=torch.int32), torch.tensor([0, 400, 700], dtype=torch.int32)
    call = fastattn.attention_varlen, (q, k, v, *(x.to(DEVICE) for x in lengths)), {"causal": True}
    out = call[0](*call[1], **call[2], backend="triton")
    expected = call[0](*call[1], **call[2], backend="reference")
    torch.testing.assert_close(out, expected)
