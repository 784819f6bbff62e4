"""fastattn.compat.natten against natten's published definition, token by token."""

import itertools

import pytest
import torch

import fastattn
from fastattn.compat import natten

FUNCTIONS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def window(place, length, kernel_size, stride, causal):
    """The neighbours of one token of `length` on an axis: GNA's definition (arXiv 2504.16922, natten's masks)."""
    if causal:
        leader = min(place // stride * stride + stride - 1, length - 1)
        return range(max(leader - kernel_size + 1, 0), place + 1)
    leader = min(place // stride * stride + stride // 2, length - 1)
    left, right = kernel_size // 2, kernel_size // 2 + kernel_size % 2 - 1
    center = min(max(leader, left), length - 1 - right)
    return range(center - left, center + right + 1)


def neighbours(token, size, kernel_size, stride, dilation, causal):
    """[(key, key - query in steps of dilation)] of a token on an axis."""
    group = range(token % dilation, size, dilation)
    place = token // dilation
    return [(group[key], key - place) for key in window(place, len(group), kernel_size, stride, causal)]


def each(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def dense(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, rpb=None, more=None):
    """(out, lse) in float64, in natten's layout."""
    shape, axes = query.shape[1:-2], query.dim() - 3
    options = [each(x, axes) for x in (kernel_size, stride, dilation, is_causal)]
    q, k, v = (x.double().flatten(1, axes).transpose(1, 2) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    n = scores.shape[-1]
    hidden, bias = torch.ones(n, n, dtype=torch.bool), []
    for i, token in enumerate(itertools.product(*map(range, shape))):
        sets = [neighbours(*axis) for axis in zip(token, shape, *options, strict=True)]
        for pairs in itertools.product(*sets):
            j = 0
            for (key_place, _), size in zip(pairs, shape, strict=True):
                j = j * size + key_place
            hidden[i, j] = False
            if rpb is not None:
                entry = tuple(apart + size - 1 for (_, apart), size in zip(pairs, options[0], strict=True))
                bias.append((i, j, rpb[(slice(None), *entry)]))
    if bias:
        rows, columns, entries = zip(*bias, strict=True)
        table = torch.zeros(q.shape[1], n, n, dtype=torch.float64)
        scores = scores + table.index_put(
            (torch.arange(q.shape[1])[:, None], torch.tensor(rows), torch.tensor(columns)),
            torch.stack(entries, 1).double(),
        )
    scores = scores.masked_fill(hidden, -torch.inf)
    if more is not None:
        k_more, v_more = (x.double().transpose(1, 2).repeat_interleave(groups, 1) for x in more)
        scores = torch.cat([scores, q @ k_more.mT * (q.shape[-1] ** -0.5 if scale is None else scale)], -1)
        v = torch.cat([v.repeat_interleave(groups, 1), v_more], 2)
    else:
        v = v.repeat_interleave(groups, 1)
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, shape), lse.transpose(1, 2).unflatten(1, shape)


def tensors(shape, heads=2, heads_kv=2, dtype=torch.float64, head_dim=5, head_dim_v=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, head_dim), (heads_kv, head_dim), (heads_kv, head_dim_v)
    return [torch.randn(2, *shape, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


CASES = [
    ((23,), {"kernel_size": 5}),
    ((23,), {"kernel_size": 4, "stride": 3}),
    ((23,), {"kernel_size": 5, "stride": 5}),
    ((23,), {"kernel_size": 4, "dilation": 3, "is_causal": True}),
    ((23,), {"kernel_size": 4, "stride": 4, "dilation": 2, "is_causal": True}),
    ((23,), {"kernel_size": 23}),
    ((7, 9), {"kernel_size": 3}),
    ((7, 9), {"kernel_size": (3, 4), "dilation": (2, 1), "scale": 0.3}),
    ((7, 9), {"kernel_size": (5, 3), "stride": (2, 3), "is_causal": (True, False)}),
    ((7, 9), {"kernel_size": (7, 9)}),
    ((4, 5, 3), {"kernel_size": (2, 3, 3), "stride": (2, 1, 1), "dilation": (1, 1, 1)}),
    ((4, 5, 3), {"kernel_size": (2, 2, 3), "dilation": (2, 2, 1), "is_causal": (True, False, False)}),
]


@pytest.mark.parametrize("shape, options", CASES, ids=str)
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_results_and_gradients_are_those_of_the_definition(shape, options, heads_kv):
    inputs = [x.requires_grad_() for x in tensors(shape, heads_kv=heads_kv)]
    out, lse = FUNCTIONS[len(shape)](*inputs, **options, return_lse=True)
    expected, expected_lse = dense(*inputs, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((out, lse), inputs, (cotangent, torch.ones_like(lse)))
    oracle = torch.autograd.grad((expected, expected_lse), inputs, (cotangent, torch.ones_like(lse)))
    torch.testing.assert_close(grads, oracle)


@pytest.mark.parametrize(
    "shape, sizes, dilation", [((11,), (4,), 2), ((6, 7), (3, 5), (2, 1)), ((3, 4, 3), (2, 3, 3), 1)]
)
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_relative_biases_and_their_gradients(shape, sizes, dilation, heads_kv):
    rpb = torch.randn(
        2, *(2 * size - 1 for size in sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    inputs = [x.requires_grad_() for x in (*tensors(shape, heads_kv=heads_kv), rpb)]
    options = {"kernel_size": sizes, "dilation": dilation, "rpb": rpb}
    out, lse = FUNCTIONS[len(shape)](*inputs[:3], **options, return_lse=True)
    expected, expected_lse = dense(*inputs[:3], **options)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("with_table", [False, True])
def test_additional_keys_are_seen_by_all(with_table):
    inputs = [x.requires_grad_() for x in tensors((5, 6))]
    more = [x.flatten(1, 2)[:, :4].clone().requires_grad_() for x in tensors((5, 6), seed=3)[1:]]
    rpb = torch.randn(2, 5, 5, dtype=torch.float64) if with_table else None
    options = {"kernel_size": 3, "rpb": rpb}
    found = natten.na2d(*inputs, **options, additional_keys=more[0], additional_values=more[1], return_lse=True)
    expected = dense(*inputs, **options, more=more)
    torch.testing.assert_close(found, expected)
    alone = natten.na2d(*inputs, **options, additional_keys=more[0], additional_values=more[1])
    torch.testing.assert_close(alone, expected[0])
    cotangent = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(alone, [*inputs, *more], cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(expected[0], [*inputs, *more], cotangent))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_dtypes_and_strides(dtype, tolerance):
    inputs = tensors((6, 7), dtype=getattr(torch, dtype))
    inputs = [x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for x in inputs]
    out = natten.na2d(*inputs, 3)
    assert out.dtype == inputs[0].dtype
    torch.testing.assert_close(out.double(), dense(*inputs, 3)[0], rtol=tolerance, atol=tolerance)


def test_positional_arguments_have_nattens_order_and_tiles_change_nothing():
    inputs = tensors((7, 9))
    expected = dense(*inputs, 5, 2, 1, (True, False), 0.2)[0]
    torch.testing.assert_close(natten.na2d(*inputs, 5, 2, 1, (True, False), 0.2), expected)
    tiles = {"q_tile_shape": (4, 4), "kv_tile_shape": (4, 8), "run_persistent_kernel": False, "torch_compile": True}
    torch.testing.assert_close(natten.na2d(*inputs, 5, 2, None, (True, False), 0.2, **tiles), expected)


def test_compiles_without_a_graph_break():
    inputs = tensors((7, 9))
    compiled = torch.compile(lambda q, k, v: natten.na2d(q, k, v, 3, dilation=2), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), dense(*inputs, 3, dilation=2)[0])


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"kernel_size": 5, "dilation": 2}, ValueError, "kernel_size=5 times dilation=2 exceeds 7 tokens"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size=\(3, 3, 3\) must be one value"),
        ({"kernel_size": 3, "stride": 4}, ValueError, "stride=4 exceeds kernel_size=3"),
        ({"kernel_size": 3, "stride": 0}, ValueError, "stride=0 must be >= 1"),
        ({"kernel_size": 3, "is_causal": "yes"}, TypeError, "is_causal='yes' must be True or False"),
        ({"kernel_size": 3, "backend": "cutlass-fna"}, fastattn.UnsupportedError, "backend='cutlass-fna' is not here"),
        ({"kernel_size": 3, "attention_kwargs": {"x": 1}}, fastattn.UnsupportedError, "attention_kwargs"),
        ({"kernel_size": 3, "tile": 1}, TypeError, r"na2d\(\) got an unexpected keyword argument 'tile'"),
        ({"kernel_size": 3, "rpb": torch.zeros(2, 3, 3)}, ValueError, r"rpb has shape \(2, 3, 3\).*\(2, 5, 5\)"),
        (
            {"kernel_size": 3, "rpb": torch.zeros(2, 5, 5), "is_causal": True},
            fastattn.UnsupportedError,
            "rpb with is_causal",
        ),
        ({"kernel_size": 3, "additional_keys": torch.zeros(2, 3, 2, 5)}, TypeError, "additional_values must be"),
        (
            {
                "kernel_size": 3,
                "additional_keys": torch.zeros(2, 3, 2, 5),
                "additional_values": torch.zeros(2, 4, 2, 6),
            },
            ValueError,
            "additional_values has shape",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        natten.na2d(*tensors((7, 9)), **options)


def test_wrong_layouts_are_named():
    q, k, v = tensors((7, 9))
    with pytest.raises(ValueError, match=r"query has shape .* \[batch, length, heads, head_dim\]"):
        natten.na1d(q, k, v, 3)
    with pytest.raises(ValueError, match="key has shape .* batch and axes must agree"):
        natten.na2d(q, k[:, 1:], v, 3)
    with pytest.raises(ValueError, match="query, key, value have 2, 2, 1 heads"):
        natten.na2d(q, k, v[..., :1, :], 3)
    with pytest.raises(ValueError, match="each axis must have a token"):
        natten.na2d(q[:, :0], k[:, :0], v[:, :0], 3)
    with pytest.raises(TypeError, match="value must be a torch.Tensor"):
        natten.na2d(q, k, None, 3)
