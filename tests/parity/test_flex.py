"""fastattn.compat.flex against torch's eager definition of FlexAttention, which autograd goes through."""

import math
import random
import warnings
from importlib import import_module

import pytest
import torch

import fastattn
from fastattn import BlockMask
from fastattn.compat import flex

theirs = pytest.importorskip("torch.nn.attention.flex_attention")
hop = import_module("torch._higher_order_ops.flex_attention")  # an attribute of the same name hides the module
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def tensors(seqlen_q=37, seqlen_k=37, heads=4, heads_k=2, batch=2):
    return [
        normal(batch, n, seqlen, size).requires_grad_()
        for n, seqlen, size in ((heads, seqlen_q, 8), (heads_k, seqlen_k, 8), (heads_k, seqlen_k, 6))
    ]


def eager(q, k, v, score_mod=None, block_mask=None, scale=None):
    """(out, lse) by torch's own eager implementation, on tensors that want gradients."""
    score_mod = theirs._identity if score_mod is None else score_mod
    block_mask = theirs._create_empty_block_mask(q, k) if block_mask is None else block_mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, _ = hop.math_attention(q, k, v, score_mod, block_mask.as_tuple(), scale, {})
    return out, lse * math.log(2)


def agree(inputs, score_mod, more=(), same=None, **options):
    """same: the score_mod in a form that torch differentiates."""
    found = flex.flex_attention(*inputs, score_mod, enable_gqa=True, return_lse=True, **options)
    expected = eager(*inputs, same or score_mod, **options)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    leaves = [*inputs, *more]
    cotangents = normal(*found[0].shape), normal(*found[1].shape)
    cotangents[1][found[1] == -torch.inf] = 0.0
    grads = torch.autograd.grad(found, leaves, cotangents)
    oracle = torch.autograd.grad(expected, leaves, cotangents)
    oracle = [x.nan_to_num() for x in oracle]  # torch's rows that see nothing
    torch.testing.assert_close(grads, tuple(oracle), rtol=1e-6, atol=1e-7)


SLOPES = 2.0 ** -torch.arange(1.0, 5.0).double()
DOCUMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor([10, 15, 12]))
INF = float("inf")

FUSED = {
    "identity": (lambda s, b, h, i, j: s, {}),
    "causal": (lambda s, b, h, i, j: torch.where(i >= j, s, -INF), {"mask": "causal"}),
    "causal, the other way": (lambda s, b, h, i, j: torch.where(j > i, -INF, s), {"mask": "causal"}),
    "causal, masked_fill": (lambda s, b, h, i, j: s.masked_fill(i < j, -INF), {"mask": "causal"}),
    "window": (lambda s, b, h, i, j: torch.where((i - j <= 5) & (j <= i + 2), s, -INF), {"mask": "window"}),
    "documents": (lambda s, b, h, i, j: torch.where(DOCUMENTS[i] == DOCUMENTS[j], s, -INF), {"mask": "block"}),
    "heads' masks": (lambda s, b, h, i, j: torch.where((i + h) % 3 != j % 3, s, -INF), {"mask": "block"}),
    "softcap": (lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0), {"softcap": True}),
    "softcap, causal": (
        lambda s, b, h, i, j: torch.where(i >= j, torch.tanh(s / 4) * 4, -INF),
        {"softcap": True, "mask": "causal"},
    ),
    "scaled": (lambda s, b, h, i, j: s * 0.5, {}),
    "alibi": (lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(), {"alibi": True}),
    "alibi, causal": (
        lambda s, b, h, i, j: torch.where(i >= j, s + SLOPES[h] * (j - i), -INF),
        {"alibi": True, "mask": "causal"},
    ),
    "alibi, computed": (lambda s, b, h, i, j: s + torch.exp2(-(h + 1) * 2.0) * -(i - j).abs(), {"alibi": True}),
    "bias of keys": (lambda s, b, h, i, j: s + j / 8 + h * 0.5, {"bias": "float32"}),
}


def facts_of(problem):
    """What of a problem is not as in plain attention, by name."""
    found = {name: getattr(problem, name) for name in ("softcap", "alibi", "bias", "mask", "learned_scale")}
    return {name: x for name, x in found.items() if x and x != "none"}


@pytest.mark.parametrize("name", FUSED)
def test_known_score_mods_are_fused(name):
    score_mod, facts = FUSED[name]
    inputs = tensors()
    agree(inputs, score_mod)
    assert facts_of(fastattn.last_call().problem) == facts


def test_captured_tensors_get_gradients_through_fused_calls():
    slopes, scale, table, of_keys = leaves = [
        x.requires_grad_() for x in (SLOPES.clone(), normal(4), normal(4, 40, 40), normal(2, 37))
    ]
    agree(tensors(), lambda s, b, h, i, j: torch.where(i >= j, s + slopes[h] * (j - i), -INF), [slopes])
    assert facts_of(fastattn.last_call().problem) == {"alibi": True, "mask": "causal"}
    agree(tensors(), lambda s, b, h, i, j: s * scale[h], [scale])
    assert facts_of(fastattn.last_call().problem) == {"learned_scale": True}
    agree(tensors(), lambda s, b, h, i, j: s + table[h, i, j], [table])
    assert facts_of(fastattn.last_call().problem) == {"bias": "float64"}
    agree(tensors(), lambda s, b, h, i, j: s + torch.sin(of_keys[b, j]), [of_keys])
    assert facts_of(fastattn.last_call().problem) == {"bias": "float64"}
    agree(
        tensors(),
        lambda s, b, h, i, j: s - slopes[h] * (i - j).abs() + of_keys[b, j] * scale[h],
        leaves[:2] + leaves[3:],
    )
    assert facts_of(fastattn.last_call().problem) == {"alibi": True, "bias": "float64"}


TABLE = normal(4, 80).requires_grad_()
VECTORS = normal(37, 3).requires_grad_()
WEIGHT = normal(1).requires_grad_()

DIAGONAL = {
    "relative table": (lambda s, b, h, i, j: s + TABLE[h, i - j + 40], [TABLE]),
    "computed table": (
        lambda s, b, h, i, j: s - TABLE.sin().T[j - i + 40, h],
        [TABLE],
        lambda s, b, h, i, j: s - torch.sin(TABLE[h, j - i + 40]),
    ),
    "slope that is no factor": (lambda s, b, h, i, j: s - ((i - j).abs() * SLOPES[h] + WEIGHT[0] * (i == j)), [WEIGHT]),
    "negative slopes": (lambda s, b, h, i, j: s + SLOPES[h] * (i - j).abs(), []),
    "two": (lambda s, b, h, i, j: s + TABLE[b, i - j + 40] - TABLE[h, j - i + 39] + 0.5 * (i > j), [TABLE]),
    "clipped": (lambda s, b, h, i, j: s + TABLE[h, torch.clamp(i - j, -4, 4) + 4], [TABLE]),
}


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.parametrize("lengths", [(37, 37), (20, 37), (37, 9)])
def test_biases_of_distances_are_fused(name, lengths):
    score_mod, more, *same = DIAGONAL[name]
    agree(tensors(*lengths), score_mod, more, *same)
    assert facts_of(fastattn.last_call().problem) == {} and fastattn.last_call().problem.relative


ARBITRARY = {
    "look-ups one after the other": (
        lambda s, b, h, i, j: s + TABLE[h][i - j + 40],
        [TABLE],
        lambda s, b, h, i, j: s + TABLE[h, i - j + 40],
    ),
    "vectors": (
        lambda s, b, h, i, j: s + (VECTORS[i] * VECTORS[j]).sum(),
        [VECTORS],
        lambda s, b, h, i, j: s + sum(VECTORS[i, x] * VECTORS[j, x] for x in range(3)),
    ),
    "function of the score": (lambda s, b, h, i, j: s + WEIGHT[0] * torch.sin(s) * (i - j), [WEIGHT]),
    "mask of scores": (lambda s, b, h, i, j: torch.where(s > 0.0, s, -INF), []),
    "mask inside of a bias": (lambda s, b, h, i, j: torch.where(i >= j, s, -INF) + 0.1 * (i % 3), []),
    "two kinds of bias": (lambda s, b, h, i, j: s + TABLE[h, i - j + 40] + VECTORS[j, 0], [TABLE, VECTORS]),
    "product of positions": (lambda s, b, h, i, j: s + WEIGHT[0] * i * j / 100, [WEIGHT]),
    "cap that is not the divisor": (lambda s, b, h, i, j: 2.0 * torch.tanh(s / 3.0), []),
    "captured cap": (lambda s, b, h, i, j: WEIGHT[0] * torch.tanh(s / WEIGHT[0]), [WEIGHT]),
}


@pytest.mark.parametrize("name", ARBITRARY)
@pytest.mark.parametrize("rows", [5, 128])
def test_any_other_score_mod_runs_in_blocks_of_rows(name, rows, monkeypatch):
    score_mod, more, *same = ARBITRARY[name]
    monkeypatch.setattr(flex, "_ROWS", (rows, rows))
    with fastattn.record() as calls:
        agree(tensors(), score_mod, more, *same)
    assert not calls


@pytest.mark.parametrize("lengths", [(20, 37), (37, 20), (1, 9), (130, 150)])
def test_lengths_that_differ(lengths):
    for score_mod in (
        lambda s, b, h, i, j: torch.where(i >= j, s, -INF),
        lambda s, b, h, i, j: torch.where(i + lengths[1] - lengths[0] >= j, s, -INF),
        lambda s, b, h, i, j: torch.where(i - 3 >= j, s, -INF),
        lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(),
        lambda s, b, h, i, j: s - SLOPES[h] * (i + lengths[1] - lengths[0] - j).abs(),
    ):
        agree(tensors(*lengths), score_mod)


MASK_PARTS = [
    "i >= j",
    "(i - j).abs() < 9",
    "j % 3 != 1",
    "(i // 8) == (j // 8)",
    "i + h >= j",
    "i - j > 3",
    "j < 20 + b",
]
BIAS_PARTS = ["-SLOPES[h] * (i - j).abs()", "TABLE[h, i - j + 40]", "0.1 * (i - j)", "0.5 * h", "TABLE[b, i] * 2"]
BIAS_PARTS += ["WEIGHT[0] * i * j / 50", "TABLE[h, (i - j).clamp(-3, 3) + 3]", "torch.where(i > j, SLOPES[h], 0.3)"]
SCORE_PARTS = [
    "s",
    "s * 0.7",
    "s / 2",
    "-s",
    "s * SLOPES[h]",
    "3.0 * torch.tanh(s / 3.0)",
    "torch.tanh(s)",
    "s + 0.1 * s * s",
]


@pytest.mark.parametrize("seed", range(25))
def test_random_score_mods(seed):
    """Whatever is read off a score_mod, right or not at all."""
    chance = random.Random(seed)
    text = chance.choice(SCORE_PARTS)
    for _ in range(chance.randint(0, 2)):
        text = f"({text}) {chance.choice('+-')} ({chance.choice(BIAS_PARTS)})"
    for _ in range(chance.randint(0, 2)):
        text = f"torch.where({chance.choice(MASK_PARTS)}, {text}, -INF)"
    inputs, score_mod = tensors(*chance.choice([(37, 37), (20, 37), (37, 20)])), eval(f"lambda s, b, h, i, j: {text}")
    found = flex.flex_attention(*inputs, score_mod, enable_gqa=True, return_lse=True)
    expected = eager(*inputs, score_mod)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, msg=lambda message: f"{text}: {message}")
    cotangent = normal(*found[0].shape)
    grads = torch.autograd.grad(found[0], inputs, cotangent)
    oracle = [x.nan_to_num() for x in torch.autograd.grad(expected[0], inputs, cotangent)]
    torch.testing.assert_close(grads, tuple(oracle), rtol=1e-5, atol=1e-5, msg=lambda message: f"{text}: {message}")


def test_block_masks_and_score_mods_combine():
    inputs = tensors(130, 130)
    for sees in (lambda b, h, i, j: (i >= j) & (j % 7 != 0), lambda b, h, i, j: (i - j).abs() < 20 + 5 * h + b):
        block_mask = flex.create_block_mask(sees, 2, 4, 130, 130, BLOCK_SIZE=32)
        ours = BlockMask.from_mask_mod(sees, batch=2, num_heads=4, seqlen_q=130, block_size=32)
        for name in ("identity", "window", "heads' masks", "alibi", "softcap"):
            agree(inputs, FUSED[name][0], block_mask=block_mask)
        agree(inputs, lambda s, b, h, i, j: s * torch.cos(s), block_mask=block_mask)
        agree(inputs, None, block_mask=block_mask, scale=0.1)
        for score_mod in (None, FUSED["window"][0], lambda s, b, h, i, j: s * torch.cos(s)):
            found = (flex.flex_attention(*inputs, score_mod, mask, enable_gqa=True) for mask in (block_mask, ours))
            torch.testing.assert_close(*found)


def test_rows_that_see_nothing():
    for score_mod in (
        lambda s, b, h, i, j: torch.where((i > 3) & (i >= j), s, -INF),
        lambda s, b, h, i, j: torch.where(i > 3, torch.sin(s), -INF),
    ):
        inputs = tensors()
        out, lse = flex.flex_attention(*inputs, score_mod, enable_gqa=True, return_lse=True)
        assert not out[:, :, :4].any() and (lse[:, :, :4] == -INF).all()
        agree(inputs, score_mod)


def test_zero_lengths_and_one_batch_of_keys():
    def score_mod(s, b, h, i, j):
        return torch.sin(s) + b

    for rows, keys in ((0, 5), (5, 0)):
        q, k, v = tensors(rows, keys)
        out = flex.flex_attention(q, k, v, score_mod, enable_gqa=True)
        assert out.shape == (2, 4, rows, 6) and not out.any()
    q, k, v = tensors()
    shared = flex.flex_attention(q, k[:1], v[:1], score_mod, enable_gqa=True)
    torch.testing.assert_close(
        shared, flex.flex_attention(q, *(x[:1].repeat(2, 1, 1, 1) for x in (k, v)), score_mod, enable_gqa=True)
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_forward_is_that_of_the_public_function(dtype, tolerance):
    q, k, v = (x.detach().to(dtype) for x in tensors())
    for score_mod in (FUSED["alibi, causal"][0], FUSED["softcap"][0], lambda s, b, h, i, j: s * torch.cos(s) + h):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled, and that return_lse has another name
            expected = theirs.flex_attention(q, k, v, score_mod, enable_gqa=True, return_lse=True)
        found = flex.flex_attention(q, k, v, score_mod, enable_gqa=True, return_lse=True)
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_derivatives_of_any_score_mod():
    inputs = [x.detach()[:1, :2, :5].clone().requires_grad_() for x in tensors(5, 5, heads_k=4)]

    def run(q, k, v, table):
        table = table.sin()  # captured, and no leaf
        return flex.flex_attention(q, k, v, lambda s, b, h, i, j: torch.sin(s) + table[h, i - j + 4], return_lse=True)

    table = normal(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(run, (*inputs, table))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(run(*inputs, table)[0].sum(), inputs[0], create_graph=True)


def test_inference_mode_and_autocast():
    q, k, v = (x.detach().float() for x in tensors(heads_k=4))
    for score_mod in (FUSED["causal"][0], lambda s, b, h, i, j: s * s):
        expected = flex.flex_attention(q, k, v, score_mod)
        with torch.inference_mode():
            assert torch.equal(flex.flex_attention(q, k, v, score_mod), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(flex.flex_attention(q, k, v, score_mod), expected)


def test_transforms():
    q, k, v = (x.detach() for x in tensors(heads_k=4))
    for name in ("causal", "softcap", "bias of keys"):
        found = torch.vmap(lambda q, name=name: flex.flex_attention(q, k, v, FUSED[name][0]))(torch.stack([q, 2 * q]))
        torch.testing.assert_close(found[1], flex.flex_attention(2 * q, k, v, FUSED[name][0]))

    def run(slopes):
        return flex.flex_attention(q, k, v, lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()).sum()

    with pytest.raises(NotImplementedError, match="captures tensors"):
        torch.func.grad(run)(SLOPES)


def test_results_that_torch_returns_beside_the_output():
    q, k, v = tensors(heads_k=4)
    out, aux = flex.flex_attention(q, k, v, return_aux=theirs.AuxRequest(lse=True))
    expected = flex.flex_attention(q, k, v, return_lse=True)
    torch.testing.assert_close((out, aux.lse), expected)
    assert flex.flex_attention(q, k, v, return_aux=theirs.AuxRequest())[1].lse is None
    assert torch.equal(flex.flex_attention(q, k, v, kernel_options={"BLOCK_M": 64}), out)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"score_mod": 3}, TypeError, "score_mod=3 must be a function"),
        ({"block_mask": 3}, TypeError, "block_mask=3 must be torch's BlockMask"),
        ({"scale": "x"}, TypeError, "softmax_scale='x'"),
        ({"score_mod": lambda s, b, h, i, j: s if i > j else s + 1}, RuntimeError, "data-dependent|item"),
        ({"score_mod": lambda s, b, h, i, j: s.nonsense}, AttributeError, "nonsense"),
        ({"score_mod": lambda s, b, h, i, j: 1.0}, TypeError, "score_mod returned 1.0; it must return a score"),
        ({"return_aux": theirs.AuxRequest(max_scores=True)}, fastattn.UnsupportedError, "max_scores=True"),
        ({"return_aux": theirs.AuxRequest(lse=True), "return_lse": True}, ValueError, "exclude each other"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_wrong_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        flex.flex_attention(*tensors(heads_k=4), **options)


def test_tensors_that_do_not_fit_are_named():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="query has 4 heads and key 2; pass enable_gqa=True"):
        flex.flex_attention(q, k, v)
    with pytest.raises(ValueError, match="k has shape"):
        flex.flex_attention(q, k[..., :3], v, lambda s, b, h, i, j: s * s, enable_gqa=True)
    with pytest.raises(TypeError, match="value must be a torch.Tensor"):
        flex.flex_attention(q, k, None)
