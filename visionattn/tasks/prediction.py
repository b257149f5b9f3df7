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

from visionattn.data.images import ImageError, list_images, open_image
from visionattn.engine.config import ModelConfig
from visionattn.engine.errors import InputError, as_input_error
from visionattn.engine.network import check_network_name, create_network
from visionattn.engine.run_folder import replacing
from visionattn.models._restoration import RestorationInfo
from visionattn.tasks import create_task, load_trained_config
from visionattn.tasks.classification import ClassificationTask, classify
from visionattn.tasks.restoration import restore


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
    if not Path(images).exists():
        raise InputError(f"there is no image or folder {images}")
    with as_input_error("cannot read the images", FileNotFoundError):
        files = [Path(images)] if Path(images).is_file() else list_images(images)
    predict, suffix = _open(source, checkpoint, top)
    stems = Counter(file.stem for file in files)
    for file in files:
        try:
            result = predict(open_image(file))
        except ValueError as error:
            yield file, error if isinstance(error, ImageError) else ImageError(f"{file}: {error}")
            continue
        if isinstance(result, Image.Image):
            name = file.stem if stems[file.stem] == 1 else file.name
            written = Path(output) / f"{name}_{suffix}.png"
            with replacing(written) as beside:
                result.save(beside, format="PNG")
            result = written
        yield file, result


def _open(source: str, checkpoint: str | None, top: int) -> tuple[Callable[[Image.Image], Any], str]:
    """The prediction of one image, and what is added to its name if the prediction is an image."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if Path(source).exists():
        task: Any = create_task(load_trained_config(source, checkpoint=checkpoint)).to(device or "cpu").eval()
        if hasattr(task, "draw"):
            return task.draw, task.config.task
        model = task.model
        names = partial(task.predict, top=top) if isinstance(task, ClassificationTask) else None
    else:
        model, names = _open_network(source, checkpoint), None
    model.to(device or "cpu").eval()
    info = getattr(model, "info", None)
    if isinstance(info, RestorationInfo):
        return partial(restore, model), f"x{info.upscale}"
    names = names or partial(classify, model, top=top)
    return lambda image: names([image])[0], ""


def _open_network(name: str, checkpoint: str | None) -> nn.Module:
    check_network_name(name)
    if checkpoint is None and not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no weights that can be downloaded: give --checkpoint FILE")
    with as_input_error(f"cannot get the published weights of {name}", OSError, RuntimeError):
        return create_network(ModelConfig(name=name, checkpoint=checkpoint, pretrained=checkpoint is None))
