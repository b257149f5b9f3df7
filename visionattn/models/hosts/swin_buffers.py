"""The indices and masks that Swin and its descendants store beside their weights: functions of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def window_index(rows: Sequence[int], columns: Sequence[int] | None = None) -> Tensor:
    """Swin's index of relative positions: for every pair of pixels of a window, their entry in a table.

    Args:
        rows: height and width of the window.
        columns: those of the window of keys, where it is another one.

    Returns:
        int64 `[pixels, pixels of keys]`: query minus key, counted from the most negative offset.
    """
    queries, keys = _pixels(rows), _pixels(columns or rows)
    height, width = columns or rows
    offset = queries[:, None] - keys[None] + torch.tensor([height - 1, width - 1])
    return offset[..., 0] * (rows[1] + width - 1) + offset[..., 1]


def window_offsets(window: Sequence[int]) -> Tensor:
    """All offsets `[(2 * height - 1) * (2 * width - 1), 2]` inside a window, as the authors store them."""
    height, width = window
    return torch.cartesian_prod(torch.arange(1 - height, height), torch.arange(1 - width, width)).float()


def bias_table(stored: Tensor) -> Tensor:
    """A table as `[heads, rows, columns]`, key minus query, of Swin's `[offsets, heads]`, query minus key."""
    side = round(stored.shape[0] ** 0.5)
    return stored.unflatten(0, (side, -1)).permute(2, 0, 1).flip(1, 2)


def stored_table(table: Tensor) -> Tensor:
    """The inverse of `bias_table`."""
    return table.flip(1, 2).flatten(1).T


def shift_mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Swin's mask of shifted windows: -100 between pixels that do not belong together, else 0.

    Args:
        size: height and width of the map, multiples of the window's.
        window: height and width of a window.
        shift: pixels by which the map is rolled.

    Returns:
        float32 `[windows, pixels, pixels]`.
    """
    lines = []
    for side, length, step in zip(size, window, shift):
        line = torch.zeros(side)
        line[-length:], line[-step:] = 1, 2
        lines.append(line)
    region = 3 * lines[0][:, None] + lines[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2)
    region = region.flatten(0, 1)
    return torch.where(region[:, None] != region[:, :, None], -100.0, 0.0)


def _pixels(size: Sequence[int]) -> Tensor:
    """Rows and columns `[height * width, 2]` of the pixels of a window."""
    return torch.cartesian_prod(*(torch.arange(side) for side in size))
