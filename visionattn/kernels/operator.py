"""Rules for `torch.vmap` over registered operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of an operator whose samples cannot share a batch, as gradients of a bias: one call each."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        samples = [
            operator(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        outs = tuple(torch.stack(parts) for parts in zip(*samples))
        return outs, (0,) * len(outs)

    return rule
