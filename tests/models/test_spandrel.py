"""Agreement with spandrel, which carries the authors' code of HAT, RGT and CRAFT."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from spandrel.architectures.CRAFT import CRAFT
from spandrel.architectures.HAT import HAT
from spandrel.architectures.RGT import RGT
from torch import nn

import visionattn

HAT_SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "window_size": 8,
    "compress_ratio": 3,
    "squeeze_factor": 6,
    "mlp_ratio": 2,
    "conv_scale": 0.01,
}
RGT_SIZES: dict[str, Any] = {"embed_dim": 96, "mlp_ratio": 2, "split_size": (8, 32)}


def hat(upscale: int) -> tuple[nn.Module, nn.Module]:
    depths = (2, 2)
    theirs = HAT(
        depths=depths,
        num_heads=(2, 2),
        upscale=upscale,
        upsampler="pixelshuffle",
        **HAT_SIZES,
    )
    return theirs, timm.create_model(f"hat_x{upscale}", depths=depths, num_heads=2, **HAT_SIZES)


def rgt(upscale: int) -> tuple[nn.Module, nn.Module]:
    # Two groups, because shifts alternate between groups.
    depths = (3, 2)
    theirs = RGT(depth=depths, num_heads=(6, 6), upscale=upscale, drop_path_rate=0, **RGT_SIZES)
    return theirs, timm.create_model(f"rgt_x{upscale}", depths=depths, **RGT_SIZES)


def craft(
    upscale: int, embed_dim: int = 48, depths: tuple[int, ...] = (1, 2), split_size: tuple[int, int] = (4, 16)
) -> tuple[nn.Module, nn.Module]:
    rows, columns = split_size
    theirs = CRAFT(
        upscale=upscale,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=(6,) * len(depths),
        split_size_0=rows,
        split_size_1=columns,
    )
    sizes = {"embed_dim": embed_dim, "depths": depths, "split_size": split_size}
    # Theirs always adds a block, as the authors' script does.
    return theirs, timm.create_model(f"craft_x{upscale}", pad="always", **sizes)


def randomise(network: nn.Module) -> None:
    """Weights of normal size, so that no branch is too small to be seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def assert_agree(theirs: nn.Module, ours: nn.Module, size: tuple[int, int]) -> None:
    randomise(theirs)
    theirs, ours = theirs.double(), ours.double()
    visionattn.load_checkpoint(ours, theirs.state_dict())
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    assert actual.shape == expected.shape
    # Theirs rounds the mean colour to float32: 1.6e-8 of an output.
    assert (actual - expected).norm() <= 5e-8 * expected.norm()


@pytest.mark.parametrize(("upscale", "size"), [(2, (16, 24)), (3, (19, 21)), (4, (9, 16))])
def test_hat(upscale: int, size: tuple[int, int]):
    theirs, ours = hat(upscale)
    assert_agree(theirs.eval(), ours.eval(), size)


@pytest.mark.parametrize(("upscale", "size"), [(2, (32, 64)), (2, (37, 50)), (3, (16, 33)), (4, (20, 72))])
def test_rgt(upscale: int, size: tuple[int, int]):
    theirs, ours = rgt(upscale)
    assert_agree(theirs.eval(), ours.eval(), size)


def test_rgt_in_training():
    theirs, ours = rgt(2)
    assert_agree(theirs.train(), ours.train(), (33, 40))


@pytest.mark.parametrize(("upscale", "size"), [(2, (32, 48)), (3, (37, 50)), (4, (9, 16))])
def test_craft(upscale: int, size: tuple[int, int]):
    theirs, ours = craft(upscale)
    assert_agree(theirs.eval(), ours.eval(), size)


def test_craft_with_a_position_bias():
    theirs, ours = craft(2, embed_dim=96, depths=(1,))
    assert_agree(theirs.eval(), ours.eval(), (16, 31))
