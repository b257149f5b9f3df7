"""Paired images for restoration: a low-quality input beside the truth, whole or as aligned random crops.

Inputs are stored beside their truths (`files.pair_files`), or made from them: by a `Degradation`, or as those
of the super-resolution benchmarks are, by MATLAB's bicubic reduction, rounded to 8 bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypedDict

import torch
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.decode import ImageError
from visionattn.data.degradations.pipeline import Degradation
from visionattn.data.degradations.resize import bicubic_low_resolution, modcrop
from visionattn.data.files import ImageSource, read_depth, read_planes, shorten

# Benchmarks cut their truths to multiples of 12 pixels before they reduce them.
_LARGEST_REMAINDER = 12


class Pair(TypedDict):
    """One sample: `lq` `[C, h, w]`, `gt` `[C, h * upscale, w * upscale]`, float32 in [0, 1], and a name."""

    lq: Tensor
    gt: Tensor
    name: str


class PairedImages(Dataset):
    """Whole images with their low-quality inputs, read at the start to be sure of them.

    Args:
        gt_files: the true images, by name. A remainder of the division by `upscale` is cut off.
        upscale: side of the truth / side of the input.
        lq_files: the inputs by the same names; made by bicubic reduction where not given.
        degradation: makes the inputs from the truths; `lq_files`, if given, are then their depth maps. Whole
            images are degraded with the random numbers of seed 0, every one with the same, as is usual.
        channels: channels of the inputs and of the truths.
        cut: what is left of a truth that is larger than its input says: its top left or its centre.
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
        gt_files: Mapping[str, ImageSource],
        upscale: int,
        lq_files: Mapping[str, ImageSource] | None = None,
        *,
        degradation: Degradation | None = None,
        channels: tuple[int, int] = (3, 3),
        cut: Literal["corner", "centre"] = "corner",
        min_side: int = 1,
        broken_images: Literal["error", "skip"] = "error",
        check_images: int = 10_000,
        in_memory: bool = False,
    ) -> None:
        self.upscale, self.degradation = upscale, degradation
        self._channels, self._cut, self._min_side = channels, cut, min_side
        self._gt_files, self._lq_files = gt_files, lq_files
        self._memory: dict[str, tuple[Tensor | None, Tensor]] = {}
        self.skipped: dict[str, str] = {}
        names = list(gt_files)
        checked = names if in_memory else _evenly(names, check_images)
        # Decoders release the interpreter lock, so threads share this work.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, outcome in zip(checked, pool.map(self._check, checked), strict=True):
                if isinstance(outcome, str):
                    self.skipped[name] = outcome
                elif in_memory:
                    self._memory[name] = outcome if degradation else self._with_input(*outcome)
        self.names = [name for name in names if name not in self.skipped]
        if self.skipped and (broken_images == "error" or not self.names):
            problems = shorten(list(self.skipped.values()))
            raise ImageError(f"{len(self.skipped)} of {len(checked)} images cannot be used: {problems}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        companion, gt = self._read(self.names[index])
        truth = to_float(gt)
        if self.degradation is not None:
            lq = self.degradation(truth, RandomState(0), companion)
        else:
            lq = to_float(self._with_input(companion, gt)[0])
        return {"lq": lq, "gt": truth, "name": self.names[index]}

    def random_crop(self, index: int, size: int) -> tuple[Tensor | None, Tensor]:
        """A random crop of image `index`, drawn by torch's generator.

        Args:
            index: which image.
            size: side of the input's crop in pixels.

        Returns:
            The input `[C, size, size]` and the truth `[C, size * upscale, size * upscale]`, as they are
            stored: uint8, or float32 from cubes. Where there is a degradation, depth (or None) and truth.
        """
        lq, gt = self._read(self.names[index])
        k = self.upscale
        height, width = gt.shape[-2] // k, gt.shape[-1] // k
        top = int(torch.randint(height - size + 1, ()))
        left = int(torch.randint(width - size + 1, ()))
        if lq is not None:
            lq = lq[:, top : top + size, left : left + size]
        elif self.degradation is None:
            # The reduction of the crop with two more input pixels around it equals the crop of the reduction:
            # that is as far as the kernel reaches, and at the borders of the image both mirror.
            y, x = max(top - 2, 0), max(left - 2, 0)
            lq = bicubic_low_resolution(gt[:, y * k : (top + size + 2) * k, x * k : (left + size + 2) * k], k)
            lq = lq[:, top - y : top - y + size, left - x : left - x + size]
        return lq, gt[:, top * k : (top + size) * k, left * k : (left + size) * k]

    def _read(self, name: str) -> tuple[Tensor | None, Tensor]:
        """Input or depth (None where there is none) and truth, checked against each other."""
        if name in self._memory:
            return self._memory[name]
        k, source = self.upscale, self._gt_files[name]
        gt = read_planes(source, self._channels[1])
        companion = None
        if self._lq_files is not None:
            companion = (
                read_planes(self._lq_files[name], self._channels[0], "input")
                if self.degradation is None
                else read_depth(self._lq_files[name])
            )
        gt = modcrop(gt, k) if companion is None else self._cut_truth(gt, companion, source)
        if min(gt.shape[-2:]) < self._min_side * k:
            need = self._min_side * k
            raise ImageError(
                f"{source}: {gt.shape[1]}x{gt.shape[2]} pixels, but each side must have at least {need}"
            )
        return companion, gt

    def _cut_truth(self, gt: Tensor, companion: Tensor, source: ImageSource) -> Tensor:
        """The part of a truth that belongs to its input."""
        k = self.upscale
        (height, width), (of_height, of_width) = companion.shape[-2:], gt.shape[-2:]
        spare = (of_height - height * k, of_width - width * k)
        if min(spare) < 0 or (self._cut == "corner" and max(spare) >= max(_LARGEST_REMAINDER, k)):
            raise ImageError(
                f"{source}: {of_height}x{of_width} pixels, which is not {k} times "
                f"the {height}x{width} of its input"
            )
        top, left = (side // 2 if self._cut == "centre" else 0 for side in spare)
        return gt[:, top : top + height * k, left : left + width * k]

    def _with_input(self, lq: Tensor | None, gt: Tensor) -> tuple[Tensor, Tensor]:
        return bicubic_low_resolution(gt, self.upscale) if lq is None else lq, gt

    def _check(self, name: str) -> tuple[Tensor | None, Tensor] | str:
        try:
            return self._read(name)
        except (ImageError, FileNotFoundError) as error:
            return str(error)


class TrainingCrops(Dataset):
    """Aligned random crops of paired images, flipped and transposed with a probability of one half each.

    All chance comes from torch's generator, so that whoever seeds it decides the sample.

    Args:
        images: where the crops are cut.
        patch_size: side of the input's crop in pixels.
        repeat: crops per image and epoch.
        permute_colors: also put the colour channels in random order, for sets of few images and few colours.
        degraded_size: side in pixels of the input of the piece that is cut and degraded before the crop is
            cut from it, so that the grid of JPEG and the borders of blurs fall anywhere.
    """

    def __init__(
        self,
        images: PairedImages,
        patch_size: int,
        repeat: int = 1,
        permute_colors: bool = False,
        degraded_size: int | None = None,
    ) -> None:
        self.images, self.patch_size = images, patch_size
        self.repeat, self.permute_colors = repeat, permute_colors
        self.piece_size = max(patch_size, degraded_size or 0)

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, index: int) -> Pair:
        index %= len(self.images)
        companion, gt = self.images.random_crop(index, self.piece_size)
        flip = _random_flip()
        lq, gt = None if companion is None else flip(to_float(companion)), flip(to_float(gt))
        if self.permute_colors:
            order = torch.randperm(len(gt))
            gt = gt[order]
            lq = lq[order] if lq is not None and len(lq) == len(gt) else lq
        if self.images.degradation is not None:
            seed = int(torch.randint(2**31, ()))
            lq = self.images.degradation(gt.contiguous(), RandomState(seed), lq)
        assert lq is not None
        lq, gt = self._crop(lq, gt)
        return {"lq": lq.contiguous(), "gt": gt.contiguous(), "name": self.images.names[index]}

    def _crop(self, lq: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        size, k = self.patch_size, self.images.upscale
        if self.piece_size == size:
            return lq, gt
        top, left = (int(torch.randint(self.piece_size - size + 1, ())) for _ in range(2))
        return (
            lq[:, top : top + size, left : left + size],
            gt[:, top * k : (top + size) * k, left * k : (left + size) * k],
        )


def _random_flip() -> Callable[[Tensor], Tensor]:
    """One random choice of flips and transposition, to be applied to several images alike."""
    horizontal, vertical, transposed = (torch.rand(3) < 0.5).tolist()
    dims = [dim for dim, flip in ((-1, horizontal), (-2, vertical)) if flip]
    return lambda image: image.flip(dims).transpose(-1, -2) if transposed else image.flip(dims)


def to_float(image: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; floats as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _evenly(names: list[str], count: int) -> list[str]:
    return names[:: math.ceil(len(names) / count)] if count else []
