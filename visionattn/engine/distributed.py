"""What tasks and the engine ask about processes; with one process every answer is the trivial one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_index() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if is_distributed() else 0


def process_count() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, on each of them; every process must call it."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every process in their order, on each of them; every process must call it."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * process_count()
    dist.all_gather_object(gathered, value)
    return gathered
