"""What routed attention asks of its arguments: one clear sentence before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.checks import check_bias, check_dense_bias, check_tensor


def num_regions(x: Tensor, region: Sequence[int]) -> int:
    """How many regions a map `[B, H, W, ...]` has."""
    return -(-x.shape[1] // region[0]) * -(-x.shape[2] // region[1])


def check_pair_bias(name: str, bias: Tensor, q: Tensor, k: Tensor) -> None:
    """Check a bias of pairs of pixels; a relative one only where keys and queries are of one map."""
    check_tensor(name, "bias", bias, "[heads, ...]")
    height, width, heads = q.shape[1:4]
    table = (heads, 2 * height - 1, 2 * width - 1)
    dense = (heads, height * width, k.shape[1] * k.shape[2])
    if k.shape == q.shape:
        check_bias(name, bias, q, table, dense)
    elif tuple(bias.shape) == table:
        raise ValueError(
            f"{name}: a relative bias needs keys and queries of one map, got {height}x{width} "
            f"queries and {k.shape[1]}x{k.shape[2]} keys; a dense bias {dense} is allowed"
        )
    else:
        check_dense_bias(name, "bias", bias, dense, q)


def checked_lists(
    name: str, what: str, indices: Tensor, q: Tensor, rows: int, regions: int, distinct: bool = False
) -> Tensor:
    """The lists of every image, without repetitions; `what` the caller calls them."""
    batch, _, _, heads, _ = q.shape
    check_tensor(name, what, indices, "[B, 1 or heads, rows, n]")
    if indices.dim() != 4 or indices.shape[0] not in (1, batch) or indices.shape[1] not in (1, heads):
        raise ValueError(
            f"{name}: {what} must be [{batch} or 1, 1 or {heads}, rows, n], got {tuple(indices.shape)}"
        )
    if indices.shape[2] != rows:
        raise ValueError(
            f"{name}: {what} hold {indices.shape[2]} lists, the queries have {rows} regions or blocks"
        )
    check_integers(name, what, indices, q)
    indices = indices.expand(batch, -1, -1, -1)
    if distinct or not indices.numel():
        return indices
    if torch.compiler.is_compiling():
        # A compiled graph cannot refuse a repetition; it counts once.
        repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
        return indices.masked_fill(repeated, -1)
    least, most = (int(x) for x in indices.aminmax())
    if least < -1 or most >= regions:
        raise ValueError(f"{name}: {what} must lie in -1 (padding) .. {regions - 1}, got {least} to {most}")
    listed = indices.sort(-1).values
    if ((listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] >= 0)).any():
        raise ValueError(f"{name}: a list names the same one twice, its keys would count twice")
    return indices


def checked_counts(
    name: str, counts: Tensor, q: Tensor, regions: int, pixels: int, distinct: bool = False
) -> Tensor:
    """The counts of every image."""
    check_tensor(name, "counts", counts, "[B, 1 or heads, regions]")
    batch, _, _, heads, _ = q.shape
    shape = tuple(counts.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != regions:
        raise ValueError(f"{name}: counts must be [{batch} or 1, 1 or {heads}, {regions}], got {shape}")
    check_integers(name, "counts", counts, q)
    counts = counts.expand(batch, -1, -1)
    if distinct or torch.compiler.is_compiling() or not counts.numel():
        return counts
    least, most = (int(x) for x in counts.aminmax())
    if least < 0 or most > pixels:
        raise ValueError(
            f"{name}: counts must lie in 0 .. {pixels}, the pixels of a region, got {least} to {most}"
        )
    return counts


def check_integers(name: str, what: str, x: Tensor, q: Tensor) -> None:
    """Check that `x`, called `what`, holds integers and lies where the queries do."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: {what} must be int32 or int64, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: {what} are on {x.device}, the queries are on {q.device}")
