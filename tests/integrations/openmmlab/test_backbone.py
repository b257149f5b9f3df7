from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from families import ANY_SIZE, SMALL, prefix
from mmengine.registry import MODELS
from torch import nn

import visionattn
from visionattn.integrations.openmmlab import VisionAttnBackbone


def build(name: str = "biformer_tiny", **options: Any) -> VisionAttnBackbone:
    kwargs = {**SMALL[prefix(name)], **options.pop("kwargs", {})}
    torch.manual_seed(0)
    return MODELS.build({"type": "VisionAttnBackbone", "name": name, "kwargs": kwargs, **options})


def test_stages_are_frozen() -> None:
    backbone = build(frozen_stages=1).train()
    stages = backbone.net.model.stages
    trained = {name for name, value in backbone.net.model.named_parameters() if value.requires_grad}
    assert trained
    assert not any(name.startswith(("stem", "stages.0.")) for name in trained)
    assert all(name in trained for name, _ in backbone.net.model.named_parameters() if "stages.1." in name)
    assert not any(module.training for module in stages[0].modules())
    assert stages[1].training
    assert not any(module.training for module in backbone.eval().modules())


def test_nothing_is_frozen_by_default() -> None:
    assert all(value.requires_grad for value in build().parameters())


def test_batch_norms_can_stay_as_they_are() -> None:
    norms = [m for m in build(norm_eval=True).train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_weights_come_through_our_loader(tmp_path) -> None:
    torch.manual_seed(7)
    source = timm.create_model("biformer_tiny", **SMALL["biformer"])
    file = tmp_path / "weights.safetensors"
    visionattn.save_checkpoint(source, file)
    backbone = build(checkpoint=str(file))
    name, wanted = "stages.3.blocks.0.mlp.fc1.weight", source.state_dict()["stages.3.blocks.0.mlp.fc1.weight"]
    before = backbone.net.model.state_dict()[name].clone()
    backbone.init_weights()
    assert not torch.equal(before, wanted)
    assert torch.equal(backbone.net.model.state_dict()[name], wanted)


def test_only_the_maps_that_are_asked_for() -> None:
    maps = build(out_indices=(1, 2, 3))(torch.randn(1, 3, 70, 90))
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 12), (5, 6), (3, 3)]


def test_networks_of_timm_that_keep_channels_last() -> None:
    backbone = MODELS.build(
        {
            "type": "VisionAttnBackbone",
            "name": "swin_tiny_patch4_window7_224",
            "kwargs": {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1), "img_size": 64},
        }
    )
    assert [tuple(m.shape) for m in backbone(torch.randn(1, 3, 64, 64))] == [
        (1, 12, 16, 16),
        (1, 24, 8, 8),
        (1, 48, 4, 4),
        (1, 96, 2, 2),
    ]


def test_blocks_can_be_recomputed() -> None:
    x = torch.randn(1, 3, 64, 64)
    plain, recomputed = build().train(), build(grad_checkpointing=True).train()
    for backbone in (plain, recomputed):
        backbone(x)[-1].sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "biformer_tinny"}, "did you mean biformer_tiny"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "x.pth"}}, "give checkpoint=FILE"),
        ({"frozen_stages": 7}, "frozen_stages of biformer_tiny must be -1 to 4, got 7"),
        ({"checkpoint": "x.pth", "pretrained": True}, "choose one source"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS.build({"type": "VisionAttnBackbone", "name": "biformer_tiny", **options})


@pytest.mark.parametrize("name", ANY_SIZE)
def test_every_backbone_at_an_odd_size(name: str) -> None:
    backbone = build(name)
    info = backbone.net.feature_info
    maps = backbone(torch.randn(1, 3, 97, 131))
    assert isinstance(maps, tuple)
    for m, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert m.shape[1] == channels
        assert abs(m.shape[2] - 97 / reduction) < 1
        assert abs(m.shape[3] - 131 / reduction) < 1
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
