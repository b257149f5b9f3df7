"""Restoring and enlarging image files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.data.degradations.resize import imresize
from visionattn.data.images import ImageError
from visionattn.data.pictures import Format, Picture, read_picture, write_picture
from visionattn.errors import InputError, as_input_error, one_line
from visionattn.inference.ensemble import self_ensemble
from visionattn.inference.memory import parse_bytes, run_within
from visionattn.inference.tiles import check_tiles, run_in_tiles
from visionattn.models import RestorationInfo

_ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class RestoreOptions:
    """How files are restored.

    Attributes:
        memory_budget: bytes for the network, as `run_within` takes them; None for as many as it takes.
        tile: side of tiles in pixels, None for the whole image. For most networks an approximation.
        tile_overlap: pixels around a tile that it sees.
        self_ensemble: the mean over all flips and transpositions, in eight times the time.
        half: in half precision, where the network's record says that it is safe.
        format: of the files.
        side_by_side: also write a picture of the input, enlarged by bicubic interpolation, beside the result.
    """

    memory_budget: str | int | None = None
    tile: int | None = None
    tile_overlap: int = 32
    self_ensemble: bool = False
    half: bool = False
    format: Format = "png"
    side_by_side: bool = False


def restore_files(
    model: nn.Module, files: Sequence[Path], output: Path, options: RestoreOptions | None = None
) -> Iterator[tuple[Path, Path | ImageError]]:
    """Restore or enlarge image files, one after the other.

    Colours go through the network; transparency is enlarged by bicubic interpolation. Grey images stay grey,
    those of 16 bits per channel keep them in PNG, and profile and EXIF data go along; the image is turned
    upright. How many grey images went through a network for colours is said on stderr.

    Args:
        model: a restoration network for RGB or grey images, in evaluation mode.
        files: image files.
        output: folder for the results, `NAME_x4.png` or, at the same size, `NAME_restored.png`.
        options: how.

    Yields:
        Each file with the file that was written, or with the error that says why it cannot be restored.

    Raises:
        InputError: the network or the options cannot do this, before any file is touched.
    """
    options = options or RestoreOptions()
    run, info = make_restorer(model, options), _image_network(model)
    suffix = f"_x{info.upscale}" if info.upscale > 1 else "_restored"
    grey = 0
    for file, name in name_results(files, suffix):
        written = output / f"{name}{_ENDINGS[options.format]}"
        try:
            picture = read_picture(file)
            grey += len(picture.color) < info.channels
            restored = restore_picture(run, info, picture)
            write_picture(restored, written, options.format)
            if options.side_by_side:
                write_picture(_side_by_side(picture, restored), output / f"{name}_side_by_side.png")
        except ImageError as error:
            yield file, error
        except (ValueError, torch.OutOfMemoryError, MemoryError) as error:
            yield file, ImageError(f"{file}: {one_line(error)}")
        else:
            yield file, written
    if grey:
        note = (
            f"note: {grey} grey images went through a network for colours; the mean of its channels was kept"
        )
        print(note, file=sys.stderr)


def name_results(files: Sequence[Path], suffix: str) -> Iterator[tuple[Path, str]]:
    """Files and names of their results without ending: the stem, or the whole name where others share it."""
    stems = Counter(file.stem for file in files)
    for file in files:
        yield file, (file.stem if stems[file.stem] == 1 else file.name) + suffix


def make_restorer(model: nn.Module, options: RestoreOptions) -> Callable[[Tensor], Tensor]:
    """The function from images `[B, C, H, W]` to restored ones that the options describe.

    Raises:
        InputError: options that do not go together, or that the network does not allow.
    """
    info, device = _image_network(model), next(model.parameters()).device
    run: Callable[[Tensor], Tensor] = model
    if options.memory_budget is not None:
        with as_input_error("memory budget", ValueError):
            run = partial(run_within, model, memory_budget=parse_bytes(options.memory_budget))
    if options.tile is not None:
        with as_input_error("tiles", ValueError):
            check_tiles(info, options.tile, options.tile_overlap)
        run = partial(run_in_tiles, run, info=info, tile=options.tile, overlap=options.tile_overlap)
    if options.self_ensemble:
        run = partial(self_ensemble, run)
    precision: Any = nullcontext()
    if options.half:
        if not (info.half_safe or info.bfloat16_safe):
            raise InputError("this network's record says that half precision is not safe")
        precision = torch.autocast(device.type, torch.float16 if info.half_safe else torch.bfloat16)

    def restore(x: Tensor) -> Tensor:
        with torch.no_grad(), precision:
            return run(x.to(device)).float().cpu()

    return restore


def restore_picture(run: Callable[[Tensor], Tensor], info: RestorationInfo, picture: Picture) -> Picture:
    """Restore a picture with a function from images `[B, C, H, W]` to images.

    A network for one channel restores those of a colour picture one by one; one for three channels sees a
    grey picture three times, and the mean of its answers counts.

    Raises:
        ValueError: the picture is too small.
    """
    color = picture.color
    if min(color.shape[1:]) < info.min_size:
        raise ValueError(
            f"{color.shape[1]}x{color.shape[2]} pixels are too small: {info.min_size} per side are needed"
        )
    if info.channels == 1:
        restored = torch.cat([run(channel[None, None])[0] for channel in color])
    else:
        restored = run(color.expand(3, -1, -1)[None])[0]
        restored = restored if len(color) == 3 else restored.mean(0, keepdim=True)
    alpha = picture.alpha
    if alpha is not None and info.upscale > 1:
        alpha = imresize(alpha, info.upscale)
    return Picture(restored, alpha, picture.bits, picture.profile, picture.exif)


def _image_network(model: nn.Module) -> RestorationInfo:
    info = getattr(model, "info", None)
    if not isinstance(info, RestorationInfo):
        raise InputError("the network does not restore images")
    if info.channels not in (1, 3) or info.out_channels not in (None, info.channels):
        raise InputError(
            f"the network turns {info.channels} channels into {info.out_channels or info.channels}, "
            "but image files have 1 or 3"
        )
    return info


def _side_by_side(picture: Picture, restored: Picture) -> Picture:
    """Input, enlarged by bicubic interpolation, and result; opaque, 8 bits."""
    color = picture.color
    if restored.color.shape != color.shape:
        color = imresize(color, restored.color.shape[1] // color.shape[1])
    return Picture(torch.cat((color, restored.color), 2), profile=picture.profile)
