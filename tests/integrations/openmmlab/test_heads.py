"""Our decoders and those of mmsegmentation: the same parameters, the same numbers."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.decode_heads import FCNHead as TheirFCN
from mmseg.models.decode_heads import FPNHead as TheirFPNHead
from mmseg.models.decode_heads import UPerHead as TheirUPer
from mmseg.models.necks import FPN as TheirFPN
from torch import Tensor, nn

from visionattn.heads.segmentation import FPN, FCNHead, FPNHead, UPerHead

WIDTHS = [8, 12, 16, 24]
NORM = {"type": "BN"}
COMMON = {"num_classes": 7, "norm_cfg": NORM, "align_corners": False}


def maps() -> list[Tensor]:
    """Maps of an image of 130x98 pixels: no size is a multiple of the next."""
    return [torch.randn(2, width, -(-130 // s), -(-98 // s)) for width, s in zip(WIDTHS, (4, 8, 16, 32))]


def randomise(net: nn.Module) -> None:
    """Statistics and affine weights that a mistake would not hide behind."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)


HEADS = {
    "upernet": (
        UPerHead(WIDTHS, 10, 7),
        TheirUPer(in_channels=WIDTHS, in_index=[0, 1, 2, 3], channels=10, **COMMON),
    ),
    "fcn": (
        FCNHead(16, 10, 7),
        TheirFCN(in_channels=16, in_index=2, channels=10, num_convs=1, concat_input=False, **COMMON),
    ),
    "semantic_fpn": (
        FPNHead(WIDTHS, (4, 8, 16, 32), 10, 7),
        TheirFPNHead(
            in_channels=WIDTHS, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=10, **COMMON
        ),
    ),
    "fpn": (FPN(WIDTHS, 10), TheirFPN(in_channels=WIDTHS, out_channels=10, num_outs=4)),
}


@pytest.mark.parametrize("name", HEADS)
def test_their_weights_give_their_numbers(name: str) -> None:
    ours, theirs = HEADS[name]
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    inputs = maps()
    with torch.no_grad():
        got = ours(inputs[2] if name == "fcn" else inputs)
        wanted = theirs(inputs)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["upernet", "fcn", "semantic_fpn"])
def test_they_share_gradients_too(name: str) -> None:
    ours, theirs = HEADS[name]
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = maps()
    for net, x in ((ours, inputs[2] if name == "fcn" else inputs), (theirs, inputs)):
        net.train()
        net.dropout = nn.Identity()
        net.zero_grad()
        net(x).square().mean().backward()
    for (key, a), b in zip(
        sorted(ours.named_parameters()), (p for _, p in sorted(theirs.named_parameters()))
    ):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
