"""Image classification: any network of timm or of this library, on any images that timm reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from PIL.Image import Image
from pydantic import Field, model_validator
from timm.data import ImageNetInfo, Mixup, create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose

from visionattn.checkpoints.description import Preprocessing, prepare
from visionattn.data.decode import as_rgb
from visionattn.engine.batches import make_eval_loader, make_train_loader
from visionattn.engine.config import RunConfig, Section
from visionattn.engine.distributed import gather_objects
from visionattn.engine.network import create_network, evaluating
from visionattn.engine.task import Task
from visionattn.errors import InputError, RunError, as_input_error
from visionattn.models.frames.common import Supervised
from visionattn.tasks.classification.data import (
    ClassificationData,
    LabelledImages,
    class_indices,
    open_images,
    remove_broken_images,
    to_image_mode,
)


class Augmentation(Section):
    """Changes of the training images, by timm's transforms."""

    crop_scale: tuple[float, float] = Field(default=(0.08, 1.0), description="area of the random crop")
    crop_ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="aspect ratio of the crop")
    hflip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    vflip: float = Field(default=0.0, ge=0, le=1, description="probability of a vertical flip")
    color_jitter: float = Field(default=0.4, ge=0, description="strength of colour jitter")
    auto_augment: str | None = Field(default=None, description="timm's policy, as rand-m9-mstd0.5-inc1")
    erasing: float = Field(default=0.0, ge=0, le=1, description="probability of random erasing")
    repeats: int = Field(default=1, ge=1, description="augmentations of one image side by side in an epoch")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix")
    mix_prob: float = Field(default=1.0, ge=0, le=1, description="probability of mixing a batch")
    switch_prob: float = Field(default=0.5, ge=0, le=1, description="probability of cutmix where both are on")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")


class ClassificationConfig(RunConfig):
    """The configuration of a classification run."""

    task: Literal["classification"] = Field(description="what is trained")
    data: ClassificationData = Field(description="the images")
    augment: Augmentation = Field(default_factory=Augmentation, description="changes of the training images")

    @model_validator(mode="after")
    def _even_batches(self) -> ClassificationConfig:
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise ValueError(f"mixing needs an even train.batch_size, but it is {self.train.batch_size}")
        return self


class ClassificationTask(Task):
    """Trains a network to name what an image shows; judges it by the share of right names.

    Batches are `(uint8 images [B, C, H, W], class indices [B])`; they are normalised and mixed on the device.

    Args:
        config: the run. Number and names of the classes are taken from the training images where it leaves
            them open, and stand in the `config` of the task.

    Raises:
        InputError: network, weights, images, image size and number of classes do not exist or fit together.
    """

    config: ClassificationConfig
    monitor = "top1"
    metrics = ("top1", "top5", "loss")
    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.model.kwargs.get("in_chans", 3)
        if channels not in (1, 3):
            raise InputError(f"model.kwargs.in_chans must be 1 or 3 for images, but {channels!r} was given")
        self.image_mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
        self._images: dict[bool, Dataset] = {}
        if config.data.num_classes is None:
            self._open(training=True)
        num_classes = cast(int, self.config.data.num_classes)
        if config.model.kwargs.get("num_classes", num_classes) != num_classes:
            given = config.model.kwargs["num_classes"]
            raise InputError(f"model.kwargs.num_classes is {given}, but the data has {num_classes} classes")
        self.model = create_network(config.model, num_classes=num_classes)
        self.preprocessing = resolve_preprocessing(self.model, config.data, channels)
        for name in ("mean", "std"):
            value = 255 * torch.tensor(self.preprocessing[name]).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        shape = check_image_size(self.model, config.model.name, self.preprocessing["input_size"])
        if shape != (1, num_classes):
            given = f"{tuple(shape[1:])} numbers for an image, not one for each of {num_classes} classes"
            raise InputError(f"{config.model.name} does not classify: it gives {given}")
        # What is saved of the network says how its images are prepared and what its classes are called.
        names = self.config.data.class_names
        prepare(self.model, Preprocessing.model_validate({**self.preprocessing, "label_names": names}))
        augment = config.augment
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross entropy of a batch, mixed and erased as configured; a second classifier's is added."""
        images, targets = batch
        augment, smoothing = self.config.augment, self.config.augment.label_smoothing
        images = self._normalize(images)
        if augment.erasing:
            images = RandomErasing(augment.erasing, mode="pixel", device=str(images.device))(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # part of the mixed targets
        out = self.model(images)
        if not isinstance(out, Supervised):
            return {"loss": F.cross_entropy(out, targets, label_smoothing=smoothing)}
        main, auxiliary = (F.cross_entropy(x, targets, label_smoothing=smoothing) for x in out[:2])
        return {"loss": main + out.weight * auxiliary, "auxiliary": auxiliary.detach()}

    def evaluate(self, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """`top1` and `top5` in percent and the mean `loss`, each held-out image counted once.

        They are not numbers where a stream gives no image.

        Raises:
            RunError: an image has a class beyond those of the network.
        """
        sums = [0.0, 0.0, 0.0, 0.0]
        for images, targets in loader:
            logits = self.model(self._normalize(images)).float()
            if not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
                wrong = f"{int(targets.min())} to {int(targets.max())}"
                raise RunError(f"held-out images have classes {wrong}, but there are {logits.shape[1]}")
            right = logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            batch = torch.stack([right[:, 0].sum(), right.sum(), loss]).tolist()
            sums = [total + value for total, value in zip(sums, [*batch, len(targets)], strict=True)]
        top1, top5, loss, count = map(sum, zip(*gather_objects(sums), strict=True))
        if not count:
            return dict.fromkeys(self.metrics, math.nan)
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}

    def predict(self, inputs: Sequence[Image], top: int | None = 5) -> list[list[tuple[str, float]]]:
        """The most probable names of what images show, see `classify`."""
        return classify(
            self.model, inputs, self.config.data.class_names, top=top, preprocessing=self.preprocessing
        )

    def show(self, image: Image) -> list[tuple[str, float]]:
        """All names of the classes with their probabilities, the most probable first."""
        return self.predict([image], top=None)[0]

    def train_loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the training images, augmented."""
        augment = self.config.augment
        transform = self._transform(
            is_training=True,
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
        )
        return make_train_loader(self._ready(True, transform), self.config.train, repeats=augment.repeats)

    def eval_loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the held-out images, resized and cropped in the middle."""
        transform = self._transform(crop_pct=self.preprocessing["crop_pct"])
        return make_eval_loader(self._ready(False, transform), self.config.train)

    def _transform(self, **options: Any) -> Any:
        names = ("input_size", "interpolation", "mean", "std")
        stated = {name: self.preprocessing[name] for name in names}
        kinds = (ValueError, TypeError, LookupError, AssertionError)
        with as_input_error("cannot prepare images as data and augment say", *kinds):
            # use_prefetcher: images stay uint8, a quarter of the traffic, and are normalised on the device.
            return create_transform(**stated, use_prefetcher=True, **options)

    def _ready(self, training: bool, transform: Any) -> Dataset:
        dataset: Any = self._open(training)
        remove_broken_images(dataset, self.config.data)
        read = [] if isinstance(dataset, LabelledImages) else [to_image_mode(self.image_mode)]
        dataset.transform = Compose([*read, transform])
        if not training and not isinstance(dataset, IterableDataset) and not len(dataset):
            raise InputError(f"data.eval_split={self.config.data.eval_split} holds no image to judge by")
        return dataset

    def _open(self, training: bool) -> Dataset:
        """The images of a split, whose classes are then those of the configuration."""
        if training in self._images:
            return self._images[training]
        data, train = self.config.data, self.config.train
        opened = partial(
            open_images,
            data,
            training,
            image_mode=self.image_mode,
            batch_size=train.batch_size,
            seed=train.seed,
        )
        dataset = opened()
        wanted = {name: index for index, name in enumerate(data.class_names or [])}
        found = class_indices(dataset)
        if data.source == "folder" and wanted and found and found != wanted:
            unknown = sorted(set(found) - set(wanted))
            if unknown:
                split = data.train_split if training else data.eval_split
                raise InputError(
                    f"the {split} images have the class {unknown[0]!r}, which is not among the "
                    f"{len(wanted)} of the {'configuration' if training else 'training images'}"
                )
            dataset = opened(class_to_index=wanted)
            found = wanted
        self._adopt_classes(found)
        # A stream that is opened before the processes know of each other would not be shared among them.
        if not isinstance(dataset, IterableDataset):
            self._images[training] = dataset
        return dataset

    def _adopt_classes(self, found: dict[str, int] | None) -> None:
        """Take number and names of the classes from the images, or compare them with the configured ones."""
        data = self.config.data
        names = data.class_names or (None if found is None else sorted(found, key=found.__getitem__))
        count = data.num_classes or (None if names is None else len(names))
        if count == 1:
            raise InputError(f"the images have one class alone, {(names or ['of no name'])[0]!r}")
        if count is None:
            raise InputError(f"data.source={data.source} does not state its classes: give data.num_classes")
        has = count if found is None else max(found.values()) + 1
        if has != count or (names is not None and len(names) != count):
            given = (
                f"data.num_classes is {count}" if data.num_classes else f"data.class_names has {count} names"
            )
            raise InputError(f"{given}, but the images have {has} classes")
        update = {"num_classes": count, "class_names": names}
        self.config = self.config.model_copy(update={"data": data.model_copy(update=update)})

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def resolve_preprocessing(
    model: nn.Module, data: ClassificationData | None = None, channels: int | None = None
) -> dict[str, Any]:
    """How images become the input of a network, by timm's names.

    These are `input_size` `(C, H, W)`, `mean` and `std` per channel, `interpolation` and `crop_pct`.

    Args:
        model: what it states about itself holds where `data` says nothing.
        data: options of a run.
        channels: of the images; by default what the network was published with.
    """
    resolved = resolve_data_config(model=model)
    channels = channels or resolved["input_size"][0]
    resolved["input_size"] = (channels, *resolved["input_size"][1:])
    if data is not None:
        names = ("mean", "std", "interpolation", "crop_pct")
        resolved.update({name: getattr(data, name) for name in names if getattr(data, name) is not None})
        if data.image_size is not None:
            size = data.image_size
            resolved["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    for name in ("mean", "std"):
        values = resolved[name]
        if len(values) not in (1, channels) and channels != 1:
            raise InputError(f"data.{name} has {len(values)} values for images of {channels} channels")
        resolved[name] = (sum(values) / len(values),) * channels if len(values) != channels else tuple(values)
    return resolved


def check_image_size(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of what the network makes of one image `[C, H, W]` of this size.

    Raises:
        InputError: it does not run on it.
    """
    refused = f"{name} does not take images of {input_size[1]}x{input_size[2]}"
    kinds = (ValueError, RuntimeError, AssertionError, TypeError, LookupError, ArithmeticError)
    with evaluating(model), as_input_error(refused, *kinds):
        return tuple(getattr(model(torch.zeros(1, *input_size)), "shape", ()))


def classify(
    model: nn.Module,
    images: Sequence[Image],
    class_names: Sequence[str] | None = None,
    *,
    top: int | None = 5,
    preprocessing: dict[str, Any] | None = None,
) -> list[list[tuple[str, float]]]:
    """Name what images show.

    Args:
        model: a classification network.
        images: any sizes and modes; those that say so are turned upright.
        class_names: names of the classes; by default those that the network's weights brought, ImageNet's
            where it has its number of classes, else the numbers.
        top: how many names per image; None for all.
        preprocessing: from `resolve_preprocessing`, which is the default.

    Returns:
        For each image its `top` most probable classes as `(name, probability)`.
    """
    if not images:
        return []
    settings = preprocessing or resolve_preprocessing(model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    transform: Any = create_transform(**{name: settings[name] for name in names})
    mode = "L" if settings["input_size"][0] == 1 else "RGB"
    device, results = next(model.parameters()).device, []
    with evaluating(model):
        for image in images:
            logits = model(transform(as_rgb(image).convert(mode)).unsqueeze(0).to(device))[0].float()
            class_names = class_names or _known_names(model, len(logits))
            found = logits.softmax(0).topk(min(top or len(logits), len(logits)))
            best = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            results.append([(class_names[index], probability) for index, probability in best])
    return results


def _known_names(model: nn.Module, num_classes: int) -> list[str]:
    own: Any = getattr(model, "pretrained_cfg", {}).get("label_names") or ()
    if len(own) == num_classes:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [str(index) for index in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(num_classes)]
