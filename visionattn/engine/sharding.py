"""Networks whose weights are dealt to the processes (PyTorch's FSDP2), and whole where judged or saved.

What is saved is the same with and without sharding, so that a run may continue on another number of processes
and in the other form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from visionattn.engine.distributed import process_count

# Smaller blocks are gathered with what surrounds them: a message of a few kilobytes costs its latency.
_UNIT = 1_000_000  # parameters


def shard(network: nn.Module, device: torch.device) -> None:
    """Deal the parameters of a network to the processes, in place; each of them must call it.

    Blocks of its sequences and lists are gathered one by one where they compute, the rest at once.

    Args:
        network: on `device`, equal on all processes.
        device: where it computes.
    """
    mesh = init_device_mesh(device.type, (process_count(),))
    for module in reversed(list(network.modules())):
        blocks = module.children() if isinstance(module, (nn.Sequential, nn.ModuleList)) else ()
        for block in blocks:
            size = sum(p.numel() for p in block.parameters())
            if size >= _UNIT and any(True for _ in block.children()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.register_load_state_dict_pre_hook(_deal)


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """The weights of a network whole on every process inside the block, where it may run any number of times.

    A sharded network otherwise computes on all processes together, and a process with fewer samples than
    another would be waited for. Every process must enter; a network that is not sharded is left alone.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # The network itself is needed again for the backward pass right after its forward pass.
            part.set_reshard_after_forward(part is not network, recurse=False)


@contextmanager
def unsynchronized(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """No exchange of gradients inside the block, for all but the last of accumulated batches."""
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        with accelerator.no_sync(network):
            yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def whole(tree: Any) -> Any:
    """A structure of tensors, numbers and texts, its sharded tensors whole; every process must call it."""
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(whole, tree))
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def whole_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The inverse of `whole` for the state of an optimizer whose parameters are sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def deal(index: int, value: Any) -> Any:
        of_weights = isinstance(value, Tensor) and value.shape == params[index].shape
        return _like(value, params[index]) if of_weights else value

    dealt = {
        index: {name: deal(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": dealt}


def _deal(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Replace whole weights in a state dict by the shards that the parameters of `module` are."""
    for name, param in module.named_parameters(remove_duplicate=False):
        if prefix + name in state:
            state[prefix + name] = _like(state[prefix + name], param)


def _like(value: Tensor, param: Tensor) -> Tensor:
    if not isinstance(param, DTensor) or isinstance(value, DTensor) or value.shape != param.shape:
        return value
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)
