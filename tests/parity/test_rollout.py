"""`rollout` against products of the dense matrices in float64."""

import pytest
import torch

import fastattn
from cases import Case
from fastattn import Mask, rollout
from isas import needs_cpu
from seeing import call, dense_weights

pytestmark = needs_cpu

SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=90, head_dim=12)
CASES = (
    SMALL, SMALL._replace(causal=True, num_heads_k=4), SMALL._replace(mask="tensor_per_head", softcap=2.0, alibi=True),
    SMALL._replace(mask="left_padding", bias="per_head"), SMALL._replace(mask="blocks", learned_scale="per_head"),
)  # fmt: skip
ROWS = [0, 89, 17, -2]


def layers_of(case, dtype="float64", with_lse=False):
    """(layers, dense weights of each, [batch, heads, seqlen, seqlen]) of three calls with different values."""
    layers, dense = [], []
    for seed in range(3):
        q, k, v, kwargs = call(case._replace(dtype=dtype, num_heads=4 * (1 + seed % 2)), seed)
        lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)[1]
        layers.append((q, k, kwargs | ({"lse": lse} if with_lse else {})))
        dense.append(dense_weights(q, k, **kwargs))
    return layers, dense


def mixed(weights, residual, heads):
    """A of a layer."""
    fused = {"mean": weights.mean(1), "max": weights.amax(1), "min": weights.amin(1)}[heads]
    if heads != "mean":
        fused = fused / fused.sum(-1, keepdim=True).clamp(min=1e-300)
    return residual * torch.eye(fused.shape[-1], dtype=fused.dtype) + (1.0 - residual) * fused


def product(matrices):
    found = matrices[0]
    for matrix in matrices[1:]:
        found = matrix @ found
    return found


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rollout_is_the_product_of_the_matrices(case, with_lse):
    layers, dense = layers_of(case, with_lse=with_lse)
    for residual in (0.5, 0.0, 0.3):
        expected = product([mixed(p, residual, "mean") for p in dense])
        found = rollout(layers, ROWS, residual=residual)
        assert fastattn.last_call().kernel == "cpu.backward"
        torch.testing.assert_close(found, expected[:, ROWS], rtol=0.0, atol=1e-13)
    torch.testing.assert_close(rollout(layers), product([mixed(p, 0.5, "mean") for p in dense]), rtol=0.0, atol=1e-13)
    with fastattn.use("reference"):
        torch.testing.assert_close(rollout(layers, ROWS), rollout(layers)[:, ROWS], rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("heads", ["max", "min"])
def test_other_ways_to_fuse_heads(heads):
    layers, dense = layers_of(SMALL)
    expected = product([mixed(p, 0.5, heads) for p in dense])
    torch.testing.assert_close(rollout(layers, ROWS, heads=heads), expected[:, ROWS], rtol=0.0, atol=1e-13)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, 90, dtype=torch.float64))


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("case", [SMALL, SMALL._replace(causal=True)], ids=str)
def test_the_widest_path(case, heads):
    layers, dense = layers_of(case)
    found = torch.ones(2, 90, 90, dtype=torch.float64)
    found = torch.where(torch.eye(90, dtype=torch.bool), found, 0.0)
    for p in reversed(dense):
        found = torch.minimum(found[:, :, :, None], mixed(p, 0.5, heads)[:, None]).amax(2)
    torch.testing.assert_close(rollout(layers, ROWS, heads=heads, method="widest_path"), found[:, ROWS])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    layers, dense = layers_of(SMALL, dtype)
    found, expected = rollout(layers, ROWS), product([mixed(p, 0.5, "mean") for p in dense])
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected[:, ROWS], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))


def test_padding_sends_nothing_and_causal_looks_back():
    q, k, _, _ = call(SMALL)
    mask = Mask.lengths(torch.tensor([50, 90])) & Mask.causal()
    k = k.clone()
    k[0, :, 50:] = torch.nan
    found = rollout([(q, k, {"mask": mask})] * 2, [40])
    assert (found[:, :, 41:] == 0.0).all() and found.isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"layers": []}, TypeError, "layers="),
        ({"layers": [3]}, TypeError, r"layers\[0\]=3"),
        ({"layers": [(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 5, 8))]}, ValueError, r"layers\[0\].*seqlen=4"),
        ({"layers": [(torch.ones(1, 1, 4, 8),) * 2, (torch.ones(2, 1, 4, 8),) * 2]}, ValueError, r"layers\[1\]"),
        ({"layers": [(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), {"rows": [1]})]}, TypeError, "rows is no option"),
        ({"residual": 1.5}, ValueError, "residual=1.5"),
        ({"heads": "median"}, ValueError, "heads='median'"),
        ({"method": "gradient"}, ValueError, "method='gradient'"),
        ({"method": "flow"}, NotImplementedError, "widest_path"),
        ({"rows": [4]}, ValueError, "rows="),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, text):
    arguments = {"layers": [(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8))]} | arguments
    with pytest.raises(error, match=text):
        rollout(**arguments)
