"""The plug-in layers: shapes on any map, and gradients for every parameter."""

from __future__ import annotations

import pytest
import torch

from visionattn.layers import NeighborhoodAttention2d, OverlappingWindowAttention2d

LAYERS = [
    lambda: NeighborhoodAttention2d(12, 3, kernel_size=5, dilation=2),
    lambda: OverlappingWindowAttention2d(12, 3, window_size=4, overlap=1),
    lambda: OverlappingWindowAttention2d(12, 3, window_size=4, overlap=1, border="clamp", qkv_bias=False),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("size", [(9, 13), (6, 20)])
def test_forward_and_gradients(make, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, *size, 12)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        NeighborhoodAttention2d(10, 3, kernel_size=3)
