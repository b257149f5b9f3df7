"""Pictures and numbers of what a super-resolution network looks at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from visionattn.data.decode import ImageError
from visionattn.data.degradations.resize import bicubic_low_resolution, to_uint8
from visionattn.data.images import read_image, to_pil
from visionattn.data.photographs import photograph_files
from visionattn.data.pictures import read_picture, write_png
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.files import check_folder, refuse_inputs, replacing
from visionattn.inference.attribution import Attribution, local_attribution
from visionattn.models import RestorationInfo
from visionattn.tasks.comparison import busiest_crop, draw_comparison

_RED = (215, 25, 28)


@dataclass(frozen=True)
class Explained:
    """The results for one image.

    Attributes:
        picture: the PNG file.
        numbers: the JSON file.
        attribution: the map and the diffusion index.
    """

    picture: Path
    numbers: Path
    attribution: Attribution


def explain_image(
    model: nn.Module,
    image: str,
    output: Path,
    *,
    place: tuple[int, int] | None = None,
    window: int = 16,
    context: int = 64,
) -> Explained:
    """Draw the local attribution map of a window, and write the diffusion index beside it.

    Args:
        model: a super-resolution network for RGB images, in evaluation mode.
        image: a file, which is the network's input, or the name of a built-in photograph, which is reduced to
            be one.
        output: folder for `NAME_lam.png` and `NAME_lam.json`.
        place: row and column of the middle of the window in the input; by default where the input has most
            detail.
        window: side of the window, in pixels of the output.
        context: side of the part of the input that the network is given, around the window.

    Raises:
        InputError: the network, the image or the window cannot be used.
    """
    info = getattr(model, "info", None)
    if not isinstance(info, RestorationInfo) or info.task != "super-resolution" or info.channels != 3:
        raise InputError("attribution is for super-resolution networks of RGB images")
    x = _read_input(image, info.upscale)
    side = min(context, *x.shape[1:])
    if side < info.min_size or window > side * info.upscale:
        raise InputError(
            f"a part of {side} pixels of {image} is too small: this network needs {info.min_size}, and a "
            f"window of {window} pixels of the output must lie in it"
        )
    cut, middle = _part(x, side, place)
    low = x[:, cut[0] : cut[0] + side, cut[1] : cut[1] + side]
    limit = side * info.upscale - window
    top, left = (min(max(int((m + 0.5) * info.upscale) - window // 2, 0), limit) for m in middle)
    low = low.to(next(model.parameters()).device)
    name = Path(image).stem
    files = output / f"{name}_lam.png", output / f"{name}_lam.json"
    check_folder(output)
    refuse_inputs(files, [Path(image)])
    with as_input_error(f"cannot explain {image}", ValueError):
        attribution = local_attribution(model, low, info.upscale, top, left, window)
    with torch.no_grad():
        high = model(low[None])[0]
    write_png(_draw(low.cpu(), high.cpu(), attribution, info.upscale), files[0])
    numbers = {
        "image": image,
        "diffusion_index": attribution.diffusion_index,
        "window": dict(zip(("top", "left", "side"), attribution.window)),
        "input": {"top": cut[0], "left": cut[1], "side": side},
        "upscale": info.upscale,
    }
    with replacing(files[1]) as beside:
        beside.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return Explained(*files, attribution)


def _read_input(image: str, upscale: int) -> Tensor:
    """`[3, H, W]` in [0, 1]."""
    if Path(image).is_file():
        with as_input_error("cannot read the image", ImageError):
            return read_picture(image).color.expand(3, -1, -1)
    with as_input_error("cannot use the photographs", FileNotFoundError, ModuleNotFoundError):
        photographs = {**photograph_files("train"), **photograph_files("validation")}
    if image not in photographs:
        raise InputError(f"there is no file and no photograph {image!r}: {nearest(image, photographs)}")
    truth = read_image(photographs[image])
    height, width = (n // upscale * upscale for n in truth.shape[1:])
    return bicubic_low_resolution(truth[:, :height, :width], upscale).float() / 255


def _part(x: Tensor, side: int, place: tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top and left of the part of an input around a place, and that place inside it."""
    if place is None:
        grey = x.mean(0)
        detail = torch.zeros_like(grey)
        detail[:-1, :-1] = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (grey[:-1, 1:] - grey[:-1, :-1]).abs()
        small = min(8, side)
        top, left = busiest_crop(detail, small, 1)
        place = top + small // 2, left + small // 2
    if not all(0 <= p < n for p, n in zip(place, x.shape[1:])):
        raise InputError(
            f"row {place[0]}, column {place[1]} are not in the input of {x.shape[1]}x{x.shape[2]}"
        )
    corner = [min(max(p - side // 2, 0), n - side) for p, n in zip(place, x.shape[1:])]
    return (corner[0], corner[1]), (place[0] - corner[0], place[1] - corner[1])


def _draw(low: Tensor, high: Tensor, attribution: Attribution, upscale: int) -> Image.Image:
    """The result with its window, the map, and the map over the input."""
    top, left, side = attribution.window
    result = to_uint8(high)
    framed = result.clone()
    red = torch.tensor(_RED, dtype=torch.uint8)[:, None]
    for rows, columns in (
        (top, slice(left, left + side)),
        (top + side - 1, slice(left, left + side)),
        (slice(top, top + side), left),
        (slice(top, top + side), left + side - 1),
    ):
        framed[:, rows, columns] = red
    # The share of single pixels is tiny beside the largest: its root can be seen.
    share = attribution.map.cpu().sqrt()[None]
    paper = 1 - share * (1 - torch.tensor(_RED)[:, None, None] / 255)
    grey = low.mean(0, keepdim=True).expand(3, -1, -1)
    over = grey * (1 - share) + torch.tensor(_RED)[:, None, None] / 255 * share
    panels = [
        (f"result x{upscale}, window of {side} pixels", framed),
        (f"attribution, diffusion index {attribution.diffusion_index:.1f}", to_uint8(paper)),
        ("over the input", to_uint8(over)),
    ]
    return draw_comparison([[(label, to_pil(image)) for label, image in panels]], side=320)
