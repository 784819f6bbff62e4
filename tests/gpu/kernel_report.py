"""What Triton makes of every kernel for every architecture: compiled here, run nowhere.

`make kernel-report` writes tests/gpu/golden.json and the table in docs/triton.md; tests/gpu/test_compiled.py compiles
again, compares with the former, and asks for what must hold.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parents[2] / "kernels"
GOLDEN = Path(__file__).with_name("golden.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "triton.md"
BEGIN, END = "<!-- make kernel-report: begin -->", "<!-- end -->"


class Spec(NamedTuple):
    """An attention call to compile the kernels of: shapes and options that a kernel's code depends on."""

    name: str
    head_dim: int = 128
    dtype: str = "bfloat16"
    seqlen_q: int = 4096
    causal: bool = False
    backward: bool = False
    everything: bool = False  # bias, ALiBi, softcap, sinks, dropout, a bool mask if there is no other
    blocks: bool = False  # a block mask
    window: bool = False
    learned_scale: bool = False
    cache: str = ""  # decoding from "pages", of "int8", or both

    def __str__(self) -> str:
        return f"{self.name} D{self.head_dim} {self.dtype}"


SPECS = (
    *(Spec("prefill", head_dim) for head_dim in (64, 128, 192, 256)),
    *(Spec("prefill causal", head_dim, causal=True) for head_dim in (64, 128, 192, 256)),
    *(Spec("prefill", head_dim, "float32") for head_dim in (64, 128)),
    Spec("prefill", 128, "float16"),
    *(Spec("prefill window", head_dim, window=True) for head_dim in (64, 128, 256)),
    Spec("prefill everything", everything=True),
    *(Spec("decode", head_dim, seqlen_q=1) for head_dim in (64, 128, 256)),
    Spec("decode pages", seqlen_q=1, cache="pages"),
    Spec("decode pages of int8", seqlen_q=1, cache="pages int8"),
    Spec("block_sparse", blocks=True),
    Spec("block_sparse backward", blocks=True, backward=True),
    *(Spec("backward", head_dim, backward=True) for head_dim in (64, 128, 256)),
    *(Spec("backward causal", head_dim, causal=True, backward=True) for head_dim in (64, 128, 256)),
    Spec("backward", 64, "float32", backward=True),
    Spec("backward everything", everything=True, backward=True),
    Spec("backward window", window=True, backward=True),
    Spec("backward learned scale", learned_scale=True, backward=True),
)
MORE = (  # other rows of tables that most architectures have in common
    Spec("prefill", 256, "float32"),
    *(Spec("prefill everything", head_dim, everything=True) for head_dim in (64, 192, 256)),
    *(Spec("prefill learned scale", head_dim, learned_scale=True) for head_dim in (64, 128, 192, 256)),
    *(Spec("block_sparse everything", head_dim, blocks=True, everything=True) for head_dim in (64, 128, 256)),
    Spec("decode learned scale", 256, seqlen_q=1, learned_scale=True),
    *(Spec("decode blocks", head_dim, seqlen_q=1, blocks=True) for head_dim in (128, 256)),
    Spec("decode blocks everything", seqlen_q=1, blocks=True, everything=True),
    *(Spec("decode", head_dim, "float32", seqlen_q=1) for head_dim in (128, 256)),
    *(Spec("decode everything", head_dim, seqlen_q=1, everything=True) for head_dim in (128, 256)),
    *(Spec("backward", head_dim, "float32", backward=True) for head_dim in (128, 256)),
    *(Spec("backward everything", head_dim, everything=True, backward=True) for head_dim in (64, 80, 96, 256)),
    *(Spec("backward window", head_dim, window=True, backward=True) for head_dim in (64, 80, 96, 256)),
    *(Spec("backward learned scale", head_dim, learned_scale=True, backward=True) for head_dim in (64, 96, 256)),
    Spec("block_sparse backward everything", blocks=True, everything=True, backward=True),
    *(Spec("backward everything", head_dim, "float32", everything=True, backward=True) for head_dim in (64, 128, 256)),
)
SPLIT = (Spec("split keys causal", seqlen_q=64, causal=True),)
FEW = tuple(spec for spec in SPECS if str(spec) in ("prefill D128 bfloat16", "backward D128 bfloat16"))
ARCHS = {
    80: SPECS + MORE + SPLIT,
    90: SPECS + MORE + SPLIT,
    "gfx942": SPECS + MORE,
    "gfx1100": SPECS + MORE,
    86: SPECS + MORE,
    100: SPECS + MORE + SPLIT,
    120: SPECS + MORE,
    "gfx90a": SPECS,
    "gfx950": SPECS,
    # built from the tables of sm_86, sm_100 and gfx1100
    89: FEW,
    103: FEW,
    "gfx1201": FEW,
}


def arch_name(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


@contextmanager
def compiling_for(arch: int | str, run=None) -> Iterator[list]:
    """Inside, fastattn runs its Triton kernels on meta tensors, and they compile for `arch`; yields the launches.

    run: called with each of them, whose tensors are on the CPU then, where other kernels are too.
    """
    from fake_device import SHARED_MEMORY, fake_gpu
    from fastattn import dispatch, plans
    from fastattn.kernels import config, launch

    def clear():
        launch.forget(), plans.forget()

    device = config.Device(arch_name(arch), SHARED_MEMORY[arch], 100, "fake")
    supported = {"device": {"cpu" if run else "meta"}}
    rows = tuple(
        row._replace(available=None, supports={**row.supports, **supported}) if row.backend == "triton" else row
        for row in dispatch.KERNELS
        if row.backend == "triton" or run
    )
    replaced = ((dispatch, "KERNELS", rows), (launch, "device_facts", lambda index: device))
    replaced += ((launch, "current_device", lambda: -1),)
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    clear()
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        with fake_gpu(arch, run) as launches:
            yield launches
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        clear()


def without_device(mask):
    """A BlockMask whose tensors, and its transpose's, are shapes alone: its constructor looks at values."""
    import torch

    def moved(mask):
        copy = object.__new__(type(mask))
        fields = {name: torch.empty_like(x, device="meta") for name, x in mask.tensors().items()}
        copy.__dict__.update(mask.__dict__ | fields | {"_cache": {}})
        return copy

    forward, transposed = moved(mask), moved(mask.transpose())
    forward._cache["transpose"], transposed._cache["transpose"] = transposed, forward
    return forward


def attend(spec: Spec) -> None:
    """The call that `spec` describes, on meta tensors."""
    import torch

    import fastattn
    from fastattn import BlockMask, Mask

    b, h, s, d = 2, 16, 4096, spec.head_dim
    dtype = getattr(torch, spec.dtype)

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=spec.backward and dtype != torch.bool)

    q, k, v = empty(b, h, spec.seqlen_q, d), empty(b, h, s, d), empty(b, h, s, d)
    if spec.cache:
        decode_from_cache(q, k, v, spec.cache)
        return
    kwargs: dict = {"causal": True} if spec.causal else {}
    if spec.window:
        kwargs["window_size"] = (512, 512)
    if spec.learned_scale:
        kwargs["softmax_scale"] = empty(h, dtype=torch.float32)
    if spec.blocks:
        kwargs["mask"] = without_device(BlockMask.from_mask(Mask.causal(), seqlen_q=spec.seqlen_q, seqlen_k=s))
    if spec.everything:
        kwargs |= {
            "bias": empty(1, h, spec.seqlen_q, s), "alibi_slopes": empty(h, dtype=torch.float32),
            "sinks": empty(h, dtype=torch.float32), "softcap": 30.0, "dropout_p": 0.1, "seed": 1,
        }  # fmt: skip
        if not spec.blocks:
            kwargs["mask"] = empty(b, 1, spec.seqlen_q, s, dtype=torch.bool)
    out = fastattn.attention(q, k, v, **kwargs, backend="triton")
    if spec.backward:
        wanted = [x for x in (q, k, v, *kwargs.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(out, wanted, torch.empty_like(out))


def decode_from_cache(q, k, v, cache: str) -> None:
    """Decoding where k and v are held in pages of 16 keys, and in int8 if `cache` says so."""
    from fastattn.api import bind
    from fastattn.kernels import decode

    (batch, heads, seqlen, _), size = k.shape, 16
    bound = bind(q, k, v, backend="triton")
    table = q.new_empty(batch, seqlen // size).int()
    k, v = (x.new_empty(batch * seqlen // size, heads, size, x.shape[3]) for x in (k, v))
    scales = (None, None)
    if "int8" in cache:
        scales = [x[..., 0].float() for x in (k, v)]
        k, v = (x.char() for x in (k, v))
    decode.forward(bound.problem, q, k, v, bound.terms, decode.Cache(table, *scales))


def compile_spec(arch: int | str, spec: Spec) -> dict[str, dict]:
    """Kernel name -> what its code consists of."""
    with compiling_for(arch) as launches:
        attend(spec)
    names: dict = {}
    for binary in (launch.binary for launch in launches):
        of_name = [known for name, known in names.items() if name.split()[0] == binary.name]
        if binary not in of_name:  # a kernel that is launched for two things has a binary for each
            names[binary.name + (f" {len(of_name) + 1}" if of_name else "")] = binary
    return {name: describe(binary) for name, binary in names.items()}


def describe(binary) -> dict:
    """A line of the golden file."""
    from machine_code import analyze, blocks_per_multiprocessor, pipeline_depth, tensor_bound

    code = analyze(binary)
    bound = tensor_bound(code)
    return {
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "warps": code.warps,
        "stages": binary.metadata["num_stages"],
        "depth": pipeline_depth(binary),
        "blocks": blocks_per_multiprocessor(code),
        "bound": round(bound, 3) if bound else None,
        "matrix": code.matrix,
        "loops": [
            {
                "instructions": len(loop.instructions),
                "products": loop.products,
                "spills": loop.spills,
                "copies": loop.copies,
                "kind": loop.kind,
            }
            for loop in code.loops
        ],
    }


CASES = [(arch, spec) for arch, specs in ARCHS.items() for spec in specs]


def compile_all(cases: list[tuple[int | str, Spec]]) -> dict:
    """Kernels of these cases as the golden file holds them, architecture -> spec -> kernel; compiled on all cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(compile_spec, *zip(*cases, strict=True))
        kernels: dict = {}
        for (arch, spec), found in zip(cases, results, strict=True):
            kernels.setdefault(arch_name(arch), {})[str(spec)] = found
    return kernels


# --- text ------------------------------------------------------------------------------------------------------------

COLUMNS = "| | kernel | warps | stages | registers | spilled | in loops | shared | programs | loop | in it | bound |"
SHOWN = {
    *(
        f"{name} bfloat16"
        for name in ("prefill D64", "prefill D128", "prefill D256", "decode D128", "block_sparse D128")
    ),
    *(f"{name} bfloat16" for name in ("prefill causal D64", "prefill causal D128", "block_sparse backward D128")),
    *(f"{name} bfloat16" for name in ("backward D64", "backward D128", "backward D256", "backward causal D128")),
    *("prefill D64 float32", "backward D64 float32"),
}  # the others are in the golden file


def table(golden: dict) -> str:
    """What the golden file says, as Markdown: what spills, and one table for each architecture."""
    parts = [f"Triton {golden['triton']}.", spilling(golden)]
    for arch, specs in golden["kernels"].items():
        lines = [f"#### {arch}", "", COLUMNS, "|---" * (COLUMNS.count("|") - 1) + "|"]
        for spec, kernels in specs.items():
            lines += [_row(spec, name, kernel) for name, kernel in kernels.items() if spec in SHOWN and kernel["loops"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def spilling(golden: dict) -> str:
    """Which kernels move registers to memory and back inside a loop."""
    lines = [
        f"- {arch}: {spec}, `{name}` ({', '.join(str(loop['spills']) for loop in kernel['loops'])} instructions)"
        for arch, specs in golden["kernels"].items()
        for spec, kernels in specs.items()
        for name, kernel in kernels.items()
        if any(loop["spills"] for loop in kernel["loops"])
    ]
    if not lines:
        return "No kernel of any entry spills inside a loop."
    return "These spill inside a loop (instructions that move registers, loop by loop):\n\n" + "\n".join(lines)


def _row(spec: str, name: str, kernel: dict) -> str:
    loop = kernel["loops"][0] if kernel["loops"] else None
    spills = sum(loop["spills"] for loop in kernel["loops"])
    cells = [
        spec, f"`{name}`", kernel["warps"], kernel["stages"], kernel["registers"], kernel["spills"] or "", spills or "",
        f"{kernel['shared'] / 1024:.0f} KiB", kernel["blocks"] or "",
        loop["instructions"] if loop else "", f"{loop['products']} {loop['kind']}" if loop else "",
        f"{kernel['bound']:.0%}" if kernel["bound"] else "",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def document_with(text: str) -> str:
    """docs/triton.md with `text` between its two marks."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def hash_of_sources() -> str:
    """Of the kernels as they are: golden.json says what Triton made of the sources with the hash that it holds."""
    found = hashlib.sha256()
    for path in sorted(KERNELS.glob("**/*.py")):
        found.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def read_golden() -> dict:
    golden = json.loads(GOLDEN.read_text())
    kernels: dict = {}
    for arch, spec, name, kernel in golden["kernels"]:
        kernels.setdefault(arch, {}).setdefault(spec, {})[name] = kernel
    return golden | {"kernels": kernels}


def write_golden(golden: dict) -> None:
    """A line for each kernel, so that a difference says whose it is."""
    rows = [
        json.dumps([arch, spec, name, kernel])
        for arch, specs in golden["kernels"].items()
        for spec, kernels in specs.items()
        for name, kernel in kernels.items()
    ]
    text = ",\n".join(rows)
    head = f'"triton": "{golden["triton"]}", "sources": "{golden["sources"]}"'
    GOLDEN.write_text(f'{{{head}, "kernels": [\n{text}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="the table alone, from the golden file as it is")
    parser.add_argument(
        "--arch", nargs="+", choices=list(map(arch_name, ARCHS)), help="compile for these, keep the others"
    )
    options = parser.parse_args()
    if options.print:
        print(table(read_golden()))
        return
    import triton

    chosen = options.arch or list(map(arch_name, ARCHS))
    made = compile_all([case for case in CASES if arch_name(case[0]) in chosen])
    kept = read_golden()["kernels"] if options.arch else {}
    kernels = {name: made.get(name) or kept[name] for name in map(arch_name, ARCHS) if name in made or name in kept}
    golden = {"triton": triton.__version__, "sources": hash_of_sources(), "kernels": kernels}
    write_golden(golden)
    DOCUMENT.write_text(document_with(table(golden)))
    print(table(golden))


if __name__ == "__main__":
    main()
