"""Each opcode of AMD's kernels on random operands, against AMD's own description of it (tests/gpu/pseudocode/).

Products of matrices and what other lanes give (DPP), which it does not describe, are in test_emulator_amd.py.
"""

import pytest

pytest.importorskip("tinygrad", reason="AMD's descriptions of its instructions are those of the package tinygrad")

import numpy as np  # noqa: E402

from amd_bench import SHARED, Bench  # noqa: E402
from amd_samples import samples  # noqa: E402
from emulator.amd.opcodes.memory import LAST_WORDS  # noqa: E402
from emulator.amd.parsing import EXEC, VCC, Number, Register, instruction  # noqa: E402
from emulator.amd.registers import constant  # noqa: E402
from pseudocode import Run, Value, descriptions, to_bits  # noqa: E402

ROUNDS = 1
ARCHS = ("gfx1100", "gfx942")
COPY = "D0.b32 = S0.b32"
NOT_DESCRIBED = {"v_accvgpr_read_b32": COPY, "v_accvgpr_write_b32": COPY, "v_accvgpr_mov_b32": COPY}
APPROXIMATE = ("v_exp_f32", "v_log_f32", "v_rcp_f32", "v_rcp_iflag_f32", "v_sqrt_f32", "v_rsq_f32")
SAMPLES = [(arch, opcode) for arch in ARCHS for opcode in samples(arch)]


def described(arch: str, opcode: str) -> str:
    arch = "gfx1100" if opcode.startswith("v_fma_mix") else arch  # cdna's document leaves two of these out
    text = NOT_DESCRIBED.get(opcode) or descriptions(arch)[opcode]
    return text.replace(".u32[", "[") if opcode == "v_pk_mov_b32" else text  # its sources have 64 bits


def kind_of(opcode: str) -> str:
    if opcode in ("v_readfirstlane_b32", "v_readlane_b32", "v_writelane_b32", "v_permlanex16_b32", "ds_bpermute_b32"):
        return "lanes"
    if opcode.startswith(("buffer", "global", "scratch", "ds", "s_load")):
        return "memory"
    return "scalar" if opcode.startswith("s_") else "vector"


def of_kind(kind: str) -> list:
    return [pytest.param(arch, opcode, id=f"{arch}-{opcode}") for arch, opcode in SAMPLES if kind_of(opcode) == kind]


def equal(found: int, expected: int, opcode: str, is_zero_signed: bool = True) -> bool:
    """As numbers of the result's type; f16: in both halves. A fused product may be rounded twice in the emulator."""
    type, is_approximate, is_fused = type_of(opcode), opcode in APPROXIMATE, "fma" in opcode
    if found == expected or type not in ("f32", "f16"):
        return found == expected
    pair = np.array([found, expected], np.uint32)[:, None].view(np.float32 if type == "f32" else np.float16)
    if is_approximate and np.isfinite(pair[1, 0]):
        x, y = pair[:, 0].tolist()
        return abs(x - y) <= 2.0**-21 * max(abs(y), 2.0**-4) or abs(y) < 2.0**-126
    if is_fused and abs(int(pair.view(np.uint32)[0, 0]) - int(pair.view(np.uint32)[1, 0])) <= 1:
        return True
    if not is_zero_signed and np.all(pair == 0):
        return True
    bits = pair.view(f"u{pair.itemsize}")
    return bool(np.all((bits[0] == bits[1]) | np.isnan(pair).all(0)))


def type_of(opcode: str) -> str:
    """Of the result."""
    words = opcode.split("_")
    return words[2] if words[1] == "cvt" else "f16" if opcode == "v_pack_b32_f16" else words[-1]


# --- vector instructions ---------------------------------------------------------------------------------------------


def source(bench: Bench, operand, lane: int) -> Value:
    if isinstance(operand, Number):
        return Value("b", 32, int(constant(operand, "u32")))
    if operand.kind == "s":
        return Value("b", 32 * operand.count, bench.scalar(operand.number, operand.count))
    bits = sum(int(bench.vector(operand.number + i)[lane]) << 32 * i for i in range(operand.count))
    if operand.half:
        bits = bits >> (16 if operand.half == "h" else 0) & 0xFFFF
    return Value("b", 32 * operand.count, bits ^ (1 << 31 if operand.negated else 0))


def names_of(bench: Bench, parsed, lane: int) -> dict:
    """What the description of a vector instruction reads, in one lane."""
    destination, *sources = parsed.operands
    opcode, names = parsed.opcode, {"laneId": Value("u", 32, lane), "VCC": Value("b", 64, bench.bits_of_mask(VCC))}
    if opcode.startswith("v_cmpx"):
        destination, sources = Register("s", EXEC, 2), list(parsed.operands)
    if opcode.endswith("_co_u32") or "_co_ci" in opcode or opcode in ("v_mad_u64_u32", "v_div_scale_f32"):
        sources = sources[1:]
    if opcode.startswith(("v_cndmask", "v_add_co_ci", "v_addc")):
        names["VCC"] = Value("b", 64, bench.bits_of_mask(sources.pop().number))
    found = [source(bench, operand, lane) for operand in sources]
    if opcode in ("v_fmaak_f32", "v_fmamk_f32"):
        names["SIMM32"] = found.pop(2 if opcode == "v_fmaak_f32" else 1)
    flags = {key: [int(x) for x in value.strip("[]").split(",")] for key, value in parsed.modifiers.items()}
    if opcode.startswith("v_fma_mix"):
        for key, name in (("op_sel", "OPSEL"), ("op_sel_hi", "OPSEL_HI")):
            names[name] = Value("b", 3, sum(bit << i for i, bit in enumerate(flags[key])))
        names["S"] = dict(enumerate(found))
    elif opcode == "v_pk_mov_b32":
        names["OPSEL"] = Value("b", 2, sum(bit << i for i, bit in enumerate(flags["op_sel"])))
    elif opcode.startswith("v_pk_"):
        found = [packed(value, i, flags, 16 if "b16" in opcode else 32) for i, value in enumerate(found)]
    names |= {f"S{i}": value for i, value in enumerate(found)}
    if opcode == "v_div_scale_f32":  # what it does not scale, it passes on
        names["D0"] = names["S0"]
    elif destination.kind == "v":
        names["D0"] = source(bench, destination._replace(half=""), lane)
    return names


def packed(value: Value, number: int, flags: dict, size: int) -> Value:
    """A source whose halves are those that the modifiers choose."""
    halves = [to_bits(value) >> size * i & (1 << size) - 1 for i in range(2)]
    low = halves[flags.get("op_sel", [0] * 3)[number]] ^ flags.get("neg_lo", [0] * 3)[number] << size - 1
    high = halves[flags.get("op_sel_hi", [1] * 3)[number]] ^ flags.get("neg_hi", [0] * 3)[number] << size - 1
    return Value("b", 2 * size, low | high << size)


@pytest.mark.parametrize("arch, opcode", of_kind("vector"))
def test_vector(arch, opcode):
    text = samples(arch)[opcode]
    parsed = instruction(1, "\t" + text, "")
    destination, is_compared = parsed.operands[0], opcode.startswith("v_cmp")
    for seed in range(ROUNDS):
        bench = Bench(arch, seed)
        wanted = [Run(arch, names_of(bench, parsed, lane)).text(described(arch, opcode)) for lane in range(bench.lanes)]
        before = None if is_compared else vectors_of(bench, destination)
        bench.run(text)
        if not is_compared:
            _assert_values(bench, opcode, destination, before, wanted)
        if is_compared or "_co_" in opcode or opcode in ("v_mad_u64_u32", "v_div_scale_f32"):
            _assert_mask(bench, opcode, parsed, wanted)


def vectors_of(bench: Bench, register: Register) -> list[np.ndarray]:
    return [bench.vector(register.number + i) for i in range(register.count)]


def _assert_values(bench: Bench, opcode: str, destination: Register, before: list, wanted: list[dict]) -> None:
    is_zero_signed = bench.arch == "gfx1100" or not opcode.startswith(("v_min", "v_max"))  # or it is left open
    for lane, names in enumerate(wanted):
        expected = to_bits(names["D0"])
        if destination.half:
            kept = int(before[0][lane])
            low, high = (kept, expected) if destination.half == "h" else (expected, kept >> 16)
            expected = low & 0xFFFF | (high & 0xFFFF) << 16
        for i, found in enumerate(vectors_of(bench, destination)):
            bits = expected >> 32 * i & 0xFFFFFFFF if bench.active[lane] else int(before[i][lane])
            assert equal(int(found[lane]), bits, opcode, is_zero_signed), (lane, names)


def _assert_mask(bench: Bench, opcode: str, parsed, wanted: list[dict]) -> None:
    """Of lanes that are not active the bits are 0."""
    is_compared = opcode.startswith("v_cmp")
    mask = Register("s", EXEC) if "cmpx" in opcode else parsed.operands[0 if is_compared else 1]
    found = bench.bits_of_mask(mask.number)
    for lane, names in enumerate(wanted):
        if opcode == "v_mad_u64_u32":
            expected = to_bits(names["D1"])
        elif opcode == "v_div_scale_f32":  # described for one lane
            expected = to_bits(names["VCC"])
        else:
            expected = to_bits(names["EXEC" if "cmpx" in opcode else "D0" if is_compared else "VCC"]) >> lane
        assert found >> lane & 1 == (expected & 1 if bench.active[lane] else 0), (lane, names)


# --- scalar instructions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, opcode", of_kind("scalar"))
def test_scalar(arch, opcode):
    text = samples(arch)[opcode]
    parsed = instruction(1, "\t" + text, "")
    is_result = not opcode.startswith(("s_cmp", "s_bitcmp"))
    sources = parsed.operands[is_result:]
    destination = parsed.operands[0]
    for seed in range(8 * ROUNDS):
        bench = Bench(arch, seed)
        executed = bench.bits_of_mask(EXEC)
        names = {"SCC": Value("u", 1, int(bench.registers.scc[0, 0])), "EXEC": Value("b", 64, executed)}
        found = [source(bench, operand, 0) for operand in sources]
        found_16 = [value for value, operand in zip(found, sources, strict=True) if isinstance(operand, Number)]
        if found_16 and arch == "gfx1100":
            names["SIMM16"] = Value("b", 16, to_bits(found_16[0]) & 0xFFFF)
        names |= {f"S{i}": value for i, value in enumerate(found)}
        if is_result:
            names["D0"] = source(bench, destination, 0)
        wanted = Run(arch, names).text(described(arch, opcode))
        bench.run(text)
        assert bool(wanted["SCC"].data) == bench.registers.scc[0, 0], (seed, names)
        if is_result:
            count = destination.count
            assert bench.scalar(destination.number, count) == to_bits(wanted["D0"]) & (1 << 32 * count) - 1, (
                seed,
                names,
            )
        assert bench.bits_of_mask(EXEC) == to_bits(wanted["EXEC"]) & (1 << bench.lanes) - 1


# --- other lanes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, opcode", of_kind("lanes"))
def test_lanes(arch, opcode):
    text = samples(arch)[opcode]
    parsed = instruction(1, "\t" + text, "")
    destination = parsed.operands[0]
    for seed in range(4 * ROUNDS):
        bench = Bench(arch, seed)
        executed = Value("b", 64, bench.bits_of_mask(EXEC))
        registers = (1, 3, 20)
        lanes = {
            lane: {n: Value("b", 32, int(bench.vector(n)[lane])) for n in registers} for lane in range(bench.lanes)
        }
        numbers = {"VDST": destination.number, "SRC0": 1, "ADDR": 1, "DATA0": 3, "OFFSET": 0}
        names = {name: Value("u", 32, number) for name, number in numbers.items()}
        names |= {"VGPR": lanes, "EXEC": executed, "EXEC_LO": executed}
        if opcode == "v_permlanex16_b32":
            # lanes that are not active are read, too (op_sel), which the text does not say
            names |= {"S1": Value("b", 32, bench.scalar(2)), "S2": Value("b", 32, bench.scalar(3))}
        elif opcode != "ds_bpermute_b32":
            names |= {"S0": Value("b", 32, bench.scalar(2)), "S1": Value("b", 32, 5 if "write" in opcode else 31)}
        wanted = Run(arch, names).text(described(arch, opcode))
        bench.run(text)
        if destination.kind == "s":
            assert bench.scalar(destination.number) == to_bits(wanted["D0"])
        else:
            assert bench.vector(20).tolist() == [to_bits(lanes[lane][20]) for lane in range(bench.lanes)]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, opcode", of_kind("memory"))
def test_memory(arch, opcode):
    parsed = instruction(1, "\t" + samples(arch)[opcode], "")
    for seed in range(ROUNDS):
        bench = Bench(arch, seed)
        places = 32 * bench.rng.permutation(bench.lanes)
        if "64_b" in opcode:  # neighbours in memory
            places = int(opcode[-2:]) // 8 * (places // 32)
        if opcode.startswith("buffer"):
            places = np.where(bench.rng.random(bench.lanes) < 0.2, 1 << 31, places)  # beyond it: zeros, and not written
        _prepare(bench, opcode.split("_")[0], places)
        if opcode.startswith("s_load"):
            wanted = Run(arch, {"ADDR": Value("u", 64, 16)}, memory_of(bench)).text(described(arch, opcode))["SDATA"]
            bench.run(samples(arch)[opcode])
            destination = parsed.operands[0]
            assert bench.scalar(destination.number, destination.count) == to_bits(wanted)
        else:
            _compare_lanes(bench, opcode, parsed, places)


def _prepare(bench: Bench, space: str, places: np.ndarray) -> None:
    records = (bench.address & 0xFFFFFFFF, bench.address >> 32, SHARED, LAST_WORDS[bench.arch[:4]])
    for i, word in enumerate(records):
        bench.write_scalar(8 + i, word)
    bench.write_vector(1, places)
    if space == "global":
        addresses = bench.address + places.astype(np.uint64)
        bench.write_vector(2, addresses & np.uint64(0xFFFFFFFF))
        bench.write_vector(3, addresses >> np.uint64(32))
    scratch = bench.machine.scratch
    scratch[:], bench.machine.is_scratch_written[:] = bench.rng.integers(0, 256, scratch.shape), True


def memory_of(bench: Bench, lane: int = 0, space: str = "") -> dict[int, int]:
    found = bench.machine.scratch[:, lane] if space == "scratch" else bench.memory.numpy()
    found = bench.machine.shared.data if space == "ds" else found
    return dict(enumerate(found.tolist()))


def _compare_lanes(bench: Bench, opcode: str, parsed, places: np.ndarray) -> None:
    arch, space, text = bench.arch, opcode.split("_")[0], described(bench.arch, opcode)
    offset = int(parsed.modifiers.get("offset", "0"))
    is_load = "load" in opcode or "read" in opcode
    data = parsed.operands[:1] if is_load or space == "buffer" else parsed.operands[1:]
    memory, wanted = memory_of(bench, 0, space), []
    for lane in range(bench.lanes):
        if not is_load and space != "scratch" and wanted:
            memory = wanted[-1][1]  # lanes write to one memory
        elif space == "scratch":
            memory = memory_of(bench, lane, space)
        address = 0 if space == "scratch" else int(places[lane])
        names = {"ADDR": Value("u", 64, address + (0 if "OFFSET.u32" in text else offset))}
        names |= {"OFFSET": Value("u", 32, offset), "OFFSET0": Value("u", 32, 1), "OFFSET1": Value("u", 32, 3)}
        for name, operand in zip(("DATA", "DATA2"), (x for x in data if isinstance(x, Register)), strict=False):
            names[name] = source(bench, operand, lane)
        names["VDATA"] = names["RETURN_DATA"] = names["DATA"]
        is_inside = space != "buffer" or address < SHARED
        if bench.active[lane] and is_inside:
            names = Run(arch, names, memory).text(text)
        elif bench.active[lane] and is_load:
            names["VDATA"] = Value("b", 128, 0)
        wanted.append((to_bits(names["RETURN_DATA" if space == "ds" else "VDATA"]), memory))
    bench.run(samples(arch)[opcode])
    for lane, (bits, memory) in enumerate(wanted):
        if is_load:
            found = [int(bench.vector(data[0].number + i)[lane]) for i in range(data[0].count)]
            assert found == [bits >> 32 * i & 0xFFFFFFFF for i in range(data[0].count)], (lane, places[lane])
        elif space == "scratch" or lane == bench.lanes - 1:
            assert memory_of(bench, lane, space) == memory
