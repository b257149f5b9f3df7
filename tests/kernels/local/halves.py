"""Shapes for the two halves of neighborhood attention, and what their tests compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visionattn.kernels import neighborhood_aggregation, neighborhood_attention, neighborhood_scores

# Size of the map, kernel, and the rest.
SHAPES: dict[str, tuple[tuple[int, int], Any, dict[str, Any]]] = {
    "one pixel": ((1, 1), 1, {}),
    "whole map": ((5, 7), (5, 7), {}),
    "nearly the whole map": ((8, 9), 7, {}),
    "even": ((7, 9), (4, 2), {}),
    "wide": ((3, 37), 3, {}),
    "dilated": ((7, 9), 3, {"dilation": (2, 3)}),
    "strided": ((7, 8), 5, {"stride": (3, 2)}),
    "causal": ((4, 7), (3, 4), {"is_causal": True}),
    "all": ((9, 9), (3, 4), {"stride": (2, 3), "dilation": (3, 2), "is_causal": (True, False)}),
}


def sample(name: str, bias: str = "none", dim: int = 4, batch: int = 2, **kwargs: Any) -> list[Tensor]:
    """Strided queries, keys and values of two heads, and a bias if it is not `"none"`."""
    size, kernel, options = SHAPES[name]
    torch.manual_seed(0)
    kwargs = {"dtype": torch.float64, **kwargs}
    tensors = list(torch.randn(batch, *size, 3, 2, dim, **kwargs).unbind(3))
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    stride = options.get("stride", 1)
    block = stride * stride if isinstance(stride, int) else stride[0] * stride[1]
    shapes = {"table": (2, 2 * rows - 1, 2 * columns - 1), "dense": (2, block, rows * columns)}
    return [*tensors, torch.randn(shapes[bias], **kwargs)] if bias != "none" else tensors


def in_halves(name: str) -> Callable[..., Tensor]:
    """Neighborhood attention as the sum by the softmax of the logits."""
    _, kernel, options = SHAPES[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = neighborhood_scores(q, k, kernel, bias, **options).softmax(-1)
        return neighborhood_aggregation(weights, v, kernel, **options)

    return attend


def whole(name: str) -> Callable[..., Tensor]:
    """Neighborhood attention in one piece."""
    _, kernel, options = SHAPES[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(q, k, v, kernel, bias=bias, **options)

    return attend
