"""Image restoration: enlarging, denoising, removal of JPEG artefacts and haze; photographs or cubes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn

from visionattn.checkpoints import load_checkpoint
from visionattn.data.decode import as_rgb
from visionattn.data.degradations.blur import sharpen
from visionattn.data.degradations.resize import bicubic_upscale, to_uint8
from visionattn.data.files import shorten
from visionattn.data.images import to_pil, to_tensor
from visionattn.data.paired import Pair, PairedImages, TrainingCrops
from visionattn.engine.batches import make_eval_loader, make_train_loader, seed_all
from visionattn.engine.distributed import gather_objects, process_index
from visionattn.engine.network import create_network, evaluating
from visionattn.engine.task import NamedImages, Task
from visionattn.errors import InputError, as_input_error
from visionattn.inference.ensemble import self_ensemble
from visionattn.models.frames.restorer import RestorationInfo
from visionattn.tasks.comparison import busiest_crop, draw_comparison
from visionattn.tasks.restoration.adversarial import Discriminator, PerceptualLoss, adversarial_losses
from visionattn.tasks.restoration.config import RestorationConfig
from visionattn.tasks.restoration.data import open_images
from visionattn.tasks.restoration.metrics import SMALLEST, mpsnr, mssim, psnr, psnr_b, sam, ssim

_PICTURED_IMAGES = 3
_PICTURED_SIDE = 128  # pixels of the truth
_PIXEL_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l1": lambda x, epsilon: x.abs(),
    "mse": lambda x, epsilon: x.square(),
    "charbonnier": lambda x, epsilon: (x.square() + epsilon**2).sqrt(),
}


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
        self.info, self.out_channels = info, info.out_channels or info.channels
        self.metric = config.metric or _usual_metric(info.upscale, self.out_channels)
        if (self.metric == "bands") != (self.out_channels not in (1, 3)):
            raise InputError(
                f"metric={self.metric} does not fit the {self.out_channels} channels of the network"
            )
        self.monitor = "mpsnr" if self.metric == "bands" else f"psnr_{self.metric}"
        self.border = info.upscale if info.upscale > 1 and self.metric != "bands" else 0
        self.metrics = [*self._measures, f"gain_over_{self._plainly}"]
        self.perceptual: PerceptualLoss | None = None
        self._check_losses()
        # A trained checkpoint holds what became of the initial weights.
        if config.initial_weights is not None and config.model.checkpoint is None:
            with as_input_error("cannot start from initial_weights", FileNotFoundError, ValueError):
                left_out = load_checkpoint(self.model, config.initial_weights, strict=False)
            if left_out and process_index() == 0:
                print(f"initial_weights: {left_out}", file=sys.stderr)

    def _check_losses(self) -> None:
        loss = self.config.loss
        if (loss.perceptual or loss.adversarial) and self.out_channels != 3:
            raise InputError(
                f"loss.perceptual and loss.adversarial need RGB, not {self.out_channels} channels"
            )
        if loss.intermediate and not hasattr(self.model, "forward_all"):
            raise InputError(f"{self.config.model.name} has no intermediate image for loss.intermediate")

    def _make_losses(self) -> None:
        loss = self.config.loss
        seed_all("weights", self.config.train.seed, 1)
        if loss.perceptual:
            with as_input_error("loss.perceptual", FileNotFoundError, ValueError):
                self.perceptual = PerceptualLoss(loss.vgg_weights)
        if loss.adversarial:
            self.adversary = Discriminator(dim=loss.discriminator_dim)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """The configured losses of a batch of `Pair`s."""
        loss, lq, truth = self.config.loss, batch["lq"], batch["gt"]
        target = sharpen(truth) if loss.sharpen_targets else truth
        if not loss.intermediate:
            image = self.model(lq)
            total = self._pixel_loss(image, target)
        else:
            whole: Any = self.model
            image, intermediate, _ = whole.forward_all(lq)
            total = self._pixel_loss(image, target)
            total = total + loss.intermediate * self._pixel_loss(intermediate, target)
        parts: dict[str, Tensor] = {}
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(image, target)
            total = total + loss.perceptual * parts["perceptual"]
        if self.adversary is not None:
            judged, learned, logits = adversarial_losses(self.adversary, image, truth)
            total = total + loss.adversarial * judged + learned
            parts |= {"adversarial": judged, "discriminator": learned, **logits}
        return {"loss": total, **parts}

    def _pixel_loss(self, image: Tensor, target: Tensor) -> Tensor:
        loss = self.config.loss
        return _PIXEL_LOSSES[loss.name](image - target, loss.epsilon).mean()

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Mean quality over whole images, and the gain in dB over bicubic or over the input.

        `rows` then holds the quality of every image. One that is too small for a metric's window has no value
        (not a number) there and does not count in its mean.
        """
        mine = [self._score(pair) for pair in loader]
        self.rows = [row for part in gather_objects(mine) for row in part]
        names = [name for name in self.metrics if all(name in row for row in self.rows)]
        values = {name: [v for row in self.rows if not math.isnan(v := row[name])] for name in names}
        for name, known in values.items():
            if len(known) < len(self.rows) and process_index() == 0:
                lacking = [row["name"] for row in self.rows if math.isnan(row[name])]
                print(
                    f"{name} has no value for {shorten(lacking)}, of {len(self.rows)} images", file=sys.stderr
                )
        return {name: sum(known) / len(known) if known else math.nan for name, known in values.items()}

    def predict(self, inputs: Image.Image | Sequence[Image.Image]) -> Any:
        """Restored images: one RGB image for one, a list for several of any sizes.

        Raises:
            ValueError: an image is smaller than the network allows.
        """
        if not isinstance(inputs, Image.Image):
            return [self.predict(image) for image in inputs]
        return restore(self.model, inputs)

    @classmethod
    def judge_named(cls, images: NamedImages) -> dict[str, Any]:
        """Named images come from folders, and are not degraded where their inputs are named too."""
        data: dict[str, Any] = {}
        if images.truths:
            stored = [images.inputs] if images.inputs else []
            data |= {"source": "folders", "eval_gt": images.truths, "eval_lq": stored}
        if images.inputs:
            data["eval_degradations"] = None
        if images.template:
            data["eval_template"] = images.template
        return {"data": data, **({"self_ensemble": True} if images.self_ensemble else {})}

    def train_loader(self) -> Iterable[Any]:
        """Random crops as batches of `Pair`s; makes what training alone needs: VGG and discriminator."""
        self._make_losses()
        data = self.config.data
        images = open_images(self.config, self.info, "train", max(data.patch_size, data.degraded_size or 0))
        crops = TrainingCrops(images, data.patch_size, data.repeat, data.permute_colors, data.degraded_size)
        return make_train_loader(crops, self.config.train)

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
        smallest = max(SMALLEST.get(metric.__name__, 1) for metric in self._measures.values())
        smallest = math.ceil((smallest + 2 * self.border) / self.info.upscale)
        return open_images(self.config, self.info, "validation", max(self.info.min_size, smallest))

    def _score(self, pair: Any) -> dict[str, Any]:
        """Quality of the restoration of an evaluation batch, which is one image."""
        lq, truth = pair["lq"][0], pair["gt"][0].cpu()
        restored = self._restore(lq)
        row: dict[str, Any] = {"name": pair["name"][0]}
        if self.metric == "bands":
            measure, plain = {}, lq.cpu() if lq.shape == truth.shape else None
        else:
            truth, restored, plain = to_uint8(truth), to_uint8(restored), self._plain(lq)
            measure = {"border": self.border, "luma": self.metric == "y"}
        side = min(truth.shape[-2:]) - 2 * self.border
        for name, metric in self._measures.items():
            small = side < SMALLEST.get(metric.__name__, 1)
            row[name] = math.nan if small else metric(restored, truth, **measure)
        if plain is not None:
            row[f"gain_over_{self._plainly}"] = row[self.monitor] - self._measures[self.monitor](
                plain, truth, **measure
            )
        return row

    @property
    def _measures(self) -> dict[str, Callable[..., float]]:
        """The metrics of an image, by their names."""
        if self.metric == "bands":
            return {metric.__name__: metric for metric in (mpsnr, mssim, sam)}
        measures = (psnr, ssim, psnr_b) if self._judges_blocks else (psnr, ssim)
        return {f"{metric.__name__}_{self.metric}": metric for metric in measures}

    @property
    def _plainly(self) -> str:
        """What stands for the result without a network."""
        return "bicubic" if self.info.upscale > 1 else "input"

    @property
    def _judges_blocks(self) -> bool:
        if self.config.psnr_b is not None:
            return self.config.psnr_b
        data = self.config.data
        degraded = not (data.eval_lq and data.source == "folders")
        return self.info.task == "jpeg" or (
            degraded and any(step["name"] == "jpeg" for step in data.judged_degradations)
        )

    def _plain(self, lq: Tensor) -> Tensor:
        """The result without a network: `lq` `[C, h, w]`, enlarged bicubically if need be, as uint8."""
        plain = to_uint8(lq).cpu()
        return bicubic_upscale(plain, self.info.upscale) if self.info.upscale > 1 else plain

    def _restore(self, lq: Tensor) -> Tensor:
        """The network's image for `lq` `[C, h, w]`, floats on the CPU."""
        network = partial(self_ensemble, self.model) if self.config.self_ensemble else self.model
        return _run(self.model, lq, network)

    def _panels(self, pair: Pair) -> list[tuple[str, Image.Image]]:
        upscale = self.info.upscale
        restored, truth = to_uint8(_shown(self._restore(pair["lq"]))), to_uint8(_shown(pair["gt"]))
        lq = _shown(pair["lq"])
        plain = self._plain(lq)
        shown = {"bicubic": plain} if upscale > 1 else {}
        shown["ours"] = restored
        side = min(_PICTURED_SIDE, *truth.shape[-2:]) // upscale * upscale
        lost = (plain.float() - truth.float()).abs().mean(0)
        top, left = busiest_crop(lost, side, upscale)
        cut = (slice(None), slice(top, top + side), slice(left, left + side))
        cut_lq = (slice(None), *(slice(s.start // upscale, s.stop // upscale) for s in cut[1:]))

        def named(name: str, image: Tensor) -> str:
            return f"{name}, {psnr(image[cut], truth[cut], luma=self.metric == 'y'):.2f} dB"

        label = "low resolution" if upscale > 1 else named("input", plain)
        panels = [(f"{pair['name']}: {label}", to_uint8(lq)[cut_lq])]
        panels += [(named(name, image), image[cut]) for name, image in shown.items()]
        return [(label, to_pil(image)) for label, image in [*panels, ("truth", truth[cut])]]


def restore(model: nn.Module, image: Image.Image) -> Image.Image:
    """Restore or enlarge an image.

    Args:
        model: a network with an `info: RestorationInfo` attribute.
        image: of any mode; what its EXIF data turn is turned upright.

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
    return to_pil(to_uint8(_run(model, to_tensor(as_rgb(image)).float() / 255)))


def _run(model: nn.Module, lq: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The image that `network` (or `model` itself) makes of `lq` `[C, h, w]`, as float32 on the CPU."""
    with evaluating(model):
        return (network or model)(lq[None].to(next(model.parameters()).device))[0].float().cpu()


def _shown(image: Tensor) -> Tensor:
    """An image that can be drawn: of cubes the middle band of every third of the spectrum, red first."""
    bands = len(image)
    return image if bands in (1, 3) else image[[5 * bands // 6, bands // 2, bands // 6]]


def _usual_metric(upscale: int, channels: int) -> Literal["y", "rgb", "bands"]:
    if channels not in (1, 3):
        return "bands"
    return "y" if upscale > 1 or channels == 1 else "rgb"
