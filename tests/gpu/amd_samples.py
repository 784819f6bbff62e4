"""One instruction of each opcode that AMD's kernels contain, as LLVM writes it, for the tests of the emulator.

v1 to v9 are read, v20 and on are written; s[2:3] and on are read, s[30:31] and on are written, s[40:41] is a mask.
"""

import re

from emulator.amd.opcodes import comparisons, mixed, vector

OF_GFX11 = re.compile(r"_nc_|(and|or|mov)_b16$|cvt_u32_u16|xor3|minmax|maxmin")
OF_GFX9 = re.compile(r"v_(add|sub|subrev)_u32$|v_add_u16|lshl_add_u64|accvgpr|v_mov_b64|pack_b32")
COMPARED = ("lt", "eq", "le", "gt", "ge")
SELECTED = {
    "v_pk_add_f32": "op_sel:[0,1] op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[1,0]",
    "v_pk_mul_f32": "op_sel_hi:[1,0]",
    "v_pk_fma_f32": "op_sel_hi:[1,1,0] neg_lo:[0,0,1] neg_hi:[0,0,1]",
}
SCALARS = (
    "s_and_b32 s_or_b32 s_xor_b32 s_add_u32 s_sub_u32 s_add_i32 s_sub_i32 s_mul_i32 s_mul_hi_u32 s_max_i32 s_min_i32 "
    "s_bfe_u32 s_bfe_i32 s_lshl_b32 s_lshr_b32 s_ashr_i32 s_addc_u32 s_subb_u32 s_cselect_b32"
).split()


def samples(arch: str) -> dict[str, str]:
    """opcode -> an instruction"""
    is_gfx11 = arch == "gfx1100"
    found = _values(is_gfx11) + _masks(is_gfx11) + _lanes(is_gfx11) + _scalars(is_gfx11) + _memory(is_gfx11)
    return {re.sub(r"_e(32|64)$", "", text.split()[0]): text for text in found}


def at(first: int, count: int, kind: str = "v") -> str:
    return f"{kind}{first}" if count == 1 else f"{kind}[{first}:{first + count - 1}]"


def _values(is_gfx11: bool) -> list[str]:
    other = OF_GFX9 if is_gfx11 else OF_GFX11
    found = [_value(opcode, is_gfx11) for opcode in vector.OPERATIONS if not other.search(opcode)]
    mixed_products = ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")
    found += [f"{opcode} v20, v1, v3, v5 op_sel:[1,1,1] op_sel_hi:[1,0,1]" for opcode in mixed_products]
    if not is_gfx11:
        third = {"v_pk_fma_f32": ", v[5:6]"}
        found += [f"{x} v[20:21], v[1:2], v[3:4]{third.get(x, '')} {SELECTED[x]}" for x in mixed.PACKED]
        found += ["v_pk_mov_b32 v[20:21], v[1:2], v[3:4] op_sel:[1,0]"]
    return [*found, "v_pk_lshlrev_b16 v20, v1, v3 op_sel_hi:[0,1]"]


def _value(opcode: str, is_gfx11: bool) -> str:
    def register(number: int, type: str) -> str:
        half = ".l" if is_gfx11 and type.endswith("16") else ""
        return at(number, 2 if type.endswith("64") else 1) + half

    operation = vector.operation_of(opcode)
    sources = [register(1 + 2 * i, type) for i, type in enumerate(operation.operands)]
    if opcode == "v_fmac_f32":
        sources.pop()
    if opcode in ("v_fmaak_f32", "v_fmamk_f32"):
        sources[2 if opcode == "v_fmaak_f32" else 1] = "0x3fc90fdb"
    return f"{opcode} {register(20, operation.result)}, " + ", ".join(sources)


def _masks(is_gfx11: bool) -> list[str]:
    """Vector instructions that read a mask or make one."""
    made, read, half = ("s30", "s40", ".l") if is_gfx11 else ("s[30:31]", "s[40:41]", "")
    carry = "v_add_co_ci_u32" if is_gfx11 else "v_addc_co_u32"
    floats = [f"{name}_{type}" for name in comparisons.COMPARISONS if name != "ne" for type in ("f32", "f16")]
    integers = [f"{name}_{type}" for name in (*COMPARED, "ne") for type in ("i32", "u32", "u16")]
    found = [f"v_cmp_{name} {made}, v1{x}, v3{x}" for name in floats + integers for x in [half * name.endswith("16")]]
    found += [f"v_cmp_class_f32 {made}, v1, v3", f"v_cmp_class_f16 {made}, v1{half}, v3"]
    found += ["v_cmpx_gt_i32 v1, v3", "v_cmpx_lt_i32 v1, v3", "v_cmpx_ne_u32 v1, v3"] if is_gfx11 else []
    found += [f"v_add_co_u32 v20, {made}, v1, v3", f"{carry} v20, {made}, v1, v3, {read}"]
    found += [f"v_sub_co_u32 v20, {made}, v1, v3", f"v_mad_u64_u32 v[20:21], {made}, v1, v3, v[5:6]"]
    found += [f"v_div_scale_f32 v20, {made}, v1, v1, v3", "v_div_fmas_f32 v20, v1, v3, v5"]
    found += [f"v_cndmask_b16 v20.h, v1.h, v3.l, {read}"] if is_gfx11 else []
    return [*found, f"v_cndmask_b32 v20, v1, -v3, {read}"]


def _lanes(is_gfx11: bool) -> list[str]:
    found = ["v_readfirstlane_b32 s30, v1", "v_readlane_b32 s30, v1, 31", "v_writelane_b32 v20, s2, 5"]
    found += ["v_permlanex16_b32 v20, v1, s2, s3 op_sel:[1,0]"] if is_gfx11 else []
    return [*found, "ds_bpermute_b32 v20, v1, v3"]


def _scalars(is_gfx11: bool) -> list[str]:
    found = [f"{opcode} s30, s2, s4" for opcode in SCALARS]
    found += [f"{x} s[30:31], s[2:3], s[4:5]" for x in ("s_and_b64", "s_or_b64", "s_xor_b64", "s_cselect_b64")]
    found += [f"{opcode} s[30:31], s[2:3], s4" for opcode in ("s_lshl_b64", "s_lshr_b64", "s_ashr_i64")]
    and_not = "s_and_not1" if is_gfx11 else "s_andn2"
    found += [f"{and_not}_b32 s30, s2, s4", f"{and_not}_b64 s[30:31], s[2:3], s[4:5]", "s_mov_b64 s[30:31], s[2:3]"]
    found += [f"{opcode} s30, s2" for opcode in ("s_mov_b32", "s_not_b32", "s_abs_i32", "s_brev_b32")]
    found += ["s_addk_i32 s30, 0x80f0", "s_mulk_i32 s30, 0x41", "s_movk_i32 s30, 0x8041"]
    found += [f"s_cmp_{name}_{type} s2, s4" for name in (*COMPARED, "lg") for type in ("u32", "i32")]
    found += ["s_cmp_lg_u64 s[2:3], s[4:5]", "s_bitcmp0_b32 s2, s4", "s_bitcmp1_b32 s2, s4"]
    found += ["s_cmpk_gt_u32 s2, 0x7e", "s_cmpk_lt_u32 s2, 0x8001", "s_cmpk_lt_i32 s2, 0x8001"]
    size, made, read = ("b32", "s30", "s2") if is_gfx11 else ("b64", "s[30:31]", "s[2:3]")
    found += [f"{name}_saveexec_{size} {made}, {read}" for name in ("s_and", "s_or", and_not)]
    return found + [f"s_lshl{n}_add_u32 s30, s2, s4" for n in (1, 2, 3, 4)]


def _memory(is_gfx11: bool) -> list[str]:
    words = {1: "b32", 2: "b64", 4: "b128", 8: "b256"} if is_gfx11 else _WORDS_OF_GFX9
    wide = {words[count]: count for count in (1, 2, 4)}
    loads = dict.fromkeys(("u8", "u16") if is_gfx11 else ("ubyte", "ushort"), 1) | wide
    stores = dict.fromkeys(("b8", "b16") if is_gfx11 else ("byte", "short"), 1) | wide
    found = [f"buffer_load_{name} {at(20, count)}, v1, s[8:11], 0 offen offset:16" for name, count in loads.items()]
    found += [f"buffer_store_{name} {at(4, count)}, v1, s[8:11], 0 offen" for name, count in stores.items()]
    found += [f"global_load_{name} {at(20, count)}, v[2:3], off offset:16" for name, count in loads.items()]
    found += [f"global_store_{name} v1, {at(4, count)}, s[8:9] offset:16" for name, count in stores.items()]
    found += [f"scratch_load_{words[n]} {at(20, n)}, off, off offset:16" for n in (1, 2)]
    found += [f"scratch_store_{words[n]} off, {at(4, n)}, off offset:4" for n in (1, 2)]
    found += [f"s_load_{name} {at(32, count, 's')}, s[8:9], 0x10" for count, name in words.items()]
    if is_gfx11:
        found += [f"global_load_{name} v20, v[2:3], off" for name in ("d16_u8", "d16_hi_u8")]
        found += [f"ds_load_{name} v20, v1 offset:8" for name in ("u8_d16", "u8_d16_hi", "u16_d16", "u16_d16_hi")]
    found += [f"ds_{'store' if is_gfx11 else 'write'}_b16_d16_hi v1, v4 offset:8"]
    load, store, two, far = ("load", "store", "_2addr", "_stride64") if is_gfx11 else ("read", "write", "2", "st64")
    wide = {"b32": 1, "b64": 2, "b128": 4}
    found += [f"ds_{load}_{name} {at(20, n)}, v1 offset:16" for name, n in (wide | {"u8": 1, "u16": 1}).items()]
    found += [f"ds_{store}_{name} v1, {at(4, n)} offset:16" for name, n in (wide | {"b8": 1, "b16": 1}).items()]
    for stride in ("", far):
        for name, n in (("b32", 1), ("b64", 2)):
            found += [f"ds_{load}{two}{stride}_{name} {at(20, 2 * n)}, v1 offset0:1 offset1:3"]
            found += [f"ds_{store}{two}{stride}_{name} v1, {at(4, n)}, {at(8, n)} offset0:1 offset1:3"]
    return found


_WORDS_OF_GFX9 = {1: "dword", 2: "dwordx2", 4: "dwordx4", 8: "dwordx8"}
