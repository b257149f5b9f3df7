"""What every restoration network states about itself, and the parts that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from visionattn.layers.bands import by_bands
from visionattn.layers.maps import on_nhwc
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

# Rows of features on which a row of the image depends at most through one 3x3 convolution at their size,
# `upsampler`, and one at that of the image.
TAIL_HALO = 3


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

    return by_bands(close, y, x, halo=1).permute(0, 3, 1, 2)


def super_resolution_cfg(results: str, **kwargs: Any) -> dict[str, Any]:
    """A `default_cfgs` entry of a super-resolution network.

    Args:
        results: "PSNR/SSIM" on Y for Set5, Set14, B100, Urban100 and Manga109, separated by blanks.
        kwargs: the other fields.
    """
    sets = ("Set5", "Set14", "B100", "Urban100", "Manga109")
    table = ", ".join(f"{name} {value}" for name, value in zip(sets, results.split()))
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 64, 64),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "license": "apache-2.0",
        "first_conv": "conv_first",
        "notes": (f"PSNR/SSIM on Y: {table}",),
        **kwargs,
    }


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
