"""Semantic segmentation on built-in scenes, or on folders such as those of ADE20K and Cityscapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms import v2

from visionattn.data.label_maps import IGNORED, LabelMaps
from visionattn.data.scenes import CLASS_NAMES as SCENE_CLASSES
from visionattn.engine.config import Section
from visionattn.engine.distributed import sum_over_processes
from visionattn.errors import InputError, as_input_error
from visionattn.tasks.dense.backbone import pixel_statistics
from visionattn.tasks.dense.data import DenseData, find_split
from visionattn.tasks.dense.drawing import draw_classes
from visionattn.tasks.dense.segmenters import (
    InferenceOptions,
    Segmenter,
    SegmenterOptions,
    create_segmenter,
    segment,
)
from visionattn.tasks.dense.task import DenseConfig, DenseTask, load_weights
from visionattn.tasks.dense.transforms import RandomScale, VariedCrop


class SegmentationData(DenseData):
    """The images and their class maps."""

    source: Literal["scenes", "folders"] = Field(
        default="scenes",
        description="scenes: digits on photographs, built in; folders of images and class maps",
    )
    train_images: str = Field(default="images/training", description="folder in root of the training images")
    train_labels: str = Field(
        default="annotations/training", description="folder in root of their class maps"
    )
    eval_images: str = Field(default="images/validation", description="folder in root of the held-out images")
    eval_labels: str = Field(
        default="annotations/validation", description="folder in root of their class maps"
    )
    image_suffix: str | None = Field(
        default=None, description="how names of images end: _leftImg8bit.png; null: as those of images do"
    )
    label_suffix: str = Field(
        default=".png", description="what class maps have in its place: _gtFine_labelTrainIds.png"
    )
    num_classes: int | None = Field(default=None, gt=1, description="null: as many as class_names has")
    reduce_zero_label: bool = Field(
        default=False, description="value 0 of a class map is ignored and 1 the first class, as in ADE20K"
    )
    background: int | None = Field(default=None, ge=0, description="a class that pictures leave clear")


class SegmentationAugmentation(Section):
    """Changes of the training images."""

    crop_size: int = Field(default=512, gt=0, description="side of the training crops in pixels")
    short_side: int | None = Field(
        default=None, gt=0, description="images are resized to this shorter side first; null: not resized"
    )
    long_side: int | None = Field(default=None, gt=0, description="longest side of resized images; null: any")
    scale: tuple[float, float] = Field(
        default=(0.5, 2.0), description="least and largest factor of resizing, on top of this"
    )
    max_share: float = Field(
        default=0.75, gt=0, le=1, description="largest share of one class in a crop, if ten tries find one"
    )
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    distort: float = Field(default=0.5, ge=0, le=1, description="probability of photometric distortion")


class SegmentationConfig(DenseConfig):
    """A segmentation run."""

    task: Literal["segmentation"] = Field(default="segmentation", description="what is trained")
    data: SegmentationData = Field(
        default_factory=SegmentationData, description="the images and their class maps"
    )
    augment: SegmentationAugmentation = Field(
        default_factory=SegmentationAugmentation, description="changes of the training images"
    )
    segmenter: SegmenterOptions = Field(default_factory=SegmenterOptions, description="the head")
    inference: InferenceOptions = Field(
        default_factory=InferenceOptions, description="how whole images are segmented"
    )

    @model_validator(mode="after")
    def _enough_for_norms(self) -> SegmentationConfig:
        segmenter = self.segmenter
        if segmenter.name == "upernet" and self.train.batch_size == 1 and not segmenter.sync_norm:
            raise ValueError("upernet normalises over a batch, so it needs a train.batch_size of at least 2")
        return self


class SegmentationTask(DenseTask):
    """Trains a head on a network's feature maps; judges it by the overlap of the classes.

    Batches are lists of uint8 images `[3, H, W]` and of class indices `[H, W]`, 255 where none is known.

    Args:
        config: the run. Names of the classes are filled in where it leaves them open.

    Raises:
        InputError: network, weights or data do not exist or do not fit together.
    """

    config: SegmentationConfig
    model: Segmenter
    monitor = "miou"
    metrics = ("miou", "macc", "aacc")
    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__()
        names = _class_names(config.data)
        update: dict[str, Any] = {"class_names": names, "num_classes": len(names)}
        if config.data.source == "scenes":
            update["background"] = 0
        self.config = config.model_copy(update={"data": config.data.model_copy(update=update)})
        self.model = create_segmenter(config.model, config.backbone, config.segmenter, len(names))
        for name, value in zip(("mean", "std"), pixel_statistics(self.model.backbone.body, config.data)):
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)
        weights = config.segmenter.class_weights
        if weights is not None and len(weights) != len(names):
            raise InputError(
                f"segmenter.class_weights has {len(weights)} values, but there are {len(names)} classes"
            )
        given = None if weights is None else torch.tensor(weights)
        self.register_buffer("class_weights", given, persistent=False)
        load_weights(self.model, config)

    def loss(self, batch: tuple[Sequence[Tensor], Sequence[Tensor]]) -> dict[str, Tensor]:
        """Cross entropy over the pixels with a class, that of the auxiliary head added with its weight."""
        images, classes = (torch.stack(list(part)) for part in batch)
        logits, auxiliary = self.model(self._normalize(images))
        loss = self._cross_entropy(logits, classes)
        if auxiliary is None:
            return {"loss": loss}
        of_auxiliary = self._cross_entropy(auxiliary, classes)
        total = loss + self.model.auxiliary_weight * of_auxiliary
        return {"loss": total, "decode": loss, "auxiliary": of_auxiliary}

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean intersection over union `miou`, mean accuracy of classes `macc`, accuracy of pixels `aacc`.

        All are in 0 to 1, from one confusion matrix of all images; classes that are neither there nor found
        do not count. Where no pixel has a class, they are not numbers.
        """
        count = len(self.config.data.class_names or [])
        confusion = torch.zeros(count, count, dtype=torch.float64, device=self.mean.device)
        for images, classes in loader:
            for image, truth in zip(images, classes, strict=True):
                found = self._classes(image)
                confusion += multiclass_confusion_matrix(found, truth, count, ignore_index=IGNORED)
        confusion = sum_over_processes(confusion)
        hits, there, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union = there + found - hits
        return {
            "miou": (hits / union)[union > 0].mean().item(),
            "macc": (hits / there)[there > 0].mean().item(),
            "aacc": (hits.sum() / there.sum()).item(),
        }

    def check_held_out(self, images: LabelMaps) -> None:
        """Refuse class maps without any pixel that has a class."""
        if not any((images.classes(index) != IGNORED).any() for index in range(len(images))):
            raise InputError(
                f"no pixel of the {len(images)} held-out class maps has a class: nothing can be judged"
            )

    def find(self, image: Tensor) -> Tensor:
        """The classes `[H, W]` of a uint8 image `[3, H, W]`."""
        return self._classes(image).cpu()

    def show(self, image: Image) -> Image:
        """The image under the colours of its classes."""
        return self._draw(image, self.predict([image])[0])

    def panels(self, name: str, image: Image, target: Tensor) -> list[tuple[str, Image]]:
        """The image, and the same under the colours of its true classes and of those that were found."""
        return [(name, image), ("truth", self._draw(image, target)), ("found", self.show(image))]

    def training_transform(self) -> v2.Transform:
        """See the function of this name."""
        return training_transform(self.config.augment)

    def _open(self, training: bool) -> LabelMaps:
        data = self.config.data
        places = find_split(data, training, "labels", "annotations/{}")
        count = len(data.class_names or [])
        names: Any = () if data.source == "scenes" else ("image_suffix", "label_suffix", "reduce_zero_label")
        with as_input_error("cannot use the data", ValueError, OSError):
            return LabelMaps(*places, count, **{name: getattr(data, name) for name in names})

    def _draw(self, image: Image, classes: Tensor) -> Image:
        data = self.config.data
        return draw_classes(image, classes, data.class_names or [], data.background)

    def _classes(self, image: Tensor) -> Tensor:
        """The classes `[H, W]` of a uint8 image `[3, H, W]`."""
        logits = segment(self.model, self._normalize(image), self.config.inference)
        return logits.argmax(0)

    def _cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The mean over pixels with a class, by their weights; 0 where there is none."""
        total = F.cross_entropy(
            logits.float(), classes, self.class_weights, ignore_index=IGNORED, reduction="sum"
        )
        known = classes != IGNORED
        weight = known.sum() if self.class_weights is None else self.class_weights[classes[known]].sum()
        return total / weight.clamp(min=1e-6)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def training_transform(augment: SegmentationAugmentation) -> v2.Transform:
    """Resizing, crop, flip, distortion."""
    return v2.Compose(
        [
            RandomScale(augment.scale, augment.short_side, augment.long_side),
            VariedCrop(augment.crop_size, augment.max_share, IGNORED),
            v2.RandomHorizontalFlip(augment.hflip),
            v2.RandomPhotometricDistort(p=augment.distort),
        ]
    )


def _class_names(data: SegmentationData) -> list[str]:
    names = data.class_names
    if data.source == "scenes":
        if names not in (None, list(SCENE_CLASSES)):
            raise InputError("the built-in scenes have classes of their own: leave data.class_names out")
        names = list(SCENE_CLASSES)
    if names is None and data.num_classes is None:
        raise InputError("data.source=folders needs data.num_classes or data.class_names")
    names = names or [f"class {index}" for index in range(data.num_classes or 0)]
    if data.num_classes not in (None, len(names)):
        raise InputError(f"data.num_classes is {data.num_classes}, but there are {len(names)} class names")
    return names
