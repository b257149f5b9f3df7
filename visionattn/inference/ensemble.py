"""The x8 self-ensemble of the restoration literature (Timofte et al., CVPR 2016)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def self_ensemble(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of what a network makes of all flips and transpositions of its input, turned back.

    Args:
        network: takes and returns images `[B, C, H, W]`, of any proportion of the sides.
        x: its input.

    Returns:
        Images like `network(x)`, in float32; the output is then equivariant to flips and transpositions.
    """
    outputs = []
    for transposed, *flips in itertools.product((False, True), repeat=3):
        dims = [dim for dim, flip in ((-1, flips[0]), (-2, flips[1])) if flip]
        y = x.transpose(-1, -2) if transposed else x
        y = network(y.flip(dims).contiguous()).float().flip(dims)
        outputs.append(y.transpose(-1, -2) if transposed else y)
    return torch.stack(outputs).mean(0)
