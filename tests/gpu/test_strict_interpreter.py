"""The strict interpreter catches what it is there for: planted mistakes, and numbers that it must get right."""

import process

process.require(interpreted=True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from strict_interpreter import OutOfBounds, Race, Violation, harden  # noqa: E402

harden()


@triton.jit
def copy(x, y, n, N: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    if MASKED:
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)
    else:
        tl.store(y + i, tl.load(x + i), mask=i < n)


@pytest.mark.parametrize("n", [100, 128])
def test_a_correct_kernel_passes(n):
    x, y = torch.randn(n), torch.empty(n)
    copy[(4,)](x, y, n, 32, MASKED=True)
    assert torch.equal(x, y)


def test_load_out_of_bounds():
    x, y = torch.randn(100), torch.empty(100)
    with pytest.raises(OutOfBounds, match=r"load in program 3: 28 of 32 lanes outside .*\(100,\).* 100 elements from"):
        copy[(4,)](x, y, 100, 32, MASKED=False)


def test_load_that_runs_into_its_neighbour():
    """Both tensors lie in one allocation: the memory after x is good memory, and none of x."""
    both = torch.randn(256)
    with pytest.raises(OutOfBounds):
        copy[(4,)](both[:100], both[128:228], 100, 32, MASKED=False)


def test_load_from_the_gap_between_strides():
    x, y = torch.randn(8, 32), torch.empty(256)
    copy[(1,)](x, y, 256, 256, MASKED=True)
    with pytest.raises(OutOfBounds, match="load .* 16 elements from its start"):
        copy[(1,)](x[:, :16], y, 256, 256, MASKED=True)


@pytest.mark.parametrize("n", [-1, 99])
def test_store_out_of_bounds(n):
    @triton.jit
    def poke(y, n):
        tl.store(y + n, 1.0)

    poke[(1,)](torch.empty(99), 98)
    with pytest.raises(OutOfBounds, match=f"store .* {n} elements from its start"):
        poke[(1,)](torch.empty(99), n)


def test_a_pointer_that_was_selected():
    @triton.jit
    def pick(x, y, out):
        i = tl.arange(0, 16)
        tl.store(out + i, tl.load(tl.where(i < 8, x + i, y + i)))

    x, y, out = torch.randn(8), torch.randn(16), torch.empty(16)
    pick[(1,)](x, y, out)
    assert torch.equal(out, torch.cat([x, y[8:]]))
    with pytest.raises(OutOfBounds):
        pick[(1,)](x, y[:12], out)


def test_two_programs_store_to_one_element():
    @triton.jit
    def overlap(y, STEP: tl.constexpr):
        tl.store(y + tl.program_id(0) * STEP + tl.arange(0, 32), 1.0)

    overlap[(3,)](torch.empty(96), 32)
    with pytest.raises(Race, match="program 1 writes what program 0 writes: 1 elements"):
        overlap[(3,)](torch.empty(96), 31)


def test_a_program_reads_what_another_writes():
    @triton.jit
    def shift(x, y, FROM: tl.constexpr, TO: tl.constexpr):
        i = tl.program_id(0)
        tl.store(y + i + TO, tl.load(x + i + FROM))

    x = torch.randn(4)
    shift[(3,)](x, torch.empty(4), 0, 1)
    with pytest.raises(Race, match="program 1 reads what program 0 writes"):
        shift[(3,)](x, x, 0, 1)
    with pytest.raises(Race, match="program 1 writes what program 0 reads"):
        shift[(3,)](x, x, 1, 0)


def test_two_lanes_store_to_one_element():
    @triton.jit
    def fold(y):
        i = tl.arange(0, 32)
        tl.store(y + i // 2, i.to(tl.float32))

    with pytest.raises(Race, match="two lanes of program 0"):
        fold[(1,)](torch.empty(32))


def test_one_program_may_read_and_write_again():
    @triton.jit
    def twice(y):
        i = tl.program_id(0) * 8 + tl.arange(0, 8)
        tl.store(y + i, 1.0)
        tl.store(y + i, tl.load(y + i) + 1.0)

    y = torch.empty(16)
    twice[(2,)](y)
    assert (y == 2.0).all()


def test_a_masked_lane_is_not_zero():
    @triton.jit
    def sum_of(x, y, n, N: tl.constexpr):
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, N), mask=tl.arange(0, N) < n)))

    x, y = torch.ones(16), torch.zeros(1)
    sum_of[(1,)](x, y, 16, 16)
    assert y == 16.0
    sum_of[(1,)](x, y, 15, 16)
    assert y.isnan()


def test_a_masked_lane_of_integers_is_not_zero():
    @triton.jit
    def largest_of(x, y, n, N: tl.constexpr):
        tl.store(y, tl.max(tl.load(x + tl.arange(0, N), mask=tl.arange(0, N) < n)))

    x, y = torch.ones(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    largest_of[(1,)](x, y, 16, 16)
    assert y == 1
    largest_of[(1,)](x, y, 15, 16)
    assert y > 2**30


def test_overflow_of_int32():
    @triton.jit
    def offset(y, stride, WIDE: tl.constexpr):
        i = tl.program_id(0)
        if WIDE:
            i = i.to(tl.int64)
        tl.store(y + i * stride // 2**30, i.to(tl.float32))

    offset[(4,)](torch.empty(4), 2**30, WIDE=True)
    with pytest.raises(AssertionError, match="int32 overflow"):
        offset[(4,)](torch.empty(4), 2**30, WIDE=False)


def test_offsets_beyond_32_bits():
    """Two rows, 2^31 elements apart, of memory that is not there until it is touched."""

    @triton.jit
    def copy_row(x, y, stride, N: tl.constexpr, WIDE: tl.constexpr):
        row = tl.program_id(0)
        if WIDE:
            row = row.to(tl.int64)
        i = tl.arange(0, N)
        tl.store(y + tl.program_id(0) * N + i, tl.load(x + row * stride + i))

    x = torch.from_numpy(np.zeros(2**31 + 16, np.int16)).view(torch.float16).as_strided((2, 16), (2**31, 1))
    x[:] = torch.arange(32).view(2, 16)
    y = torch.empty(2, 16, dtype=torch.float16)
    copy_row[(2,)](x, y, 2**31, 16, WIDE=True)
    assert torch.equal(x, y)
    x = x.as_strided((2, 16), (2**30, 1))  # the program number times 2^30 fits, twice that does not
    with pytest.raises(AssertionError, match="int32 overflow"):
        copy_row[(3,)](x, torch.empty(3, 16, dtype=torch.float16), 2**30, 16, WIDE=False)


def test_device_assert():
    @triton.jit
    def check(x):
        tl.device_assert(tl.load(x) > 0.0, "not positive")

    check[(1,)](torch.ones(1))
    with pytest.raises(AssertionError, match="not positive"):
        check[(1,)](-torch.ones(1))


def test_atomics_are_refused():
    @triton.jit
    def add(y):
        tl.atomic_add(y, 1.0)

    with pytest.raises(Violation, match="atomic"):
        add[(1,)](torch.zeros(1))


# --- numbers ---------------------------------------------------------------------------------------------------------


@triton.jit
def binary(x, y, out, OP: tl.constexpr):
    i = tl.arange(0, 4096)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "add":
        c = a + b
    elif OP == "mul":
        c = a * b
    elif OP == "where":
        c = tl.where(a < b, a, b)
    elif OP == "max":
        c = tl.maximum(a, b)
    elif OP == "cast":
        c = (a.to(tl.float32) * 1.2345).to(out.dtype.element_ty)
    tl.store(out + i, c)


OPERATIONS = {
    "add": torch.add,
    "mul": torch.mul,
    "where": torch.minimum,
    "max": torch.maximum,
    "cast": lambda x, y: (x.float() * 1.2345).to(x.dtype),
}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_torchs(op, dtype):
    x, y = (torch.randn(4096).to(dtype) for _ in range(2))
    out = torch.empty(4096, dtype=dtype)
    binary[(1,)](x, y, out, op)
    assert torch.equal(out, OPERATIONS[op](x, y))


def test_rounding_to_bfloat16():
    """To nearest, ties to even; infinities, NaN and subnormal numbers included."""

    @triton.jit
    def cast(x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, tl.load(x + i).to(tl.bfloat16))

    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), dtype=torch.int32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.4e38, 1.00390625], dtype=torch.float32
    )
    x = torch.cat([bits.view(torch.float32), special.repeat(2**13)])
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    cast[(1,)](x, out, x.numel())
    torch.testing.assert_close(out, x.bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)


@triton.jit
def product(x, y, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    c = tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION)
    tl.store(out + at, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype):
    x, y = (torch.randn(32, 32).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    product[(1,)](x, y, out, "ieee")
    torch.testing.assert_close(out, x.float() @ y.float())


def test_tf32_is_seen():
    """Triton's default for float32 loses 13 bits, which Triton's interpreter does not show."""
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    exact, rounded = torch.empty(32, 32), torch.empty(32, 32)
    product[(1,)](x, y, exact, "ieee")
    product[(1,)](x, y, rounded, "tf32")
    error = (exact - rounded).abs().max() / exact.abs().max()
    assert 2**-13 < error < 2**-9


def test_reductions_of_bfloat16():
    @triton.jit
    def reduce(x, out):
        i = tl.arange(0, 64)
        tile = tl.load(x + i[:, None] * 64 + i[None, :])
        tl.store(out + i, tl.max(tile, 1))

    x, out = torch.randn(64, 64).bfloat16(), torch.empty(64, dtype=torch.bfloat16)
    reduce[(1,)](x, out)
    assert torch.equal(out, x.amax(1))


def test_numpy_types_of_all_others_are_tritons():
    from triton.runtime import interpreter

    assert interpreter._get_np_dtype(tl.float16) == np.float16 and interpreter._get_np_dtype(tl.int32) == np.int32
    assert interpreter._get_np_dtype(tl.pointer_type(tl.bfloat16)) == np.uint64
