"""HAT's head for denoising and JPEG artefacts, at the size of the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from families import PARAMETERS
from torch import nn

import visionattn
from visionattn.models import HAT

SMALL = {"embed_dim": 12, "depths": (2,), "num_heads": 2, "window_size": 8, "squeeze_factor": 4}


def network(**kwargs) -> HAT:
    return timm.create_model("hat_x1", **{**SMALL, **kwargs})


@pytest.mark.parametrize("variant", ["hat_s_x1", "hat_x1", "hat_l_x1"])
def test_registered_at_the_sizes_of_the_official_variants(variant: str):
    net = timm.create_model(variant, device="meta")
    assert net.info.upscale == 1
    # Those of the network for x2, whose head takes 228560 (HAT-S) or 248324 more.
    head = 228_560 if variant == "hat_s_x1" else 248_324
    assert PARAMETERS[variant] == PARAMETERS[variant.replace("_x1", "_x2")] - head
    assert not any(name.startswith(("upsample", "conv_before")) for name in net.state_dict())


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [(16, 24), (5, 9)])
def test_restores_any_size_at_its_own_size(in_chans: int, size: tuple[int, int]):
    net = network(in_chans=in_chans).eval()
    assert net(torch.rand(2, in_chans, *size)).shape == (2, in_chans, *size)


def test_correction_is_added_to_the_input():
    net = network(img_range=255.0).eval()
    nn.init.zeros_(net.conv_last.weight)
    nn.init.zeros_(net.conv_last.bias)
    x = torch.rand(1, 3, 11, 13)
    torch.testing.assert_close(net(x), x)


def test_task_is_stated():
    assert network().info.task == "denoising"
    assert network(task="jpeg").info.task == "jpeg"
    assert network(upscale=2).info.task == "super-resolution"


def test_every_parameter_gets_a_gradient():
    net = network().train()
    net(torch.rand(1, 3, 11, 13)).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_state_dict_round_trip(tmp_path: Path):
    net, other = network().eval(), network().eval()
    visionattn.save_checkpoint(net, tmp_path / "net.safetensors")
    assert not visionattn.load_checkpoint(other, tmp_path / "net.safetensors")
    x = torch.rand(1, 3, 9, 8)
    assert torch.equal(net(x), other(x))


def test_starts_from_the_body_of_an_enlarging_network():
    net, enlarging = network(), network(upscale=2)
    report = visionattn.load_checkpoint(net, enlarging.state_dict(), strict=False)
    assert not report.missing
    assert all(name.startswith(("conv_before_upsample", "upsample")) for name in report.unexpected)
    assert all(entry.startswith("conv_last") for entry in report.mismatched)


@pytest.mark.parametrize("upscale", [0, 5])
def test_impossible_enlargement(upscale: int):
    with pytest.raises(ValueError, match="upscale"):
        network(upscale=upscale)
