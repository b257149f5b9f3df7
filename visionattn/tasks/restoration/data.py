"""Opens the images that a restoration run names."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from numpy.random import RandomState

from visionattn.data.degradations.pipeline import Degradation
from visionattn.data.files import ImageSource, pair_files
from visionattn.data.paired import PairedImages
from visionattn.data.photographs import photograph_files
from visionattn.engine.distributed import process_index
from visionattn.errors import InputError, as_input_error
from visionattn.models.frames.restorer import RestorationInfo
from visionattn.tasks.restoration.config import RestorationConfig

Split = Literal["train", "validation"]


def open_images(
    config: RestorationConfig, info: RestorationInfo, split: Split, min_side: int
) -> PairedImages:
    """The images of one side of the split, read once to be sure of them.

    Args:
        config: the run.
        info: what the network takes.
        split: which side.
        min_side: smallest side of an input in pixels.

    Raises:
        InputError: images are missing, broken, or not such as the network takes.
    """
    data = config.data
    with as_input_error("cannot use the images", FileNotFoundError, ModuleNotFoundError, ValueError):
        degradation = _degradation(config, info, split)
        if data.source == "photographs":
            files: Any = photograph_files(split)
            inputs, in_memory = None, True
        else:
            files, inputs = _folder_files(config, split)
            in_memory = data.in_memory and split == "train"
        if inputs is None and degradation is None and (info.upscale == 1 or _channels(info)[1] > 3):
            key = "train_lq" if split == "train" else "eval_lq"
            raise ValueError(
                f"{config.model.name} does not enlarge images, so it needs data.{key} or data.degradations"
            )
        images = PairedImages(
            files,
            info.upscale,
            inputs,
            degradation=degradation,
            channels=_channels(info),
            cut=data.cut,
            min_side=min_side,
            broken_images=data.broken_images,
            check_images=data.check_images,
            in_memory=in_memory,
        )
    if images.skipped and process_index() == 0:
        print(f"skipped: {'; '.join(images.skipped.values())}", file=sys.stderr)
    return images


def _channels(info: RestorationInfo) -> tuple[int, int]:
    return info.channels, info.out_channels or info.channels


def _degradation(config: RestorationConfig, info: RestorationInfo, split: Split) -> Degradation | None:
    """The steps that make the inputs, tried once on a blank image; None where inputs are stored."""
    data = config.data
    stored = data.train_lq if split == "train" else data.eval_lq
    steps = data.degradations if split == "train" else data.judged_degradations
    if not steps or (stored and data.source == "folders"):
        return None
    degradation = Degradation(steps, info.upscale)
    k, channels = info.upscale, _channels(info)[1]
    degraded = degradation(torch.full((channels, 32 * k, 32 * k), 0.5), RandomState(0))
    if degraded.shape != (info.channels, 32, 32):
        raise InputError(
            f"data.degradations make {tuple(degraded.shape)} of {channels}x{32 * k}x{32 * k}, but "
            f"{config.model.name} needs {info.channels}x32x32; bicubic and real_world change the size"
        )
    return degradation


def _folder_files(
    config: RestorationConfig, split: Split
) -> tuple[dict[str, ImageSource], dict[str, ImageSource] | None]:
    data = config.data
    key = "train" if split == "train" else "eval"
    truths, inputs, depths, template = (
        getattr(data, f"{key}_{part}") for part in ("gt", "lq", "depth", "template")
    )
    if not truths:
        raise ValueError(f"data.source=folders needs data.{key}_gt")
    part, companions = ("depth", depths) if depths else ("lq", inputs)
    if companions and len(companions) != len(truths):
        raise ValueError(
            f"data.{key}_gt names {len(truths)} folders, but data.{key}_{part} {len(companions)}"
        )
    gt_files: dict[str, ImageSource] = {}
    lq_files: dict[str, ImageSource] = {}
    for number, (truth, companion) in enumerate(
        zip(truths, companions or [None] * len(truths), strict=True), start=1
    ):
        gt, lq = pair_files(truth, companion, template)
        # Several folders may use the same names, and one folder may be named with several inputs.
        prefix = f"{truth}/" if len(truths) > 1 else ""
        prefix = f"{number}:{prefix}" if truths.count(truth) > 1 else prefix
        gt_files |= {prefix + name: file for name, file in gt.items()}
        lq_files |= {prefix + name: file for name, file in (lq or {}).items()}
    return gt_files, lq_files or None
