"""What type checkers see: the stub has the parameters that the functions have; pyright accepts README's examples."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

ROOT = Path(fastattn.__file__).parents[1]
STUB = ast.parse((ROOT / "fastattn/typed.pyi").read_text())


@pytest.mark.parametrize("function, options", [("attention", "Options"), ("attention_csr", "EdgeOptions")])
def test_the_stub_has_the_parameters_of_the_function(function, options):
    (fields,) = (node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == options)
    named = [node.target.id for node in fields.body]
    overloads = [node for node in STUB.body if isinstance(node, ast.FunctionDef) and node.name == function]
    real = list(inspect.signature(getattr(fastattn, function)).parameters)
    assert len(overloads) == 3
    for overload in overloads:
        stub = [argument.arg for argument in (*overload.args.args, *overload.args.kwonlyargs)]
        assert sorted(stub + named) == sorted(real)


@pytest.mark.slow
def test_pyright_accepts_the_examples(tmp_path):
    pytest.importorskip("pyright")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    text = "\n".join(block for block in blocks if "transformers" not in block)
    text += "\nout.sum()\nboth: tuple[torch.Tensor, torch.Tensor] = fastattn.attention(q, k, v, return_lse=True)\n"
    (tmp_path / "example.py").write_text(text)
    run = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "example.py"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "0 errors" in result.stdout, result.stdout + result.stderr
    (tmp_path / "wrong.py").write_text(text + "\nfastattn.attention(q, k, v, return_lse=True).sum()\n")
    assert subprocess.run([*run[:-1], "wrong.py"], cwd=tmp_path, capture_output=True).returncode
