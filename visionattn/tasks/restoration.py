"""Image restoration: super-resolution of photographs or of folders of images."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor, nn

from visionattn.checkpoints import load_checkpoint
from visionattn.data.degradations import bicubic_upscale, to_uint8
from visionattn.data.images import to_pil, to_tensor
from visionattn.data.paired import Pair, PairedImages, TrainingCrops, folder_files
from visionattn.data.photographs import photograph_files
from visionattn.engine.config import RunConfig, Section
from visionattn.engine.distributed import gather_objects, process_index
from visionattn.engine.errors import InputError, as_input_error
from visionattn.engine.loading import make_eval_loader, make_train_loader
from visionattn.engine.network import create_network
from visionattn.engine.task import Task
from visionattn.models._restoration import RestorationInfo
from visionattn.tasks.comparison import busiest_crop, draw_comparison
from visionattn.tasks.metrics import psnr, ssim

Split = Literal["train", "validation"]
_PICTURED_IMAGES = 3
_PICTURED_SIDE = 128  # pixels of the truth


class RestorationData(Section):
    """The images."""

    source: Literal["photographs", "folders"] = Field(
        default="photographs",
        description="photographs: those that come with scikit-image and scikit-learn; or folders",
    )
    train_gt: list[str] = Field(default=[], description="folders of true images to train on")
    train_lq: list[str] = Field(
        default=[], description="folders of their inputs, in the same order; empty: bicubic reduction"
    )
    eval_gt: list[str] = Field(default=[], description="folders of true images to judge")
    eval_lq: list[str] = Field(default=[], description="folders of their inputs; empty: bicubic reduction")
    train_template: str = Field(
        default="{}", description="file name of an input without ending, {} being that of its truth: {}x4"
    )
    eval_template: str = Field(default="{}", description="the same for the images to judge")
    patch_size: int = Field(
        default=64, gt=0, description="side of the training crops, in pixels of the input"
    )
    repeat: int = Field(default=1, gt=0, description="crops per image and epoch")
    permute_colors: bool = Field(
        default=False, description="put the colour channels of a training crop in random order"
    )
    in_memory: bool = Field(
        default=False, description="keep the training images of folders in memory, decoded"
    )
    broken_images: Literal["error", "skip"] = Field(
        default="error", description="on damaged, too small or ill-matched images, found before training"
    )
    check_images: int = Field(
        default=10_000, ge=0, description="images per split that are read for this, evenly chosen from more"
    )

    @field_validator("train_gt", "train_lq", "eval_gt", "eval_lq", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class RestorationLoss(Section):
    """The loss."""

    name: Literal["l1", "charbonnier"] = Field(
        default="l1", description="mean |x|, or mean sqrt(x^2 + epsilon^2), of the difference"
    )
    epsilon: float = Field(default=1e-3, gt=0, description="epsilon of charbonnier")


class RestorationConfig(RunConfig):
    """A restoration run."""

    task: Literal["restoration"] = Field(default="restoration", description="what is trained")
    data: RestorationData = Field(default_factory=RestorationData, description="the images")
    loss: RestorationLoss = Field(default_factory=RestorationLoss, description="the loss")
    initial_weights: str | None = Field(
        default=None,
        description="checkpoint of the network at another scale to start from, what it lacks staying random",
    )
    metric: Literal["y", "rgb"] = Field(
        default="y", description="judge the luma (super-resolution) or all three channels"
    )

    @field_validator("train")
    @classmethod
    def _whole_images(cls, value: Any) -> Any:
        if value.eval_batch_size not in (None, 1):
            raise ValueError("restoration judges whole images of any size: eval_batch_size must be 1 or null")
        return value.model_copy(update={"eval_batch_size": 1})


class RestorationTask(Task):
    """Trains and judges a network with an `info: RestorationInfo` attribute.

    Args:
        config: the run.

    Raises:
        InputError: the network does not restore images, or cannot be built.
    """

    config: RestorationConfig

    def __init__(self, config: RestorationConfig) -> None:
        super().__init__()
        self.config = config
        self.model = create_network(config.model)
        info = getattr(self.model, "info", None)
        if not isinstance(info, RestorationInfo):
            raise InputError(f"{config.model.name} is not a restoration network")
        if info.channels != 3:
            raise InputError(f"the images are RGB, but {config.model.name} has {info.channels} channels")
        self.info = info
        self.monitor = f"psnr_{config.metric}"
        # A trained checkpoint holds what became of the initial weights.
        if config.initial_weights is not None and config.model.checkpoint is None:
            with as_input_error("cannot start from initial_weights", FileNotFoundError, ValueError):
                left_out = load_checkpoint(self.model, config.initial_weights, strict=False)
            if left_out and process_index() == 0:
                print(f"initial_weights: {left_out}", file=sys.stderr)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """L1 or Charbonnier loss of a batch of `Pair`s."""
        difference = self.model(batch["lq"]) - batch["gt"]
        if self.config.loss.name == "l1":
            return {"loss": difference.abs().mean()}
        return {"loss": (difference.square() + self.config.loss.epsilon**2).sqrt().mean()}

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean PSNR and SSIM over whole images, and for an enlarging network the gain over bicubic in dB."""
        mine = [self._score(pair) for pair in loader]
        scores = [score for part in gather_objects(mine) for score in part]
        return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}

    def predict(self, inputs: Image.Image | Sequence[Image.Image]) -> Any:
        """Restored images: one RGB image for one, a list for several of any sizes.

        Raises:
            ValueError: an image is smaller than the network allows.
        """
        if not isinstance(inputs, Image.Image):
            return [self.predict(image) for image in inputs]
        return restore(self.model, inputs)

    def train_loader(self) -> Iterable[Any]:
        """Random crops as batches of `Pair`s."""
        data = self.config.data
        images = self._images("train", data.patch_size)
        return make_train_loader(
            TrainingCrops(images, data.patch_size, data.repeat, data.permute_colors), self.config.train
        )

    def eval_loader(self) -> Iterable[Any]:
        """Whole images, one at a time."""
        return make_eval_loader(self._held_out, self.config.train)

    def pictures(self) -> dict[str, Image.Image]:
        """Input, bicubic, restored and true of the first held-out images, where bicubic loses most."""
        count = min(len(self._held_out), _PICTURED_IMAGES)
        rows = [self._panels(self._held_out[index]) for index in range(count)]
        return {"comparison": draw_comparison(rows)}

    @cached_property
    def _held_out(self) -> PairedImages:
        return self._images("validation", self.info.min_size)

    def _images(self, split: Split, min_side: int) -> PairedImages:
        data = self.config.data
        with as_input_error("cannot use the images", FileNotFoundError, ModuleNotFoundError, ValueError):
            if data.source == "photographs":
                files, inputs, in_memory = photograph_files(split), None, True
            else:
                files, inputs = self._folder_files(split)
                in_memory = data.in_memory and split == "train"
            images = PairedImages(
                files,
                self.info.upscale,
                inputs,
                min_side=min_side,
                broken_images=data.broken_images,
                check_images=data.check_images,
                in_memory=in_memory,
            )
        if images.skipped and process_index() == 0:
            print(f"skipped: {'; '.join(images.skipped.values())}", file=sys.stderr)
        return images

    def _folder_files(self, split: Split) -> tuple[dict[str, Path], dict[str, Path] | None]:
        data = self.config.data
        key = "train" if split == "train" else "eval"
        truths, inputs, template = (getattr(data, f"{key}_{part}") for part in ("gt", "lq", "template"))
        if not truths:
            raise ValueError(f"data.source=folders needs data.{key}_gt")
        if inputs and len(inputs) != len(truths):
            raise ValueError(f"data.{key}_gt names {len(truths)} folders, but data.{key}_lq {len(inputs)}")
        if not inputs and self.info.upscale == 1:
            raise ValueError(f"{self.config.model.name} does not enlarge images, so it needs data.{key}_lq")
        gt_files: dict[str, Path] = {}
        lq_files: dict[str, Path] = {}
        for truth, of_truth in zip(truths, inputs or [None] * len(truths), strict=True):
            gt, lq = folder_files(truth, of_truth, template)
            # Several folders may use the same names.
            prefix = f"{truth}/" if len(truths) > 1 else ""
            gt_files |= {prefix + name: file for name, file in gt.items()}
            lq_files |= {prefix + name: file for name, file in (lq or {}).items()}
        return gt_files, lq_files or None

    def _score(self, pair: Any) -> dict[str, float]:
        """Quality of the restoration of an evaluation batch, which is one image."""
        upscale, suffix = self.info.upscale, self.config.metric
        lq, truth = pair["lq"][0], to_uint8(pair["gt"][0]).cpu()
        measure = {"border": upscale if upscale > 1 else 0, "luma": suffix == "y"}
        restored = _run(self.model, lq)
        score = {
            f"psnr_{suffix}": psnr(restored, truth, **measure),
            f"ssim_{suffix}": ssim(restored, truth, **measure),
        }
        if upscale > 1:
            bicubic = bicubic_upscale(to_uint8(lq).cpu(), upscale)
            score["gain_over_bicubic"] = score[f"psnr_{suffix}"] - psnr(bicubic, truth, **measure)
        return score

    def _panels(self, pair: Pair) -> list[tuple[str, Image.Image]]:
        upscale, truth = self.info.upscale, to_uint8(pair["gt"])
        shown = {"bicubic": bicubic_upscale(to_uint8(pair["lq"]), upscale)} if upscale > 1 else {}
        plain = shown.get("bicubic", to_uint8(pair["lq"]))
        shown["ours"] = _run(self.model, pair["lq"])
        side = min(_PICTURED_SIDE, *truth.shape[-2:]) // upscale * upscale
        lost = (plain.float() - truth.float()).abs().mean(0)
        top, left = busiest_crop(lost, side, upscale)
        cut = (slice(None), slice(top, top + side), slice(left, left + side))
        cut_lq = (slice(None), *(slice(s.start // upscale, s.stop // upscale) for s in cut[1:]))
        panels = [
            (f"{pair['name']}: {'low resolution' if upscale > 1 else 'input'}", to_uint8(pair["lq"])[cut_lq])
        ]
        for label, image in shown.items():
            decibels = psnr(image[cut], truth[cut], luma=self.config.metric == "y")
            panels.append((f"{label}, {decibels:.2f} dB", image[cut]))
        return [(label, to_pil(image)) for label, image in [*panels, ("truth", truth[cut])]]


def restore(model: nn.Module, image: Image.Image) -> Image.Image:
    """Restore or enlarge an image.

    Args:
        model: a network with an `info: RestorationInfo` attribute, in evaluation mode.
        image: of any mode.

    Raises:
        ValueError: the image is smaller than the network allows, or the network is not for RGB.
    """
    info: Any = model.info
    if info.channels != 3:
        raise ValueError(f"the image becomes RGB, but the network has {info.channels} channels")
    if min(image.size) < info.min_size:
        raise ValueError(
            f"{image.height}x{image.width} pixels are too small: {info.min_size} per side are needed"
        )
    return to_pil(_run(model, to_tensor(image.convert("RGB")).float() / 255))


def _run(model: nn.Module, lq: Tensor) -> Tensor:
    """The network's image for `lq` `[3, h, w]` in [0, 1], as uint8 on the CPU."""
    with torch.no_grad():
        return to_uint8(model(lq[None].to(next(model.parameters()).device))[0].float()).cpu()
