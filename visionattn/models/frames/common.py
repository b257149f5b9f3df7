"""What networks of every kind do alike: refusing small inputs, stochastic depth."""

from __future__ import annotations

from torch import Tensor


def check_size(x: Tensor, min_size: int) -> None:
    """Refuse images `[B, C, H, W]` smaller than a network can take.

    Raises:
        ValueError: a side below `min_size` pixels; the message says the smallest size.
    """
    height, width = x.shape[-2:]
    if min(height, width) < min_size:
        raise ValueError(
            f"an input of {height}x{width} is too small: each side must be at least {min_size} pixels"
        )


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0 to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
