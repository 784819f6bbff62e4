"""Skipped tiles change nothing: results with and without are equal to the last bit, and tiles are skipped indeed."""

import math
import os

import pytest
import torch

import fastattn
from cases import Case, inputs
from fastattn import BlockMask
from fastattn.backends import cpu
from forward import DTYPES, assert_parity, run
from isas import run_tests_on, running_isa, supported_isas

INF, NAN = math.inf, math.nan
LEAVES = ("alibi_slopes", "sinks", "softmax_scale")
pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


def results(qkv, kwargs, skip, dout=None) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """(out, lse and every gradient by name; pairs that the forward and the backward pass skipped)"""
    leaves = dict(zip("qkv", qkv, strict=True)) | {n: kwargs[n] for n in LEAVES if torch.is_tensor(kwargs.get(n))}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    others = {name: x for name, x in kwargs.items() if name not in leaves}
    start = cpu.skipped_pairs()
    out, lse = fastattn.attention(**leaves, **others, skip_negligible=skip, return_lse=True, backend="cpu")
    middle = cpu.skipped_pairs()
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype) if dout is None else dout
    dlse = torch.where(lse.isfinite(), 0.5, 0.0).to(lse.dtype)
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse])
    assert fastattn.last_call().kernel == "cpu.backward"
    found = {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found, (middle - start, cpu.skipped_pairs() - middle)


def assert_equal(actual, expected):
    """NaN equals NaN, 0 equals -0."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x.isnan(), expected[name].isnan()), name
        assert torch.equal(x.nan_to_num(), expected[name].nan_to_num()), name


def assert_no_difference(qkv, kwargs, dout=None) -> tuple[int, int]:
    """Pairs that are skipped where it is asked for."""
    without, none = results(qkv, kwargs, False, dout)
    assert none == (0, 0)
    found, counts = results(qkv, kwargs, True, dout)
    assert_equal(found, without)
    return counts


# --- data whose far or weak keys weigh nothing -----------------------------------------------------------------------

SHAPE = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=330, seqlen_k=700, head_dim=20, head_dim_v=36)
SLOPES = torch.tensor([8.0, 1.5, 0.9, 2.0])
MASKS = ("lengths", "left_padding", "documents", "prefix_lm", "intervals", "tensor", "tensor_per_head", "key_tensor")
MASKS += ("blocks", "shared_blocks")


def alibi(case, slopes=SLOPES):
    qkv, kwargs = inputs(case)
    return qkv, kwargs | {"alibi_slopes": slopes[: case.num_heads]}


def peaked(case):
    """The first 40 keys have scores about 1000, the others are short."""
    (q, k, v), kwargs = inputs(case)
    direction = torch.ones(case.head_dim).to(q.dtype)
    k = k * 0.1
    k[:, :, :40] += 250 * direction
    return (q * 0.2 + direction, k, v), kwargs


VARIANTS = {
    "plain": SHAPE,
    "causal": SHAPE._replace(causal=True),
    "long causal": SHAPE._replace(causal=True, seqlen_q=700),
    "window": SHAPE._replace(window_size=(500, 300)),
    "bshd": SHAPE._replace(layout="bshd"),
    "one key head": SHAPE._replace(num_heads_k=1),
    "sinks": SHAPE._replace(sinks=True),
    "softcap": SHAPE._replace(softcap=90.0),
    "dropout": SHAPE._replace(dropout_p=0.3, causal=True),
    "learned scale": SHAPE._replace(learned_scale="per_head", causal=True),
    "wide": SHAPE._replace(head_dim=200, head_dim_v=7),
    "split": SHAPE._replace(seqlen_q=5, seqlen_k=2100, causal=True),
    "one row": SHAPE._replace(seqlen_q=1, seqlen_k=1500),
    "all": SHAPE._replace(causal=True, sinks=True, softcap=200.0, dropout_p=0.2, learned_scale="one", layout="bshd"),
}
VARIANTS |= {dtype: SHAPE._replace(dtype=dtype, causal=True) for dtype in DTYPES}
VARIANTS |= {mask: SHAPE._replace(mask=mask, seqlen_q=700) for mask in MASKS}
VARIANTS |= {f"causal {mask}": SHAPE._replace(mask=mask, seqlen_q=700, causal=True) for mask in MASKS}


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_alibi(case):
    forward, backward = assert_no_difference(*alibi(case))
    assert forward > 0 and backward > 0


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("left_padding", "causal left_padding")])
def test_peaked_scores(name):
    """Where every row sees the tall keys first, or sooner or later (left padding may hide them all)."""
    case = VARIANTS[name]
    forward, backward = assert_no_difference(*peaked(case))
    sees_tall_keys = case.mask not in ("documents", "intervals") and not case.softcap
    assert not sees_tall_keys or (forward > 0 and backward > 0)


@pytest.mark.slow  # a handful is in test_isas.py
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    if isa != running_isa():
        run_tests_on(isa, __file__, "-k", "test_alibi or what_is_skipped or random_calls or (parity and plain)")


def test_random_calls():
    generator = torch.Generator().manual_seed(5)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    counts = []
    for _ in range(40):
        case = Case(
            batch=pick(1, 2), num_heads=4, num_heads_k=pick(1, 2, 4), seqlen_q=pick(1, 40, 129, 300, 513),
            seqlen_k=pick(130, 512, 640, 1025), head_dim=pick(1, 16, 33, 64), head_dim_v=pick(8, 40),
            dtype=pick(*DTYPES), causal=pick(True, False), window_size=pick(None, None, (200, 100)),
            mask=pick(None, None, *MASKS), softcap=pick(0.0, 0.0, 120.0), sinks=pick(True, False),
            dropout_p=pick(0.0, 0.0, 0.2),
        )  # fmt: skip
        qkv, kwargs = pick(alibi, peaked)(case)
        counts.append(assert_no_difference(qkv, kwargs))
    assert all(sum(found > 0 for found in passes) > 15 for passes in zip(*counts, strict=True))


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_skipped(causal):
    """All scores are -slope * distance: tiles with all weights 0 are skipped, nothing else is."""
    seqlen, slope = 1024, 0.5
    qkv = [torch.zeros(1, 1, seqlen, 16) for _ in range(3)]
    qkv[2] += 1.0
    distance = (torch.arange(seqlen)[:, None] - torch.arange(seqlen)).abs()
    visible = distance.tril().bool() | torch.eye(seqlen).bool() if causal else torch.ones(seqlen, seqlen).bool()
    far = (slope * math.log2(math.e) * distance > 126) & visible  # weights below the smallest normal number
    surely = (slope * math.log2(math.e) * distance > 153) & visible
    # A tile and a panel, or a block, are at most 128 x 128: what is void for all of its pairs.
    whole = surely.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
    all_void = (whole | ~visible.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)).all(-1).all(-1)
    at_least = int(whole[all_void].sum())
    assert at_least > seqlen * seqlen / 20
    for skipped in assert_no_difference(qkv, {"alibi_slopes": torch.tensor([slope]), "causal": causal}):
        assert at_least <= skipped <= int(far.sum())


def test_negative_slopes():
    """They favour what is far: the keys about the diagonal are skipped."""
    case = SHAPE._replace(seqlen_q=1200, seqlen_k=1200, num_heads=2, batch=1)
    forward, backward = assert_no_difference(*alibi(case, torch.tensor([-2.0, -3.0])))
    assert forward > 0 and backward > 0


def test_by_itself():
    """None skips where ALiBi is steep and rows are long, and nowhere else."""
    steep = SHAPE._replace(seqlen_q=700)
    qkv, kwargs = alibi(steep)
    assert min(results(qkv, kwargs, None)[1]) > 0
    for case, slopes in (
        (steep, SLOPES / 100),  # too flat for any weight of 0
        (steep._replace(seqlen_q=20), SLOPES),
        (steep._replace(seqlen_k=500), SLOPES),
        (steep._replace(bias="key"), SLOPES),
    ):
        assert results(*alibi(case, slopes), None)[1] == (0, 0), case
    assert results(*peaked(steep), None)[1] == (0, 0)


def test_never_with_a_bias():
    """Its largest value is not known."""
    (q, k, v), kwargs = peaked(SHAPE._replace(bias="key"))
    kwargs["bias"][..., 600:] = 2000.0
    assert assert_no_difference((q, k, v), kwargs) == (0, 0)
    out = results((q, k, v), kwargs, True)[0]["out"]
    assert (out - v[:, [0, 0, 1, 1], 600:].mean(2, keepdim=True)).abs().max() < 2.0


def test_bits_do_not_depend_on_threads():
    for make in (alibi, peaked):
        qkv, kwargs = make(SHAPE._replace(seqlen_q=700, causal=True))
        expected, counts = results(qkv, kwargs, True)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            found, again = results(qkv, kwargs, True)
            assert_equal(found, expected)
            assert again == counts


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("make", [alibi, peaked])
def test_not_finite(make, name, value, causal):
    """Anywhere: far keys and near ones, seen and masked."""
    case = SHAPE._replace(seqlen_q=700, causal=causal)
    for position in (3, 350, 699):
        qkv, kwargs = make(case)
        dout = torch.randn(2, 4, 700, 36)
        tensor = dict(zip("qkv", qkv, strict=True), dout=dout)[name]
        tensor[1, 1, position, 2] = value
        assert_no_difference(qkv, kwargs, dout)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_not_finite_beside_masks(mask, name):
    """The second, careful computation of a unit that had NaN starts from the same facts."""
    for causal in (False, True):
        for make in (alibi, peaked):
            qkv, kwargs = make(SHAPE._replace(seqlen_q=700, causal=causal, mask=mask))
            dout = torch.randn(2, 4, 700, 36)
            tensor = dict(zip("qkv", qkv, strict=True), dout=dout)[name]
            tensor[0, 0, 130, 0] = tensor[1, 1, 600] = NAN
            assert_no_difference(qkv, kwargs, dout)


def test_nan_in_a_value_that_weighs_nothing_shows():
    qkv, kwargs = alibi(SHAPE._replace(seqlen_q=700))
    qkv[2][0, 0, 699, 5] = NAN
    out = results(qkv, kwargs, True)[0]["out"]
    assert out[0, :2, :, 5].isnan().all() and out.isnan().sum() == 2 * 700


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e4, 1e12, 1e18])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_any_size(which, size, dtype):
    for make in (alibi, peaked):
        (q, k, v), kwargs = make(SHAPE._replace(dtype=dtype, seqlen_q=700, causal=True))
        q = q if which == "k" else q * size
        k = k if which == "q" else k * size
        assert_no_difference((q, k, v), kwargs)


def test_underflow_does_not_shorten_a_norm():
    """The squares of q underflow, its products with k do not."""
    q, k, v = (torch.ones(1, 1, 600, 8, dtype=torch.float64) for _ in range(3))
    k[:, :, :300], k[:, :, 300:] = 1e202, 3e202
    q *= 1e-200
    v[:, :, :300] = 0.0
    assert assert_no_difference((q, k, v), {"softmax_scale": 1.0}) == (0, 0)
    assert (results((q, k, v), {"softmax_scale": 1.0}, True)[0]["out"] == 1.0).all()


# --- the look ahead of ALiBi -----------------------------------------------------------------------------------------

LOOK_AHEAD = ("plain", "causal", "window", "sinks", "softcap", "dropout", "learned scale", "wide", "split", *DTYPES)
LOOK_AHEAD += (*MASKS, *(f"causal {mask}" for mask in MASKS))


@pytest.mark.parametrize("slopes", [SLOPES, -SLOPES / 50, torch.tensor([0.0, 1e-3, -0.2, 40.0])], ids=str)
@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_parity_of_alibi(name, slopes):
    """The reference point comes from a key that may be masked."""
    qkv, kwargs = alibi(VARIANTS[name], slopes)
    assert_parity(run(*qkv, **kwargs), *qkv, **kwargs, large_scores=True)


@pytest.mark.parametrize("size", [1e8, 1e15])
def test_scores_beyond_the_digits_of_their_sums(size):
    """The point looked ahead at lies below the score however both were rounded: some key keeps a weight."""
    (q, k, v), kwargs = alibi(SHAPE._replace(seqlen_q=700, causal=True))
    out, lse = run(q * size, k * size, v, **kwargs)
    exact, exact_lse = run(q.double() * size, k.double() * size, v.double(), "reference", **kwargs)
    assert ((lse - exact_lse).abs() <= 1e-5 * exact_lse.abs() + 1e-4 * size**2).all() and out.isfinite().all()
    one_hot = (out[0, 0, :, None] - v[0, 0]).abs().amax(-1).amin(-1)
    assert (one_hot < 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("slope", [INF, -INF, NAN])
def test_slopes_that_are_not_finite(slope):
    qkv, kwargs = alibi(SHAPE._replace(seqlen_q=700), torch.tensor([slope, 1.0, 2.0, 0.5]))
    assert_no_difference(qkv, kwargs)
    assert_parity(run(*qkv, **kwargs), *qkv, **kwargs)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", 1.0, torch.tensor(True)])
def test_wrong_argument(value):
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError, match="skip_negligible=.* must be True or False"):
        fastattn.attention(q, q, q, skip_negligible=value)


def test_other_backends_take_it():
    """It is no property of the result."""
    qkv, kwargs = alibi(SHAPE)
    expected = fastattn.attention(*qkv, **kwargs, backend="reference")
    assert torch.equal(fastattn.attention(*qkv, **kwargs, skip_negligible=True, backend="reference"), expected)


def test_block_mask_of_far_blocks():
    """Rows whose nearest keys are not in their lists: the forward pass looks ahead in vain, the backward knows lse."""
    query, key = torch.arange(1100)[:, None], torch.arange(1100)
    mask = BlockMask.from_dense((key <= query - 400)[None, None])
    qkv, kwargs = alibi(SHAPE._replace(seqlen_q=1100, seqlen_k=1100))
    assert assert_no_difference(qkv, kwargs | {"mask": mask})[1] > 0
