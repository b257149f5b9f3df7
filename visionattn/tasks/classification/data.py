"""Opens images with labels from wherever timm reads them, and checks them before a run depends on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, PositiveFloat, model_validator
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from visionattn.data.decode import ImageError, as_rgb
from visionattn.data.digits import Digits
from visionattn.data.images import open_image
from visionattn.engine.config import Section, UniqueNames
from visionattn.errors import InputError, as_input_error, nearest, one_line
from visionattn.tasks.broken import find_broken, refuse_or_skip

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
_TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")


class LabelledImages(Dataset):
    """Images and classes of a reader of timm, read as pictures are everywhere here.

    Args:
        reader: gives open files and classes.
        image_mode: `"L"` for one channel, `"RGB"` for three.
    """

    def __init__(self, reader: Any, image_mode: Literal["L", "RGB"]) -> None:
        self.reader, self.image_mode = reader, image_mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, target, *_ = self.reader[index]
        with file:
            image = open_image(getattr(file, "name", f"image {index}"), file).convert(self.image_mode)
        return image if self.transform is None else self.transform(image), -1 if target is None else target


class ClassificationData(Section):
    """Where the images are and how they are prepared."""

    source: str = Field(
        default="folder",
        description="digits (built in), folder (of folders or tar files), or what timm reads: "
        "hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME, torch/NAME",
    )
    root: str | None = Field(default=None, description="folder of the data, or of its cache")
    train_split: str = Field(default="train", description="split, or folder or tar file in root")
    eval_split: str = Field(default="validation", description="the same for the held-out images")
    kwargs: dict[str, Any] = Field(default={}, description="further arguments of timm's create_dataset")
    num_classes: int | None = Field(default=None, gt=1, description="null: as many as the data has")
    class_names: UniqueNames | None = Field(default=None, description="null: the data's own names")
    image_size: int | tuple[int, int] | None = Field(
        default=None, description="pixels, one side or [height, width]; null: the network's own"
    )
    mean: tuple[float, ...] | None = Field(
        default=None, description="of [0, 1] pixels; null: the network's own"
    )
    std: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="of [0, 1] pixels; null: the network's own"
    )
    interpolation: str | None = Field(default=None, description="of resizing; null: the network's own")
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="side of the evaluation crop / resized side; null: the network's own",
    )
    broken_images: Literal["error", "skip"] = Field(
        default="error", description="on images of a folder that cannot be read, found before training"
    )
    check_images: int = Field(
        default=10_000, ge=0, description="files per split that are read for this, evenly chosen from more"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ClassificationData:
        if self.source == "digits":
            names = ("root", "train_split", "eval_split", "kwargs")
            self.refuse_changed(names, "source=digits is built in; source=folder takes images from root")
        return self


def open_images(
    data: ClassificationData,
    training: bool,
    *,
    image_mode: Literal["L", "RGB"],
    batch_size: int,
    seed: int,
    class_to_index: dict[str, int] | None = None,
) -> Dataset:
    """The training or the held-out images.

    Args:
        data: where they are.
        training: which of the two.
        image_mode: `"L"` for one channel, `"RGB"` for three.
        batch_size: a hint for sources that stream.
        seed: of the shuffling of sources that stream.
        class_to_index: indices of the classes of a folder, where they shall not follow from its order.

    Raises:
        InputError: there is no such source, or it cannot be opened.
    """
    if data.source == "digits":
        with as_input_error("cannot open data.source=digits", ModuleNotFoundError):
            return Digits("train" if training else "validation", image_mode=image_mode)
    split = data.train_split if training else data.eval_split
    # Other streams than tfds hand images out as they are, so that they are turned and converted here.
    mode = image_mode if data.source.startswith("tfds/") else ""
    kwargs = {"is_training": training, "batch_size": batch_size, "seed": seed, "input_img_mode": mode}
    name, root = data.source, data.root
    if data.source == "folder":
        root, name = str(_find_split(data.root, split)), ""
        kwargs.update(search_split=False, class_map=class_to_index)
    elif not data.source.startswith(_TIMM_PREFIXES):
        raise InputError(f"unknown data.source {data.source!r}: {nearest(data.source, _source_names())}")
    elif (
        data.root is not None
        and not data.source.startswith(("hfds/", "hfids/"))
        and not Path(data.root).exists()
    ):
        raise InputError(f"there is no data.root {data.root}")
    kinds = (ImportError, OSError, ValueError, TypeError, RuntimeError, AssertionError)
    with as_input_error(f"cannot open the {split} images of data.source={data.source}", *kinds):
        dataset: Any = create_dataset(name, root=root, split=split, **{**kwargs, **data.kwargs})
    if isinstance(dataset, ImageDataset):
        dataset = LabelledImages(dataset.reader, image_mode)
    elif isinstance(dataset, DatasetFolder):
        dataset.loader = open_image
    _leave_out_hidden(getattr(dataset, "reader", dataset))
    return dataset


def _leave_out_hidden(holder: Any) -> None:
    """Take hidden files and folders out of the images of a folder, and the classes that they made.

    Raises:
        InputError: an image stands in no folder of a class, or nothing is left.
    """
    if not isinstance(holder, (ReaderImageFolder, DatasetFolder)):
        return
    places = [Path(path).relative_to(holder.root) for path, _ in holder.samples]
    shown = [not any(part.startswith(".") for part in place.parts) for place in places]
    if stray := [place for place, visible in zip(places, shown) if visible and len(place.parts) == 1]:
        raise InputError(f"{Path(holder.root) / stray[0]} stands in no folder of a class")
    if all(shown):
        return
    samples = [sample for sample, visible in zip(holder.samples, shown) if visible]
    if not samples:
        raise InputError(f"{holder.root} holds no images but hidden ones")
    used = {target for _, target in samples}
    names = sorted(holder.class_to_idx, key=holder.class_to_idx.__getitem__)
    kept = [name for name in names if holder.class_to_idx[name] in used or not name.startswith(".")]
    holder.samples = [(path, kept.index(names[target])) for path, target in samples]
    holder.class_to_idx = {name: index for index, name in enumerate(kept)}


def class_indices(dataset: Dataset) -> dict[str, int] | None:
    """Class names and their indices as the source states them, None where it does not."""
    if isinstance(dataset, Digits):
        return {name: index for index, name in enumerate(dataset.class_names)}
    holder = getattr(dataset, "reader", dataset)
    # timm's readers of folders and of tar files use different names.
    return getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None) or None


def remove_broken_images(dataset: Dataset, data: ClassificationData) -> None:
    """Read the files of a folder and deal with those that cannot be read as `data.broken_images` says.

    Every process reads its share; all of them must call it. Sources other than folders are left alone.

    Raises:
        InputError: there are such files, and they shall not be skipped, or nothing else is left.
    """
    reader = getattr(dataset, "reader", dataset)
    if not isinstance(reader, (ReaderImageFolder, DatasetFolder)) or not data.check_images:
        return
    checked = reader.samples[:: -(-len(reader.samples) // data.check_images)]
    broken = find_broken(len(checked), lambda index: _why_broken(checked[index][0]))
    total, choice = len(checked), data.broken_images
    refuse_or_skip(broken.values(), total, "images cannot be read", "data.broken_images", choice)
    gone = {checked[index][0] for index in broken}
    reader.samples = [sample for sample in reader.samples if sample[0] not in gone]


def _why_broken(path: str) -> str | None:
    try:
        open_image(path)
    except (ImageError, FileNotFoundError) as error:
        return one_line(error)
    return None


def _find_split(root: str | None, split: str) -> Path:
    if root is None:
        raise InputError(
            "data.source=folder needs data.root, the folder that holds the training and held-out images"
        )
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} (data.root)")
    names = next((synonyms for synonyms in _SPLITS.values() if split in synonyms), (split,))
    candidates = [folder / f"{name}{ending}" for name in (split, *names) for ending in ("", ".tar")]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    # timm would fall back to the whole folder, and so judge on the training images.
    if found is None:
        here = sorted(entry.name for entry in folder.iterdir())[:5]
        raise InputError(
            f"{folder} has no {split} folder or tar file (it has {', '.join(here) or 'nothing'})"
        )
    return found


def _source_names() -> list[str]:
    return ["digits", "folder", *(f"{prefix}NAME" for prefix in _TIMM_PREFIXES)]


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return as_rgb(image).convert(mode)


def to_image_mode(mode: str) -> partial[Image.Image]:
    """A transform to an upright image of a PIL mode, for sources that hand images out as they are."""
    return partial(_convert, mode=mode)
