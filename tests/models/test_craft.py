from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import list_models
from torch import nn

import visionattn
from visionattn.models.craft import CRAFT, LAYOUT, ChannelAttention, WindowBlock


def small(**kwargs: object) -> CRAFT:
    torch.manual_seed(0)
    return timm.create_model("craft_x2", **{"depths": (1, 1), **kwargs})


@pytest.mark.parametrize("variant", ["craft_x2", "craft_x3", "craft_x4"])
def test_official_variants(variant: str):
    assert sorted(list_models("craft*")) == ["craft_x2", "craft_x3", "craft_x4"]
    net = timm.create_model(variant)
    assert net.info.upscale == int(variant[-1])
    cfg = net.pretrained_cfg
    assert cfg["tag"] == "div2k"
    assert cfg["notes"][0].count("/.") == 5


def test_shifted_windows_wrap_round_the_border():
    torch.manual_seed(0)
    block = WindowBlock(48, 6, (4, 16), True, 2.0, True).double()
    x = torch.randn(1, 32, 32, 48).double()
    changed = x.clone()
    changed[0, 0, 0].neg_()
    with torch.no_grad():
        difference = (block(x) - block(changed)).abs().sum(-1)[0]
    # A flat window of rows -2 .. 1 and columns -8 .. 7, and its transpose: a mask would cut both there.
    assert difference[-1, -1] > 0
    assert difference[-2:, -8:].min() > 0
    assert difference[-8:, -2:].min() > 0
    assert difference[2:-8, 2:-8].max() == 0


@pytest.mark.parametrize("size", [(44, 56), (1, 1), (5, 33), (16, 48)])
@pytest.mark.parametrize("pad", ["needed", "always"])
def test_images_are_continued_by_their_mirror_image(size: tuple[int, int], pad: str):
    net = small(pad=pad).eval()
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    more = [-side % 16 + (16 if pad == "always" and side % 16 == 0 else 0) for side in size]
    padded = torch.from_numpy(np.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])), mode="symmetric"))
    bare = small(pad="needed").eval()
    with torch.no_grad():
        expected = bare(padded)[..., : 2 * size[0], : 2 * size[1]]
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-6)


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="pad must be 'needed' or 'always', got 'reflect'"):
        small(pad="reflect")


def test_channel_attention_follows_its_formula():
    torch.manual_seed(0)
    layer = ChannelAttention(12, 3).double()
    low, high = torch.randn(2, 2, 5, 7, 12).double()
    with torch.no_grad():
        layer.temperature.uniform_(0.5, 20)
        q = layer.q_dwconv(layer.q(high).permute(0, 3, 1, 2)).reshape(2, 3, 4, 35)
        k, v = layer.kv_dwconv(layer.kv(low).permute(0, 3, 1, 2)).reshape(2, 2, 3, 4, 35).unbind(1)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        logits = torch.einsum("bhcn,bhdn->bhcd", q, k)
        out = ((logits * layer.temperature).softmax(-1) @ v).reshape(2, 12, 5, 7).permute(0, 2, 3, 1)
        added = layer.add_to(low, high, nn.Identity())
        torch.testing.assert_close(added, low + layer.proj(out), rtol=1e-10, atol=1e-12)


def test_channel_weights_keep_float32_under_autocast():
    layer = ChannelAttention(12, 3)
    maps = torch.rand(2, 1, 4, 5, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        weights = layer._weights(*maps, nn.Identity())
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize(("embed_dim", "trained_bias"), [(48, False), (96, True)])
def test_every_parameter_receives_a_gradient(grad_checkpointing: bool, embed_dim: int, trained_bias: bool):
    net = small(embed_dim=embed_dim).train()
    net.set_grad_checkpointing(grad_checkpointing)
    net(torch.rand(2, 3, 17, 24, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    for name, parameter in net.named_parameters():
        # A bias MLP of width 1 has no influence: its gradient would be zero.
        assert parameter.requires_grad == (trained_bias or ".position_bias." not in name)
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # A bias common to all offsets is nothing to the softmax.
            if not name.endswith("pos3.2.bias"):
                assert parameter.grad.abs().max() > 0, name


def test_checkpoint_round_trip_and_bare_official_wrapper(tmp_path: Path):
    net, other = small().eval(), timm.create_model("craft_x2", depths=(1, 1)).eval()
    visionattn.save_checkpoint(net, tmp_path / "craft.safetensors")
    visionattn.load_checkpoint(other, tmp_path / "craft.safetensors")
    x = torch.rand(1, 3, 20, 17)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    for wrapper in ("params", "params_ema"):
        assert LAYOUT.checkpoint_filter_fn({wrapper: net.state_dict()}, net).keys() == net.state_dict().keys()
