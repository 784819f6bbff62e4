"""torchvision beside a torch for CPUs, which timm and open_clip import: PyPI's torchvision wants one for CUDA."""

import importlib
import sys

import pytest
import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_fragments = []


def declare():
    """Declares the two operators whose absence keeps such a torchvision from loading."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            fragment.define(operator + SCHEMA)
        _fragments.append(fragment)
        for module in [x for x in sys.modules if x.split(".")[0] == "torchvision"]:
            del sys.modules[module]
    except ImportError:
        pass


def importorskip(name):
    """The package `name`, which imports torchvision if it is there."""
    declare()
    return pytest.importorskip(name)
