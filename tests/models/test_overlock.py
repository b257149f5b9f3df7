"""OverLoCK: its inner maps, the merge of its large convolutions, the second classifier, dense backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity
import pytest
import timm
import torch
from families import small
from torch import Tensor, nn

import visionattn
from visionattn.checkpoints.conversion import official_state_dict
from visionattn.checkpoints.identify import load_network
from visionattn.checkpoints.reading import CheckpointError
from visionattn.layers.context_mixing import DILATED_BRANCHES, ContextMixingBlock, LargeConv2d
from visionattn.models.frames.common import Supervised
from visionattn.models.overlock import LAYOUT
from visionattn.models.registry.zoo import count_macs

PARTS = Path(__file__).parents[1] / "parity" / "overlock" / "parts"


def shaken(net: nn.Module) -> nn.Module:
    """Give batch norms statistics and every parameter a part in the output."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def test_inner_maps_are_the_published_ones() -> None:
    meta, stored = parity.load(PARTS / "overlock_xt_taps.safetensors")
    net = timm.create_model("overlock_xt", aux_head=True).eval()
    assert sum(p.numel() for p in net.parameters()) == meta["params"]
    visionattn.load_checkpoint(net, parity.state_dict(meta))
    taps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: taps.__setitem__(name, args[0].permute(0, 3, 1, 2))

    for stage in (2, 3):
        blocks = net.stages[stage].blocks
        blocks[0].mix.linear.register_forward_pre_hook(keep(f"contmix{stage + 1}_first"))
        blocks[-1].mix.linear.register_forward_pre_hook(keep(f"contmix{stage + 1}_last"))
    with torch.inference_mode():
        state = net.stages(net.embed(parity.example(meta)))
        taps["overview"] = state.overview.permute(0, 3, 1, 2)
        taps["aux_logits"] = net.aux_head(state.overview)
    assert taps.keys() == stored.keys()
    errors = {name: parity.error(taps[name], expected) for name, expected in stored.items()}
    assert all(error <= 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_block_by_itself(backend: str) -> None:
    meta, stored = parity.load(PARTS / "contmix_block.safetensors")
    block = ContextMixingBlock(64, 2).eval()
    assert sum(p.numel() for p in block.parameters()) == meta["params"]
    weights = {}
    for name, value in parity.state_dict(meta).items():
        name = name.replace("weight_value.0", "value.linear").replace("weight_value.1", "value.norm")
        name = name.replace("fusion_proj", "dyconv_proj")
        weights[LAYOUT.rename(f"sub_blocks3.0.{name}").removeprefix("stages.2.blocks.0.")] = value
    own = block.state_dict()
    assert {n for n in own if "num_batches" not in n} == weights.keys()
    block.load_state_dict({n: v.view(own[n].shape) for n, v in weights.items()}, strict=False)
    x = parity.example(meta).permute(0, 2, 3, 1)
    with torch.inference_mode(), visionattn.kernels.use_backend(backend):
        out = block(x).permute(0, 3, 1, 2)
    assert parity.error(out, stored["image"]) <= 1e-5


@pytest.mark.parametrize("kernel", DILATED_BRANCHES)
def test_merged_convolution_equals_the_sum_of_its_branches(kernel: int) -> None:
    torch.manual_seed(0)
    conv = shaken(LargeConv2d(3, kernel).double())
    x = torch.randn(2, 20, 23, 3, dtype=torch.float64)
    planes = x.permute(0, 3, 1, 2)
    expected = conv.origin_bn(conv.lk_origin(planes))
    for side, dilation in DILATED_BRANCHES[kernel]:
        branch, norm = (conv.get_submodule(f"dil_{part}_k{side}_{dilation}") for part in ("conv", "bn"))
        expected = expected + norm(branch(planes))
    torch.testing.assert_close(conv(x), expected.permute(0, 2, 3, 1))
    conv.reparameterize()
    torch.testing.assert_close(conv(x), expected.permute(0, 2, 3, 1))
    assert {name for name, _ in conv.named_parameters()} == {"lk_origin.weight", "lk_origin.bias"}


def test_reparameterized_network() -> None:
    net, x = shaken(small("overlock_xt")), torch.randn(2, 3, 70, 90)
    expected = net(x)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    net.reparameterize()
    assert (net(x) - expected).norm() <= 1e-6 * expected.norm()
    # It is the form that a network made for deployment has, and weights of training become it.
    deployed = small("overlock_xt", merged=True).eval()
    deployed.load_state_dict(net.state_dict())
    assert torch.equal(deployed(x), net(x))
    other = small("overlock_xt", merged=True).eval()
    other.load_state_dict({n: torch.zeros_like(v) for n, v in other.state_dict().items()})
    visionattn.load_checkpoint(other, weights)
    assert (other(x) - expected).norm() <= 1e-6 * expected.norm()


def test_official_files_for_training_and_for_deployment() -> None:
    net = shaken(small("overlock_xt", aux_head=True, num_classes=7))
    official = official_state_dict(net)
    assert official["head.4.weight"].shape == (7, 40, 1, 1)
    assert official["sub_blocks3.0.weight_proj.weight"].shape == (74, 49, 1, 1)
    assert official["blocks3.0.ls.weight"].shape == (32, 1, 1, 1)
    assert visionattn.identify(official).arguments.get("merged") is None
    # Without the second classifier of training as well.
    plain = small("overlock_xt", num_classes=7).eval()
    assert not visionattn.load_checkpoint(plain, official)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(plain(x), net(x))

    plain.reparameterize()
    deployed = official_state_dict(plain)
    identity = visionattn.identify(deployed)
    assert identity.arguments["merged"] is True
    assert "blocks1.0.proj.1.lk_origin.bias" in deployed
    assert all("dil_conv" not in name for name in deployed)
    twin, _ = load_network(deployed)
    torch.testing.assert_close(twin(x), plain(x))
    with pytest.raises(CheckpointError, match="origin_bn"):
        visionattn.load_checkpoint(small("overlock_xt", num_classes=7), deployed)


@pytest.mark.parametrize(
    ("name", "training", "merged", "gmacs"),
    [
        ("overlock_xt", 17_307_272, 16_453_712, 2.6),
        ("overlock_t", 34_990_472, 33_467_040, 5.5),
        ("overlock_s", 58_309_772, 56_156_452, 9.5),
        ("overlock_b", 98_012_968, 94_942_528, 16.8),
    ],
)
def test_published_sizes(name: str, training: int, merged: int, gmacs: float) -> None:
    full = timm.create_model(name, aux_head=True, device="meta")
    assert sum(p.numel() for p in full.parameters()) == training
    net = timm.create_model(name, merged=True, device="meta").eval()
    assert sum(p.numel() for p in net.parameters()) == merged
    # The projection of the kernels is applied to 49 keys here, not to every pixel.
    assert count_macs(net, (1, 3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.05)


def test_second_classifier_in_training() -> None:
    net = small("overlock_xt", aux_head=True, num_classes=5).train()
    x = torch.randn(2, 3, 64, 96)
    out = net(x)
    assert isinstance(out, Supervised)
    assert out.logits.shape == out.auxiliary.shape == (2, 5)
    assert out.weight == 0.4
    (out.logits.sum() + out.auxiliary.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 5)
    net.reset_classifier(3)
    assert net.train()(x).auxiliary.shape == (2, 3)
    net.reset_classifier(0)
    assert net(x).shape == (2, 40)


def test_the_overview_reaches_the_last_map_of_a_detector() -> None:
    net = shaken(small("overlock_xt", features_only=True, extra_norms=True, overview_output=True))
    x = torch.randn(1, 3, 64, 96)
    maps = net(x)
    assert [m.shape[1] for m in maps] == [16, 16, 40, 40]
    inner = net.model
    states = [inner.stages[:3](inner.embed(x))]
    states.append(inner.stages[3](states[0]))
    last = inner.extra_norms[3](states[1].map)
    overview = inner.overview_norm(states[1].overview)
    expected = last + inner.overview_scale(inner.overview_proj(overview))
    torch.testing.assert_close(maps[3], expected.permute(0, 3, 1, 2))
    official = official_state_dict(inner)
    assert official["h_proj.1.weight"].shape == (40, 1, 1, 1)
    assert official["extra_norm.4.weight"].shape == (32,)
    back = LAYOUT.checkpoint_filter_fn(official, inner)
    assert all(torch.equal(back[name], value) for name, value in inner.state_dict().items())
    with pytest.raises(ValueError, match="extra_norms=True"):
        small("overlock_xt", overview_output=True)


def test_hooks_on_the_kernels_projection_are_heard() -> None:
    block = shaken(ContextMixingBlock(16, 2, kernel_size=7))
    x = torch.randn(1, 9, 8, 16)
    expected = block(x)
    seen = []
    block.weight_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(block(x), expected)
    assert seen == [(1, 4, 72, 74)]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="7, 13, 15, 17, not of 9"):
        LargeConv2d(8, 9)
    with pytest.raises(ValueError, match="multiple of 4"):
        ContextMixingBlock(20, 2)
