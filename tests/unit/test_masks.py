"""Each mask against a predicate in plain Python, the laws of &, and what the constructors refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import Mask
from fastattn.masks import UNBOUNDED, Window, diagonal_bounds
from refusals import assert_refused

LENGTHS = [(1, 1), (4, 4), (3, 5), (5, 3), (1, 6), (6, 1), (0, 3), (3, 0)]
lengths = pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS, ids=lambda n: str(n))


def table(sees, batch, num_heads, seqlen_q, seqlen_k) -> torch.Tensor:
    """sees(b, h, i, j) as a bool tensor [batch, num_heads, seqlen_q, seqlen_k]."""
    rows = [
        [[[bool(sees(b, h, i, j)) for j in range(seqlen_k)] for i in range(seqlen_q)] for h in range(num_heads)]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(batch, num_heads, seqlen_q, seqlen_k)


def check(mask, sees, seqlen_q, seqlen_k, batch=1, num_heads=1):
    dense = mask.to_dense(seqlen_q, seqlen_k)
    assert dense.dtype == torch.bool and dense.dim() == 4
    expected = table(sees, batch, num_heads, seqlen_q, seqlen_k)
    assert torch.equal(dense.expand(expected.shape), expected)


@lengths
def test_empty_mask(seqlen_q, seqlen_k):
    check(Mask(), lambda b, h, i, j: True, seqlen_q, seqlen_k)


@lengths
def test_causal(seqlen_q, seqlen_k):
    check(Mask.causal(), lambda b, h, i, j: j <= i + seqlen_k - seqlen_q, seqlen_q, seqlen_k)
    check(Mask.causal("bottom_right"), lambda b, h, i, j: j <= i + seqlen_k - seqlen_q, seqlen_q, seqlen_k)
    check(Mask.causal("top_left"), lambda b, h, i, j: j <= i, seqlen_q, seqlen_k)


@lengths
@pytest.mark.parametrize("left, right", [(0, 0), (2, 0), (0, 1), (1, 2), (None, 1), (1, None), (None, None), (99, 99)])
@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
def test_window(left, right, alignment, seqlen_q, seqlen_k):
    offset = seqlen_k - seqlen_q if alignment == "bottom_right" else 0

    def sees(b, h, i, j):
        return (left is None or j >= i + offset - left) and (right is None or j <= i + offset + right)

    check(Mask.window(left, right, alignment), sees, seqlen_q, seqlen_k)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_lengths(dtype):
    seqlens = [0, 2, 5, 9]
    check(Mask.lengths(torch.tensor(seqlens, dtype=dtype)), lambda b, h, i, j: j < seqlens[b], 3, 5, batch=4)


def test_intervals():
    start = [[[0, 1, 2], [3, 0, -7]]]
    end = [[[5, 1, 4], [2, 99, 3]], [[0, 0, 0], [4, 4, 4]]]

    def sees(b, h, i, j):
        return start[0][h][i] <= j < end[b][h][i]

    check(Mask.intervals(torch.tensor(start), torch.tensor(end)), sees, 3, 5, batch=2, num_heads=2)
    check(Mask.intervals(torch.tensor(start)), lambda b, h, i, j: start[0][h][i] <= j, 3, 5, num_heads=2)
    check(Mask.intervals(k_end=torch.tensor(end)), lambda b, h, i, j: j < end[b][h][i], 3, 5, batch=2, num_heads=2)
    huge = Mask.intervals(torch.tensor([[[-(2**40)]]]), torch.tensor([[[2**40]]]))  # beyond int32
    check(huge, lambda b, h, i, j: True, 3, 5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding(dtype):
    keep = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    check(Mask.padding(torch.tensor(keep, dtype=dtype)), lambda b, h, i, j: keep[b][j], 3, 4, batch=6)
    assert Mask.padding(torch.ones(2, 0, dtype=dtype)).to_dense(3, 0).shape == (2, 1, 3, 0)


def test_documents():
    ids_q, ids_k = [[0, 0, 3, 3], [7, 8, 8, 9]], [[0, 1, 3, 3, 3], [6, 7, 7, 8, 10]]
    mask = Mask.documents(torch.tensor(ids_q))
    check(mask, lambda b, h, i, j: ids_q[b][i] == ids_q[b][j], 4, 4, batch=2)
    mask = Mask.documents(torch.tensor(ids_q), torch.tensor(ids_k))
    check(mask, lambda b, h, i, j: ids_q[b][i] == ids_k[b][j], 4, 5, batch=2)


@lengths
def test_prefix_lm(seqlen_q, seqlen_k):
    prefixes = [0, 2, 4]
    mask = Mask.prefix_lm(torch.tensor(prefixes), seqlen_q, seqlen_k)
    check(mask, lambda b, h, i, j: j < prefixes[b] or j <= i + seqlen_k - seqlen_q, seqlen_q, seqlen_k, batch=3)
    square = Mask.prefix_lm(torch.tensor(prefixes), seqlen_q)
    check(square, lambda b, h, i, j: j < prefixes[b] or j <= i, seqlen_q, seqlen_q, batch=3)


def test_key_bounds_are_int32_and_three_dimensional():
    for mask in (
        Mask.lengths(torch.tensor([3, 4])),
        Mask.padding(torch.ones(2, 5, dtype=torch.bool)),
        Mask.documents(torch.tensor([[0, 1]])),
        Mask.prefix_lm(torch.tensor([1]), 4),
        Mask(k_start=torch.ones(1, 1, 1, dtype=torch.int64)),
    ):
        for bound in (mask.k_start, mask.k_end):
            assert bound is None or (bound.dtype == torch.int32 and bound.dim() == 3 and (bound >= 0).all())


def test_diagonal_bounds():
    assert diagonal_bounds((), 3, 5) == (-UNBOUNDED, UNBOUNDED)
    assert diagonal_bounds((Window(None, 0),), 3, 5) == (-UNBOUNDED, 2)
    assert diagonal_bounds((Window(1, 1), Window(None, 0, "top_left")), 3, 5) == (1, 0)
    assert diagonal_bounds((Window(2**70, 2**70),), 3, 5) == (-UNBOUNDED, UNBOUNDED)  # what a kernel gets fits int64


# --- laws ------------------------------------------------------------------------------------------------------------

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = 2, 2, 3, 4


@st.composite
def windows(draw):
    side = st.none() | st.integers(0, 5)
    return Mask.window(draw(side), draw(side), draw(st.sampled_from(["bottom_right", "top_left"])))


@st.composite
def bounds(draw):
    shape = [draw(st.sampled_from([1, full])) for full in (BATCH, HEADS, SEQLEN_Q)]
    count = shape[0] * shape[1] * shape[2]
    return torch.tensor(draw(st.lists(st.integers(-1, SEQLEN_K + 1), min_size=count, max_size=count))).view(shape)


@st.composite
def intervals(draw):
    return Mask.intervals(draw(st.none() | bounds()), draw(st.none() | bounds()))


simple = windows() | intervals() | st.just(Mask())
masks = simple | st.builds(lambda a, b: a & b, simple, simple)
laws = settings(max_examples=100, deadline=None, derandomize=True)


def dense(mask):
    return mask.to_dense(SEQLEN_Q, SEQLEN_K).expand(BATCH, HEADS, SEQLEN_Q, SEQLEN_K)


@laws
@given(masks, masks)
def test_and_is_intersection_and_commutes(a, b):
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a & b), dense(b & a))


@laws
@given(masks, masks, masks)
def test_and_is_associative(a, b, c):
    assert torch.equal(dense((a & b) & c), dense(a & (b & c)))


@laws
@given(masks)
def test_and_is_idempotent_with_identity(a):
    assert torch.equal(dense(a & a), dense(a))
    assert torch.equal(dense(a & Mask()), dense(a)) and torch.equal(dense(Mask() & a), dense(a))


@laws
@given(st.lists(masks, min_size=2, max_size=6))
def test_and_keeps_one_window_an_alignment(parts):
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    assert len(mask.windows) <= 2 and len({window.alignment for window in mask.windows}) == len(mask.windows)


def test_and_of_both_alignments():
    mask = Mask.window(1, None, "bottom_right") & Mask.causal("top_left")
    check(mask, lambda b, h, i, j: i + 1 - 1 <= j <= i, 3, 4)


# --- refusals --------------------------------------------------------------------------------------------------------

ONES = torch.ones(1, 1, 1, dtype=torch.int64)
REFUSALS = {
    "negative window": (lambda: Mask.window(-1, 0), ValueError, r"window=\(-1, 0\): left must be >= 0.*None"),
    "negative right": (lambda: Mask.window(0, -2), ValueError, r"window=\(0, -2\): right must be >= 0"),
    "float window": (lambda: Mask.window(1.5, 0), TypeError, "left must be an int >= 0 or None, got 1.5"),
    "bool window": (lambda: Mask.window(0, True), TypeError, "right must be an int"),
    "alignment": (lambda: Mask.causal("middle"), ValueError, r"alignment='middle' must be one of .*bottom_right"),
    "window alignment": (lambda: Mask.window(1, 0, None), ValueError, "alignment=None must be one of"),
    "lengths rank": (lambda: Mask.lengths(ONES), ValueError, r"seqlens_k has shape \(1, 1, 1\); it must be \[batch\]"),
    "lengths list": (lambda: Mask.lengths([3, 4]), TypeError, r"seqlens_k must be a torch.Tensor \[batch\], got list"),
    "lengths dtype": (lambda: Mask.lengths(torch.ones(2)), TypeError, "float32; key indices must be integers"),
    "intervals rank": (lambda: Mask.intervals(ONES[0]), ValueError, r"k_start has shape \(1, 1\); it must be \[batch"),
    "intervals int": (lambda: Mask.intervals(k_end=3), TypeError, "k_end must be a torch.Tensor .* got int"),
    "intervals dtype": (lambda: Mask.intervals(k_end=ONES.double()), TypeError, "k_end has dtype torch.float64"),
    "intervals bool": (lambda: Mask.intervals(ONES.bool()), TypeError, "k_start has dtype torch.bool"),
    "bare constructor": (lambda: Mask(k_end=torch.tensor([3])), ValueError, r"k_end has shape \(1,\)"),
    "padding rank": (lambda: Mask.padding(ONES), ValueError, r"keep has shape .* must be \[batch, seqlen_k\]"),
    "padding list": (lambda: Mask.padding([[1, 0]]), TypeError, "keep must be a torch.Tensor .* got list"),
    "padding gaps": (
        lambda: Mask.padding(torch.tensor([[1, 1, 0], [1, 0, 1]])),
        ValueError,
        r"keep\[1\] has gaps .*pass mask=keep",
    ),
    "additive padding": (
        lambda: Mask.padding(torch.tensor([[0.0, float("-inf")]])),
        TypeError,
        "keep has dtype torch.float32; it must be bool or 0/1 .*bias=",
    ),
    "documents rank": (lambda: Mask.documents(ONES), ValueError, r"ids_q has shape .* must be \[batch, seqlen\]"),
    "documents order": (lambda: Mask.documents(torch.tensor([[1, 0]])), ValueError, "ids_q must not decrease"),
    "documents keys": (
        lambda: Mask.documents(torch.tensor([[0, 1]]), torch.tensor([[2, 1]])),
        ValueError,
        "ids_k must not decrease",
    ),
    "documents batch": (
        lambda: Mask.documents(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)),
        ValueError,
        r"ids_q has shape \(1, 2\) and ids_k \(3, 2\); they must have the same batch",
    ),
    "documents dtype": (lambda: Mask.documents(torch.zeros(1, 2)), TypeError, "document ids must be integers"),
    "prefix rank": (lambda: Mask.prefix_lm(ONES, 3), ValueError, r"prefix_lengths has shape .* must be \[batch\]"),
    "prefix dtype": (lambda: Mask.prefix_lm(torch.ones(2), 3), TypeError, "must be integers"),
    "and shapes": (
        lambda: Mask.lengths(torch.tensor([1, 2])) & Mask.lengths(torch.tensor([1, 2, 3])),
        ValueError,
        r"\(2, 1, 1\) and \(3, 1, 1\); they must broadcast",
    ),
    "and tensor": (lambda: Mask.causal() & torch.ones(2, 2, dtype=torch.bool), TypeError, "unsupported operand"),
    "tensor and": (lambda: torch.ones(2, 2, dtype=torch.bool) & Mask.causal(), TypeError, "unsupported operand"),
    "or": (lambda: Mask.causal() | Mask.causal(), TypeError, "unsupported operand"),
    "python and": (lambda: Mask.causal() and Mask.window(1, 1), TypeError, "combine masks with &"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    assert_refused(*REFUSALS[name])


def test_masks_are_immutable_values_with_identity():
    mask = Mask.causal()
    with pytest.raises(AttributeError):
        mask.windows = ()
    assert mask != Mask.causal() and len({mask, Mask.causal()}) == 2  # tensors inside: equality is identity
