"""Precision that does not depend on the autocast state of the caller."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A `with` block in which operations on the device of `x` keep the dtypes of their inputs."""
    kind = x.device.type
    # Exported programs would hold the block as a program of its own, which takes no size that may vary.
    # Dynamo of PyTorch 2.6 cannot ask whether a kind of device knows autocast.
    is_known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    is_enabled = is_known and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_enabled else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
