"""`python -m fastattn doctor`: what is installed, what runs, what it reaches, and what to do about each finding."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from .. import dispatch
from ..api import attention, bind
from ..backends import cpu, triton
from . import machine
from .timing import Contender, rounds

KNOWN = {
    "FASTATTN_AUTOTUNE", "FASTATTN_BACKEND", "FASTATTN_BUILD_EXT", "FASTATTN_CHECK", "FASTATTN_CPU_ISA",
    "FASTATTN_DIST", "FASTATTN_FALLBACK", "FASTATTN_ISAS", "FASTATTN_ROUNDED_DELTA", "FASTATTN_SELFCHECK",
    "FASTATTN_TUNED",
}  # fmt: skip
"""Variables that the package, its build and its tests read."""


class Finding(NamedTuple):
    """Something that is not as it should be: serious ones make the exit status 1."""

    serious: bool
    text: str
    advice: str


def add_arguments(parser) -> None:
    """See fastattn/cli/__init__.py."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")


def run(options) -> int:
    """See fastattn/cli/__init__.py."""
    facts = machine.facts() | {
        "package": str(Path(dispatch.__file__).parent),
        "instruction_sets_of_cpu": machine.instruction_sets(),
        "instruction_sets_built": None if cpu.unavailable() else cpu._C.built_isas(),
        "openmp_runtimes": machine.openmp_runtimes(),
        "triton": machine.version_of("triton"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "sdpa": _sdpa(),
        "backends": _backends(),
    }
    findings = look(facts)
    parity, speed = _parity(), _speed()
    if parity is not None and not parity <= 1e-4:
        findings.append(Finding(True, f"results are off by {parity:.1e}", "report it, with this output"))
    facts |= {"parity_error": parity, "speed_against_sdpa": speed}
    for name, value in facts.items():
        print(f"{name:<26}{_text(value)}")
    print()
    for finding in findings:
        print(f"{'PROBLEM' if finding.serious else 'note'}: {finding.text}\n    {finding.advice}")
    broken = any(finding.serious for finding in findings)
    print("something is wrong: see above" if broken else "all is well")
    if options.json:
        document = {"schema": "fastattn-doctor/1", "facts": facts, "findings": [x._asdict() for x in findings]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(broken)


def look(facts: dict) -> list[Finding]:
    """What the facts say, the worst first."""
    found = []
    if missing := cpu.unavailable():
        compiler = "" if shutil.which("g++") or shutil.which("clang++") else " (no C++ compiler is on the path)"
        found.append(Finding(True, missing + compiler, "pip install --force-reinstall --no-cache-dir fastattn"))
    elif refusal := cpu.unusable():
        text = "unset FASTATTN_CPU_ISA, or call with backend='reference': every other call raises this"
        found.append(Finding(True, refusal, text))
    elif not facts["openmp"]:
        found.append(
            Finding(True, "torch has loaded no OpenMP runtime: calls run on one thread", "install torch from a wheel")
        )
    if len(facts["openmp_runtimes"]) > 1:
        text = f"{len(facts['openmp_runtimes'])} OpenMP runtimes are loaded; only torch's is used here"
        found.append(Finding(False, text, "another package brings its own: their threads compete"))
    cores = min(x for x in (facts["usable_cores"], facts["cgroup_cores"], facts["cores"]) if x)
    if facts["threads"] > cores:
        text = f"{facts['threads']} threads share {cores:g} cores"
        found.append(Finding(False, text, f"torch.set_num_threads({max(int(cores), 1)}), or OMP_NUM_THREADS"))
    if facts["isa"] == "amx":
        text = "FASTATTN_CPU_ISA=amx_bf16 runs kernels that no machine had run when they were written"
        found.append(Finding(False, text, "compare results with FASTATTN_CPU_ISA unset, and tell us"))
    if (isa := os.environ.get("FASTATTN_CPU_ISA")) and facts["isa"] == isa:
        found.append(Finding(False, f"FASTATTN_CPU_ISA={isa} narrows the kernels", "unset it for the best"))
    for name in sorted(x for x in os.environ if x.startswith("FASTATTN_") and x not in KNOWN):
        found.append(Finding(False, f"{name} is not a variable of fastattn", "docs/guide.md lists them"))
    if facts["gpus"] and (reason := triton.unavailable()):
        found.append(Finding(False, f"there is a GPU, but: {reason}", "pip install triton"))
    if facts["governor"] not in (None, "performance"):
        found.append(Finding(False, f"the frequency governor is {facts['governor']}", "benchmark with performance"))
    return sorted(found, key=lambda finding: not finding.serious)


def _backends() -> dict[str, str]:
    """Each kernel with its verdict on a plain call."""
    problem = bind(*torch.zeros(3, 1, 2, 64, 32).unbind(), backend="reference").problem
    gpu = problem._replace(device="cuda", dtype="bfloat16")
    rows, unusable = {}, cpu.unusable()
    for row in dispatch.rows_of(None, "dense"):
        if row.supports.get("direction") == {"forward"}:
            reasons = dispatch.refuse(row, gpu if row.backend == "triton" else problem)
            if row.backend == "cpu" and unusable:
                reasons = [unusable]
            rows[row.name] = (
                ", ".join(x for x in reasons if "rows_per_key_head" not in x and "seqlen" not in x) or "ready"
            )
    return rows


def _sdpa() -> str:
    """What torch's own function would run here."""
    flash = getattr(torch.backends.cuda, "flash_sdp_enabled", lambda: None)()
    return f"{torch.backends.cpu.get_cpu_capability()}, flash {'on' if flash else 'off'}"


def _parity() -> float | None:
    """Largest error of a causal call and its gradients against float64."""
    if cpu.unusable():
        return None
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, 4, 300, 64, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = [x.detach().float().requires_grad_() for x in exact]
    outs = attention(*ours, causal=True, backend="cpu"), attention(*exact, causal=True, backend="reference")
    grads = [torch.autograd.grad(out.sum(), x) for out, x in zip(outs, (ours, exact), strict=True)]
    pairs = zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True)
    return max(float((a.double() - b).detach().abs().max()) for a, b in pairs)


def _speed() -> float | None:
    """How many times as long torch's SDPA takes for a short causal call."""
    if cpu.unusable():
        return None
    q, k, v = torch.randn(3, 1, 8, 512, 64).unbind()
    threads = torch.get_num_threads()
    contenders = {
        "ours": Contender(lambda: attention(q, k, v, causal=True), threads),
        "sdpa": Contender(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True), threads),
    }
    best = {name: min(min(burst) for burst in bursts) for name, bursts in rounds(contenders, 1.0).items()}
    return best["sdpa"] / best["ours"]


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else "unknown" if value is None else str(value)
