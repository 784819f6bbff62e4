"""`fastattn.apply` under DistributedDataParallel and both kinds of FSDP, in one process."""

import pytest
import torch
import torch.distributed as dist

import fastattn
from plain_models import CALLS, net, tokens

X = tokens()


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(kind, model):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model):
    model(X).square().sum().backward()
    full = [x.grad.full_tensor() if hasattr(x.grad, "full_tensor") else x.grad for x in model.parameters()]
    return torch.cat([x.flatten() for x in full])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp2"])
def test_training_step(kind, before):
    expected = gradients(wrapped(kind, net()))
    model = net()
    model = model if before else wrapped(kind, model)
    handle = fastattn.apply(model, on_unsupported="error")
    model = wrapped(kind, model) if before else model
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-4)
    handle.assert_all_replaced()
    assert sum(row.calls for row in handle.report().rows) == CALLS
    handle.remove()
    model.zero_grad()
    assert torch.equal(gradients(model), expected)
    assert sum(row.calls for row in handle.report().rows) == CALLS
    assert all("forward" not in module.__dict__ for module in model.modules())
