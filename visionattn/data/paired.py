"""Paired images for restoration: a low-quality input beside the truth, whole or as aligned random crops.

Folders follow the layout of BasicSR: the truth is `0001.png`, and its input has that stem put through a
template (`{}x4` gives `0001x4.png`). Where there are no inputs, they are made from the truth as those of the
benchmarks are: by MATLAB's bicubic reduction, rounded to 8 bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.degradations import bicubic_low_resolution, modcrop
from visionattn.data.images import ImageError, list_images, read_image

_SHOWN_PROBLEMS = 3


class Pair(TypedDict):
    """One sample: `lq` `[3, h, w]`, `gt` `[3, h * upscale, w * upscale]`, both RGB in [0, 1], and a name."""

    lq: Tensor
    gt: Tensor
    name: str


class PairedImages(Dataset):
    """Whole images with their low-quality inputs, read at the start to be sure of them.

    Args:
        gt_files: the true images, by name. A remainder of the division by `upscale` is cut off.
        upscale: side of the truth / side of the input.
        lq_files: the inputs by the same names; made by bicubic reduction where not given.
        min_side: smallest side of an input in pixels.
        broken_images: what a damaged, too small or ill-matched image does: end with an error, or be left out.
        check_images: how many images are read at the start, evenly chosen where there are more.
        in_memory: keep the decoded images instead of reading a file for every sample.

    Attributes:
        skipped: reasons why images were left out, by name.

    Raises:
        ImageError: images cannot be used; the message counts them and gives names and reasons.
    """

    def __init__(
        self,
        gt_files: Mapping[str, Path],
        upscale: int,
        lq_files: Mapping[str, Path] | None = None,
        *,
        min_side: int = 1,
        broken_images: Literal["error", "skip"] = "error",
        check_images: int = 10_000,
        in_memory: bool = False,
    ) -> None:
        self.upscale, self._min_side = upscale, min_side
        self._gt_files, self._lq_files = gt_files, lq_files
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        self.skipped: dict[str, str] = {}
        names = list(gt_files)
        checked = names if in_memory else _evenly(names, check_images)
        # Decoders release the interpreter lock, so threads share this work.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, outcome in zip(checked, pool.map(self._check, checked), strict=True):
                if isinstance(outcome, str):
                    self.skipped[name] = outcome
                elif in_memory:
                    self._memory[name] = self._with_input(*outcome)
        self.names = [name for name in names if name not in self.skipped]
        if self.skipped and (broken_images == "error" or not self.names):
            raise ImageError(_describe(self.skipped, len(checked)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        lq, gt = self._with_input(*self._read(self.names[index]))
        return {"lq": lq.float() / 255, "gt": gt.float() / 255, "name": self.names[index]}

    def random_crop(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """A random crop of image `index`, drawn by torch's generator.

        Args:
            index: which image.
            size: side of the input's crop in pixels.

        Returns:
            uint8 `[3, size, size]` and `[3, size * upscale, size * upscale]`.
        """
        lq, gt = self._read(self.names[index])
        k = self.upscale
        height, width = gt.shape[-2] // k, gt.shape[-1] // k
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        if lq is None:
            # The reduction of the crop with two more input pixels around it equals the crop of the reduction:
            # that is as far as the kernel reaches, and at the borders of the image both mirror.
            y, x = max(top - 2, 0), max(left - 2, 0)
            lq = bicubic_low_resolution(gt[:, y * k : (top + size + 2) * k, x * k : (left + size + 2) * k], k)
            lq = lq[:, top - y : top - y + size, left - x : left - x + size]
        else:
            lq = lq[:, top : top + size, left : left + size]
        return lq, gt[:, top * k : (top + size) * k, left * k : (left + size) * k]

    def _read(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Input (None where it is yet to be made) and truth as uint8, checked against each other."""
        if name in self._memory:
            return self._memory[name]
        k, path = self.upscale, self._gt_files[name]
        gt = read_image(path)
        lq = None if self._lq_files is None else read_image(self._lq_files[name])
        height, width = (side // k for side in gt.shape[-2:])
        if min(height, width) < self._min_side:
            need = self._min_side * k
            raise ImageError(
                f"{path}: {gt.shape[1]}x{gt.shape[2]} pixels, but each side must have at least {need}"
            )
        if lq is not None and lq.shape[-2:] != (height, width):
            raise ImageError(
                f"{path}: {gt.shape[1]}x{gt.shape[2]} pixels, which is not {k} times "
                f"the {lq.shape[1]}x{lq.shape[2]} of its input"
            )
        return lq, modcrop(gt, k)

    def _with_input(self, lq: Tensor | None, gt: Tensor) -> tuple[Tensor, Tensor]:
        return bicubic_low_resolution(gt, self.upscale) if lq is None else lq, gt

    def _check(self, name: str) -> tuple[Tensor | None, Tensor] | str:
        try:
            return self._read(name)
        except ImageError as error:
            return str(error)


class TrainingCrops(Dataset):
    """Aligned random crops of paired images, flipped and transposed with a probability of one half each.

    All chance comes from torch's generator, so that whoever seeds it decides the sample.

    Args:
        images: where the crops are cut.
        patch_size: side of the input's crop in pixels.
        repeat: crops per image and epoch.
        permute_colors: also put the colour channels in random order, for sets of few images and few colours.
    """

    def __init__(
        self, images: PairedImages, patch_size: int, repeat: int = 1, permute_colors: bool = False
    ) -> None:
        self.images, self.patch_size = images, patch_size
        self.repeat, self.permute_colors = repeat, permute_colors

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, index: int) -> Pair:
        index %= len(self.images)
        lq, gt = (crop.float() / 255 for crop in self.images.random_crop(index, self.patch_size))
        horizontal, vertical, transposed = (torch.rand(3) < 0.5).tolist()
        dims = [dim for dim, flip in ((-1, horizontal), (-2, vertical)) if flip]
        lq, gt = lq.flip(dims), gt.flip(dims)
        if transposed:
            lq, gt = lq.transpose(-1, -2), gt.transpose(-1, -2)
        if self.permute_colors:
            order = torch.randperm(3)
            lq, gt = lq[order], gt[order]
        return {"lq": lq.contiguous(), "gt": gt.contiguous(), "name": self.images.names[index]}


def folder_files(
    gt_folder: str | Path, lq_folder: str | Path | None = None, template: str = "{}"
) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """The true images of a folder and their inputs in another, by the stem of the truth.

    Args:
        gt_folder: the true images.
        lq_folder: the inputs, if there are any.
        template: stem of an input with `{}` for the stem of its truth, for instance `{}x4`.

    Raises:
        FileNotFoundError: a folder is missing or empty, or true images have no input.
        ValueError: the template has no `{}`, or two images of one folder have the same stem.
    """
    gt_files = _by_stem(gt_folder)
    if lq_folder is None:
        return gt_files, None
    if "{}" not in template:
        raise ValueError(f"the template of the inputs must hold {{}}, as in {{}}x4, but is {template!r}")
    available = _by_stem(lq_folder)
    stems = {name: template.replace("{}", name) for name in gt_files}
    missing = [stem for stem in stems.values() if stem not in available]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(stems)} images in {gt_folder} have no input in {lq_folder}: "
            f"{_enumerate(missing)} (template {template!r})"
        )
    return gt_files, {name: available[stem] for name, stem in stems.items()}


def _by_stem(folder: str | Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in list_images(folder):
        if file.stem in files:
            raise ValueError(f"two images share a name: {files[file.stem]} and {file}")
        files[file.stem] = file
    return files


def _evenly(names: list[str], count: int) -> list[str]:
    return names[:: math.ceil(len(names) / count)] if count else []


def _describe(problems: Mapping[str, str], total: int) -> str:
    return f"{len(problems)} of {total} images cannot be used: {_enumerate(list(problems.values()))}"


def _enumerate(items: list[str]) -> str:
    more = len(items) - _SHOWN_PROBLEMS
    return "; ".join([*items[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])
