"""`python -m fastattn`: its table of commands, and `explain`."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli
from isas import needs_cpu

ROOT = Path(fastattn.__file__).parents[1]


def test_every_command_is_a_module_with_two_functions():
    for name in cli.COMMANDS:
        module = importlib.import_module(f"fastattn.cli.{name}")
        assert callable(module.add_arguments) and callable(module.run)


def test_version():
    result = subprocess.run([sys.executable, "-m", "fastattn", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"fastattn {fastattn.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["explain", "1,2,3"], ["explain", "1,2,3,4,5,x"]])
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: python -m fastattn" in capsys.readouterr().err


def test_explain_prints_what_the_function_returns(capsys):
    q, k = torch.zeros(2, 6, 5, 8, requires_grad=True), torch.zeros(2, 3, 7, 8)
    options = ["--causal", "--training", "--window", "3", "-1", "--softcap", "2.5", "--dropout-p", "0.5"]
    assert cli.main(["explain", "2,6,3,5,7,8", *options]) == 0
    expected = fastattn.explain(q, k, k, causal=True, window_size=(3, None), softcap=2.5, dropout_p=0.5)
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_of_a_device_that_is_not_here(capsys):
    assert cli.main(["explain", "1,2,2,5,5,8", "--device", "cuda", "--dtype", "bfloat16"]) == 0
    assert "cuda bfloat16 B1 H2 S5 D8" in (text := capsys.readouterr().out) and "device='cuda' (supports cpu)" in text


def test_a_refusal_is_one_line(capsys):
    assert cli.main(["explain", "1,8,3,5,5,8"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m fastattn explain: q has num_heads=8") and error.count("\n") == 1


@needs_cpu
def test_an_instruction_set_that_is_not_there_is_one_line():
    command = [sys.executable, "-m", "fastattn", "explain", "1,2,2,4,4,8"]
    environment = os.environ | {"FASTATTN_CPU_ISA": "sse17"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.count("\n") == 1
    assert "explain: FASTATTN_CPU_ISA=sse17 is not built into this package; built are" in result.stderr
