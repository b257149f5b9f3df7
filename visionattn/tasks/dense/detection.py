"""Detection of objects by boxes and instance masks, on built-in scenes or on any data in the COCO format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL.Image import Image
from pydantic import Field, field_validator
from torch import Tensor
from torchvision.transforms import v2

from visionattn.data.coco import CocoImages
from visionattn.engine.config import Section
from visionattn.engine.distributed import gather_objects, process_index
from visionattn.errors import InputError, as_input_error
from visionattn.tasks.broken import refuse_or_skip
from visionattn.tasks.dense.data import DenseData, find_split
from visionattn.tasks.dense.detectors import DetectorOptions, create_detector
from visionattn.tasks.dense.drawing import draw_objects
from visionattn.tasks.dense.task import DenseConfig, DenseTask, load_weights
from visionattn.tasks.dense.transforms import RandomScale, RandomSizedCrop

_PICTURED_SCORE = 0.3
_STATISTICS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")  # in COCOeval's order


class DetectionData(DenseData):
    """The images and their objects."""

    source: Literal["scenes", "coco"] = Field(
        default="scenes", description="scenes: digits on photographs, built in; coco: files in that format"
    )
    train_images: str = Field(default="train2017", description="folder in root of the training images")
    train_annotations: str = Field(
        default="annotations/instances_train2017.json", description="their file of annotations, in root"
    )
    eval_images: str = Field(default="val2017", description="folder in root of the held-out images")
    eval_annotations: str = Field(
        default="annotations/instances_val2017.json", description="their file of annotations, in root"
    )
    short_side: list[int] | None = Field(
        default=None,
        min_length=1,
        description="shorter sides of resized images, the last one in evaluation; null: not resized",
    )
    long_side: int = Field(default=1333, gt=0, description="longest side of resized images")

    @field_validator("short_side", mode="before")
    @classmethod
    def _one_side(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value


class DetectionAugmentation(Section):
    """Changes of the training images, by torchvision's transforms."""

    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field(default=(1.0, 1.0), description="least and largest factor of resizing")
    crop: float = Field(default=0.0, ge=0, le=1, description="probability of a crop, as in DETR's recipe")
    crop_resize: list[int] | None = Field(
        default=[400, 500, 600], min_length=1, description="shorter sides before the crop; null: not resized"
    )
    crop_sides: tuple[int, int] = Field(default=(384, 600), description="least and largest side of the crop")
    distort: float = Field(default=0.0, ge=0, le=1, description="probability of photometric distortion")


class DetectionConfig(DenseConfig):
    """A detection run."""

    task: Literal["detection"] = Field(default="detection", description="what is trained")
    data: DetectionData = Field(default_factory=DetectionData, description="the images and their objects")
    augment: DetectionAugmentation = Field(
        default_factory=DetectionAugmentation, description="changes of the training images"
    )
    detector: DetectorOptions = Field(default_factory=DetectorOptions, description="the detector")


class DetectionTask(DenseTask):
    """Trains a detector on a network's feature maps; judges it by COCO's average precision.

    Batches are lists of uint8 images `[3, H, W]` and of their targets, see `CocoImages`.

    Args:
        config: the run. Names of the classes are taken from the training data where it leaves them open, and
            stand in the `config` of the task.

    Raises:
        InputError: network, weights or data do not exist or do not fit together.
    """

    config: DetectionConfig
    monitor = "box_map"

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__()
        self.config = config
        self.has_masks = config.detector.name == "mask_rcnn"
        self.metrics = [f"{kind}_{name}" for kind in self._kinds() for name in _STATISTICS]
        self._images: dict[bool, CocoImages] = {}
        if config.data.class_names is None:
            data = config.data.model_copy(update={"class_names": self._open(True).class_names})
            self.config = config.model_copy(update={"data": data})
        data, names = self.config.data, self.config.data.class_names
        assert names is not None
        sizes = None if data.short_side is None else (data.short_side, data.long_side)
        self.model = create_detector(config.model, config.backbone, config.detector, data, len(names), sizes)
        load_weights(self.model, config)

    def loss(self, batch: tuple[Sequence[Tensor], Sequence[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """The sum of the detector's losses, and each of them."""
        images, targets = batch
        losses = self.model([image.float() / 255 for image in images], list(targets))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean average precision of boxes (`box_map`, `box_map50`, ...) and of masks, in 0 to 1.

        That of a size that no object has is left out.
        """
        mine: dict[str, list[Any]] = {kind: [] for kind in self._kinds()}
        for images, targets in loader:
            found = self.model([image.float() / 255 for image in images])
            for target, result in zip(targets, found, strict=True):
                for kind, entries in self._held_out.as_results(target["index"], _objects_of(result)).items():
                    mine[kind] += entries
        parts = gather_objects(mine)
        results = {kind: [entry for part in parts for entry in part[kind]] for kind in mine}
        return gather_objects(self._score(results) if process_index() == 0 else {})[0]

    def find(self, image: Tensor) -> dict[str, Any]:
        """The objects in a uint8 image `[3, H, W]`.

        Returns:
            `boxes` (x1, y1, x2, y2) `[N, 4]`, `names`, `classes` (indices of the names), `scores` `[N]` in
            descending order, and of Mask R-CNN `masks` bool `[N, H, W]`.
        """
        found = _objects_of(self.model([image.float() / 255])[0])
        classes = [label - 1 for label in found.pop("labels").tolist()]
        return {**found, "classes": classes, "names": [self._names[index] for index in classes]}

    def show(self, image: Image) -> Image:
        """The image with the objects found in it whose score is at least 0.3."""
        found = self.predict([image])[0]
        count = int((found["scores"] >= _PICTURED_SCORE).sum())
        labels = [
            f"{name} {score:.2f}"
            for name, score in zip(found["names"], found["scores"].tolist(), strict=True)
        ]
        masks = found["masks"][:count] if "masks" in found else None
        return draw_objects(image, found["boxes"][:count], found["classes"][:count], labels[:count], masks)

    def panels(self, name: str, image: Image, target: dict[str, Tensor]) -> list[tuple[str, Image]]:
        """The image with its true objects, and with those that were found."""
        classes = (target["labels"] - 1).tolist()
        labels = [self._names[index] for index in classes]
        truth = draw_objects(image, target["boxes"], classes, labels, target.get("masks"))
        return [(f"{name}: truth", truth), ("found", self.show(image))]

    def training_transform(self) -> v2.Transform:
        """See the function of this name."""
        return training_transform(self.config.augment)

    def check_held_out(self, images: CocoImages) -> None:
        """Let COCO's evaluation judge one object that is nowhere: it must take the truth and find objects."""
        labels = torch.tensor([next(iter(images.labels.values()), 1)])
        nowhere = {"boxes": torch.zeros(1, 4), "labels": labels, "scores": torch.ones(1)}
        first = images.truth()["images"][0]
        height, width = first["height"], first["width"]
        masks = {"masks": torch.zeros(1, height, width, dtype=torch.bool)} if self.has_masks else {}
        kinds = (ValueError, TypeError, LookupError, RuntimeError, AttributeError)
        with as_input_error("the held-out annotations cannot be judged", *kinds):
            found = score(images.truth(), images.as_results(0, {**nowhere, **masks}))
        if self.monitor not in found:
            count = len(images.truth()["annotations"])
            kept = f"all {count} are crowds, which do not count" if count else "there are none"
            raise InputError(f"the {len(images)} held-out images have no objects to be judged by: {kept}")

    def _kinds(self) -> tuple[str, ...]:
        return ("box", "mask") if self.has_masks else ("box",)

    @property
    def _names(self) -> list[str]:
        return self.config.data.class_names or []

    def _checked(self, training: bool) -> CocoImages:
        images = self._open(training)
        broken, total = images.broken_objects(), len(images.content.objects)
        refuse_or_skip(
            broken.values(), total, "annotations cannot be used", "data.broken", self.config.data.broken
        )
        return super()._checked(training)

    def _open(self, training: bool) -> CocoImages:
        if training not in self._images:
            data = self.config.data
            places = find_split(data, training, "annotations", "annotations/instances_{}.json")
            with as_input_error("cannot use the data", ValueError, OSError):
                self._images[training] = CocoImages(*places, data.class_names, self.has_masks)
        return self._images[training]

    def _score(self, results: dict[str, list[Any]]) -> dict[str, float]:
        return score(self._held_out.truth(), results)


def score(truth: dict[str, Any], results: dict[str, list[Any]]) -> dict[str, float]:
    """COCO's statistics of results, without those that have no value because no object is of their size.

    Args:
        truth: images, objects and categories in COCO's format.
        results: entries in COCO's format of results, for `"box"` and `"mask"`.
    """
    reference = COCO(truth)
    metrics = {}
    for kind, entries in results.items():
        judge = COCOeval_faster(
            reference,
            reference.loadRes(entries),
            "bbox" if kind == "box" else "segm",
            print_function=_silent,
        )
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        # A size that no object has gives -1.
        metrics |= {
            f"{kind}_{name}": float(value)
            for name, value in zip(_STATISTICS, judge.stats, strict=False)
            if value >= 0
        }
    return metrics


def training_transform(augment: DetectionAugmentation) -> v2.Transform:
    """Flip, distortion, resizing and crop; objects that are cut off leave the target."""
    steps: list[Any] = [
        v2.RandomHorizontalFlip(augment.hflip),
        v2.RandomPhotometricDistort(p=augment.distort),
    ]
    if augment.scale != (1.0, 1.0):
        steps.append(RandomScale(augment.scale))
    if augment.crop:
        crop: list[Any] = [RandomSizedCrop(augment.crop_sides)]
        if augment.crop_resize is not None:
            crop.insert(0, v2.RandomShortestSize(augment.crop_resize))
        steps.append(v2.RandomApply(crop, augment.crop))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_of_objects)])


def _of_objects(inputs: tuple[Any, dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(inputs[1][name] for name in ("labels", "masks") if name in inputs[1])


def _objects_of(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's result for one image on the CPU, its masks as bool `[N, H, W]`."""
    masks = {"masks": result["masks"][:, 0] >= 0.5} if "masks" in result else {}
    found = {name: value.cpu() for name, value in {**result, **masks}.items()}
    # Label 0 belongs to no class; RetinaNet and FCOS have an output for it that nothing trains.
    return {name: value[found["labels"] > 0] for name, value in found.items()}


def _silent(*text: Any) -> None:
    """COCOeval's table is not printed."""
