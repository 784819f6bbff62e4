"""Two kernels that share no code, the C++ and the interpreted Triton, agree on problems drawn from all there are."""

import random

import process

process.require(interpreted=True)

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from accuracy import plain  # noqa: E402
from backward import SLACK, sizes_of_scale_sums, slack_of  # noqa: E402
from fastattn import Mask  # noqa: E402
from fastattn.backends import cpu  # noqa: E402
from strict_interpreter import harden  # noqa: E402

harden()
if cpu.unavailable():
    pytest.skip(f"nothing to compare with: {cpu.unavailable()}", allow_module_level=True)

COUNT = 200
QUICK = 25  # of them in `make test-triton`, all in `make test-all`
DTYPES = ("float32", "bfloat16", "float16")


class Draw:
    """One random call: the same for the same number."""

    def __init__(self, number: int):
        self.random, self.torch = random.Random(number), torch.Generator().manual_seed(number)
        self.b, self.hk, self.group = self.random.choice((1, 1, 2)), self.random.choice((1, 2)), self.pick(1, 1, 2, 3)
        self.h = self.hk * self.group
        self.sq, self.sk = self.pick(1, 3, 17, 64, 100), self.pick(1, 5, 64, 77, 150, 300)
        self.d = self.pick(1, 8, 16, 24, 64, 80, 128)
        self.dv = self.d if self.chance(0.6) else self.pick(3, 16, 40, 96)
        self.dtype = getattr(torch, self.pick(*DTYPES))

    def pick(self, *choices):
        return self.random.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def normal(self, *shape, dtype=torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=self.torch, dtype=torch.float64).to(dtype)

    def integers(self, low: int, high: int, *shape) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.torch)

    def states(self, heads: int, seqlen: int, dim: int) -> torch.Tensor:
        """Either memory order, a slice of something larger, or heads that share memory."""
        layout = self.pick("bhsd", "bhsd", "bshd", "slice", "padded", "shared")
        if layout == "bshd":
            return self.normal(self.b, seqlen, heads, dim, dtype=self.dtype).transpose(1, 2)
        if layout == "slice":
            return self.normal(self.b, heads, seqlen, 2 * dim, dtype=self.dtype)[..., dim:]
        if layout == "padded":
            return self.normal(self.b + 1, heads, seqlen + 3, dim, dtype=self.dtype)[1:, :, 2:-1]
        if layout == "shared":
            return self.normal(self.b, 1, seqlen, dim, dtype=self.dtype).expand(self.b, heads, seqlen, dim)
        return self.normal(self.b, heads, seqlen, dim, dtype=self.dtype)

    def qkv(self) -> list[torch.Tensor]:
        return [self.states(self.h, self.sq, self.d), *(self.states(self.hk, self.sk, d) for d in (self.d, self.dv))]

    def broadcast(self, *shape: int) -> tuple[int, ...]:
        """`shape` with some sizes 1 and some leading ones left out."""
        sizes = [size if self.chance(0.6) else 1 for size in shape]
        return tuple(sizes[self.random.randrange(len(sizes)) if self.chance(0.2) else 0 :])

    def mask(self) -> Mask | torch.Tensor | None:
        b, h, sq, sk = self.b, self.h, self.sq, self.sk
        makers = {
            "none": lambda: None,
            "lengths": lambda: Mask.lengths(self.integers(0, sk + 1, b)),
            "left_padding": lambda: Mask.padding(torch.arange(sk) >= self.integers(0, sk + 1, b, 1)),
            "documents": lambda: Mask.documents(*(self.integers(0, 4, b, s).sort(1).values for s in (sq, sk))),
            "prefix_lm": lambda: Mask.prefix_lm(self.integers(0, sk + 1, b), sq, sk),
            "top_left": lambda: Mask.causal("top_left"),
            "intervals": lambda: Mask.intervals(
                self.integers(-2, sk + 1, *self.rows()), self.integers(0, sk + 3, *self.rows())
            ),
            "tensor": lambda: torch.rand(self.broadcast(b, h, sq, sk), generator=self.torch) < 0.7,
        }
        return makers[self.pick("none", "none", *makers)]()

    def rows(self) -> tuple[int, ...]:
        return tuple(size if self.chance(0.7) else 1 for size in (self.b, self.h, self.sq))

    def kwargs(self) -> dict:
        b, h, sq, sk = self.b, self.h, self.sq, self.sk
        found = {"mask": self.mask(), "causal": self.chance(0.4)}
        if self.chance(0.2):
            found["window_size"] = (self.pick(None, 0, 7, 60), self.pick(None, 0, 5))
        if self.chance(0.3):
            found["bias"] = self.normal(*self.broadcast(b, h, sq, sk), dtype=self.pick(self.dtype, torch.float32))
        if self.chance(0.2):
            found["alibi_slopes"] = 0.1 * self.normal(*self.pick((h,), (b, h)), dtype=torch.float32).abs()
        if self.chance(0.2):
            found["softcap"] = self.pick(0.5, 3.0, 30.0)
        if self.chance(0.2):
            found["sinks"] = self.normal(h, dtype=torch.float32)
        if self.chance(0.3):
            found["softmax_scale"] = self.pick(0.0, -0.3, 1.0, self.normal(*self.pick((), (h,)), dtype=torch.float32))
        if self.chance(0.3):
            found |= {"dropout_p": self.pick(0.1, 0.5, 0.9), "seed": self.random.getrandbits(63)}
        return found


def results(q, k, v, kwargs: dict, backend: str, dout=None, dlse=None) -> dict[str, torch.Tensor]:
    """out and lse by name, and the gradients of everything if dout is given."""
    tensors = {"q": q, "k": k, "v": v}
    tensors |= {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    if dout is not None:
        tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = fastattn.attention(**kwargs | tensors, return_lse=True, backend=backend)
    assert fastattn.last_call().kernel.split(".")[0] == backend
    found = {"out": out.detach(), "lse": lse.detach()}
    if dout is not None:
        pairs = [out, lse.masked_fill(lse == -torch.inf, 0.0)], [dout.to(out.dtype), dlse.to(lse.dtype)]
        grads = torch.autograd.grad(pairs[0], list(tensors.values()), pairs[1])
        found |= {f"d{name}": x for name, x in zip(tensors, grads, strict=True)}
    return found


def to_double(kwargs: dict) -> dict:
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in kwargs.items()
    }


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n < QUICK else [pytest.mark.slow]) for n in range(COUNT)]
)
def test_agreement(number):
    """Both within twice the error of plain torch of the truth, hence within four times of each other.

    Those of a learned scale may also be an ulp of the sum of the sizes of its terms apart, half of one each.
    """
    draw = Draw(number)
    (q, k, v), kwargs = draw.qkv(), draw.kwargs()
    cotangents = (None, None)
    if number % 2:
        cotangents = draw.normal(draw.b, draw.h, draw.sq, draw.dv), draw.normal(draw.b, draw.h, draw.sq)
        cotangents = cotangents[0].to(draw.dtype).double(), cotangents[1]
    ours, theirs = (results(q, k, v, kwargs, backend, *cotangents) for backend in ("triton", "cpu"))
    with plain(q.dtype):
        same_dtype = results(q, k, v, kwargs, "reference", *cotangents)
    doubles = q.double(), k.double(), v.double(), to_double(kwargs)
    oracle = results(*doubles, "reference", *cotangents)
    for name, truth in oracle.items():
        x, y = ours[name], theirs[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        size = truth.abs().clamp(min=1.0)
        finite = torch.isfinite(truth)
        assert torch.equal(x.isinf(), y.isinf()) and not x.isnan().any() and not y.isnan().any()
        floor = sizes_of_scale_sums(*doubles, *cotangents) * 2**-23 / size if name == "dsoftmax_scale" else 0.0
        distance, reference = (
            ((a.double() - b.double()).abs() / size - least)[finite].amax() if finite.any() else 0.0
            for a, b, least in ((x, y, floor), (same_dtype[name], truth, 0.0))
        )
        own = slack_of(x, q) if name[0] == "d" else SLACK[str(x.dtype).removeprefix("torch.")]
        slack = 2.0 * own  # each may use the one of its own suite
        assert distance <= 4.0 * reference + slack, (
            f"{name}: {distance:.3g} apart, the reference errs by {reference:.3g}"
        )


def test_the_draws_reach_everything():
    """What the 200 are said to cover, they cover."""
    draws = [Draw(number) for number in range(COUNT)]
    kinds = [(draw, draw.qkv(), draw.kwargs()) for draw in draws]
    problems = []
    for _, (q, k, v), kwargs in kinds:
        fastattn.attention(q, k, v, **kwargs, backend="cpu")
        problems.append(fastattn.last_call().problem)
    for field in ("alibi", "softcap", "sinks", "dropout", "learned_scale"):
        assert {getattr(problem, field) for problem in problems} == {True, False}, field
    assert {problem.dtype for problem in problems} == set(DTYPES)
    assert {problem.mask for problem in problems} >= {"none", "causal", "window", "interval", "tensor"}
    assert len({problem.bias for problem in problems}) == 4 and len({problem.group_size for problem in problems}) == 3
