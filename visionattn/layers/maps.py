"""Convolve, fill up and measure channels-last maps `[B, H, W, C]`: small functions that layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def on_nhwc(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A convolution or pooling on `[B, H, W, C]`; the permutations are views of channels-last memory."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def extend_to(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, height, width, C]` of a smaller `[B, H, W, C]`: zeros on the right and bottom."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if is_needed(bottom, right) else x


def is_needed(*padding: int) -> bool:
    """Whether padding may change a map: always where sizes vary, so that a program is not for some only."""
    return any(isinstance(amount, torch.SymInt) or amount > 0 for amount in padding)


def fill_up(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Zeros on the right and bottom of `[B, H, W, C]`, up to multiples of (rows, columns)."""
    return extend_to(x, *(n * -(-side // n) for n, side in zip(multiple, x.shape[1:3])))


def as_tokens(x: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int], int]:
    """Tokens `[B, prefix + H * W, C]` of a map or of tokens that come with the size of their map.

    Returns:
        The tokens, (H, W), and how many tokens precede the map.

    Raises:
        ValueError: tokens without a size, or fewer tokens than pixels.
    """
    if x.dim() == 4:
        return x.flatten(1, 2), (x.shape[1], x.shape[2]), 0
    if size is None or x.shape[1] < size[0] * size[1]:
        raise ValueError(
            f"tokens [B, prefix + H * W, C] need the (H, W) of their map; got {tuple(x.shape)} and {size}"
        )
    return x, size, x.shape[1] - size[0] * size[1]


def add_to_map(x: Tensor, local: Tensor, prefix: int) -> Tensor:
    """Tokens `[B, prefix + H * W, C]`, in inference overwritten, with `[B, H * W, C]` added to those of the
    map."""
    if not torch.is_grad_enabled():
        x[:, prefix:] += local
        return x
    return torch.cat([x[:, :prefix], x[:, prefix:] + local], 1) if prefix else x + local


def mirror_index(size: int, length: int, device: torch.device) -> Tensor:
    """Indices `[length]`: 0 .. `size - 1`, then back, then forth, as often as needed; ends are repeated."""
    index = torch.arange(length, device=device) % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def is_known_to_be(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal; not while sizes vary, so that a program is not for the equal ones only."""
    return not any(isinstance(side, torch.SymInt) for side in size) and tuple(size) == tuple(other)
