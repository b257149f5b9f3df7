"""Restoring and enlarging image files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.data.decode import ImageError
from visionattn.data.degradations.resize import imresize
from visionattn.data.pictures import Format, Picture, check_format, read_picture, write_picture
from visionattn.errors import InputError, WriteError, as_input_error, is_out_of_memory, one_line
from visionattn.files import check_folder, refuse_inputs, unique_stems, why_unwritable
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
    targets = name_results(files, output, suffix, _ENDINGS[options.format])

    def restore(file: Path, target: Path) -> Path:
        nonlocal grey
        picture = read_picture(file)
        grey += len(picture.color) < info.channels
        height, width = (info.upscale * side for side in picture.color.shape[1:])
        check_format(target, options.format, height, width, picture.alpha is not None)
        restored = restore_picture(run, info, picture)
        write_picture(restored, target, options.format)
        if options.side_by_side:
            beside = target.with_name(f"{target.stem}_side_by_side.png")
            write_picture(_side_by_side(picture, restored), beside)
        return target

    budget = "lower" if options.memory_budget is not None else "set"
    hint = f"{budget} the memory budget (--memory-budget 2GB), which gives the same result in less memory"
    yield from for_each_file(restore, targets, hint)
    if grey:
        note = (
            f"note: {grey} grey images went through a network for colours; the mean of its channels was kept"
        )
        print(note, file=sys.stderr)


def name_results(files: Sequence[Path], output: Path, suffix: str, ending: str) -> dict[Path, Path]:
    """Files and the places of their results in `output`, all decided and allowed before work starts.

    Raises:
        InputError: there is no writing to `output`, or a result would replace one of the files.
    """
    check_folder(output)
    names = unique_stems(files)
    targets = {file: output / f"{name}{suffix}{ending}" for file, name in zip(files, names, strict=True)}
    refuse_inputs(targets.values(), files)
    return targets


def for_each_file(
    use: Callable[[Path, Any], Any], targets: Mapping[Path, Path | None], hint: str
) -> Iterator[tuple[Path, Any]]:
    """Use files one after the other; of one that cannot be used, the reason is its answer, and work goes on.

    Args:
        use: of a file and the place of its result.
        targets: files, and the places of their results, None where nothing is written.
        hint: what to do where memory runs out.

    Yields:
        Each file with what `use` returned, or with the `ImageError` that says why it did not.

    Raises:
        RunError: the disk is full.
    """
    for file, target in targets.items():
        reason = None if target is None else why_unwritable(target)
        answer: Any = None if reason is None else ImageError(f"{file}: cannot write its result: {reason}")
        if answer is None:
            # The errors themselves are not kept: their tracebacks hold the tensors of the network.
            try:
                answer = use(file, target)
            except (ImageError, WriteError) as error:
                text = str(error)
                answer = ImageError(text if str(file) in text else f"{file}: {text}")
            except (ValueError, FileNotFoundError) as error:
                answer = ImageError(f"{file}: {one_line(error)}")
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                answer = ImageError(f"{file}: memory ran out; {hint}")
        yield file, answer


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
