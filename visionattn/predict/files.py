"""Use a network on image files: name what they show, restore them, or draw what is found in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from visionattn.checkpoints.reading import is_checkpoint
from visionattn.data.decode import ImageError
from visionattn.data.images import open_image
from visionattn.data.pictures import list_pictures, write_png
from visionattn.engine.config import ModelConfig
from visionattn.engine.network import check_network_name, check_weights, create_network, identify_weights
from visionattn.engine.run_folder import run_of
from visionattn.errors import InputError, as_input_error
from visionattn.models.frames.restorer import RestorationInfo
from visionattn.predict.restore import for_each_file, name_results, restore_files
from visionattn.tasks import create_task, load_trained_config
from visionattn.tasks.classification.task import classify


def predict_files(
    source: str,
    images: str | Path,
    *,
    checkpoint: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    output: str | Path = "predictions",
    top: int = 5,
) -> Iterator[tuple[Path, Path | list[tuple[str, float]] | ImageError]]:
    """Use a network on an image file, or on each one in a folder, one after the other.

    Args:
        source: a registered network, a run folder, a file of weights or a configuration file.
        images: the file or folder.
        checkpoint: weights in place of the best of the run folder, or of the published ones.
        arguments: of the network, where neither its name nor the weights tell them.
        output: folder that restored images, or images with what was found in them, are written to, as PNG.
        top: how many names per image.

    Yields:
        Each file with the file that was written (restoration, detection, segmentation), or its most probable
        classes as `(name, probability)`, or the error that says why the image cannot be used.

    Raises:
        InputError: the network, the weights or the images do not exist.
    """
    files = find_pictures(images)
    model, show, draws = _open(source, checkpoint, arguments)
    if _restores(model):
        yield from restore_files(model, files, Path(output))
        return

    def use(file: Path, target: Path | None) -> Path | list[tuple[str, float]]:
        shown = show(open_image(file))
        if target is None:
            return shown[:top]
        write_png(shown, target)
        return target

    # Names are printed: they need no place.
    targets = name_results(files, Path(output), "_found", ".png") if draws else dict.fromkeys(files)
    yield from for_each_file(use, targets, "give smaller images")


def find_pictures(place: str | Path) -> list[Path]:
    """The image file, or those of a folder.

    Raises:
        InputError: there are none.
    """
    if not Path(place).exists():
        raise InputError(f"there is no image or folder {place}")
    with as_input_error("cannot read the images", FileNotFoundError):
        return list_pictures(place)


def open_restorer(
    source: str, checkpoint: str | None, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """The restoration network of a name, run, file or configuration, on the best device, for inference.

    Raises:
        InputError: it does not exist, has no weights, or is not made for restoration.
    """
    model, *_ = _open(source, checkpoint, arguments)
    if not _restores(model):
        raise InputError(f"{source} does not restore images")
    return model


def _open(
    source: str, checkpoint: str | None, arguments: Mapping[str, Any] | None
) -> tuple[nn.Module, Callable[[Image.Image], Any], bool]:
    """A network on the best device, for inference, what shows a user its answer, and whether by a picture."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    alone = is_checkpoint(source) and run_of(Path(source)) is None
    if Path(source).exists() and not alone:
        if arguments:
            raise InputError(
                f"{source} states the arguments of its network: {', '.join(arguments)} is too much"
            )
        task = create_task(load_trained_config(source, checkpoint=checkpoint)).to(device).eval()
        return task.model, task.show, task.draws
    if alone and checkpoint is not None:
        raise InputError(f"{source} and --checkpoint {checkpoint} are both weights: give one of them")
    model = _open_network(source, checkpoint, arguments, alone).to(device).eval()
    return model, lambda image: classify(model, [image], top=None)[0], False


def _restores(model: nn.Module) -> bool:
    return isinstance(getattr(model, "info", None), RestorationInfo)


def _open_network(
    source: str, checkpoint: str | None, arguments: Mapping[str, Any] | None, alone: bool
) -> nn.Module:
    """The network of weights that stand alone, or of a name."""
    if alone:
        return create_network(identify_weights(source, None, arguments))
    check_network_name(source)
    check_weights(source, checkpoint)
    if checkpoint is not None:
        return create_network(identify_weights(checkpoint, source, arguments))
    with as_input_error(f"cannot get the published weights of {source}", OSError, RuntimeError):
        return create_network(ModelConfig(name=source, kwargs=dict(arguments or {}), pretrained=True))
