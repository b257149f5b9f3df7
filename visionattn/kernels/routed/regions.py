"""Maps cut into regions: one row per image, head and region, in row-major order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.checks import check_tensor, pair
from visionattn.kernels.precision import at_least_float32


def to_rows(x: Tensor, region: Sequence[int]) -> Tensor:
    """`[B * heads * regions, pixels, d]` of `[B, H, W, heads, d]`, border regions filled up with zeros."""
    bottom, right = -x.shape[1] % region[0], -x.shape[2] % region[1]
    x = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom)) if bottom or right else x
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(0, 3)


def from_rows(x: Tensor, like: Tensor, region: Sequence[int]) -> Tensor:
    """The inverse of `to_rows`: rows `[..., pixels, n]` to the map `[B, H, W, heads, n]` of `like`."""
    batch, height, width, heads, _ = like.shape
    regions = -(-height // region[0]), -(-width // region[1])
    x = x.unflatten(1, region).unflatten(0, (batch, heads, *regions)).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def region_means(x: Tensor, region: Sequence[int]) -> Tensor:
    """Mean of each region of `[B, H, W, heads, d]` over its own pixels: `[B, regions, heads * d]`.

    In float32 (float64 stays), whatever the dtype of the map.
    """
    x = at_least_float32(x.flatten(3))
    height, width = x.shape[1:3]
    if height % region[0] or width % region[1]:
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), tuple(region), ceil_mode=True, count_include_pad=False)
        return x.flatten(2).transpose(1, 2)
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    # Two sums, for PyTorch's sum over two separate axes at once is ten times slower on a CPU.
    return (x.sum(4).sum(2) / (region[0] * region[1])).flatten(1, 2)


def softmax_scale(x: Tensor, scale: float | None) -> float:
    """`scale`, or the usual one of `[..., d]` where none is given."""
    return x.shape[-1] ** -0.5 if scale is None else scale


def split_heads(means: Tensor, heads: int) -> Tensor:
    """`[B, heads, regions, d]` of region means `[B, regions, heads * d]`."""
    return means.unflatten(2, (heads, -1)).transpose(1, 2)


def pixels_inside(x: Tensor, region: Sequence[int]) -> Tensor:
    """Which pixels of each region lie on the map `[B, H, W, ...]`: booleans `[regions, pixels]`."""
    return to_rows(x.new_ones((1, *x.shape[1:3], 1, 1)), region).squeeze(-1) > 0


def region_grid(
    height: int, width: int, region: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The row and the column `[regions]` of each region in the grid of regions."""
    rows, columns = -(-height // region[0]), -(-width // region[1])
    number = torch.arange(rows * columns, device=device)
    return number // columns, number % columns


def query_chunks(x: Tensor, regions: int, numbers: int) -> Iterator[slice]:
    """Slices of query regions, so that what is held for them at a time stays within the caches of a CPU.

    Args:
        x: a tensor on the device that computes.
        regions: how many query regions there are.
        numbers: how many numbers are held for one of them.
    """
    most = 2**20 if x.device.type == "cpu" else 2**26
    step = max(1, most // max(1, numbers))
    for start in range(0, regions, step):
        yield slice(start, min(start + step, regions))


def check_maps(name: str, q: Tensor, k: Tensor, region_size: int | tuple[int, int]) -> tuple[int, int]:
    """Check the maps `[B, H, W, heads, d]` that a selector called `name` compares; returns (height, width) of
    a region.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or region_size is not positive.
    """
    for letter, t in (("q", q), ("k", k)):
        check_tensor(name, letter, t, "[B, H, W, heads, head_dim]")
    if q.dim() != 5 or q.shape != k.shape:
        raise ValueError(
            f"{name}: q and k must be [B, H, W, heads, head_dim] of one shape, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not torch.is_floating_point(q) or not all(q.shape[1:]):
        raise ValueError(
            f"{name}: q and k must be of a floating-point dtype and only their batch may be empty, got "
            f"{q.dtype} of shape {tuple(q.shape)}"
        )
    return pair("region_size", region_size)


def check_counts(name: str, **counts: int | None) -> None:
    """Check that the arguments of a selector called `name` that count something are 1 or more; None is none.

    Raises:
        ValueError: one of them is less.
    """
    for argument, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {count}")


def check_shares(name: str, **shares: float | None) -> None:
    """Check that the arguments of a selector called `name` that are shares lie in (0, 1]; None is none.

    Raises:
        ValueError: one of them does not.
    """
    for argument, share in shares.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}: {argument} must be above 0 and at most 1, got {share}")
