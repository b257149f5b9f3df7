"""The frame of restoration networks: their record, timm's contract, and the way from image to image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint
from torch import Tensor, nn

from visionattn.layers.bands import convolved
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import check_size
from visionattn.models.registry.shapes import Shapes

RestorationTask = Literal[
    "super-resolution",
    "denoising",
    "jpeg",
    "dehazing",
    "deblurring",
    "hyperspectral-denoising",
    "spectral-super-resolution",
]

# Mean colour of the DIV2K training set, which super-resolution networks subtract and add back.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


@dataclass(frozen=True)
class RestorationInfo:
    """The facts that tools need to run a restoration network on any image; a network's `info` attribute.

    Attributes:
        task: what the network was made for.
        upscale: output side / input side.
        channels: image channels in, and out unless `out_channels` says otherwise.
        min_size: smallest input side in pixels.
        size_multiple: the input is padded inside the network to a multiple of this many pixels.
        exact_tiling: whether overlapping tiles can give the whole-image result (no global operation).
        half_safe: whether float16 is safe; published float16 failures make this False.
        bfloat16_safe: whether bfloat16 autocast is safe.
        out_channels: image channels out where they differ, else None.
    """

    task: RestorationTask
    upscale: int = 1
    channels: int = 3
    min_size: int = 1
    size_multiple: int = 1
    exact_tiling: bool = True
    half_safe: bool = False
    bfloat16_safe: bool = True
    out_channels: int | None = None


class Restorer(nn.Module, ABC):
    """A network from images `[B, in_chans, H, W]` to restored ones, of any size that its record allows.

    A family makes the record, says in `restore` what becomes of an image whose size it takes, and sorts its
    parameters in `group_matcher`. Another way to fill up images is a `padded` of its own.

    Args:
        info: the record.
        num_features: channels of the features before the last layers.

    Attributes:
        info: what tools need to know to run it.
        undecayed: how the names of parameters end that are not decayed, beyond timm's rule of one-dimensional
            ones.
    """

    undecayed: tuple[str, ...] = ()

    def __init__(self, info: RestorationInfo, num_features: int):
        super().__init__()
        self.info = info
        self.in_chans = info.channels
        self.num_classes = 0
        self.num_features = num_features

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, see `undecayed`."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.undecayed)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they hold."""
        for module in self.modules():
            if "grad_checkpointing" in vars(module):
                vars(module)["grad_checkpointing"] = enable

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to `[B, in_chans, upscale * H, upscale * W]`, unclipped.

        Raises:
            ValueError: an image too small; the message says the smallest size.
        """
        return self.cropped(self.restore(self.padded(x)), x)

    @abstractmethod
    def restore(self, x: Tensor) -> Tensor:
        """Filled-up images `[B, in_chans, H, W]` to `[B, in_chans, upscale * H, upscale * W]`."""

    def padded(self, x: Tensor) -> Tensor:
        """Images, reflected on the right and bottom up to `info.size_multiple`.

        Raises:
            ValueError: an image too small; the message says the smallest size.
        """
        if self.info.size_multiple > 1:
            return pad_to_multiple(x, self.info.size_multiple)
        check_size(x, self.info.min_size)
        return x

    def cropped(self, restored: Tensor, x: Tensor) -> Tensor:
        """Cut off of a restored image what the images `x` were filled up by."""
        height, width = (side * self.info.upscale for side in x.shape[-2:])
        return restored[..., :height, :width]


class ResidualRestorer(Restorer):
    """Most super-resolution networks: a convolution, a body inside a skip, and a tail that makes the image.

    `tail(conv_after_body(norm(layers(f))) + f)` with `f = conv_first(x)`, where x is the image without the
    mean colour. At the same size, the tail makes a correction of x. `add_tail` makes the parts of the usual
    tail; for another one a family has its own parts, `enlarge` and `tail_halo`.

    Args:
        info: the record.
        embed_dim: channels of the body.
        layers: modules on `[B, H, W, C]`, one after the other.
        img_range: factor on the image before the network, undone after it.
        embed_norm: whether a layer norm stands before the layers.
        eps: of the layer norm behind the layers.

    Attributes:
        mean: the mean colour, 0 for other images than those of 3 channels.
        tail_halo: rows of features on either side on which a row of the image depends in the tail.
    """

    tail_halo = 3  # of a 3x3 convolution at the size of the features, `upsampler`, one at that of the image

    def __init__(
        self,
        info: RestorationInfo,
        embed_dim: int,
        layers: Iterable[nn.Module],
        img_range: float = 1.0,
        embed_norm: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(info, embed_dim)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_range = img_range
        self.mean = DIV2K_MEAN if self.in_chans == 3 else (0.0,) * self.in_chans
        self.conv_first = nn.Conv2d(self.in_chans, embed_dim, 3, padding=1, **dd)
        self.embed_norm = nn.LayerNorm(embed_dim, **dd) if embed_norm else nn.Identity()
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(embed_dim, eps=eps, **dd)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, **dd)

    def add_tail(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Make a narrowing convolution, enlarging ones, and a last one; the last alone at the same size."""
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = self.num_features
        if self.info.upscale > 1:
            narrow = nn.Conv2d(dim, 64, 3, padding=1, **dd)
            self.conv_before_upsample = nn.Sequential(narrow, nn.LeakyReLU())
            self.upsample = upsampler(64, self.info.upscale, dd)
            dim = 64
        self.conv_last = nn.Conv2d(dim, self.in_chans, 3, padding=1, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay."""
        layers = r"^layers\.(\d+)"
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.(?:overlap_attn|conv)", (1000,)),
            (r"^(?:norm|conv_after_body|conv_before_upsample|upsample|conv_last)", (99999,)),
        ]
        return {"stem": r"^(?:conv_first|embed_norm)", "blocks": layers if coarse else fine}

    def forward_features(self, x: Tensor) -> Tensor:
        """The body: images `[B, in_chans, H, W]`, mean subtracted, to `[B, embed_dim, H, W]`.

        Sides must be multiples of `info.size_multiple` for the official numbers.
        """
        return run_body(x, self.conv_first, (self.embed_norm, *self.layers), self.norm, self.conv_after_body)

    def enlarge(self, y: Tensor) -> Tensor:
        """Features `[B, embed_dim, H, W]` to the image, or its correction, `[B, in_chans, s * H, s * W]`."""
        if self.info.upscale > 1:
            y = self.upsample(self.conv_before_upsample(y))
        return self.conv_last(y)

    def restore(self, x: Tensor) -> Tensor:
        """Filled-up images `[B, in_chans, H, W]` to `[B, in_chans, upscale * H, upscale * W]`."""
        mean, upscale = x.new_tensor(self.mean).view(1, -1, 1, 1), self.info.upscale
        x = (x - mean) * self.img_range
        corrected = (x,) if upscale == 1 else ()
        y = self.forward_features(x)

        def tail(y: Tensor, *corrected: Tensor) -> Tensor:
            out = self.enlarge(y)
            return (corrected[0] + out if corrected else out) / self.img_range + mean

        into = x if corrected else None
        return convolved(tail, y, *corrected, halo=self.tail_halo, scale=upscale, dim=2, into=into)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflect-pad `x` `[B, C, H, W]` on the right and bottom to a multiple of `multiple` pixels.

    Raises:
        ValueError: a side is too small to be reflected that far.
    """
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
        for dim, side in ((-2, height), (-1, width)):
            index = torch.arange(-(-side // multiple) * multiple, device=x.device)
            x = x.index_select(dim, torch.minimum(index, 2 * side - 2 - index))
        return x
    if bottom >= height or right >= width:
        raise ValueError(
            f"an input of {height}x{width} cannot be reflected to a multiple of {multiple}: "
            f"each side must be at least {multiple // 2 + 1} pixels"
        )
    return F.pad(x, (0, right, 0, bottom), mode="reflect") if bottom or right else x


def upsampler(
    dim: int, upscale: int, dd: dict[str, Any], negative_slope: float | None = None
) -> nn.Sequential:
    """Convolutions and pixel shuffles on `[B, dim, H, W]`, in steps of 2, or of 3 for `upscale=3`.

    Args:
        dim: channels in and out.
        upscale: 2, 3, 4 or 8.
        dd: device and dtype.
        negative_slope: of a LeakyReLU behind every step; None for none.

    Raises:
        ValueError: an `upscale` other than 2, 3, 4 and 8.
    """
    if upscale not in (2, 3, 4, 8):
        raise ValueError(f"upscale must be 2, 3, 4 or 8, got {upscale}")
    steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(dim, step**2 * dim, 3, padding=1, **dd), nn.PixelShuffle(step)]
        if negative_slope is not None:
            layers.append(nn.LeakyReLU(negative_slope))
    return nn.Sequential(*layers)


def upscale_of(shapes: Shapes) -> int:
    """The enlargement of the `upsampler` named `upsample` in a state dict; 1 where there is none."""
    names = [name for name in shapes.names if name.startswith("upsample.") and name.endswith(".weight")]
    steps = [shape for name in names if (shape := shapes.get(name, 4))]
    return math.prod(math.isqrt(rows // columns) for rows, columns, *_ in steps)


def body_arguments(ours: Shapes) -> dict[str, Any]:
    """The arguments of a `ResidualRestorer` that its weights tell, with the usual tail."""
    dim, in_chans = ours["conv_first.weight"][:2]
    return {
        "in_chans": in_chans,
        "upscale": upscale_of(ours),
        "embed_dim": dim,
        "depths": ours.lengths("layers", "blocks"),
    }


def run_body(
    x: Tensor, conv_first: nn.Module, layers: Iterable[nn.Module], norm: nn.Module, conv_after_body: nn.Module
) -> Tensor:
    """`conv_after_body(norm(layers(f))) + f` with `f = conv_first(x)`.

    Args:
        x: images `[B, in_chans, H, W]`.
        conv_first: a 3x3 convolution, as `conv_after_body`.
        layers: modules on `[B, H, W, C]`, one after the other.
        norm: a module on single pixels of `[B, H, W, C]`.
        conv_after_body: see `conv_first`.

    Returns:
        `[B, C, H, W]`.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    y = on_nhwc(conv_first, x)
    for layer in layers:
        y = layer(y)

    def close(y: Tensor, x: Tensor) -> Tensor:
        # The first convolution runs again: its output would have to be kept all the time.
        return on_nhwc(conv_after_body, norm(y)) + on_nhwc(conv_first, x)

    return convolved(close, y, x, halo=1).permute(0, 3, 1, 2)


def restoration_cfg(*, channels: int = 3, size: int = 64, min_size: int = 1, **kwargs: Any) -> dict[str, Any]:
    """A `default_cfgs` entry of a restoration network.

    Args:
        channels: of images.
        size: side of the images for which costs are stated.
        min_size: smallest side.
        kwargs: the other fields.
    """
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (channels, size, size),
        "min_input_size": (channels, min_size, min_size),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "first_conv": "conv_first",
        **kwargs,
    }


def super_resolution_cfg(results: str, **kwargs: Any) -> dict[str, Any]:
    """A `default_cfgs` entry of a super-resolution network.

    Args:
        results: "PSNR/SSIM" on Y for Set5, Set14, B100, Urban100 and Manga109, separated by blanks.
        kwargs: of `restoration_cfg`.
    """
    sets = ("Set5", "Set14", "B100", "Urban100", "Manga109")
    table = ", ".join(f"{name} {value}" for name, value in zip(sets, results.split()))
    return restoration_cfg(**{"license": "apache-2.0", "notes": (f"PSNR/SSIM on Y: {table}",), **kwargs})


def build_restoration(model_cls: type, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg` for a network without a classifier.

    Raises:
        ValueError: published weights of a network whose output has as many channels as its input, and
            `in_chans` of another number: timm's rule is for the first convolution alone.
    """
    classifier_options: Any = ("num_classes", "global_pool")
    convert = kwargs.pop("pretrained_filter_fn", None)

    def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
        weights = convert(state_dict, model) if convert else state_dict
        channels, own = model.pretrained_cfg["input_size"][0], model.state_dict()
        first = f"{model.pretrained_cfg['first_conv']}.weight"
        differing = [n for n, v in weights.items() if n in own and n != first and v.shape != own[n].shape]
        if model.in_chans != channels and differing:
            raise ValueError(
                f"the weights of {variant} are for {channels} channels and cannot be adapted to "
                f"in_chans={model.in_chans}, because more than the first convolution depends on them: give "
                f"it images of {channels} channels (gray ones repeated), or create it without pretrained"
            )
        return weights

    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        kwargs_filter=classifier_options,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """Blocks one after the other; `recompute` them in the backward pass instead of storing what they hold."""
    for block in blocks:
        x = checkpoint(block, x) if recompute else block(x)
    return x


class ResidualGroup(nn.Module):
    """`x + conv(blocks(x))` with a 3x3 convolution.

    Args:
        dim: channels.
        blocks: modules on `[B, H, W, C]`.

    Attributes:
        grad_checkpointing: recompute blocks in the backward pass instead of storing what they hold.
    """

    def __init__(
        self,
        dim: int,
        blocks: Sequence[nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, device=device, dtype=dtype)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        y = run_blocks(self.blocks, x, self.grad_checkpointing and self.training)
        return add_convolved(x, self.conv, y)


def add_convolved(x: Tensor, conv: nn.Conv2d, y: Tensor) -> Tensor:
    """`x + conv(y)` on `[B, H, W, C]` for a 3x3 convolution, by bands."""
    return convolved(lambda x, y: x + on_nhwc(conv, y), x, y, halo=1)
