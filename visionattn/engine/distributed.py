"""Questions about the processes of a run; with a single process every answer is the trivial one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from visionattn.errors import LostProcess, one_line


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


@contextmanager
def expecting_others() -> Iterator[None]:
    """Turn the loss of another process inside the block into one sentence.

    Raises:
        LostProcess: another process ended, or was not heard of for `train.timeout` seconds.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (lost and is_distributed()):
            raise
        raise LostProcess(
            f"process {process_index()} of {process_count()} waited for another that ended or was silent for "
            f"train.timeout seconds; see what the others say, then continue with resume=auto "
            f"({one_line(error)})"
        ) from error
