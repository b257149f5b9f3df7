"""Mask R-CNN, RetinaNet and FCOS of torchvision over a feature pyramid on any backbone.

Papers: https://arxiv.org/abs/1703.06870, https://arxiv.org/abs/1708.02002, https://arxiv.org/abs/1904.01355.
Anchors, pooling and padding follow from the strides that the backbone states.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from visionattn.engine.config import ModelConfig, Section, check_kinds
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.tasks.dense.backbone import (
    BackboneOptions,
    DenseBackbone,
    create_body,
    pixel_statistics,
)
from visionattn.tasks.dense.data import DenseData


class DetectorOptions(Section):
    """The detector on the backbone, from torchvision."""

    name: Literal["mask_rcnn", "retinanet", "fcos"] = Field(
        default="mask_rcnn", description="mask_rcnn: boxes and masks; retinanet, fcos: boxes"
    )
    fpn_channels: int = Field(default=256, gt=0, description="channels of the feature pyramid")
    anchor_scale: float | None = Field(
        default=None, gt=0, description="side of the anchors / stride; null: 8, of retinanet's smallest 4"
    )
    box_channels: int = Field(default=1024, gt=0, description="mask_rcnn: channels of the box head")
    mask_channels: int = Field(default=256, gt=0, description="mask_rcnn: channels of the mask head")
    mask_layers: int = Field(default=4, gt=0, description="mask_rcnn: convolutions of the mask head")
    score_threshold: float = Field(default=0.05, ge=0, lt=1, description="least score of a detection")
    nms_threshold: float = Field(default=0.5, gt=0, le=1, description="largest overlap of two of one class")
    detections: int = Field(default=100, gt=0, description="most detections per image")
    kwargs: dict[str, Any] = Field(default={}, description="further arguments of torchvision's detector")


class PyramidBackbone(DenseBackbone):
    """A backbone with a feature pyramid, in the form that torchvision's detectors take.

    Args:
        body: a network made by timm with `features_only=True`.
        options: how it is used.
        channels: of the pyramid.
        convolved: whether two levels come on top by convolutions (RetinaNet, FCOS), else one by pooling.

    Attributes:
        levels: strides of the levels in pixels.
    """

    def __init__(self, body: Any, options: BackboneOptions, channels: int, convolved: bool) -> None:
        super().__init__(body, options)
        self.out_channels = channels
        top = LastLevelP6P7(self.channels[-1], channels) if convolved else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(self.channels, channels, extra_blocks=top)
        more = 2 if convolved else 1
        self.levels = self.strides + [2**i * self.strides[-1] for i in range(1, more + 1)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalised images `[B, 3, H, W]` to levels `[B, channels, H / s_i, W / s_i]`, rounded up."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(super().forward(images))))


class OwnSize(GeneralizedRCNNTransform):
    """Normalises and batches images without resizing them."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Both as they are."""
        return image, target


class _RoILevels:
    """Which map a region is pooled from, by its size, when the strides have gaps too."""

    def __init__(self, strides: Sequence[int]) -> None:
        finest, coarsest = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
        self.of_octave = initLevelMapper(finest, coarsest)
        octaves = [2**octave for octave in range(finest, coarsest + 1)]
        self.table = torch.tensor([sum(stride <= octave for stride in strides) - 1 for octave in octaves])

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        return self.table.to(boxes[0].device)[self.of_octave(boxes)]


def create_detector(
    model: ModelConfig,
    backbone: BackboneOptions,
    options: DetectorOptions,
    data: DenseData,
    num_classes: int,
    sizes: tuple[Sequence[int], int] | None,
) -> Any:
    """A detector; its weights are random, but for those of a `pretrained` backbone.

    Args:
        model: the network.
        backbone: how it is used.
        options: the detector.
        data: how images are normalised.
        num_classes: classes without the background; their labels start at 1.
        sizes: of the shorter side in pixels, one drawn in training and the last one otherwise, and the
            longest that the longer side becomes; None keeps the size of images.

    Raises:
        InputError: the network is no backbone, or torchvision does not take the arguments.
    """
    convolved = options.name != "mask_rcnn"
    body = create_body(model, backbone, min_stride=8 if convolved else 4)
    mean, std = pixel_statistics(body, data)
    pyramid = PyramidBackbone(body, backbone, options.fpn_channels, convolved)
    shared = {"image_mean": mean, "image_std": std, "size_divisible": math.lcm(32, pyramid.strides[-1])}
    if sizes is not None:
        shared.update(min_size=tuple(sizes[0]), max_size=sizes[1])
    kinds = (TypeError, ValueError)
    make, kind = _DETECTORS[options.name]
    # torchvision passes over arguments that it does not know.
    known = inspect.signature(kind.__init__).parameters
    for name in options.kwargs:
        if name not in known:
            raise InputError(f"unknown key detector.kwargs.{name}: {nearest(name, known)}")
    check_kinds("detector.kwargs", options.kwargs, {name: p.default for name, p in known.items()})
    with as_input_error(f"cannot build {options.name} with detector.kwargs {options.kwargs}", *kinds):
        detector = make(pyramid, options, num_classes + 1, {**shared, **options.kwargs})
    # timm asks a network for this when it groups parameters for the optimizer.
    undecayed = {f"backbone.{name}" for name in pyramid.undecayed()}
    detector.no_weight_decay = lambda: undecayed
    if sizes is None:
        detector.transform = OwnSize(0, 0, mean, std, shared["size_divisible"])
    return detector


def _mask_rcnn(
    pyramid: PyramidBackbone, options: DetectorOptions, num_classes: int, kwargs: dict[str, Any]
) -> MaskRCNN:
    scale, channels = options.anchor_scale or 8, options.mask_channels
    anchors = AnchorGenerator(
        tuple((scale * stride,) for stride in pyramid.levels), ((0.5, 1.0, 2.0),) * len(pyramid.levels)
    )
    return MaskRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        box_roi_pool=_pooling(pyramid, 7),
        box_head=TwoMLPHead(49 * pyramid.out_channels, options.box_channels),
        box_predictor=FastRCNNPredictor(options.box_channels, num_classes),
        mask_roi_pool=_pooling(pyramid, 14),
        mask_head=MaskRCNNHeads(pyramid.out_channels, (channels,) * options.mask_layers, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
        box_score_thresh=options.score_threshold,
        box_nms_thresh=options.nms_threshold,
        box_detections_per_img=options.detections,
        **kwargs,
    )


def _pooling(pyramid: PyramidBackbone, size: int) -> MultiScaleRoIAlign:
    pooling = MultiScaleRoIAlign([str(i) for i in range(len(pyramid.strides))], size, sampling_ratio=2)
    # torchvision would guess the strides from the first batch, wrongly for images much smaller than their
    # padding.
    pooling.scales = [1 / stride for stride in pyramid.strides]
    pooling.map_levels = _RoILevels(pyramid.strides)  # pyright: ignore[reportAttributeAccessIssue]
    return pooling


def _retinanet(
    pyramid: PyramidBackbone, options: DetectorOptions, num_classes: int, kwargs: dict[str, Any]
) -> RetinaNet:
    scales = [(options.anchor_scale or 4) * 2 ** (third / 3) for third in range(3)]
    sizes = tuple(tuple(scale * stride for scale in scales) for stride in pyramid.levels)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))  # pyright: ignore[reportArgumentType]
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **_thresholds(options), **kwargs)


def _fcos(
    pyramid: PyramidBackbone, options: DetectorOptions, num_classes: int, kwargs: dict[str, Any]
) -> FCOS:
    # One point per place; its "anchor" is the stride, by which the distances to the sides are measured.
    anchors = AnchorGenerator(tuple((stride,) for stride in pyramid.levels), ((1.0,),) * len(pyramid.levels))
    return FCOS(pyramid, num_classes, anchor_generator=anchors, **_thresholds(options), **kwargs)


_DETECTORS: dict[str, tuple[Any, type]] = {
    "mask_rcnn": (_mask_rcnn, MaskRCNN),
    "retinanet": (_retinanet, RetinaNet),
    "fcos": (_fcos, FCOS),
}


def _thresholds(options: DetectorOptions) -> dict[str, Any]:
    return {
        "score_thresh": options.score_threshold,
        "nms_thresh": options.nms_threshold,
        "detections_per_img": options.detections,
    }
