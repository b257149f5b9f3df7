"""Images of detection and segmentation: where they are, checks before a run, and samples of a loader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveFloat, model_validator
from torch.utils.data import Dataset

from visionattn.data.scenes import SceneOptions, scenes_folder
from visionattn.engine.config import Section, UniqueNames
from visionattn.errors import InputError, as_input_error
from visionattn.tasks.broken import find_broken, refuse_or_skip
from visionattn.tasks.dense.transforms import plain


class DenseData(Section):
    """The images, and where they are."""

    root: str | None = Field(
        default=None, description="folder of the data; of scenes, where they are written, null being a cache"
    )
    scenes: dict[str, Any] = Field(default={}, description="what built-in scenes look like: SceneOptions")
    class_names: UniqueNames | None = Field(default=None, description="null: the data's own names")
    mean: tuple[float, float, float] | None = Field(
        default=None, description="of [0, 1] pixels; null: the network's own"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="of [0, 1] pixels; null: the network's own"
    )
    broken: Literal["error", "skip"] = Field(
        default="error", description="on images and annotations that cannot be used, found before training"
    )
    check_images: int = Field(
        default=10_000, ge=0, description="images per split that are read for this, evenly chosen from more"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> DenseData:
        if getattr(self, "source", None) == "scenes":
            places = [name for name in type(self).model_fields if name.startswith(("train_", "eval_"))]
            self.refuse_changed(places, "source=scenes is built in and has places of its own")
        return self


class DenseImages(Protocol):
    """A dataset of images and of what is to be found in them, which knows those that cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...

    def path(self, index: int) -> Path:
        """The file of an image."""
        ...

    def why_broken(self, index: int, read: bool = True) -> str | None:
        """The reason, or None."""
        ...

    def remove_images(self, indices: Sequence[int]) -> None:
        """Leave images out."""
        ...


class Augmented(Dataset):
    """Samples after a transform of image and target, as plain tensors."""

    def __init__(self, images: DenseImages, transform: Callable[..., Any] | None = None) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.images[index]
        if self.transform is not None:
            image, target = self.transform(image, target)
        return plain(image), plain(target)


def find_split(data: Any, training: bool, targets: str, scenes: str) -> tuple[Path, Path]:
    """Where the images of one side of the split lie, and what is to be found in them.

    Args:
        data: the `DenseData` of a task, which has the options `train_images`, `eval_images`, and the same for
            its targets.
        training: which side.
        targets: the name of its targets in the options: `labels` for `train_labels` and `eval_labels`.
        scenes: the place of the targets in the folder of the built-in scenes, {} being the side of the split.

    Raises:
        InputError: `data.root` is missing, or the scenes cannot be made.
    """
    if data.source == "scenes":
        root, split = scenes_root(data), "train" if training else "validation"
        return root / f"images/{split}", root / scenes.format(split)
    if data.root is None:
        raise InputError(f"data.source={data.source} needs data.root, the folder of images and {targets}")
    root, split = Path(data.root), "train" if training else "eval"
    return root / getattr(data, f"{split}_images"), root / getattr(data, f"{split}_{targets}")


def scenes_root(data: DenseData) -> Path:
    """The folder of the built-in scenes that a configuration asks for.

    Raises:
        InputError: there are no such options, or `data.root` holds something else.
    """
    kinds = (TypeError, ValueError, ModuleNotFoundError, OSError)
    with as_input_error(f"cannot make data.source=scenes with data.scenes {data.scenes}", *kinds):
        return scenes_folder(data.root, SceneOptions(**data.scenes))


def remove_broken_images(dataset: DenseImages, data: DenseData) -> None:
    """Read images and annotations, and deal with those that cannot be used as `data.broken` says.

    Every process reads its share; all of them must call it.

    Raises:
        InputError: there are such images, and they shall not be skipped, or nothing else is left.
    """
    total = len(dataset)
    every = math.ceil(total / data.check_images) if data.check_images else total + 1
    broken = find_broken(total, lambda index: dataset.why_broken(index, read=index % every == 0))
    refuse_or_skip(broken.values(), total, "images cannot be used", "data.broken", data.broken)
    dataset.remove_images(list(broken))
