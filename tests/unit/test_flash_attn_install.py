"""`import flash_attn` without flash-attn: what is there, what is not, and that undoing leaves nothing."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
import torch

from fastattn.compat import flash_attn as ours
from fastattn.compat import install_flash_attn
from flash import angles, randn, turned

if importlib.util.find_spec("flash_attn") is not None:
    pytest.skip("flash-attn itself is installed", allow_module_level=True)


@pytest.fixture
def installed():
    undo = install_flash_attn()
    yield undo
    undo()


def test_what_real_code_imports(installed):
    import flash_attn
    import flash_attn.flash_attn_interface
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func  # noqa: F401
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
    from flash_attn.layers.rotary import apply_rotary_emb  # noqa: F401

    assert flash_attn_func is ours.flash_attn_func
    assert {name for name in vars(flash_attn) if name.startswith("flash_attn_")} >= set(ours.__all__[1:])
    assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.8.3"
    assert importlib.metadata.version("flash_attn") == "2.8.3"
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.util.find_spec("flash_attn") is not None
    assert importlib.util.find_spec("flash_attn.bert_padding") is not None
    for missing in ("flash_attn.ops", "flash_attn.cute", "flash_attn.losses", "flash_attn_interface"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(missing)


def test_undo():
    before, finders = dict(sys.modules), list(sys.meta_path)
    undo = install_flash_attn()
    assert install_flash_attn() is undo
    undo()
    undo()  # harmless
    assert sys.modules == before and sys.meta_path == finders
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    install_flash_attn()()


def test_a_name_that_was_blocked_is_blocked_again(monkeypatch):
    """People write sys.modules["flash_attn"] = None to keep models from using it."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    undo = install_flash_attn()
    assert sys.modules["flash_attn"] is not None
    undo()
    assert sys.modules["flash_attn"] is None


def test_a_real_one_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=f"installed already, at {tmp_path}"):
        install_flash_attn()
    assert "flash_attn" not in sys.modules


def test_a_handmade_one_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(RuntimeError, match="installed already, at sys.modules"):
        install_flash_attn()


def test_importing_fastattn_installs_nothing():
    code = "import fastattn, importlib.util, sys; sys.exit(importlib.util.find_spec('flash_attn') is not None)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- bert_padding ----------------------------------------------------------------------------------------------------

KEPT = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])


@pytest.mark.parametrize("tail", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
def test_unpad_and_pad(tail, dtype):
    from fastattn.compat.flash_attn.bert_padding import pad_input, unpad_input

    x = randn(3, 5, *tail).requires_grad_()
    mask = KEPT.to(dtype)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 2, 11, 12, 13, 14] and cu_seqlens.tolist() == [0, 3, 3, 7] and longest == 4
    assert cu_seqlens.dtype == used.dtype == torch.int32 and used.tolist() == [3, 0, 4]
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    back = pad_input(packed, indices, 3, 5)
    assert torch.equal(pad_input(packed, indices.int(), 3, 5), back)  # transformers has them in int32
    expected = x * KEPT.view(3, 5, *(1 for _ in tail))
    assert torch.equal(back, expected)
    weights = randn(*x.shape)
    assert torch.equal(torch.autograd.grad(back, x, weights)[0], weights * KEPT.view(3, 5, *(1 for _ in tail)))


def test_unused_places_are_kept_and_not_counted():
    from fastattn.compat.flash_attn.bert_padding import unpad_input

    unused = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest, used = unpad_input(randn(3, 5, 2), KEPT, unused)
    assert indices.tolist() == [0, 1, 2, 3, 5, 11, 12, 13, 14] and len(packed) == 9
    assert cu_seqlens.tolist() == [0, 4, 5, 9] and longest == 4 and used.tolist() == [3, 0, 4]


def test_concatenated_sequences():
    from fastattn.compat.flash_attn.bert_padding import unpad_input_for_concatenated_sequences

    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(randn(3, 6, 2), lengths)
    assert indices.tolist() == [*range(5), *range(6, 10), *range(12, 18)] and len(packed) == 15
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 9, 15] and longest == 6


def test_masks_that_do_not_fit():
    from fastattn.compat.flash_attn import bert_padding

    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\).*here \(3, 4\)"):
        bert_padding.unpad_input(randn(3, 4, 2), KEPT)
    with pytest.raises(ValueError, match=r"attention_mask_in_length has shape \(3, 5\).*here \(2, 5\)"):
        bert_padding.unpad_input_for_concatenated_sequences(randn(2, 5, 2), KEPT)


# --- rotary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    from fastattn.compat.flash_attn.rotary import apply_rotary_emb, apply_rotary_emb_func

    x, (cos, sin) = randn(2, 4, 3, 8).requires_grad_(), angles(40, 3)
    offsets = torch.tensor([0, 7])
    found = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    expected = torch.stack([
        torch.stack([turned(x[b, i], int(offsets[b]) + i, interleaved) for i in range(4)]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    dout = randn(*x.shape)
    grads = [torch.autograd.grad(out, x, dout)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)

    packed = randn(7, 3, 8)
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    found = apply_rotary_emb_func(packed, cos, sin, interleaved, cu_seqlens=cu_seqlens, seqlen_offsets=2)
    expected = [turned(row, 2 + i - (3 if i >= 3 else 0), interleaved) for i, row in enumerate(packed)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-13)
    assert apply_rotary_emb(packed, cos, sin, interleaved, True, 2, cu_seqlens) is packed
    assert torch.equal(packed, found)


def test_rotary_refuses_positions_without_angles():
    from fastattn.compat.flash_attn.rotary import apply_rotary_emb

    cos, sin = angles(4, 3)
    with pytest.raises(ValueError, match="positions 2 ... 5 are needed, and cos has 4"):
        apply_rotary_emb(randn(1, 4, 1, 8), cos, sin, seqlen_offsets=2)
    with pytest.raises(ValueError, match=r"positions -1 ... 2 are needed"):
        apply_rotary_emb(randn(1, 4, 1, 8), cos, sin, seqlen_offsets=-1)
    with pytest.raises(ValueError, match=r"cos has shape \(4, 3\).*head_dim, here 4"):
        apply_rotary_emb(randn(1, 4, 1, 4), cos, sin)
