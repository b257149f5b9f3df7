"""Maps cut into windows and put together again, as the published code does it."""

from __future__ import annotations

from torch import Tensor


def partition(x: Tensor, region: tuple[int, int]) -> Tensor:
    """`[B, regions, pixels, C]` of `[B, H, W, C]`."""
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(x: Tensor, region: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `partition`."""
    x = x.unflatten(2, region).unflatten(1, (height // region[0], width // region[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_heads(x: Tensor, window: int) -> Tensor:
    """`[B * windows, heads, pixels, d]` of `[B, H, W, heads, d]`."""
    heads = x.shape[3]
    x = partition(x.flatten(3), (window, window)).flatten(0, 1)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
