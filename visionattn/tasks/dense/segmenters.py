"""Segmenters: a backbone under UPerNet, Semantic FPN or a plain head, and how they see images of any size.

Modules have the names of MMSegmentation's `EncoderDecoder`, so that its checkpoints load (`backbone.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from visionattn.engine.config import ModelConfig, Section
from visionattn.heads.segmentation import FPN, FCNHead, FPNHead, UPerHead, resize
from visionattn.tasks.dense.backbone import BackboneOptions, DenseBackbone, create_body
from visionattn.tasks.dense.transforms import fitted_size


class SegmenterOptions(Section):
    """The head on the backbone."""

    name: Literal["upernet", "semantic_fpn"] = Field(default="upernet", description="upernet or semantic_fpn")
    channels: int | None = Field(
        default=None, gt=0, description="channels of the head; null: 512, of semantic_fpn 128"
    )
    fpn_channels: int = Field(default=256, gt=0, description="semantic_fpn: channels of its pyramid")
    auxiliary: float | None = Field(
        default=None,
        ge=0,
        description="weight of the loss of an FCN head on the last map but one, 0: no such head; "
        "null: 0.4, of semantic_fpn 0",
    )
    auxiliary_channels: int = Field(default=256, gt=0, description="channels of that head")
    class_weights: list[float] | None = Field(
        default=None, min_length=2, description="weight of each class in the loss; null: all alike"
    )
    sync_norm: bool = Field(
        default=False, description="take batch statistics of the heads over all processes (GPUs only)"
    )


class InferenceOptions(Section):
    """How whole images are segmented."""

    mode: Literal["whole", "slide"] = Field(
        default="whole", description="whole: at once; slide: in overlapping windows whose logits are averaged"
    )
    short_side: int | None = Field(
        default=None, gt=0, description="images are resized to this shorter side; null: not resized"
    )
    long_side: int | None = Field(default=None, gt=0, description="longest side of resized images; null: any")
    window: int | None = Field(default=None, gt=0, description="slide: side of the windows")
    stride: int | None = Field(default=None, gt=0, description="slide: from one window to the next")

    @model_validator(mode="after")
    def _windows(self) -> InferenceOptions:
        if self.mode == "slide" and (self.window is None or self.stride is None or self.stride > self.window):
            raise ValueError("mode slide needs window and stride, which must not be larger than the window")
        return self


class Segmenter(nn.Module):
    """Backbone, pyramid and heads.

    Args:
        body: a network made by timm with `features_only=True`.
        backbone: how it is used.
        options: the head.
        num_classes: classes.
    """

    def __init__(
        self, body: Any, backbone: BackboneOptions, options: SegmenterOptions, num_classes: int
    ) -> None:
        super().__init__()
        self.backbone = DenseBackbone(body, backbone)
        widths, strides = self.backbone.channels, self.backbone.strides
        self.num_classes = num_classes
        self.neck = None
        if options.name == "upernet":
            self.decode_head: nn.Module = UPerHead(widths, options.channels or 512, num_classes)
        else:
            self.neck = FPN(widths, options.fpn_channels)
            levels = [options.fpn_channels] * len(widths)
            self.decode_head = FPNHead(levels, strides, options.channels or 128, num_classes)
        by_default = 0.4 if options.name == "upernet" else 0.0
        self.auxiliary_weight = by_default if options.auxiliary is None else options.auxiliary
        if self.auxiliary_weight:
            # Of four maps the third, of which the authors' heads are made too.
            self.auxiliary_head = FCNHead(widths[-2:][0], options.auxiliary_channels, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond timm's rule of one-dimensional ones."""
        return {f"backbone.{name}" for name in self.backbone.undecayed()}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised images to logits of each pixel.

        Args:
            images: `[B, 3, H, W]`.

        Returns:
            Logits `[B, num_classes, H, W]`, and in training those of the auxiliary head.
        """
        size = (images.shape[2], images.shape[3])
        maps = self.backbone(images)
        logits = resize(self.decode_head(maps if self.neck is None else self.neck(maps)), size)
        if not self.training or not hasattr(self, "auxiliary_head"):
            return logits, None
        return logits, resize(self.auxiliary_head(maps[-2:][0]), size)


def create_segmenter(
    model: ModelConfig, backbone: BackboneOptions, options: SegmenterOptions, num_classes: int
) -> Segmenter:
    """A segmenter; its weights are random, but for those of a `pretrained` backbone.

    Raises:
        InputError: the network is no backbone.
    """
    segmenter = Segmenter(create_body(model, backbone), backbone, options, num_classes)
    # The norm of a CPU cannot communicate.
    if options.sync_norm and torch.cuda.is_available():
        for name in ("neck", "decode_head", "auxiliary_head"):
            if getattr(segmenter, name, None) is not None:
                head = nn.SyncBatchNorm.convert_sync_batchnorm(getattr(segmenter, name))
                setattr(segmenter, name, head)
    return segmenter


def segment(model: Segmenter, image: Tensor, options: InferenceOptions) -> Tensor:
    """The logits of a whole image at its own size.

    Args:
        model: in evaluation mode.
        image: normalised, `[3, H, W]`.
        options: whole or in windows, and at which size.

    Returns:
        `[num_classes, H, W]`.
    """
    height, width = image.shape[-2:]
    at_size = resize(image[None], fitted_size(height, width, options.short_side, options.long_side))
    logits = model(at_size)[0] if options.mode == "whole" else _slide(model, at_size, options)
    return resize(logits.float(), (height, width))[0]


def _slide(model: Segmenter, image: Tensor, options: InferenceOptions) -> Tensor:
    """The mean over windows of an image `[1, 3, H, W]`; the last of a row or column ends at the border."""
    assert options.window is not None
    assert options.stride is not None
    rows, columns = (_starts(side, options.window, options.stride) for side in image.shape[-2:])
    sums = image.new_zeros(1, model.num_classes, *image.shape[-2:], dtype=torch.float32)
    counts = torch.zeros_like(sums[:, :1])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + options.window), slice(left, left + options.window))
            sums[place] += model(image[place])[0].float()
            counts[place] += 1
    return sums / counts


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
