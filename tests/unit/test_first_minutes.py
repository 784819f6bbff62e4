"""What strangers meet in their first minutes: errors that name the argument and what to do, on one line."""

import subprocess
import sys
import warnings

import pytest
import torch

import fastattn
from fastattn import BlockMask, Mask

X = torch.randn(1, 2, 4, 8)
WIDE = torch.ones(3, 3)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: fastattn.attention(X, X, X, attn_mask=None), TypeError, "attn_mask.*mask= takes.*takes torch's names"),
        (lambda: fastattn.attention(X, X, X, is_causal=True), TypeError, "is_causal.*use causal="),
        (lambda: fastattn.attention(X, X, X, scale=1.0), TypeError, "scale.*use softmax_scale="),
        (lambda: fastattn.attention(X, X, X, None), TypeError, "3 positional arguments.*but 4.*name the others"),
        (lambda: fastattn.explain(X, X, X, dropout=0.1), TypeError, "dropout.*use dropout_p="),
        (lambda: fastattn.attention(X, X, X, softcap=10**400), ValueError, "softcap=.*finite"),
        (lambda: fastattn.attention(X, X, X, softmax_scale=-(10**400)), ValueError, "softmax_scale=.*finite"),
        (lambda: fastattn.attention(X, X, X, dropout_p=10**400), ValueError, "dropout_p=.*finite"),
        (lambda: fastattn.attention(X, X, X, return_lse=5), TypeError, "return_lse=5 must be True or False"),
        (lambda: fastattn.attention(X, X, X, skip_negligible=7), TypeError, "skip_negligible=7 must be True or False"),
        (lambda: fastattn.attention(X, X, X, causal=2), TypeError, "causal=2 must be True or False"),
        (lambda: fastattn.attention(X, X, X, window_size=WIDE), TypeError, r"window_size=tensor\(shape=\(3, 3\)"),
        (lambda: fastattn.attention(X, X, X, window_size=(WIDE, 0)), TypeError, r"left must be .* got tensor\(shape"),
        (lambda: fastattn.attention(X, X, X, backend=WIDE), ValueError, r"backend=tensor\(shape=.*is not a backend"),
        (
            lambda: fastattn.attention(X, X, X, mask=torch.ones(1, 4, dtype=torch.bool)[:, :3]),
            ValueError,
            "mask has shape",
        ),
        (lambda: Mask.causal(WIDE), ValueError, r"alignment=tensor\(shape"),
        (lambda: BlockMask.from_mask(Mask(), seqlen_q=4, block_size=WIDE), TypeError, r"block_size=tensor\(shape"),
        (lambda: BlockMask.cat([BlockMask.from_mask(Mask(), seqlen_q=4)], dim=WIDE), ValueError, r"dim=tensor\(shape"),
        (lambda: BlockMask.cat(WIDE), TypeError, r"masks must be a sequence.*tensor\(shape"),
        (lambda: BlockMask.cat([1]), TypeError, "masks must consist of BlockMasks, got 1"),
        (lambda: fastattn.select_blocks(X, X, top_k=WIDE), TypeError, r"top_k=tensor\(shape"),
        (lambda: fastattn.select_blocks(X, X, top_k=1, causal=WIDE), TypeError, r"causal=tensor\(shape"),
        (lambda: fastattn.select_blocks(X, X, top_k=1, softmax_scale=WIDE), TypeError, "softmax_scale is a tensor"),
        (lambda: fastattn.coverage(X, X, Mask(), within=WIDE), TypeError, "mask and within are a Mask and Tensor"),
        (lambda: fastattn.scaled_dot_product_attention(X, X, X, dropout_p=WIDE), TypeError, r"dropout_p=tensor\(shape"),
        (lambda: fastattn.scaled_dot_product_attention(X, X, X, is_causal=WIDE), TypeError, r"is_causal=tensor\(shape"),
    ],
)
def test_errors_name_the_argument_on_one_line(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_padding_mask_is_told_where_it_goes():
    q = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"padding \[batch, seqlen_k\] goes in as mask\[:, None, None\]"):
        fastattn.attention(q, q, q, mask=torch.ones(2, 4, dtype=torch.bool))


def test_flags_and_numbers_that_mean_their_default():
    expected = fastattn.attention(X, X, X)
    for options in ({"causal": None}, {"causal": 0}, {"return_lse": None}, {"softcap": False}, {"dropout_p": 0}):
        assert torch.equal(fastattn.attention(X, X, X, **options), expected)
    assert torch.equal(fastattn.attention(X, X, X, softmax_scale=True), fastattn.attention(X, X, X, softmax_scale=1.0))


def test_a_number_that_equals_a_flag_is_none_whatever_was_called_before():
    fastattn.attention(X, X, X, causal=True)
    with pytest.raises(TypeError, match="causal=1.0 must be True or False"):
        fastattn.attention(X, X, X, causal=1.0)


def test_torch_takes_a_tensor_with_one_number_for_a_number():
    plain = fastattn.scaled_dot_product_attention(X, X, X, is_causal=True)
    assert torch.equal(fastattn.scaled_dot_product_attention(X, X, X, is_causal=torch.tensor(True)), plain)
    fastattn.scaled_dot_product_attention(X, X, X, dropout_p=torch.tensor(0.1))


def test_use_without_with_warns():
    with pytest.warns(RuntimeWarning, match="use.'reference'. has no effect outside a with statement"):
        fastattn.use("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastattn.use("reference"):
            pass

        @fastattn.use("reference")
        def decorated(depth):
            fastattn.attention(X, X, X)
            return fastattn.last_call().kernel if depth == 0 else decorated(depth - 1)

        assert decorated(0) == decorated(2) == "reference"
    fastattn.attention(X, X, X, backend=None)


def test_a_misspelt_fallback_policy_shows_at_import():
    code = "import os; os.environ['FASTATTN_FALLBACK'] = 'sillent'; import fastattn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "FASTATTN_FALLBACK='sillent' must be one of warn, silent, error" in result.stderr


def test_the_last_call_prints_on_one_short_line():
    fastattn.attention(X, X, X, causal=True)
    assert "ran [cpu float32 B1 H2 S4 D8 causal]" in str(fastattn.last_call()) and len(str(fastattn.last_call())) < 100


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_compiled_call_runs_on_the_kernel(needs_grad, fresh_fallbacks):
    """Dynamo breaks the graph at the call and runs it as it stands."""
    qkv = [torch.randn(1, 2, 5, 8, requires_grad=needs_grad) for _ in range(3)]

    def model(q, k, v):
        return fastattn.attention(q * 2, k, v, causal=True) + 1

    expected = model(*qkv)
    before = fastattn.last_call()
    with fastattn.record() as calls:
        out = torch.compile(model, backend="eager")(*qkv)
        again = torch.compile(lambda *x: fastattn.scaled_dot_product_attention(*x, is_causal=True), backend="eager")(
            *qkv
        )
    assert torch.equal(out, expected) and torch.equal(again, fastattn.attention(*qkv, causal=True))
    assert [call.kernel for call in calls] == [before.kernel] * 2 and not fresh_fallbacks
    if needs_grad:
        gradients = [torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
