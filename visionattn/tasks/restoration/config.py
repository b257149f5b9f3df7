"""The configuration of a restoration run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from visionattn.data.degradations.pipeline import STEPS, Degradation
from visionattn.engine.config import RunConfig, Section

_PLACES = "folders of image files or cubes (.npy, .mat), or LMDB folders (*.lmdb)"


class RestorationData(Section):
    """The images."""

    source: Literal["photographs", "folders"] = Field(
        default="photographs",
        description="photographs: those that come with scikit-image and scikit-learn; or folders",
    )
    train_gt: list[str] = Field(default=[], description=f"true images to train on: {_PLACES}")
    train_lq: list[str] = Field(
        default=[], description="their inputs, in the same order; empty: degradations, or bicubic reduction"
    )
    train_depth: list[str] = Field(default=[], description="their depth maps, for the degradation haze")
    eval_gt: list[str] = Field(default=[], description="the same for the images to judge")
    eval_lq: list[str] = Field(default=[], description="their inputs")
    eval_depth: list[str] = Field(default=[], description="their depth maps")
    train_template: str = Field(
        default="{}",
        description="file name of an input (or depth map) without ending, {} being that of its truth: {}x4; "
        "with *, as in {}_*, one truth may have several",
    )
    eval_template: str = Field(default="{}", description="the same for the images to judge")
    cut: Literal["corner", "centre"] = Field(
        default="corner", description="part of a truth that is larger than its input says (SOTS: centre)"
    )
    degradations: list[dict[str, Any]] = Field(
        default=[],
        description=f"steps that make the inputs, each a name and options; names are {', '.join(STEPS)}",
    )
    eval_degradations: list[dict[str, Any]] | None = Field(
        default=None, description="the same for the images to judge, from seed 0; null: as in training"
    )
    degraded_size: int | None = Field(
        default=None, gt=0, description="side of the piece to degrade, from which the crop is cut; null: it"
    )
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

    @field_validator("train_gt", "train_lq", "train_depth", "eval_gt", "eval_lq", "eval_depth", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("degradations", "eval_degradations")
    @classmethod
    def _known_steps(cls, value: Any) -> Any:
        Degradation(value or [])
        return value

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> RestorationData:
        if self.train_lq and self.degradations:
            raise ValueError("train_lq and degradations are both given: inputs are stored or made")
        if self.eval_lq and self.eval_degradations:
            raise ValueError("eval_lq and eval_degradations are both given: inputs are stored or made")
        for split, steps in (("train", self.degradations), ("eval", self.judged_degradations)):
            hazy = any(step["name"] == "haze" for step in steps) and not getattr(self, f"{split}_lq")
            if getattr(self, f"{split}_depth") and not hazy:
                raise ValueError(f"{split}_depth is for inputs that the degradation haze makes")
        if self.degraded_size is not None and self.degraded_size < self.patch_size:
            raise ValueError(f"degraded_size ({self.degraded_size}) is below patch_size ({self.patch_size})")
        if self.source == "photographs":
            kinds = ("gt", "lq", "depth", "template")
            parts = [f"{split}_{kind}" for split in ("train", "eval") for kind in kinds]
            self.refuse_changed(
                parts, "source=photographs is built in; source=folders takes images from them"
            )
        return self

    @property
    def judged_degradations(self) -> list[dict[str, Any]]:
        """The steps that make the inputs of the images to judge."""
        return self.degradations if self.eval_degradations is None else self.eval_degradations


class RestorationLoss(Section):
    """The loss."""

    name: Literal["l1", "charbonnier", "mse"] = Field(
        default="l1", description="mean |x|, sqrt(x^2 + epsilon^2) or x^2 of the difference"
    )
    epsilon: float = Field(default=1e-3, gt=0, description="epsilon of charbonnier")
    intermediate: float = Field(
        default=0, ge=0, description="weight of the same loss of PMNet's intermediate image"
    )
    perceptual: float = Field(default=0, ge=0, description="weight of the loss of VGG19's features")
    vgg_weights: str | None = Field(
        default=None, description="torchvision's file of VGG19; null: where torch keeps its downloads"
    )
    adversarial: float = Field(
        default=0, ge=0, description="weight of a discriminator's judgement, which is trained alongside"
    )
    discriminator_dim: int = Field(default=64, gt=0, description="its channels at full size")
    sharpen_targets: bool = Field(
        default=False, description="sharpen the truth for the pixel and perceptual losses, for crisper images"
    )


class RestorationConfig(RunConfig):
    """A restoration run."""

    task: Literal["restoration"] = Field(default="restoration", description="what is trained")
    data: RestorationData = Field(default_factory=RestorationData, description="the images")
    loss: RestorationLoss = Field(default_factory=RestorationLoss, description="the loss")
    initial_weights: str | None = Field(
        default=None,
        description="checkpoint of the network at another scale to start from, what it lacks staying random",
    )
    metric: Literal["y", "rgb", "bands"] | None = Field(
        default=None,
        description="judge the luma, all three channels, or the bands of cubes; null: y for enlarging and "
        "grey networks, bands for more than three channels, rgb otherwise",
    )
    psnr_b: bool | None = Field(
        default=None, description="also PSNR-B, for JPEG; null: where JPEG is what degrades"
    )
    self_ensemble: bool = Field(
        default=False, description="judge the mean over all flips and transpositions of the input (x8)"
    )

    @field_validator("train")
    @classmethod
    def _whole_images(cls, value: Any) -> Any:
        if value.eval_batch_size not in (None, 1):
            raise ValueError("restoration judges whole images of any size: eval_batch_size must be 1 or null")
        return value.model_copy(update={"eval_batch_size": 1})
