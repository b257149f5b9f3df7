"""Agent, InLine and L2ViT networks: what the registry-wide tests do not ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visionattn
from visionattn.layers import AgentAttention2d, InLineAttention2d, WindowAttention2d, linear
from visionattn.models.frames import common
from visionattn.models.hosts.cswin import StripeAttention

DEIT: dict[str, Any] = {"embed_dim": 48, "num_heads": 2, "depth": 3}
PVT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
SWIN: dict[str, Any] = {"depths": (2, 2, 2, 2), "embed_dim": 16, "num_heads": (1, 2, 4, 4)}
CSWIN: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (2, 2, 4, 4)}
L2VIT: dict[str, Any] = {"depths": (2, 2, 2, 2), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
SMALL = {
    "agent_deit_tiny": DEIT,
    "agent_deit_base": {**DEIT, "global_blocks": 1},
    "agent_pvt_tiny": PVT,
    "agent_swin_tiny": SWIN,
    "agent_cswin_tiny": CSWIN,
    "inline_deit_tiny": DEIT,
    "inline_pvt_tiny": PVT,
    "inline_swin_tiny": SWIN,
    "inline_cswin_tiny": CSWIN,
    "l2vit_t": L2VIT,
}
# Every network that is tied to a training size, at a small one.
SIZED = [name for name in SMALL if name.startswith("agent") or "deit" in name or "pvt" in name]


def build(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **SMALL[name], **kwargs}).eval()


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (33, 32)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_any_size(name, size):
    net = build(name)
    with torch.inference_mode():
        image = torch.randn(2, 3, *size)
        logits = net(image)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        if "deit" not in name:
            # PVT's patches drop the remainder, everything else rounds up but the stem of CSwin.
            first = [(n + 1) // 4 if "cswin" in name else -(-n // 4) for n in size]
            sides = [[-(-n // step) for step in (1, 2, 4, 8)] for n in first]
            if "pvt" in name:
                sides = [[n // step for step in (4, 8, 16, 32)] for n in size]
            features = net.forward_intermediates(image, intermediates_only=True)
            assert [tuple(x.shape[2:]) for x in features] == list(zip(*sides))


@pytest.mark.parametrize("name", SMALL)
def test_too_small_an_image_is_refused(name):
    smallest = 16 if "deit" in name else 32 if "pvt" in name else 3 if "cswin" in name else 1
    net = build(name)
    with torch.inference_mode():
        assert net(torch.randn(1, 3, smallest, 40)).isfinite().all()
        if smallest > 1:
            with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
                net(torch.randn(1, 3, smallest - 1, 40))


@pytest.mark.parametrize("name", SIZED)
def test_weights_of_another_training_size(name):
    """A network takes weights of another size and then gives what those weights give at that size."""
    source = build(name, img_size=64)
    target = build(name, img_size=96)
    assert not visionattn.load_checkpoint(target, source.state_dict())
    with torch.inference_mode():
        image = torch.randn(1, 3, 96, 96)
        # The authors of PVT resize its position embedding bicubically when loading, bilinearly at run time.
        torch.testing.assert_close(
            target(image), source(image), atol=1e-3 if "pvt" in name else 1e-5, rtol=1e-4
        )


def test_windows_of_another_size():
    source, target = (build("agent_swin_tiny", window_size=window) for window in (7, 9))
    visionattn.load_checkpoint(target, source.state_dict())
    name = "stages.3.blocks.0.attn.relative_position_bias_table"
    ours, theirs = target.state_dict()[name], source.state_dict()[name]
    torch.testing.assert_close(ours, F.interpolate(theirs[None], size=(17, 17), mode="bicubic")[0])


def test_which_blocks_are_global():
    def kinds(name: str) -> list[list[type[nn.Module]]]:
        net = timm.create_model(name, device="meta")
        stages = [stage.blocks for stage in net.stages] if hasattr(net, "stages") else [net.blocks]
        return [[type(block.attn) for block in blocks] for blocks in stages]

    agent, inline, window = AgentAttention2d, InLineAttention2d, WindowAttention2d
    assert kinds("agent_swin_tiny") == [[agent] * 2, [agent] * 2, [agent] * 6, [window] * 2]
    assert kinds("agent_swin_base_384") == [
        [agent] * 2,
        [agent] * 2,
        [agent] * 2 + [window] * 16,
        [window] * 2,
    ]
    assert kinds("inline_swin_small") == [[inline] * 2, [inline] * 2, [window] * 18, [window] * 2]
    assert kinds("inline_cswin_small") == [
        [inline] * 3,
        [inline] * 6,
        [StripeAttention] * 29,
        [StripeAttention] * 2,
    ]
    assert kinds("agent_deit_base")[0][:5].count(agent) == 4


def test_agent_counts():
    net = timm.create_model("agent_deit_base", device="meta")
    assert net.blocks[0].attn.an_bias.shape == (12, 81, 7, 7)
    shapes = [(12, 12), (16, 16), (28, 28), (28, 28)]
    net = timm.create_model("agent_pvt_tiny", device="meta", agent_shapes=shapes)
    assert [stage.blocks[0].attn.an_bias.shape[1] for stage in net.stages] == [9, 16, 49, 49]
    assert net.stages[2].blocks[0].attn.agent_shape == shapes[2]


def test_more_agents_on_the_same_weights():
    few = build("agent_swin_tiny")
    many = build("agent_swin_tiny", agent_shapes=[(5, 5), (6, 6), (9, 8), (7, 7)])
    visionattn.load_checkpoint(many, few.state_dict())
    with torch.inference_mode():
        image = torch.randn(1, 3, 64, 80)
        assert (many(image) - few(image)).abs().max() > 1e-5


def test_stripes_are_windows_of_their_own():
    """The last stripe of a map that stripes do not divide is as if the map were only that stripe."""
    torch.manual_seed(0)
    net = StripeAttention(16, 4, stripe=4).double().eval()
    net.proj = nn.Identity()
    x = torch.randn(2, 9, 10, 16, dtype=torch.float64)
    with torch.no_grad():
        out = net(x)
        for start in (0, 4, 8):
            vertical = net(x[:, :, start : start + 4])[..., :8]
            torch.testing.assert_close(out[:, :, start : start + 4, :8], vertical)
            horizontal = net(x[:, start : start + 4])[..., 8:]
            torch.testing.assert_close(out[:, start : start + 4, :, 8:], horizontal)


def test_official_names_of_pvt_are_joined():
    net = build("inline_pvt_tiny")
    own = net.state_dict()
    official = {}
    for name, value in own.items():
        if ".attn.qkv." in name:
            dim = value.shape[0] // 3
            official[name.replace(".qkv.", ".q.")] = value[:dim]
            official[name.replace(".qkv.", ".kv.")] = value[dim:]
        else:
            official[name] = value
    other = timm.create_model("inline_pvt_tiny", num_classes=7, **PVT)
    assert not visionattn.load_checkpoint(other, {"model": official})
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0)


def test_averaged_weights_come_first():
    net = build("agent_cswin_tiny")
    averaged = net.state_dict()
    last = {name: value + 1 for name, value in averaged.items()}
    other = build("agent_cswin_tiny")
    visionattn.load_checkpoint(other, {"model": last, "state_dict_ema": averaged})
    torch.testing.assert_close(other.state_dict()["norm.weight"], averaged["norm.weight"])


def test_patch_tokens_of_deit():
    net = build("agent_deit_tiny")
    image = torch.randn(2, 3, 48, 32)
    with torch.inference_mode():
        tokens = net.forward_features(image)
        final, (features, cls) = (
            net.forward_features(image),
            net.forward_intermediates(
                image, 1, norm=True, return_prefix_tokens=True, intermediates_only=True
            )[0],
        )
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])
        torch.testing.assert_close(cls, final[:, :1])
        assert net.forward_head(tokens, pre_logits=True).shape == (2, 48)
        for pool in ("avg", "max", "avgmax"):
            net.reset_classifier(5, pool)
            assert net(image).shape == (2, 5)
        net.reset_classifier(0, "")
        torch.testing.assert_close(net(image), tokens)
    with pytest.raises(ValueError, match="choose one of"):
        net.reset_classifier(5, "mean")


@pytest.mark.parametrize("name", SMALL)
def test_checkpointed_blocks_give_the_same_gradients(name):
    net = build(name).train()
    for module in net.modules():  # statistics of a batch must not move between the two passes
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image = torch.randn(2, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        net(image).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    plain = gradients()
    net.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("name", SMALL)
def test_without_data(name):
    net = build(name, device="meta")
    assert net(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 7)


@pytest.mark.parametrize(
    "name", ["agent_pvt_tiny", "agent_swin_tiny", "inline_pvt_tiny", "inline_swin_tiny", "l2vit_t"]
)
def test_operations_grow_linearly_with_the_number_of_pixels(name):
    net = timm.create_model(name, num_classes=0, device="meta").eval()

    def operations(side: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, side, side, device="meta"))
        return counter.get_total_flops()

    # The prediction of InLine's local kernels does not grow at all.
    assert operations(896) == pytest.approx(16 * operations(224), rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_inference_in_pieces_gives_the_same(name, monkeypatch):
    """Large maps pass the MLPs piece by piece, small ones meet convolutions as products of patches."""
    net, image = build(name).double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = net(image).detach()
    monkeypatch.setattr(linear, "_IN_CACHE", 0)
    monkeypatch.setattr(linear, "_PIECE", 7)
    monkeypatch.setattr(common, "_WEIGHTS_PER_NUMBER", 0)
    with torch.inference_mode():
        torch.testing.assert_close(net(image), expected)
        features = net.forward_intermediates(image, intermediates_only=True)
        before = [x.clone() for x in features]
        net(image)
        torch.testing.assert_close(features, before, rtol=0, atol=0)
