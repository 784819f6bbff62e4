"""`fastattn.apply` and `patch_sdpa`: what they reach, how they are undone, and what they leave alone."""

import copy
import gc
import inspect
import io
import pickle
import threading

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from torch import nn
from torch.nn import functional

import fastattn
from fastattn.calls import current_backend
from fastattn.replacing import routes
from plain_models import CALLS, HEADS, WIDTH, Block, Net, net, tokens

X = tokens()
KEYS = "CPU", "AutogradCPU"


def is_clean():
    """Whether torch's operators have their own kernels."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return not any(has("aten::scaled_dot_product_attention", key) for key in KEYS)


@pytest.fixture(autouse=True)
def nothing_stays():
    gc.collect()
    assert is_clean()
    yield
    gc.collect()
    assert is_clean()


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def calls_of(handle):
    return sum(row.calls for row in handle.report().rows if not row.why)


@pytest.mark.parametrize("grad", [False, True])
def test_all_ways_to_attention_are_reached_and_counted(grad):
    model = net()
    with torch.set_grad_enabled(grad):
        expected = model(X)
        handle = fastattn.apply(model, on_unsupported="error")
        with fastattn.record() as calls:
            close(model(X), expected)
        assert len(calls) == CALLS and {call.kernel.split(".")[0] for call in calls} == {"cpu"}
        handle.assert_all_replaced()
        rows = handle.report().rows
        handle.remove()
        assert torch.equal(model(X), expected)
    layer = "layer.self_attn" if grad else "layer"  # its fast path is one operator of the layer
    assert [row.module for row in rows] == ["blocks.0", "blocks.1", "blocks.2", layer, "pool"]
    assert all(row.calls == 1 and 0 < row.share < 1 and row.seconds > 0 for row in rows)
    kernel = "cpu.prefill" if grad else "cpu.decode"
    assert {row.kernel for row in rows} == {kernel}


def test_undo_is_exact():
    model = net()
    before = [dict(module.__dict__) for module in model.modules()]
    handle = fastattn.apply(model)
    assert "forward" in model.__dict__ and not is_clean() and handle.is_active
    handle.remove()
    handle.remove()
    assert [module.__dict__ for module in model.modules()] == before and is_clean() and not handle.is_active
    assert model.forward.__func__ is Net.forward


def test_undo_restores_a_forward_of_the_module_itself():
    model = net()
    old = model.blocks[0].forward
    model.blocks[0].forward = lambda x: old(2 * x)
    own = model.blocks[0].forward
    expected = model(X)
    with fastattn.apply(model) as handle:
        close(model(X), expected)
        assert calls_of(handle) == CALLS
    assert model.blocks[0].forward is own


def test_a_forward_put_over_ours_stays_and_is_harmless():
    model = net()
    handle = fastattn.apply(model)
    inner = model.blocks[0].forward
    model.blocks[0].forward = over = lambda x: inner(x)  # noqa: E731
    model(X)
    assert calls_of(handle) == CALLS
    handle.remove()
    assert model.blocks[0].forward is over
    close(model(X), net()(X))
    assert calls_of(handle) == CALLS


def test_context_manager_removes_also_after_an_error():
    model = net()
    with pytest.raises(ZeroDivisionError):
        with fastattn.apply(model):
            raise ZeroDivisionError
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_model_leaves_its_scope(error):
    model = net()

    def stop(module, inputs):
        raise error

    model.layer.register_forward_pre_hook(stop)
    with fastattn.apply(model) as handle:
        with pytest.raises(error):
            model(X)
        before = calls_of(handle)
        functional.scaled_dot_product_attention(X, X, X)
        assert calls_of(handle) == before == 3


def test_other_models_are_left_alone():
    model, other = net(), net()
    expected = other(X)
    with fastattn.apply(model) as handle, fastattn.record() as calls:
        assert torch.equal(other(X), expected)
        assert calls == [] == list(handle.report().rows)
        with torch.no_grad():
            other(X)
        assert calls == []


def test_include_and_exclude_take_whole_parts():
    model = net()
    for options, modules in (
        ({"include": "blocks.*"}, {"blocks.0", "blocks.1", "blocks.2"}),
        ({"include": ["blocks.0", "pool"]}, {"blocks.0", "pool"}),
        ({"exclude": ["layer", "blocks.1"]}, {"blocks.0", "blocks.2", "pool"}),
        ({"include": "blocks", "exclude": "blocks.2"}, {"blocks.0", "blocks.1"}),
    ):
        with fastattn.apply(model, **options) as handle:
            close(model(X), net()(X))
            assert {row.module for row in handle.report().rows} == modules


def test_the_latest_handle_counts_and_any_order_of_removal_is_right():
    model = net()
    first = fastattn.apply(model)
    second = fastattn.apply(model.blocks, backend="reference")
    third = fastattn.apply(model, exclude="blocks.0")
    model(X)
    assert (calls_of(first), calls_of(second), calls_of(third)) == (0, 1, CALLS - 1)
    first.remove()
    third.remove()
    model(X)
    assert (calls_of(first), calls_of(second), calls_of(third)) == (0, 4, CALLS - 1)
    assert {row.kernel for row in second.report().rows} == {"reference"}
    second.remove()
    model(X)
    assert calls_of(second) == 4 and "forward" not in model.blocks[0].__dict__


def test_a_deep_copy_is_served_by_its_own_weights_and_a_pickled_model_is_plain():
    model = net()
    expected = model(X)
    handle = fastattn.apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].out.bias += 1
    assert twin.forward.__self__ is twin
    assert (twin(X) - expected).abs().max() > 0.1
    close(model(X), expected)
    assert calls_of(handle) == 2 * CALLS
    thawed = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for plain in (thawed, torch.load(buffer, weights_only=False)):
        assert torch.equal(plain(X), expected)
    assert calls_of(handle) == 2 * CALLS
    own = fastattn.apply(twin)
    twin(X)
    assert calls_of(own) == CALLS and calls_of(handle) == 2 * CALLS
    own.remove()
    handle.remove()
    twin(X)
    assert calls_of(handle) == 2 * CALLS


def test_a_handle_that_is_lost_with_its_model_closes_the_routes():
    model = net()
    fastattn.apply(model)
    model(X)
    assert not is_clean()
    del model
    gc.collect()
    assert is_clean()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_recompute_with_the_same_kernels(use_reentrant):
    plain, model = net(), net(checkpointed=use_reentrant)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    plain(inputs[0]).square().sum().backward()
    handle = fastattn.apply(model, on_unsupported="error")
    loss = model(inputs[1]).square().sum()
    assert calls_of(handle) == CALLS
    loss.backward()  # outside of every forward
    assert calls_of(handle) == CALLS + 3
    handle.remove()
    for x, y in zip((inputs[0], *plain.parameters()), (inputs[1], *model.parameters()), strict=True):
        torch.testing.assert_close(y if y is inputs[1] else y.grad, x if x is inputs[0] else x.grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_threads_do_not_mix():
    models = [net() for _ in range(4)]
    expected = models[0](X)
    handles = [fastattn.apply(model) for model in models[:2]]
    failed = []

    def work(model):
        for _ in range(20):
            with fastattn.apply(model.pool) if model is models[3] else fastattn.record():
                if (model(X) - expected).abs().max() > 1e-4:
                    failed.append(model)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [calls_of(handle) for handle in handles] == [20 * CALLS] * 2
    for handle in handles:
        handle.remove()


def test_what_a_kernel_refuses_goes_to_torch_with_the_reason():
    wide = torch.randn(1, 1, 3, 600)

    class Wide(nn.Module):
        def forward(self):
            return functional.scaled_dot_product_attention(wide, wide, wide)

    model = Wide()
    expected = model()
    with fastattn.apply(model) as handle:
        assert torch.equal(model(), expected)
        (row,) = handle.report().rows
        assert row.kernel == "torch" and "head_dim=600" in row.why and row.why in str(handle.report())
        with pytest.raises(AssertionError, match="head_dim=600"):
            handle.assert_all_replaced()
    with fastattn.apply(nn.Sequential(model), on_unsupported="error"):
        with pytest.raises(fastattn.UnsupportedError, match="attention of 0: .*head_dim=600"):
            model()
    with fastattn.apply(model, backend="reference") as handle:
        torch.testing.assert_close(model(), expected)
        assert [row.kernel for row in handle.report().rows] == ["reference"]
    with fastattn.apply(model) as handle, fastattn.use("reference"):
        model()
        assert [row.kernel for row in handle.report().rows] == ["reference"]
    assert current_backend() is None


def test_torchs_own_errors_stay_torchs():
    class Wrong(nn.Module):
        def forward(self):
            return functional.scaled_dot_product_attention(X, X[:, :, :5], X)

    with fastattn.apply(Wrong()) as handle:
        pass
    model = Wrong()
    with fastattn.apply(model) as handle, pytest.raises(RuntimeError):
        model()
    assert not handle.is_active


def test_inside_torch_func_torch_answers_with_a_reason():
    model = net()

    def loss(x):
        return model(x).square().sum()

    expected = torch.func.grad(loss)(X)
    with fastattn.apply(model) as handle:
        torch.testing.assert_close(torch.func.grad(loss)(X), expected)
        assert {row.kernel for row in handle.report().rows} == {"torch"}
        assert all("torch.func" in row.why for row in handle.report().rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_torchs_operators(grad):
    model = net()
    with torch.set_grad_enabled(grad), fastattn.apply(model):
        traced = torch.jit.trace(model, X, check_trace=False)
    close(traced(2 * X + 1), model(2 * X + 1))


@pytest.mark.parametrize("strict", [True, False])
def test_exports_are_right(strict):
    model = nn.Sequential(Block(is_imported=True), Block(causal=True)).eval()
    with fastattn.apply(model):
        exported = torch.export.export(model, (X,), strict=strict)
    names = {str(node.target) for node in exported.graph.nodes}
    assert any("fastattn" in name for name in names) is strict  # otherwise torch's, which it records before any kernel
    close(exported.module()(2 * X + 1), model(2 * X + 1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_graphs_of_weights_hold_no_constants():
    model = net().pool
    with torch.no_grad(), fastattn.apply(model):
        exported = torch.export.export(model, (X, X, X), strict=False).module()
        made = torch.fx.experimental.proxy_tensor.make_fx(lambda x: model(x, x, x))(X)
    y = 2 * X + 1
    for found in (exported(y, y, y), made(y)):
        close(found, model(y, y, y))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_torch_that_keeps_its_kernels_to_itself_has_no_fast_path_meanwhile(enabled, monkeypatch):
    monkeypatch.setattr(routes, "kernel_of", lambda operator, key: None)
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        model = net()
        with torch.no_grad():
            expected = model(X)
            with fastattn.apply(model, on_unsupported="error") as handle:
                close(model(X), expected)
                assert calls_of(handle) == CALLS and not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_signatures_and_names_stay():
    model = net()
    signature = inspect.signature(model.forward)
    with fastattn.apply(model):
        assert inspect.signature(model.forward) == signature and type(model) is Net
        assert inspect.signature(model.pool.forward) == inspect.signature(nn.MultiheadAttention(4, 1).forward)


def test_autocast_and_inference_mode():
    model = net()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
        with fastattn.apply(model, on_unsupported="error") as handle:
            torch.testing.assert_close(model(X), expected, rtol=2e-2, atol=5e-2)
            assert any("bfloat16" in row.example for row in handle.report().rows)


def test_a_compiled_model_follows_apply_and_remove():
    model = nn.Sequential(Block(is_imported=True), Block(causal=True)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(X)
        for target in (model, compiled):
            close(compiled(X), expected)
            with fastattn.apply(target) as handle, fastattn.record() as calls:
                close(compiled(X), expected)
                assert len(calls) == 2 and "compiled graphs" in str(handle.report())
            with fastattn.apply(target, exclude="1"), fastattn.record() as calls:
                close(compiled(X), expected)
                assert len(calls) == 1
            with fastattn.record() as calls:
                close(compiled(X), expected)
                assert calls == []


def test_report_as_data_and_text():
    model = net()
    with fastattn.apply(model) as handle:
        assert "no attention call" in str(handle.report())
        with pytest.raises(AssertionError):
            handle.assert_all_replaced()
        model(X)
        report = handle.report()
    data = report.data
    assert [row["calls"] for row in data["rows"]] == [1] * CALLS and data["skipped"] == {}
    assert "layer.self_attn" in report.silent or "layer" in report.silent
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["module", "calls", "kernel", "ms", "share"]
    assert lines[-1] == f"{CALLS} of {CALLS} calls on fastattn" and len(lines) == CALLS + 2


def test_torchscript_is_refused_by_name():
    model = nn.Sequential(Block(), torch.jit.trace(Block().eval(), X))
    with fastattn.apply(model) as handle:
        model(X)
        assert "TorchScript" in handle.report().skipped["1"] and "not reached: 1" in str(handle.report())
    with pytest.raises(fastattn.UnsupportedError, match="1: compiled by TorchScript"):
        fastattn.apply(model, on_unsupported="error")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"include": "blocks.7"}, ValueError, "include='blocks.7' matches no module"),
        ({"exclude": ["pool", "poool"]}, ValueError, "exclude='poool' matches no module"),
        ({"include": 3}, TypeError, "include=3 must be"),
        ({"exclude": [nn.Linear]}, TypeError, "exclude="),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
        ({"on_unsupported": "warn"}, ValueError, "on_unsupported='warn' must be one of fallback, error"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        fastattn.apply(net(), **options)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="torch.nn.Module, got list"):
        fastattn.apply([nn.Linear(1, 1)])
    with pytest.raises(TypeError):
        fastattn.apply(net(), "blocks")


def test_patch_sdpa_reaches_everything_in_every_thread():
    model, results = net(), []
    expected = model(X)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    with fastattn.patch_sdpa() as patch:
        thread = threading.Thread(target=lambda: results.append(model(X)))
        thread.start()
        thread.join()
        close(results[0], expected)
        (row,) = patch.report().rows
        assert row.calls == CALLS - 1  # the weights of nn.MultiheadAttention with gradients are torch's own softmax
        with torch.no_grad():
            attention(X, X, X)
        assert sum(row.calls for row in patch.report().rows) == CALLS
        with fastattn.apply(model) as handle:
            model(X)
            assert calls_of(handle) == CALLS
        assert sum(row.calls for row in patch.report().rows) == CALLS
    with fastattn.record() as calls:
        model(X)
    assert calls == [] and not patch.is_active


def test_patches_nest_and_leave_in_any_order():
    first, second = fastattn.patch_sdpa(), fastattn.patch_sdpa(backend="reference")
    functional.scaled_dot_product_attention(X, X, X)
    assert [row.kernel for row in second.report().rows] == ["reference"] and first.report().rows == ()
    first.remove()
    functional.scaled_dot_product_attention(X, X, X)
    assert second.report().rows[0].calls == 2
    second.remove()
    second.remove()
    with pytest.raises(ValueError, match="backend='x'"):
        fastattn.patch_sdpa(backend="x")
