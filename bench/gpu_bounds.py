"""The share of the tensor cores' peak that the code of a call allows, from tests/gpu/golden.json (docs/triton.md).

It was computed from machine code, without a device: products and the rest do not overlap, memory costs nothing. None
where golden.json has no such code or no such figure.
"""

import json
from functools import cache
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "tests" / "gpu" / "golden.json"
PRODUCTS = {"forward_kernel": 2, "key_value_kernel": 4, "query_kernel": 3}
"""Matrix products of each kernel, with those that two of them compute."""

COUNTED = 7
"""Products that a rate counts for forward and backward: two and five."""


def static_bound(arch: str, shape, passes: str) -> float | None:
    """For a `gpu.Shape` on an architecture ("sm_90")."""
    if shape.suite == "decode":  # bound by memory
        return None
    kind = "prefill" if passes == "forward" else "backward"
    mask = "" if not shape.causal else " causal" if shape.window is None else " window"
    bounds = _bounds().get((arch, f"{kind}{mask} D{shape.head_dim} {shape.dtype}"), {})
    if passes == "forward":
        return bounds.get("forward_kernel")
    if not all(bounds.get(name) for name in PRODUCTS):
        return None
    return COUNTED / sum(count / bounds[name] for name, count in PRODUCTS.items())


@cache
def _bounds() -> dict[tuple[str, str], dict[str, float | None]]:
    found: dict = {}
    for arch, spec, name, kernel in json.loads(GOLDEN.read_text())["kernels"]:
        found.setdefault((arch, spec), {})[name] = kernel["bound"]
    return found
