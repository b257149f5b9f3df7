"""The bi-level routing layer: the padding rules of both official operators, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from visionattn.kernels import routed_attention, topk_regions
from visionattn.layers import BiLevelRoutingAttention


def layer(**kwargs) -> BiLevelRoutingAttention:
    torch.manual_seed(0)
    return BiLevelRoutingAttention(16, 2, n_win=3, topk=2, side_dwconv=3, **kwargs).double()


def test_filling_up_before_the_projection() -> None:
    net, x = layer(), torch.randn(2, 7, 8, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 2))
    q, k, v = net.qkv(padded).chunk(3, -1)
    local = net.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    heads = [t.unflatten(-1, (2, 8)) for t in (q, k, v)]
    indices = topk_regions(heads[0], heads[1], (3, 3), 2)
    out = routed_attention(*heads, indices, (3, 3), scale=16**-0.5).flatten(3)
    torch.testing.assert_close(net(x), net.proj(out + local)[:, :7, :8])


def test_filling_up_after_the_projection() -> None:
    net, x = layer(pad="projected"), torch.randn(2, 7, 8, 16, dtype=torch.float64)
    q, k, v = net.qkv(x).chunk(3, -1)
    local = net.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    # Regions of 2x2: 4 rows and 4 columns of them; routing sees the 7x8 map, attention the filled-up 8x8 one.
    indices = topk_regions(q.unflatten(-1, (2, 8)), k.unflatten(-1, (2, 8)), (2, 2), 2)
    heads = [F.pad(t, (0, 0, 0, 0, 0, 1)).unflatten(-1, (2, 8)) for t in (q, k, v)]
    out = routed_attention(*heads, indices, (2, 2), scale=16**-0.5).flatten(3)[:, :7]
    torch.testing.assert_close(net(x), net.proj(out + local))


def test_sizes_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="divisible by n_win=3"):
        layer(auto_pad=False)(torch.zeros(1, 7, 9, 16).double())
    with pytest.raises(ValueError, match="cannot be cut into n_win=3"):
        layer(pad="projected")(torch.zeros(1, 2, 9, 16).double())


def test_gradients_reach_every_parameter() -> None:
    net = layer()
    net(torch.randn(1, 7, 8, 16, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
