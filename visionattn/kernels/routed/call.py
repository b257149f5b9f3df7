"""What a call of routed attention asks for, beside its maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """The arguments of routed attention behind q, k and v, checked and filled in by `op.py`.

    Attributes:
        indices: `[B, 1 or heads, query regions, topk]`: numbers of key regions, -1 for padding.
        counts: `[B, 1 or heads, key regions]`: how many of the places of a key region hold a key; None: all.
        bias: relative table, dense or None.
        query_region: (height, width) of a region of queries.
        region: (height, width) of a region of keys.
        scale: multiplies q·k.
        return_lse: whether the log-sum-exp is wanted.
        is_full: whether no list holds padding, as the caller promises.
    """

    indices: Tensor
    counts: Tensor | None
    bias: Tensor | None
    query_region: Sequence[int]
    region: Sequence[int]
    scale: float
    return_lse: bool
    is_full: bool
