"""Launches through Triton's own C launcher, on a driver that records them and refuses what a driver refuses."""

import struct

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import fastattn  # noqa: E402
import stub_driver  # noqa: E402
from cases import Case, inputs  # noqa: E402
from fastattn.kernels import launch  # noqa: E402
from stub_driver import expected_parameters, stub_gpu, tensor_map  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("this process has a real driver", allow_module_level=True)

BASE = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=256, head_dim=64, dtype="bfloat16", causal=True)
BFLOAT16, FLOAT16, SWIZZLE_128 = 9, 6, 3  # of CUtensorMapDataType, CUtensorMapSwizzle


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return stub_driver.build(tmp_path_factory.mktemp("stub"))


def attend(case: Case, needs_grad: bool = False, **more) -> dict[str, torch.Tensor]:
    """The tensors of a call that were given, and out."""
    (q, k, v), kwargs = inputs(case)
    q, k, v = (x.requires_grad_(needs_grad) for x in (q, k, v))
    out = fastattn.attention(q, k, v, **kwargs | more, backend="triton")
    if needs_grad:
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return {"q": q, "k": k, "v": v, "out": out, **{name: x for name, x in kwargs.items() if torch.is_tensor(x)}}


def assert_recorded(driver) -> None:
    """Each parameter of each kernel is what Python passed, of the size that the cubin wants."""
    assert driver.recorded() and len(driver.recorded()) == len(driver.launches)
    for recorded, launched, src in zip(driver.recorded(), driver.launches, driver.sources, strict=True):
        assert (recorded.name, recorded.grid) == (launched.binary.name, launched.grid) and recorded.stream == 0
        assert recorded.threads == 32 * launched.binary.metadata["num_warps"]
        assert recorded.shared == launched.binary.metadata["shared"]
        expected = expected_parameters(src, launched.args)
        assert len(recorded.parameters) == len(expected)
        for found, wanted in zip(recorded.parameters, expected, strict=True):
            if isinstance(wanted, TensorDescriptor):
                assert_describes(tensor_map(found), wanted)
            else:
                assert found == wanted


def assert_describes(found, descriptor: TensorDescriptor) -> None:
    size, strides = descriptor.base.element_size(), descriptor.strides[:-1]
    assert found.address == descriptor.base.data_ptr() and found.dims == tuple(reversed(descriptor.shape))
    assert found.strides == tuple(size * x for x in reversed(strides))
    width = min(descriptor.block_shape[-1], 128 // size)  # a tile that is wider than the swizzle comes in parts
    assert found.box == (width, *reversed(descriptor.block_shape[:-1]))


def named(driver, kernel: str) -> dict[str, list]:
    """What the arguments of a kernel's first launch came to, by the kernel's names for them; constants are left out."""
    place = [recorded.name for recorded in driver.recorded()].index(kernel)
    src, parameters = driver.sources[place], iter(driver.recorded()[place].parameters)
    found: dict[str, list] = {}

    def read(name, kind):
        if isinstance(kind, tuple):
            for inner in kind:
                read(name, inner)
        elif kind.startswith("tensordesc"):
            found.setdefault(name, []).append(tensor_map(next(parameters)))
            found[name] += [int.from_bytes(next(parameters), "little") for _ in range(8)]  # its shape, its strides
        elif kind != "constexpr":
            data = next(parameters)
            number = struct.unpack("<f", data)[0] if kind == "fp32" else int.from_bytes(data, "little", signed=True)
            found.setdefault(name, []).append(number)

    for name, kind in src.signature.items():
        read(name, kind)
    return found


def of_strides(x: torch.Tensor) -> list[int]:
    return [stride for stride in x.stride() if stride != 1]  # 1 is a constant of the code


@pytest.mark.parametrize(
    "arch, backward", [(80, False), (90, True), (100, False), slow(80, True), slow(100, True)]
)  # fmt: skip
def test_parameters_are_those_of_the_call(arch, backward, library):
    """Pointers, strides and numbers by name; keys and values as tensor maps from sm_90 on."""
    case = BASE._replace(layout="bshd", softmax_scale=0.3)
    with stub_gpu(arch, library) as driver:
        tensors = attend(case, needs_grad=backward)
        assert_recorded(driver)
        kernels = ["forward_kernel", *(["delta_kernel", "key_value_kernel", "query_kernel"] if backward else [])]
        assert [recorded.name for recorded in driver.recorded()] == kernels
        found = named(driver, "forward_kernel")
        for name in ("q", "k", "v", "out"):
            assert found[name] == [tensors[name].data_ptr()]
            assert found[f"{name}_strides"] == of_strides(tensors[name])
        expected = {"num_heads": [4], "group_size": [2], "seqlen_q": [256], "seqlen_k": [256], "diagonal_hi": [0]}
        assert {name: found[name] for name in expected} == expected
        assert found["softmax_scale"] == [pytest.approx(0.3)]
        for name in ("k", "v") if arch >= 90 else ():
            made, *rest = found[f"{name}_descriptor"]
            assert (made.address, made.type, made.swizzle) == (tensors[name].data_ptr(), BFLOAT16, SWIZZLE_128)
            assert made.dims == (64, 256, 2, 2) and rest == [2, 2, 256, 64, *tensors[name].stride()]
            assert made.strides == (256, 128, 65536) and made.box[0] == 64 and made.box[2:] == (1, 1)


MANY = BASE._replace(mask="intervals", bias="per_head", alibi=True, softcap=5.0, sinks=True, dropout_p=0.3)
KINDS = {
    "everything": (MANY, {"seed": 2**62 + 1}),
    "a learned scale, float16": (BASE._replace(dtype="float16", learned_scale="per_head", causal=False), {}),
    "a block mask": (BASE._replace(mask="shared_blocks", causal=False), {}),
    "decoding": (BASE._replace(seqlen_q=1, seqlen_k=4096, batch=1), {}),
    "one head": (BASE._replace(batch=1, num_heads=1, num_heads_k=1, head_dim=128), {}),
}


@pytest.mark.parametrize("kind", ["everything", "decoding", *map(slow, list(KINDS)[1:3]), "one head"])
def test_kinds_of_arguments(kind, library):
    case, more = KINDS[kind]
    with stub_gpu(90, library) as driver:
        tensors = attend(case, **more)
        assert_recorded(driver)
        if kind == "everything":
            found = named(driver, "forward_kernel")
            assert found["seed"] == [2**62 + 1] and found["threshold"] == [int(0.3 * 2**32)]
            assert found["bias"] == [tensors["bias"].data_ptr()] and found["softcap"] == [5.0]
            assert found["alibi_slopes"] == [tensors["alibi_slopes"].data_ptr()]
        if kind == "decoding":
            assert [recorded.name for recorded in driver.recorded()] == ["decode_kernel", "combine_kernel"]


def test_a_second_call_sends_its_own_tensors(library):
    """What is remembered of the first one is no address of it."""
    with stub_gpu(90, library) as driver:
        first, second = attend(BASE), attend(BASE)
        assert_recorded(driver)
        parameters = [recorded.parameters for recorded in driver.recorded()]
        assert len(parameters) == 2 and parameters[0][4:] != parameters[1][4:]
        for tensors, found in zip((first, second), parameters, strict=True):
            assert [int.from_bytes(x, "little") for x in found[:3]] == [tensors[x].data_ptr() for x in "qkv"]


# --- what a driver refuses -------------------------------------------------------------------------------------------


def refused(message: str):
    return pytest.raises(RuntimeError, match=message)


RIGHT = {
    "address": 1 << 20, "swizzle": SWIZZLE_128, "size": 2, "type": BFLOAT16, "box": [1, 1, 128, 64],
    "shape": [2, 2, 256, 64], "strides": [32768, 16384, 64, 1], "padding": 0,
}  # fmt: skip
WRONG = {
    "an address": ({"address": (1 << 20) + 8}, "multiple of 16"),
    "no address": ({"address": 0}, "a tensor at"),
    "a stride": ({"strides": [32768, 16384, 60, 1]}, "stride 120"),
    "a wide stride": ({"strides": [1 << 40, 16384, 64, 1]}, "below 2.40"),
    "an empty dimension": ({"shape": [2, 0, 256, 64]}, "size 0"),
    "a large box": ({"box": [1, 1, 512, 64]}, "the box has 512"),
    "an empty box": ({"box": [1, 0, 128, 64]}, "the box has 0"),
    "rows of the box that are wider than the swizzle": ({"box": [1, 1, 128, 128]}, "256 bytes, the swizzle 128"),
    "rows of the box that are no multiple of 16 bytes": ({"box": [1, 1, 128, 4]}, "8 bytes: a multiple of 16"),
    "a swizzle": ({"swizzle": 9}, "swizzle 9"),
    "a type": ({"type": 77}, "data type 77"),
    "NaN for integers": ({"type": 1, "padding": 1}, "integers"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_tensor_maps(fault, library):
    changes, message = WRONG[fault]
    with stub_gpu(90, library) as driver:
        driver.utils.fill_tma_descriptor_tiled(*RIGHT.values())
        with refused(message):
            driver.utils.fill_tma_descriptor_tiled(*(RIGHT | changes).values())


def test_tensor_maps_begin_with_sm_90(library):
    with stub_gpu(80, library) as driver, refused("begin with sm_90"):
        driver.utils.fill_tma_descriptor_tiled(*RIGHT.values())


def test_launches(library):
    """With another number of threads, more shared memory, too many blocks; for another device; of another name."""
    with stub_gpu(90, library) as driver:
        attend(BASE)
        (launched,) = driver.launches
        start = launch._loaded[list(launch._loaded)[0]]
        num_warps, num_ctas, shared = start.metadata
        for metadata, grid, message in (
            ((num_warps // 2, num_ctas, shared), (1, 1, 1), "128 threads, compiled for 256"),
            ((num_warps, num_ctas, 228 << 10), (1, 1, 1), "bytes of shared memory"),
            ((num_warps, num_ctas, shared), (1, 70000, 1), "70000 blocks in dimension 1"),
        ):
            with refused(message):
                start.start(*grid, 0, start.function, metadata, None, None, None, *launched.args)
        cubin = launched.binary.files["cubin"].read_bytes()
        with refused("no kernel other"):
            driver.utils.load_binary("other", cubin, shared, 0)
        driver.stub.stub_device(90, 100 << 10)
        _, function, *_ = driver.utils.load_binary("forward_kernel", cubin, shared, 0)
        with refused("bytes of shared memory, 102400 were asked for"):
            start.start(1, 1, 1, 0, function, start.metadata, None, None, None, *launched.args)
        driver.stub.stub_device(100, 227 << 10)
        with refused("code for sm_90 on a device of sm_100"):
            driver.utils.load_binary("forward_kernel", cubin, shared, 0)


def test_an_address_of_the_host(library):
    """The launcher's own error, as any of a first launch."""
    (q, k, v), _ = inputs(BASE)
    with stub_gpu(90, library) as driver:
        driver.stub.stub_host(q.data_ptr(), q.data_ptr() + 1)
        with pytest.raises(fastattn.UnsupportedError, match="ValueError: .*cannot be accessed from Triton"):
            fastattn.attention(q, k, v, backend="triton")


@pytest.mark.parametrize("fault", ["load", "launch"])
def test_what_the_driver_refuses_at_first_is_a_refusal(fault, library, monkeypatch):
    """Of the row, with the driver's text."""
    message = r"code for sm_90 on a device of sm_80"
    with stub_gpu(90, library) as driver:
        if fault == "load":
            driver.stub.stub_device(80, 163 << 10)
        else:
            message, describe = (
                r"Failed to create tensor map descriptor: stride 130: a multiple of 16",
                launch._descriptor,
            )

            def describe_wrongly(*args):
                descriptor = describe(*args)
                descriptor.strides[2] += 1
                return descriptor

            monkeypatch.setattr(launch, "_descriptor", describe_wrongly)
        with pytest.raises(fastattn.UnsupportedError, match=rf"triton\.prefill: prefill: .*{message}"):
            attend(BASE)
        assert driver.recorded() == []
