"""The routed layer with every selector: its formula written out, on maps that regions do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels import dense_attention, routed_attention, use_backend
from visionattn.kernels.routed.selectors.table import SELECTORS
from visionattn.layers import BiLevelRoutingAttention, RoutedAttention2d

OPTIONS: dict[str, dict[str, Any]] = {
    "antidiagonal": {"threshold": 0.6, "stride": 3},
    "bound": {"topk": 2},
    "gated": {"threshold": 0.4},
    "hierarchical": {"topk": 2},
    "mass": {"sparsity": 0.5},
    "quantized": {"threshold": 0.3},
    "topk": {"topk": 2},
}
# A map that 3x3 regions do not divide, one that they do, and one inside a region.
SIZES = [(7, 8), (6, 9), (2, 2)]


@pytest.fixture(params=list(SELECTORS))
def selector(request: pytest.FixtureRequest) -> str:
    return request.param


def layer(selector: str, **kwargs: Any) -> RoutedAttention2d:
    torch.manual_seed(0)
    return RoutedAttention2d(16, 2, selector, 3, **kwargs, **OPTIONS[selector]).double()


def rows(selector: str) -> dict[str, int]:
    return {"query_region_size": 1} if SELECTORS[selector].per_pixel else {}


def heads(net: RoutedAttention2d, x: Tensor) -> list[Tensor]:
    return [t.unflatten(-1, (2, 8)) for t in net.qkv(x).chunk(3, -1)]


@pytest.mark.parametrize("size", SIZES)
def test_border_regions_have_the_pixels_that_there_are(selector: str, size: tuple[int, int]) -> None:
    net, x = layer(selector), torch.randn(2, *size, 16, dtype=torch.float64)
    q, k, v = heads(net, x)
    lists = SELECTORS[selector].regions(q, k, 3, **OPTIONS[selector])
    with use_backend("reference"):
        out = routed_attention(q, k, v, lists, 3, **rows(selector))
    torch.testing.assert_close(net(x), net.proj(out.flatten(3)))


@pytest.mark.parametrize("size", SIZES)
def test_filling_up_before_and_after_the_projection(selector: str, size: tuple[int, int]) -> None:
    x, (height, width) = torch.randn(2, *size, 16, dtype=torch.float64), size
    fill = (0, 0, 0, -width % 3, 0, -height % 3)
    for pad in ("input", "projected"):
        net = layer(selector, pad=pad, side_dwconv=3)
        maps = heads(net, F.pad(x, fill) if pad == "input" else x)
        local = net.lepe(maps[2].flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        lists = SELECTORS[selector].regions(*maps[:2], 3, **OPTIONS[selector])
        if pad == "projected":
            maps[1:] = [F.pad(t, (0, 0, *fill)) for t in maps[1:]]
        out = routed_attention(*maps, lists, 3, **rows(selector)).flatten(3)[:, :height, :width]
        torch.testing.assert_close(net(x), net.proj(out + local[:, :height, :width]))


def test_gradients_reach_every_parameter(selector: str) -> None:
    net = layer(selector, side_dwconv=5)
    net(torch.randn(1, 7, 8, 16, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_compiles_whole(selector: str) -> None:
    net, x = layer(selector, side_dwconv=3), torch.randn(2, 7, 8, 16, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_a_scale_and_no_bias() -> None:
    net, x = layer("topk", scale=0.2, qkv_bias=False), torch.randn(1, 6, 6, 16, dtype=torch.float64)
    assert net.qkv.bias is None
    q, k, v = heads(net, x)
    lists = SELECTORS["topk"].regions(q, k, 3, 2)
    torch.testing.assert_close(net(x), net.proj(routed_attention(q, k, v, lists, 3, scale=0.2).flatten(3)))


def test_bilevel_routing_is_a_case_of_it() -> None:
    bilevel = BiLevelRoutingAttention(16, 2, n_win=3, topk=2).double()
    net = layer("topk", pad="input", side_dwconv=5, scale=16**-0.5)
    net.load_state_dict(bilevel.state_dict())
    x = torch.randn(2, 7, 8, 16, dtype=torch.float64)
    assert torch.equal(net(x), bilevel(x))


def test_without_a_region_size_the_map_is_one_region() -> None:
    net = RoutedAttention2d(8, 2, "topk", None, topk=1).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, -1)).unbind(3)
    torch.testing.assert_close(net(x), net.proj(dense_attention(q, k, v).flatten(3)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((16, 3, "topk"), {"topk": 2}, "dim=16 must be a multiple of num_heads=3"),
        ((16, 2, "topkk"), {}, "selector='topkk' is unknown; did you mean topk"),
        ((16, 2, "topk"), {}, "the selector needs topk; its options are topk"),
        ((16, 2, "topk"), {"topk": 2, "threshold": 0.5}, "the selector takes no threshold; its options"),
        ((16, 2, "topk", 0), {"topk": 2}, "region_size must be"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedAttention2d(*arguments, **options)
