"""Using a network on image files: names what they show, restores them, or draws what is found in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

from visionattn.data.images import ImageError, open_image
from visionattn.data.pictures import list_pictures
from visionattn.engine.config import ModelConfig
from visionattn.engine.network import check_network_name, create_network
from visionattn.errors import InputError, as_input_error
from visionattn.files import replacing
from visionattn.models.frames.restorer import RestorationInfo
from visionattn.predict.restoration import restore_files
from visionattn.tasks import create_task, load_trained_config
from visionattn.tasks.classification.task import ClassificationTask, classify


def predict_files(
    source: str,
    images: str | Path,
    *,
    checkpoint: str | None = None,
    output: str | Path = "predictions",
    top: int = 5,
) -> Iterator[tuple[Path, Path | list[tuple[str, float]] | ImageError]]:
    """What a network makes of an image file, or of each one in a folder, one after the other.

    Args:
        source: a registered network, a run folder or a configuration file.
        images: the file or folder.
        checkpoint: weights in place of the best of the run folder, or of the published ones.
        output: folder that restored images, or images with what was found in them, are written to, as PNG.
        top: how many names per image.

    Yields:
        Each file with the file that was written (restoration, detection, segmentation), or its most probable
        classes as `(name, probability)`, or the error that says why the image cannot be used.

    Raises:
        InputError: the network, the weights or the images do not exist.
    """
    files = find_pictures(images)
    model, find = _open(source, checkpoint, top)
    if find is None:
        yield from restore_files(model, files, Path(output))
        return
    stems = Counter(file.stem for file in files)
    for file in files:
        try:
            found = find(open_image(file))
        except ValueError as error:
            yield file, error if isinstance(error, ImageError) else ImageError(f"{file}: {error}")
            continue
        if isinstance(found, Image.Image):
            drawn = Path(output) / f"{file.stem if stems[file.stem] == 1 else file.name}_found.png"
            with replacing(drawn) as beside:
                found.save(beside, format="PNG")
            found = drawn
        yield file, found


def find_pictures(place: str | Path) -> list[Path]:
    """The image file, or those of a folder.

    Raises:
        InputError: there are none.
    """
    if not Path(place).exists():
        raise InputError(f"there is no image or folder {place}")
    with as_input_error("cannot read the images", FileNotFoundError):
        return list_pictures(place)


def open_restorer(source: str, checkpoint: str | None) -> nn.Module:
    """The restoration network of a name, run folder or configuration, on the best device, for inference.

    Raises:
        InputError: it does not exist, has no weights, or is not made for restoration.
    """
    model, find = _open(source, checkpoint, top=1)
    if find is not None:
        raise InputError(f"{source} does not restore images")
    return model


def _open(source: str, checkpoint: str | None, top: int) -> tuple[nn.Module, Callable[..., Any] | None]:
    """The network, and unless it restores images what it finds in one: names, or a picture."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    task: Any = None
    if Path(source).exists():
        task = create_task(load_trained_config(source, checkpoint=checkpoint)).to(device or "cpu").eval()
    model: nn.Module = _open_network(source, checkpoint) if task is None else task.model
    model.to(device or "cpu").eval()
    if isinstance(getattr(model, "info", None), RestorationInfo):
        return model, None
    if task is not None and hasattr(task, "draw"):
        return model, task.draw
    names = partial(task.predict, top=top) if isinstance(task, ClassificationTask) else None
    names = names or partial(classify, model, top=top)
    return model, lambda image: names([image])[0]


def _open_network(name: str, checkpoint: str | None) -> nn.Module:
    check_network_name(name)
    if checkpoint is None and not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no weights that can be downloaded: give --checkpoint FILE")
    with as_input_error(f"cannot get the published weights of {name}", OSError, RuntimeError):
        return create_network(ModelConfig(name=name, checkpoint=checkpoint, pretrained=checkpoint is None))
