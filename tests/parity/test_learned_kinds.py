"""Cosine, differential, gated, synthesized and talking-heads attention: formulas, and the models of transformers."""

import math

import pytest
import torch
from torch.nn.functional import normalize, rms_norm

import fastattn
import learned_formula as formula
from cases import Case, inputs
from fastattn import Mask, learned

SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=33, seqlen_k=47, head_dim=6, head_dim_v=5, dtype="float64")
MASKS = [SMALL, SMALL._replace(causal=True), SMALL._replace(window_size=(4, 2))]
MASKS += [SMALL._replace(mask=mask) for mask in ("lengths", "intervals", "tensor_per_head", "blocks", "key_tensor")]
ODD = SMALL._replace(seqlen_q=130, seqlen_k=257, num_heads_k=1, mask="lengths")


def call(case, seed=0):
    (q, k, v), kwargs = inputs(case, seed)
    return q, k, v, kwargs


def normal(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    cotangent = normal(*found.shape)
    grads = torch.autograd.grad(found, leaves, cotangent)
    oracle = torch.autograd.grad(expected, leaves, cotangent)
    torch.testing.assert_close(grads, oracle, rtol=1e-8, atol=1e-9)


def leaves_of(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


# --- cosine similarity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*MASKS, ODD, SMALL._replace(bias="per_head")], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1)])
def test_cosine_attention(case, shape):
    q, k, v, kwargs = call(case)
    logit_scale = normal(*shape) + math.log(10.0)
    q, k, v, logit_scale = leaves = leaves_of(q, k, v, logit_scale)
    out = learned.cosine_attention(q, k, v, logit_scale, **kwargs)
    scale = logit_scale.clamp(max=math.log(100.0)).exp()
    unit = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    agree(out, formula.attention(*unit, v, softmax_scale=scale, **kwargs), leaves)


def test_cosine_temperature_stops_where_swin_v2_stops_it():
    q, k, v, _ = call(SMALL)
    high = torch.full((4,), 9.0, dtype=torch.float64, requires_grad=True)
    out = learned.cosine_attention(q, k, v, high)
    torch.testing.assert_close(out, learned.cosine_attention(q, k, v, torch.full((4,), math.log(100.0)).double()))
    assert not torch.autograd.grad(out.sum(), high)[0].any()
    free = learned.cosine_attention(q, k, v, high, max_scale=None)
    expected = formula.attention(*(normalize(x, dim=-1) for x in (q, k)), v, softmax_scale=high.exp())
    torch.testing.assert_close(free, expected, rtol=1e-7, atol=1e-9)
    zeros = torch.zeros_like(q)
    torch.testing.assert_close(
        learned.cosine_attention(zeros, k, v, high), v.mean(2, True).repeat_interleave(2, 1).expand(-1, -1, 33, -1)
    )


def test_cosine_attention_is_that_of_swin_v2():
    pytest.importorskip("transformers")
    from transformers.models.swinv2 import modeling_swinv2 as swin

    config = swin.Swinv2Config(embed_dim=12, num_heads=[3], depths=[1], attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    theirs = swin.Swinv2SelfAttention(config, 12, 3, 4).double().eval()
    torch.nn.init.normal_(theirs.logit_scale, 4.0, 1.0)  # on both sides of the clamp
    x = normal(6, 16, 12)
    expected = theirs(x)[0]
    heads = (layer(x).view(6, 16, 3, 4).transpose(1, 2) for layer in (theirs.query, theirs.key, theirs.value))
    table = theirs.continuous_position_bias_mlp(theirs.relative_coords_table).view(-1, 3)
    bias = 16 * torch.sigmoid(table[theirs.relative_position_index.view(-1)].view(16, 16, 3).permute(2, 0, 1))
    out = learned.cosine_attention(*heads, theirs.logit_scale, bias=bias).transpose(1, 2).flatten(2)
    parameters = list(theirs.parameters())
    agree(out, expected, parameters)


# --- differential ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*MASKS, ODD], ids=str)
@pytest.mark.parametrize("weight", [0.3, (), (2,)])
def test_differential_attention(case, weight):
    case = case._replace(num_heads=4, num_heads_k=2 if case.num_heads_k == 1 else 4)
    q, k, v, kwargs = call(case)
    v = v[:, : v.shape[1] // 2]
    q, k, v, *rest = leaves = leaves_of(q, k, v, *([] if isinstance(weight, float) else [normal(*weight)]))
    weight = weight if isinstance(weight, float) else rest[0]
    out = learned.differential_attention(q, k, v, weight, **kwargs)
    both = formula.attention(q, k, torch.cat([v, v], 1), **kwargs)
    factor = weight if isinstance(weight, float) else weight.view(-1, 1, 1)
    agree(out, both[:, :2] - factor * both[:, 2:], leaves)


def test_differential_attention_is_one_call():
    q, k, v, _ = call(SMALL._replace(num_heads_k=4))
    with fastattn.record() as calls:
        learned.differential_attention(q, k, v[:, :2], 0.5, causal=True)
    assert len(calls) == 1 and calls[0].problem.num_heads == 4


def test_differential_attention_is_that_of_diffllama():
    pytest.importorskip("transformers")
    from transformers.models.diffllama import modeling_diffllama as diff

    config = diff.DiffLlamaConfig(
        hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=4, attn_implementation="eager"
    )
    torch.manual_seed(0)
    theirs = diff.DiffLlamaAttention(config, layer_idx=3).double()
    x, positions = normal(2, 9, 32), torch.arange(9)[None]
    cos, sin = diff.DiffLlamaRotaryEmbedding(config)(x, positions)
    hidden = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, (cos.double(), sin.double()), hidden)[0]

    q, k, v = (layer(x).view(2, 9, -1, 4).transpose(1, 2) for layer in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    q, k = diff.apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    weight = learned.differential_lambda(
        theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2, theirs.lambda_init
    )
    out = learned.differential_attention(q, k, torch.cat(v.chunk(2, 1), -1), weight, causal=True)
    out = (1 - theirs.lambda_init) * rms_norm(out, out.shape[-1:], eps=config.rms_norm_eps)
    out = theirs.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # their softmax and lambda are float32
    parameters = list(theirs.parameters())
    grads, oracle = (torch.autograd.grad(y.square().sum(), parameters) for y in (out, expected))
    torch.testing.assert_close(grads, oracle, rtol=1e-4, atol=1e-5)


def test_lambdas_of_each_head():
    vectors = [normal(3, 8, seed=seed) for seed in range(4)]
    found = learned.differential_lambda(*vectors, 0.2)
    each = [learned.differential_lambda(*[x[head] for x in vectors], 0.2) for head in range(3)]
    torch.testing.assert_close(found, torch.stack(each))
    with pytest.raises(TypeError, match="lambda_q2 must be a torch.Tensor"):
        learned.differential_lambda(*vectors[:2], 1.0, vectors[3], 0.2)


# --- gated output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*MASKS, ODD], ids=str)
@pytest.mark.parametrize("width", [1, 5])
def test_gated_attention(case, width):
    q, k, v, kwargs = call(case)
    q, k, v, gate = leaves = leaves_of(q, k, v, normal(2, 4, q.shape[2], width))
    out = learned.gated_attention(q, k, v, gate, **kwargs)
    agree(out, formula.attention(q, k, v, **kwargs) * torch.sigmoid(gate), leaves)


def test_kinds_compose_with_normalizers():
    q, k, v, _ = call(SMALL)
    options = {"normalizer": "entmax15", "top_k": 9, "causal": True}
    expected = formula.attention(q, k, v, **options)
    torch.testing.assert_close(learned.gated_attention(q, k, v, torch.zeros(()), **options), expected / 2)
    scale = torch.tensor(2.0, dtype=torch.float64)
    unit = [normalize(x, dim=-1) for x in (q, k)]
    expected = formula.attention(*unit, v, softmax_scale=scale.exp(), **options)
    torch.testing.assert_close(learned.cosine_attention(q, k, v, scale, **options), expected)


# --- synthesizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*MASKS, ODD], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_synthesizer_attention(case, batch):
    _, _, v, kwargs = call(case)
    logits, v = leaves = leaves_of(normal(batch, 4, case.seqlen_q, case.seqlen_k), v)
    out = learned.synthesizer_attention(logits, v, **kwargs)
    zero = torch.zeros(2, 4, case.seqlen_q, 1), torch.zeros(2, 4, case.seqlen_k, 1)
    agree(out, formula.attention(*zero, v, bias=logits, **kwargs), leaves)


@pytest.mark.parametrize("case", [*MASKS, ODD], ids=str)
def test_factorized_synthesizer_attention(case):
    _, _, v, kwargs = call(case)
    left, right, v = leaves = leaves_of(normal(1, 4, case.seqlen_q, 3), normal(1, v.shape[1], case.seqlen_k, 3), v)
    out = learned.factorized_synthesizer_attention(left, right, v, **kwargs)
    both = left.expand(2, -1, -1, -1), right.expand(2, -1, -1, -1)
    agree(out, formula.attention(*both, v, softmax_scale=1.0, **kwargs), leaves)


# --- talking heads ---------------------------------------------------------------------------------------------------


def talking(q, k, v, mix_scores, mix_weights, softmax_scale=None, **masks):
    s = formula.scores_of(q, k, softmax_scale=softmax_scale)
    s = torch.einsum("gf,bfij->bgij", mix_scores, s)
    p = formula.normalized(s, formula.visible_pairs(q, k, **masks), "softmax")
    p = torch.einsum("hg,bgij->bhij", mix_weights, p)
    return p @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


SHARED = [case for case in (*MASKS, ODD) if case.mask not in ("intervals", "tensor_per_head", "blocks")]


@pytest.mark.parametrize("case", [*SHARED, SMALL._replace(mask="shared_blocks")], ids=str)
def test_talking_heads(case):
    q, k, v, kwargs = call(case)
    q, k, v, scale, *mixes = leaves = leaves_of(q, k, v, normal(4, seed=1), normal(4, 4, seed=2), normal(4, 4, seed=3))
    out = learned.talking_heads_attention(q, k, v, *mixes, softmax_scale=scale, **kwargs)
    agree(out, talking(q, k, v, *mixes, softmax_scale=scale, **kwargs), leaves)


def test_talking_heads_without_mixing_is_attention():
    q, k, v, _ = call(SMALL)
    expected = fastattn.attention(q, k, v, causal=True)
    torch.testing.assert_close(learned.talking_heads_attention(q, k, v, None, None, causal=True), expected)
    mask = Mask.lengths(torch.tensor([0, 20]))
    out = learned.talking_heads_attention(q, k, v, normal(4, 4), normal(4, 4), mask=mask)
    assert not out[0].any()
    k, v = k.clone(), v.clone()
    k[1, :, 20:], v[1, :, 20:] = torch.nan, torch.nan
    torch.testing.assert_close(learned.talking_heads_attention(q, k, v, normal(4, 4), normal(4, 4), mask=mask), out)


def test_derivatives_of_talking_heads():
    case = Case(num_heads=2, num_heads_k=1, seqlen_q=3, seqlen_k=4, head_dim=2, dtype="float64")
    leaves = leaves_of(*call(case)[:3], normal(2, 2, seed=1), normal(2, 2, seed=2))

    def fused(*given):
        return learned.talking_heads_attention(*given, causal=True)

    assert torch.autograd.gradcheck(fused, leaves)
    assert torch.autograd.gradgradcheck(fused, leaves)


# --- sizes, dtypes, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 130)])
def test_lengths(lengths):
    q, k, v, _ = call(SMALL._replace(seqlen_q=lengths[0], seqlen_k=lengths[1], num_heads_k=4))
    rows, keys = lengths
    found = [
        learned.cosine_attention(q, k, v, torch.zeros(4).double()),
        learned.gated_attention(q, k, v, q.new_zeros(())),
        learned.synthesizer_attention(q.new_zeros(1, 4, rows, keys), v),
        learned.factorized_synthesizer_attention(q[:1], k[:1], v),
        learned.talking_heads_attention(q, k, v, normal(4, 4), normal(4, 4)),
        learned.differential_attention(q, k, v[:, :2], 0.5),
    ]
    for out in found:
        assert out.shape[2:] == (rows, 5) and out.isfinite().all() and (keys or not out.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v, _ = call(SMALL._replace(num_heads_k=4))
    mix, logits = normal(4, 4), normal(2, 4, 33, 47)
    kinds = {
        "cosine": lambda q, k, v: learned.cosine_attention(q, k, v, torch.full((4,), 1.0).to(q.dtype)),
        "gated": lambda q, k, v: learned.gated_attention(q, k, v, logits[..., :5].to(q.dtype)),
        "synthesizer": lambda q, k, v: learned.synthesizer_attention(logits.to(q.dtype), v),
        "factorized": lambda q, k, v: learned.factorized_synthesizer_attention(q, k, v),
        "talking": lambda q, k, v: learned.talking_heads_attention(q, k, v, mix.to(q.dtype), mix.to(q.dtype)),
        "differential": lambda q, k, v: learned.differential_attention(q, k, v[:, :2], 0.5),
    }
    for name, kind in kinds.items():
        out = kind(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype, name
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), kind(q, k, v), rtol=tolerance, atol=tolerance, msg=name)


FUSED = {
    "cosine": lambda q, k, v: learned.cosine_attention(q, k, v, ZEROS.double(), causal=True),
    "differential": lambda q, k, v: learned.differential_attention(q, k, v[:, :2], 0.3, causal=True),
    "gated": lambda q, k, v: learned.gated_attention(q, k, v, q[..., :1]),
    "synthesizer": lambda q, k, v: learned.synthesizer_attention(q @ k.mT, v),
    "factorized": lambda q, k, v: learned.factorized_synthesizer_attention(q, k, v),
    "softmax1": lambda q, k, v: learned.attention(q, k, v, normalizer="softmax1", causal=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_kinds_break_no_graph(name):
    q, k, v = call(SMALL._replace(num_heads_k=4))[:3]
    compiled = torch.compile(FUSED[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), FUSED[name](q, k, v))


@pytest.mark.parametrize("name", FUSED)
def test_derivatives_of_fused_kinds(name):
    case = Case(num_heads=4, seqlen_q=3, seqlen_k=4, head_dim=2, dtype="float64")
    assert torch.autograd.gradcheck(FUSED[name], leaves_of(*call(case)[:3]))


ZEROS = torch.zeros(4)
PER_HEAD = Mask.intervals(torch.zeros(2, 4, 33, dtype=torch.int32))
differential, talking_heads = learned.differential_attention, learned.talking_heads_attention
ERRORS = [
    (
        lambda q, k, v: learned.cosine_attention(q, k, v, ZEROS, softmax_scale=1.0),
        TypeError,
        "cosine_attention has no softmax_scale, got 1.0",
    ),
    (lambda q, k, v: learned.cosine_attention(q, k, v, ZEROS[:3]), ValueError, r"logit_scale has shape \(3,\)"),
    (lambda q, k, v: learned.cosine_attention(q, k, v, 1.0), TypeError, "logit_scale must be a torch.Tensor"),
    (lambda q, k, v: learned.cosine_attention(q, k, v, ZEROS, max_scale=0.0), ValueError, "max_scale=0.0 must be > 0"),
    (lambda q, k, v: differential(q[:, :3], k, v, 0.1), ValueError, "q, k, v have 3, 4, 4 heads"),
    (lambda q, k, v: differential(q, k, v, 0.1), ValueError, "q, k, v have 4, 4, 4 heads"),
    (lambda q, k, v: differential(q[0], k, v, 0.1), ValueError, r"q has shape \(4, 33, 6\)"),
    (lambda q, k, v: differential(q, k, v[:, :2], ZEROS), ValueError, "weight=tensor"),
    (lambda q, k, v: differential(q, k, v[:, :2], "0.1"), TypeError, "weight='0.1' must be"),
    (
        lambda q, k, v: differential(q, k, v[:, :2], 0.1, dropout_p=0.1),
        TypeError,
        "differential_attention has no dropout_p, got 0.1",
    ),
    (lambda q, k, v: learned.gated_attention(q, k, v, q, return_lse=True), TypeError, "has no return_lse"),
    (lambda q, k, v: learned.gated_attention(q, k, v, torch.zeros(4, 3)), ValueError, r"gate has shape \(4, 3\)"),
    (lambda q, k, v: learned.gated_attention(q, k, v, torch.ones(1).long()), TypeError, "gate has dtype"),
    (lambda q, k, v: learned.gated_attention(q, k, v, q, attn_mask=None), TypeError, "attn_mask"),
    (lambda q, k, v: learned.synthesizer_attention(q, v), ValueError, r"logits has shape \(2, 4, 33, 6\)"),
    (lambda q, k, v: learned.synthesizer_attention(q @ k.mT, v, bias=q), TypeError, "has no bias"),
    (lambda q, k, v: learned.factorized_synthesizer_attention(q[0], k, v), ValueError, "left has shape"),
    (lambda q, k, v: talking_heads(q, k, v, torch.zeros(4, 3), None), ValueError, r"mix_scores has shape \(4, 3\)"),
    (lambda q, k, v: talking_heads(q, k, v, None, None, mask=q @ k.mT > 0), ValueError, "differs from head to head"),
    (lambda q, k, v: talking_heads(q, k, v, None, None, mask=PER_HEAD), ValueError, "differs from head to head"),
]


@pytest.mark.parametrize("run, error, text", ERRORS)
def test_wrong_arguments_are_named(run, error, text):
    with pytest.raises(error, match=text):
        run(*call(SMALL._replace(num_heads_k=4))[:3])
