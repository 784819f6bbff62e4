"""The documents say what the code does: the support matrix is generated, the Python in them runs."""

import re
from pathlib import Path

import pytest

from fastattn import dispatch

ROOT = Path(__file__).parents[2]
README, GUIDE, SUPPORT = ((ROOT / path).read_text() for path in ("README.md", "docs/guide.md", "docs/support.md"))
RUNNABLE = ["README.md", *(f"docs/{name}.md" for name in (
    "flash_attn", "generation", "guide", "learned", "modules", "relative", "replace", "seeing", "transforms"
))]  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "csr", "varlen", "cache"])
def test_support_matrix_is_the_table_of_kernels(layout):
    assert dispatch.support_matrix(layout) in SUPPORT, f"paste dispatch.support_matrix({layout!r}) into docs/support.md"


def test_readme_is_short():
    assert len(README.splitlines()) < 140


@pytest.mark.parametrize("path", RUNNABLE)
def test_python_in_the_documents_runs(path):
    """From the first block to the last: each may go on where the one before it ended."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)
    assert blocks
    if any("transformers" in block for block in blocks):
        pytest.importorskip("transformers")
    names = {}
    for block in blocks:
        exec(compile(block, path, "exec"), names)


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("fastattn/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"[\"'](FASTATTN_[A-Z_]+)[\"']", path.read_text())}
    documented = README + GUIDE + (ROOT / "CONTRIBUTING.md").read_text()
    assert sorted(name for name in used if name not in documented) == []


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/compile.md",
        "docs/guide.md",
        "docs/support.md",
        "docs/triton.md",
    ],
)
def test_files_that_the_documents_name_exist(path):
    text = (ROOT / path).read_text()
    named = re.findall(r"`((?:fastattn|csrc|kernels|tests|bench|examples|docs)/[\w./]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
