from __future__ import annotations

import math

import pytest
import timm
import torch
from spandrel.architectures.RGT.__arch.rgt import RG_SA
from timm.models import list_models
from torch import nn

import visionattn
from visionattn.models.rgt import LAYOUT, RGT, RecursiveGeneralizationAttention

reductions = RecursiveGeneralizationAttention.reductions


def small(**kwargs: object) -> RGT:
    torch.manual_seed(0)
    return timm.create_model("rgt_x2", **{"embed_dim": 96, "depths": (3, 2), **kwargs})


@pytest.mark.parametrize("variant", ["rgt_s_x2", "rgt_s_x3", "rgt_s_x4", "rgt_x2", "rgt_x3", "rgt_x4"])
def test_official_variants(variant: str):
    assert variant in list_models("rgt*")
    net = timm.create_model(variant, device="meta")
    assert net.info.upscale == int(variant[-1])
    cfg = net.pretrained_cfg
    assert cfg["tag"] == "df2k"
    assert cfg["notes"][0].count("/.") == 5


def test_recursion_depth_is_the_official_one_where_that_exists():
    for side in [*range(16, 70), 255, 256, 257, 1023, 1024, 1025, 4095, 4096]:
        evaluation = max(int(math.log(side // 16, 4)), 2)
        training = int(math.log(side // 4, 4))
        # Powers of 4 whose floating-point logarithm falls short would show here.
        assert reductions(side, side, training=False) == evaluation
        assert reductions(side, 16 * side, training=True) == reductions(16 * side, side, training=True)
        assert reductions(side, side, training=True) == training


def test_recursion_leaves_a_pixel_of_the_shorter_side():
    assert reductions(1024, 64, training=False) == 3
    assert reductions(1024, 63, training=False) == 2
    layer = RecursiveGeneralizationAttention(12, 2).eval()
    x = torch.rand(1, 1024, 17, 12)
    assert layer.add_to(x, nn.Identity(), nn.Identity()).isfinite().all()


@pytest.mark.parametrize("size", [(1024, 64), (67, 1030), (16, 31)])
def test_recursive_attention_agrees_with_the_authors_code(size: tuple[int, int]):
    theirs = RG_SA(12, 2, qkv_bias=True).double().eval()
    ours = RecursiveGeneralizationAttention(12, 2).double().eval()
    official = {f"x.attn.{name}": value for name, value in theirs.state_dict().items()}
    converted = LAYOUT.checkpoint_filter_fn(official, small())
    ours.load_state_dict({name.removeprefix("x.attn."): value for name, value in converted.items()})
    x = torch.randn(1, *size, 12).double()
    with torch.no_grad():
        expected = theirs(x.flatten(1, 2), *size).view(x.shape)
        added = ours.add_to(x, nn.Identity(), nn.Identity())
        torch.testing.assert_close(added, x + expected, rtol=1e-10, atol=1e-12)


def test_training_recursion_differs_from_evaluation():
    net = small()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(net.train()(x), net.eval()(x), atol=1e-6)


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (1, 1)])
def test_too_small_images_are_refused(size: tuple[int, int]):
    with pytest.raises(ValueError, match="at least 16 pixels"):
        small()(torch.rand(1, 3, *size))


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_every_parameter_receives_a_gradient(grad_checkpointing: bool):
    net = small(drop_path_rate=0.0).train()
    net.set_grad_checkpointing(grad_checkpointing)
    x = torch.rand(2, 3, 33, 40, generator=torch.Generator().manual_seed(0))
    net(x).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias common to all keys shifts all logits of a query alike: softmax does not see it.
        if not name.endswith("attn.k.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_checkpoint_round_trip_and_bare_official_wrapper(tmp_path):
    net, other = small().eval(), timm.create_model("rgt_x2", embed_dim=96, depths=(3, 2)).eval()
    visionattn.save_checkpoint(net, tmp_path / "rgt.safetensors")
    visionattn.load_checkpoint(other, tmp_path / "rgt.safetensors")
    x = torch.rand(1, 3, 20, 17)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    assert LAYOUT.checkpoint_filter_fn({"params": net.state_dict()}, net).keys() == net.state_dict().keys()


def test_gray_images():
    net = small(in_chans=1).eval()
    assert net.info.channels == 1
    with torch.no_grad():
        assert net(torch.rand(1, 1, 16, 20)).shape == (1, 1, 32, 40)
