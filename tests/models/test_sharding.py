"""Every family computes the same with its weights dealt to processes, whatever it does to its parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, small
from test_models import image
from torch.distributed.fsdp import FSDPModule

from visionattn.engine import sharding


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    """A group of this process alone: parameters are dealt out and gathered as with many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_networks_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_UNIT", 1)  # every block by itself
    plain, sharded = small(name), small(name)
    sharding.shard(sharded, torch.device("cpu"))
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) > 2
    x = image(plain)
    grads = []
    for net in (plain, sharded):
        torch.manual_seed(1)
        net.train()(x).square().mean().backward()
        grads.append(
            {n: None if p.grad is None else sharding.whole(p.grad) for n, p in net.named_parameters()}
        )
    torch.testing.assert_close(grads[1], grads[0])
    with torch.no_grad(), sharding.gathered(sharded):
        torch.testing.assert_close(sharded.eval()(x), plain.eval()(x))
    torch.testing.assert_close(sharding.whole(sharded.state_dict()), plain.state_dict())
    other = small(name).requires_grad_(False)
    for p in other.parameters():
        p.add_(1)
    sharded.load_state_dict(other.state_dict())
    torch.testing.assert_close(sharding.whole(sharded.state_dict()), other.state_dict())
