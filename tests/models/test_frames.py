"""Frames of backbones beyond what families ask today: other strides, class tokens, states of stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visionattn.models.frames.common import Block, StridedConv2d
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.frames.tokens import TokenNetwork


class Shift(nn.Module):
    """A block of tokens that takes the size of their map."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x + size[0]


def tokens(class_token: Any, **kwargs: Any) -> TokenNetwork:
    torch.manual_seed(0)
    options = {"global_pool": "avg", "size": (4, 4), **kwargs}
    return TokenNetwork(
        in_chans=3,
        num_classes=5,
        drop_rate=0.0,
        patch_embed=StridedConv2d(3, 8, 4, 4),
        patch_size=4,
        embed_dim=8,
        class_token=class_token,
        blocks=[Shift() for _ in range(4)],
        norm=nn.Identity(),
        **options,
    ).eval()


@pytest.mark.parametrize("place", ["first", "middle", None])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (8, 20)], ids=str)
def test_class_tokens_anywhere(place: str | None, size: tuple[int, int]):
    net = tokens(place)
    image = torch.randn(2, 3, *size)
    count = size[0] * size[1] // 16
    with torch.no_grad():
        x, map_size = net.embed(image)
        assert map_size == (size[0] // 4, size[1] // 4)
        assert x.shape == (2, count + (place is not None), 8)
        patches, token = net.split(x)
        assert patches.shape == (2, count, 8)
        if place:
            before = 0 if place == "first" else count // 2
            torch.testing.assert_close(token, x[:, before : before + 1])
            torch.testing.assert_close(patches, torch.cat([x[:, :before], x[:, before + 1 :]], 1))
            # The same token in every image: it knows no pixel.
            torch.testing.assert_close(token[0], token[1])
        final, features = net.forward_intermediates(image)
        assert [f.shape for f in features] == [(2, 8, *map_size)] * 4
        torch.testing.assert_close(features[-1].flatten(2).transpose(1, 2), net.split(final)[0])
        assert net(image).shape == (2, 5)


def test_positions_belong_to_their_tokens():
    """At the training size every patch has its own entry, wherever the class token stands."""
    net = tokens("middle")
    image = torch.zeros(1, 3, 16, 16)
    nn.init.zeros_(net.patch_embed.bias)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        expected = net.pos_embed.clone()
        expected[:, 8:9] += net.cls_token
        torch.testing.assert_close(net.embed(image)[0], expected)


def test_networks_without_a_class_token_or_positions():
    net = tokens(None, size=None)
    assert net.pos_embed is None
    assert net.no_weight_decay() == set()
    with pytest.raises(ValueError, match="choose one of"):
        net.reset_classifier(5, "token")
    assert tokens("middle", global_pool="token")(torch.randn(1, 3, 16, 16)).shape == (1, 5)


class Counting(Stage):
    """A stage that hands on its map and how many stages there were."""

    def forward(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, count = x if isinstance(x, tuple) else (x, 0)
        return super().forward(x), count + 1


class Counted(Pyramid):
    def map_of(self, x: Any) -> Tensor:
        return x[0] * x[1]


def test_stages_of_any_number_and_stride_hand_on_what_they_like():
    dims, steps = (8, 12, 16), (1, 3, 1)
    stages = [
        Counting(
            dim,
            MapSequential(nn.Conv2d(before, dim, step, step)),
            [Block(dim, nn.Identity(), layer_scale=0.1, pos_kernel=3)],
        )
        for before, dim, step in zip((8, *dims), dims, steps)
    ]
    net = Counted(
        in_chans=3,
        num_classes=5,
        global_pool="avg",
        drop_rate=0.0,
        stem=MapSequential(nn.Conv2d(3, 8, 5, 5)),
        stages=stages,
        norm=nn.LayerNorm(16),
        norm_eps=1e-5,
        extra_norms=True,
        min_size=15,
        reductions=(5, 15, 15),
    ).eval()
    image = torch.randn(1, 3, 60, 45)
    with torch.no_grad():
        final, features = net.forward_intermediates(image)
        for info, feature in zip(net.feature_info, features):
            step = info["reduction"]
            assert feature.shape == (1, info["num_chs"], 60 // step, 45 // step)
        torch.testing.assert_close(final, net.forward_features(image))
        assert net(image).shape == (1, 5)
    with pytest.raises(ValueError, match="at least 15 pixels"):
        net(torch.randn(1, 3, 14, 60))
