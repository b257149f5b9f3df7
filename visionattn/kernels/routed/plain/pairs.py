"""What the lists say about pairs of a query and a key: which there are, and where their bias stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.routed.call import Call


def lists_of_heads(q: Tensor, call: Call) -> Tensor:
    """The lists `[B, heads, query regions, topk]`; regions without a key are padding."""
    indices = call.indices
    if call.counts is not None:
        batch, lists = indices.shape[0], max(indices.shape[1], call.counts.shape[1])
        indices = indices.expand(batch, lists, -1, -1)
        counts = call.counts.expand(batch, lists, -1)[:, :, None].expand(-1, -1, indices.shape[2], -1)
        indices = indices.masked_fill(counts.gather(3, indices.clamp(min=0).long()) == 0, -1)
    return indices.expand(-1, q.shape[3], -1, -1)


def row_numbers(indices: Tensor, regions: int) -> Tensor:
    """Rows of `to_rows` that lists `[B, heads, query regions, topk]` of some of so many regions name, one row
    of numbers per list; padding names the first row of its head."""
    first = torch.arange(indices.shape[0] * indices.shape[1], device=indices.device).view(-1, 1, 1) * regions
    return (indices.clamp(min=0).flatten(0, 1) + first).flatten(0, 1)


def present_keys(k: Tensor, call: Call) -> Tensor | None:
    """Which places of every key region hold a key `[B or 1, heads or 1, regions, pixels]`; None for all."""
    height, width = k.shape[1:3]
    present = None
    if height % call.region[0] or width % call.region[1]:
        y, x = coordinates(k, call.region)
        present = ((y < height) & (x < width))[None, None]
    if call.counts is not None:
        place = torch.arange(call.region[0] * call.region[1], device=k.device)
        counted = place < call.counts[..., None]
        present = counted if present is None else present & counted
    return present


def coordinates(x: Tensor, region: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column of every place of every region of a map `[regions, pixels]`, also beyond the map."""
    rows, columns = -(-x.shape[1] // region[0]), -(-x.shape[2] // region[1])
    down = torch.arange(rows * region[0], device=x.device).view(rows, 1, region[0], 1)
    right = torch.arange(columns * region[1], device=x.device).view(1, columns, 1, region[1])
    down, right = (n.expand(rows, columns, *region).flatten(2, 3).flatten(0, 1) for n in (down, right))
    return down, right


class PairBias:
    """The entries of a bias for pairs of regions."""

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor, call: Call):
        self.flat = bias.flatten(1)
        self.size, self.key_size = q.shape[1:3], k.shape[1:3]
        self.is_table = bias.shape[1:] == tuple(2 * n - 1 for n in self.size)
        # Places beyond the map take the entry of its border: their logits count for nothing.
        self.queries, self.keys = (
            [n.clamp(max=side - 1) for n, side in zip(coordinates(x, region), x.shape[1:3])]
            for x, region in ((q, call.query_region), (k, call.region))
        )

    def entries(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Number the entries of a head for pairs of regions.

        Args:
            queries: `[..., a]` query regions.
            keys: `[..., b]` key regions.

        Returns:
            `[..., a * query pixels, b * key pixels]`.
        """
        y, x = (n[queries].flatten(-2)[..., None] for n in self.queries)
        key_y, key_x = (n[keys].flatten(-2)[..., None, :] for n in self.keys)
        (height, width), (key_height, key_width) = self.size, self.key_size
        if self.is_table:
            return (key_y - y + height - 1) * (2 * width - 1) + key_x - x + width - 1
        return (y * width + x) * (key_height * key_width) + key_y * key_width + key_x

    def take(self, heads: Tensor, entries: Tensor) -> Tensor:
        """The bias of these entries; `heads` has the shape of their leading axes."""
        return self.flat[heads[..., None, None], entries]


def add_gradient(grad: Tensor, heads: Tensor, entries: Tensor, values: Tensor) -> None:
    """Add gradients of these entries to `grad`, a bias `[heads, entries]`."""
    grad.index_put_((heads[..., None, None], entries), values.to(grad.dtype), accumulate=True)
