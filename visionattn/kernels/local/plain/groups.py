"""The groups of a dilated pattern, each computed as a smaller map without dilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Axis, Group, Pattern
from visionattn.kernels.local.plain.tiles import concatenated


def by_groups(
    pattern: Pattern, maps: Sequence[Tensor], function: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Put maps `[B, H, W, heads, d]` together from `function(undilated pattern, *maps of its group)`."""
    rows = []
    for y in pattern.y.groups():
        row = []
        for x in pattern.x.groups():
            parts = (_take_groups(_take_groups(t, y, pattern.y, 1), x, pattern.x, 2) for t in maps)
            row.append(function(Pattern(y.axis, x.axis), *parts))
        rows.append(_interleave(row, pattern.x, 2))
    return _interleave(rows, pattern.y, 1)


def _take_groups(x: Tensor, group: Group, axis: Axis, dim: int) -> Tensor:
    """Move the groups of a dilated axis into the batch: `[count * B, ...]`, groups outermost."""
    if axis.dilation == 1:
        return x
    if group.count == axis.dilation:
        x = x.unflatten(dim, (group.axis.length, group.count))
    else:
        # As many whole rounds of `dilation` as fit behind the first residue.
        x = x.narrow(dim, group.first, x.shape[dim] - group.first)
        x = x.unfold(dim, group.count, axis.dilation).movedim(-1, dim + 1)
    return x.movedim(dim + 1, 0).flatten(0, 1)


def _interleave(parts: list[tuple[Tensor, ...]], axis: Axis, dim: int) -> tuple[Tensor, ...]:
    """Undo `_take_groups` for all groups of an axis."""
    if axis.dilation == 1:
        return parts[0]
    groups = axis.groups()
    longest = groups[0].axis.length
    joined = []
    for tensors in zip(*parts):
        padded = []
        for x, group in zip(tensors, groups):
            x = x.unflatten(0, (group.count, -1)).movedim(0, dim + 1)
            missing = longest - group.axis.length
            padded.append(F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x)
        whole = concatenated(padded, dim + 1).flatten(dim, dim + 1)
        joined.append(whole.narrow(dim, 0, axis.length))
    return tuple(joined)
