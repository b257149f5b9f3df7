"""Backbones under detectors and segmenters: every network, any size, the weights of the authors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import ANY_SIZE, FAMILIES, SMALL, prefix
from safetensors.torch import save_file
from torch import nn

from visionattn.checkpoints import load_checkpoint
from visionattn.engine.config import ModelConfig
from visionattn.errors import InputError
from visionattn.tasks.dense.backbone import (
    BackboneOptions,
    DenseBackbone,
    create_body,
    load_dense_checkpoint,
)
from visionattn.tasks.dense.data import DenseData
from visionattn.tasks.dense.detectors import DetectorOptions, create_detector
from visionattn.tasks.dense.segmenters import SegmenterOptions, create_segmenter

# One variant of every family in the default suite, those of the same family with the slow tests.
BACKBONES = [
    name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow)  # families share their layers
    for name in ANY_SIZE
]
ODD = (67, 45)
BIFORMER = ModelConfig(name="biformer_tiny", kwargs=SMALL["biformer"])
SMALL_DETECTOR = {"fpn_channels": 32, "box_channels": 16, "mask_channels": 8, "mask_layers": 1}


def small(name: str, **kwargs: Any) -> ModelConfig:
    return ModelConfig(name=name, kwargs={**SMALL.get(prefix(name), {}), **kwargs})


def backbone(model: ModelConfig = BIFORMER, **options: Any) -> DenseBackbone:
    return DenseBackbone(create_body(model, BackboneOptions(**options)), BackboneOptions(**options))


def detector(model: ModelConfig = BIFORMER, name: str = "mask_rcnn", **options: Any) -> Any:
    settings = DetectorOptions.model_validate({"name": name, **SMALL_DETECTOR, **options})
    return create_detector(model, BackboneOptions(), settings, DenseData(), 3, None)


def segmenter(model: ModelConfig = BIFORMER, classes: int = 3, **options: Any) -> Any:
    settings = SegmenterOptions(channels=8, fpn_channels=8, auxiliary_channels=8, **options)
    return create_segmenter(model, BackboneOptions(), settings, classes)


def target(*size: int) -> dict[str, torch.Tensor]:
    masks = torch.zeros(1, *size, dtype=torch.uint8)
    masks[:, 8:40, 4:30] = 1
    return {"boxes": torch.tensor([[4.0, 8, 30, 40]]), "labels": torch.tensor([2]), "masks": masks}


def without_gradient(net: nn.Module) -> list[str]:
    return [
        name
        for name, value in net.named_parameters()
        if value.grad is None or not value.grad.isfinite().all()
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_under_a_detector_at_an_odd_size(name: str):
    net = detector(small(name)).train()
    losses = net([torch.rand(3, *ODD), torch.rand(3, *ODD[::-1])], [target(*ODD), target(*ODD[::-1])])
    torch.stack(list(losses.values())).sum().backward()
    assert without_gradient(net) == []
    found = net.eval()([torch.rand(3, *ODD)])[0]
    assert found["masks"].shape[1:] == (1, *ODD)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_under_a_segmenter_at_an_odd_size(name: str):
    net = segmenter(small(name)).train()
    logits, auxiliary = net(torch.rand(2, 3, *ODD))
    assert logits.shape == auxiliary.shape == (2, 3, *ODD)
    (logits.logsumexp(1).mean() + auxiliary.square().mean()).backward()
    assert without_gradient(net) == []
    assert net.eval()(torch.rand(1, 3, *ODD))[1] is None


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_other_detectors(name: str):
    net = detector(name=name).train()
    images = [torch.rand(3, *ODD), torch.rand(3, 40, 90)]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = net(images, [target(*ODD), empty])
    torch.stack(list(losses.values())).sum().backward()
    assert without_gradient(net) == []
    assert net.backbone.strides == [8, 16, 32]
    assert net.backbone.levels == [8, 16, 32, 64, 128]
    assert len(net.eval()(images)) == 2


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "fcos"])
def test_images_without_objects_train(name: str):
    net = detector(name=name).train()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *ODD, dtype=torch.uint8),
    }
    losses = net([torch.rand(3, *ODD)] * 2, [empty, empty])
    torch.stack(list(losses.values())).sum().backward()
    # Distributed training needs a gradient for every parameter here too.
    assert without_gradient(net) == []


def test_strides_that_others_have():
    """A network of three stages whose strides have a gap, and one of this library with two maps."""
    net = backbone(ModelConfig(name="test_efficientnet"), out_indices=[1, 3])
    assert net.strides == [4, 16]
    assert net.size_divisor == 16
    pooled = detector(ModelConfig(name="nat_tiny", kwargs=SMALL["nat"]))
    levels = pooled.roi_heads.box_roi_pool.map_levels
    boxes = torch.tensor([[0.0, 0, side, side] for side in (20, 130, 300, 900)])
    assert levels([boxes]).tolist() == [0, 1, 2, 3]
    assert pooled.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    options = BackboneOptions(out_indices=[0, 2, 3])
    settings = DetectorOptions.model_validate(SMALL_DETECTOR)
    gap = create_detector(small("nat_tiny"), options, settings, DenseData(), 3, None)
    assert gap.backbone.strides == [4, 16, 32]
    assert gap.roi_heads.box_roi_pool.map_levels([boxes]).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("size", [(64, 96), (67, 45), (33, 100), (5, 7)])
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "agent_deit_tiny", "nat_isotropic_small"])
def test_maps_cover_the_image(name: str, size: tuple[int, int]):
    net = backbone(small(name)).eval()
    maps = net(torch.rand(1, 3, *size))
    for x, stride, channels in zip(maps, net.strides, net.channels, strict=True):
        assert x.shape == (1, channels, *(math.ceil(side / stride) for side in size))
    assert net.strides == ([16] if len(net.strides) == 1 else [4, 8, 16, 32])
    assert net.size_divisor == {"biformer_stl": 32, "agent_deit_tiny": 16}.get(name, 1)


def test_filling_up_changes_nothing_where_it_is_not_needed():
    net = backbone().eval()
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(net(image), net.body(image))


def test_norms_can_be_kept():
    net = backbone(norm_eval=True).train()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert net.training
    assert all(norm.weight.requires_grad for norm in norms)
    assert all(m.training for m in backbone().train().modules() if isinstance(m, nn.BatchNorm2d))


def test_tables_of_positions_are_not_decayed():
    model = small("nat_tiny")
    options = BackboneOptions(no_decay=["qkv.bias", "downsample"])
    for net in (
        create_segmenter(model, options, SegmenterOptions(channels=8), 3),
        create_detector(model, options, DetectorOptions(), DenseData(), 3, None),
    ):
        names, kept = set(dict(net.named_parameters())), net.no_weight_decay()
        assert kept <= names
        parts = ("attn.rpb", "qkv.bias", "downsample")
        assert kept == {
            n for n in names if n.startswith("backbone.body") and any(part in n for part in parts)
        }


def test_no_norm_is_left_without_use():
    """A kept norm of an unused map would have no gradient, which distributed training refuses."""
    model = small("biformer_tiny", extra_norms=True)
    net = create_detector(
        model, BackboneOptions(), DetectorOptions(name="fcos", fpn_channels=32), DenseData(), 3, None
    )
    losses = net.train()([torch.rand(3, *ODD)] * 2, [target(*ODD)] * 2)
    torch.stack(list(losses.values())).sum().backward()
    assert without_gradient(net) == []


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ({"name": "hat_x2"}, {}, "hat_x2 is no backbone: it gives no feature maps"),
        ({"name": "nat_tinny"}, {}, "unknown network 'nat_tinny': did you mean nat_tiny"),
        ({"name": "biformer_tiny", "kwargs": {"n_wins": 3}}, {}, "cannot build biformer_tiny .*n_wins"),
        ({"name": "nat_tiny", "kwargs": SMALL["nat"]}, {"out_indices": [0, 7]}, "7 is out of range"),
    ],
)
def test_what_cannot_be_a_backbone(model: dict[str, Any], options: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=sentence):
        create_body(ModelConfig.model_validate(model), BackboneOptions(**options))


def test_wrong_arguments_of_the_detector():
    with pytest.raises(
        InputError, match=r"unknown key detector.kwargs.box_nms_tresh: did you mean box_nms_thresh"
    ):
        detector(kwargs={"box_nms_tresh": 0.3})
    with pytest.raises(InputError, match=r"cannot build fcos .*divisible by num_groups"):
        detector(name="fcos", fpn_channels=20)


def official_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a miniature of BiFormer under its authors' names."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("stem.", "downsample_layers.0.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            name = name.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        name = name.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")
        renamed[name] = value
    return renamed


def test_a_segmentation_checkpoint_of_the_authors_loads_strictly(tmp_path: Path):
    model = small("biformer_tiny", extra_norms=True)
    theirs = segmenter(model)
    weights = {
        name: torch.randn_like(x) if x.is_floating_point() else x for name, x in theirs.state_dict().items()
    }
    of_body = {
        n.removeprefix("backbone.body.model."): x for n, x in weights.items() if n.startswith("backbone.")
    }
    heads = {name: x for name, x in weights.items() if not name.startswith("backbone.")}
    saved = {f"backbone.{name}": x for name, x in official_names(of_body).items()} | heads
    assert any(name.startswith("backbone.downsample_layers.2") for name in saved)
    torch.save({"meta": {"epoch": 3}, "state_dict": saved}, tmp_path / "upernet.pth")

    ours = segmenter(model)
    assert not load_dense_checkpoint(ours, tmp_path / "upernet.pth")
    assert all(torch.equal(x, weights[name]) for name, x in ours.state_dict().items())
    # A model without the head that serves training alone takes the rest.
    assert not load_dense_checkpoint(segmenter(model, auxiliary=0.0), tmp_path / "upernet.pth")
    # A detector takes the backbone, and so does the plain network, which has no norms of maps.
    under = detector(model)
    load_dense_checkpoint(under, tmp_path / "upernet.pth")
    for name, x in under.backbone.body.model.state_dict().items():
        assert torch.equal(x, weights[f"backbone.body.model.{name}"])
    alone = timm.create_model(model.name, features_only=True, **model.kwargs)
    load_checkpoint(alone, tmp_path / "upernet.pth")
    torch.testing.assert_close(dict(alone.model.state_dict()), dict(under.backbone.body.model.state_dict()))
    plain = create_body(BIFORMER, BackboneOptions())
    with pytest.raises(ValueError, match=r"8 unexpected .*extra_norms"):
        load_checkpoint(plain, tmp_path / "upernet.pth")

    del saved["decode_head.conv_seg.bias"]
    torch.save({"state_dict": saved}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"1 missing \(decode_head.conv_seg.bias\)"):
        load_dense_checkpoint(ours, tmp_path / "part.pth")


def test_a_detector_of_the_authors_gives_its_backbone(tmp_path: Path):
    net = segmenter(small("nat_tiny", extra_norms=True), name="semantic_fpn")
    body = {n.removeprefix("backbone.body.model."): x for n, x in net.state_dict().items() if "backbone" in n}
    # NAT's dense backbones call the norms of their maps norm0 to norm3, and downsample at the end of a level.
    theirs = {}
    for name, x in body.items():
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample", f"levels.{stage - 1}.downsample")
        name = (
            name.replace("stages.", "levels.")
            .replace("stem.", "patch_embed.")
            .replace("extra_norms.", "norm")
        )
        theirs[f"backbone.{name}"] = torch.randn_like(x)
    others = {name: torch.zeros(3) for name in ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.bias")}
    torch.save({"state_dict": {**theirs, **others}}, tmp_path / "mask_rcnn.pth")
    before = net.decode_head.conv_seg.weight.clone()
    assert not load_dense_checkpoint(net, tmp_path / "mask_rcnn.pth")
    assert torch.equal(net.backbone.body.model.extra_norms[1].weight, theirs["backbone.norm1.weight"])
    assert torch.equal(net.decode_head.conv_seg.weight, before)


def test_a_classification_checkpoint_starts_a_dense_backbone(tmp_path: Path):
    classifier = timm.create_model(BIFORMER.name, **BIFORMER.kwargs)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    net = segmenter(small("biformer_tiny", extra_norms=True))
    assert not load_dense_checkpoint(net, tmp_path / "weights.safetensors")
    assert torch.equal(net.backbone.body.model.stem[0].weight, classifier.state_dict()["stem.0.weight"])
    assert net.backbone.body.model.extra_norms[0].weight.eq(1).all()


def test_other_classes_are_a_start(tmp_path: Path):
    save_file(segmenter(classes=5).state_dict(), tmp_path / "five.safetensors")
    net = segmenter(classes=3)
    with pytest.raises(InputError, match=r"of another shape \(decode_head.conv_seg.weight: \(5, 8, 1, 1\)"):
        load_dense_checkpoint(net, tmp_path / "five.safetensors")
    report = load_dense_checkpoint(net, tmp_path / "five.safetensors", strict=False)
    assert len(report.mismatched) == 4
    assert not report.missing
    assert not report.unexpected
