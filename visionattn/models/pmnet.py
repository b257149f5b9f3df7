"""PMNet: dehazing with separable hybrid attention (SHA) and a modelled density of the haze.

Paper: "Perceiving and Modeling Density for Image Dehazing", ECCV 2022, https://arxiv.org/abs/2111.09733. The
authors published no model code, only a scripted network
(https://github.com/Owen718/ECCV22-Perceiving-and-Modeling-Density-for-Image-Dehazing, MIT). This one follows
the paper's text, figures and table of sizes; the authors' weights do not load into it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.as_made import is_as_made
from visionattn.layers.bands import convolved, folded, pixelwise
from visionattn.models.frames.restorer import (
    RestorationInfo,
    Restorer,
    build_restoration,
    restoration_cfg,
    run_blocks,
)
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Variant, register

__all__ = ["Dehazed", "PMNet"]


class Dehazed(NamedTuple):
    """All that the network gives; `[B, C, H, W]` each.

    Attributes:
        image: the restored image.
        pseudo: the restored image of the first half, which training supervises too.
        density: the modelled density of the haze, one channel in (0, 1).
    """

    image: Tensor
    pseudo: Tensor
    density: Tensor


class SeparableHybridAttention(nn.Module):
    """SHA: every pixel is gated by its row's and its column's mean and maximum.

    Args:
        dim: channels, a multiple of 4.
        reduction: narrowing of the hidden layer.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shuffle = nn.ChannelShuffle(4)
        self.reduce = nn.Conv2d(dim, dim // reduction, 1, **dd)
        self.act = nn.ReLU6()
        self.expand = nn.Conv2d(dim // reduction, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`, by bands.

        Args:
            x: a map that nobody else needs: it may be overwritten.
            residual: a map that is added to the result.
        """
        rows, columns = self.gates(x)

        def gate(x: Tensor, rows: Tensor, *residual: Tensor) -> Tensor:
            x = x * (rows * columns).sigmoid()
            return residual[0] + x if residual else x

        added = () if residual is None else (residual,)
        return pixelwise(gate, x, rows, *added, dim=2, into=x)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of all pixels as the product of `[B, C, H, 1]` and `[B, C, 1, W]`."""
        rows, columns = (x.mean(axis) + x.amax(axis) for axis in (3, 2))
        lines = torch.cat((rows, columns), 2)[..., None]
        rows, columns = self.act(self.reduce(self.shuffle(lines))).squeeze(3).split(x.shape[2:], 2)
        if not is_as_made(nn.Conv2d, self.expand):
            return self.expand(rows[..., None]), self.expand(columns[..., None, :])
        # One 3x3 kernel serves both; on maps of one column or row, all but its middle meets padding.
        weight, bias = self.expand.weight, self.expand.bias
        rows = F.conv1d(rows, weight[..., 1], bias, padding=1)[:, :, :, None]
        columns = F.conv1d(columns, weight[..., 1, :], bias, padding=1)[:, :, None]
        return rows, columns


class MultiBranchHybridAttention(nn.Module):
    """MHA: parallel convolutions and the identity, then SHA on a residual branch."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)
        self.conv3 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.act = nn.ELU()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.sha = SeparableHybridAttention(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""

        def convolve(x: Tensor) -> Tensor:
            return self.conv(self.act(self.conv1(x) + self.conv3(x) + x))

        return self.sha(convolved(convolve, x, halo=2, dim=2), x)


class ContextualTransformer(nn.Module):
    """CoT: static context of a 3x3 neighbourhood, plus values weighted by attention over all positions.

    Args:
        dim: channels.
        kernel_size: side of the neighbourhood; the attention is predicted per neighbour and averaged.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.neighbours = kernel_size**2
        self.reach = kernel_size // 2
        self.key = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.value = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.att1 = nn.Conv2d(2 * dim, dim // 2, 1, bias=False, **dd)
        self.att2 = nn.Conv2d(dim // 2, self.neighbours * dim, 1, **dd)
        self.act = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        key = convolved(self.key, x, halo=self.reach, dim=2)
        normalise = _instance_norm(key)
        key = pixelwise(lambda key: self.act(normalise(key)), key, dim=2, into=key)
        y = pixelwise(lambda key, x: self.att1(torch.cat((key, x), 1)), key, x, dim=2)
        normalise_y, value = _instance_norm(y), self.value(x)
        normalise_value = _instance_norm(value)
        logits = pixelwise(self._mean_attention(normalise_y), y, dim=2)

        def extend(total: Tensor, logits: Tensor, core: slice) -> Tensor:
            return torch.logaddexp(total, logits.flatten(2).logsumexp(-1))

        nothing = logits.new_full((), float("-inf"))
        total = folded(extend, nothing, logits, dim=2)[..., None, None]

        def mix(key: Tensor, logits: Tensor, value: Tensor) -> Tensor:
            return key + (logits - total).exp() * normalise_value(value)

        return pixelwise(mix, key, logits, value, dim=2, into=key)

    def _mean_attention(self, normalise: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What takes features to attention logits, the mean over the neighbours."""
        if not is_as_made(nn.Conv2d, self.att2):
            return lambda y: self.att2(self.act(normalise(y))).unflatten(1, (-1, self.neighbours)).mean(2)
        # The mean over the neighbours of a linear layer's outputs is the output of its mean.
        both: Any = (self.att2.weight, self.att2.bias)
        weight, bias = (p.unflatten(0, (-1, self.neighbours)).mean(1) for p in both)
        return lambda y: F.conv2d(self.act(normalise(y)), weight, bias)


class AdaptiveFusion(nn.Module):
    """AFF: `sigmoid(theta) a + (1 - sigmoid(theta)) b` with one learned number."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """`a` and `b` of one shape."""
        return b + self.theta.sigmoid() * (a - b)


class Block(nn.Module):
    """MHA-C: multi-branch hybrid attention and contextual transformer side by side, fused."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mha = MultiBranchHybridAttention(dim, **dd)
        self.cot = ContextualTransformer(dim, **dd)
        self.aff = AdaptiveFusion(**dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        mha, cot = self.mha(x), self.cot(x)
        return pixelwise(self.aff, mha, cot, dim=2, into=mha)


def _framed(x: Tensor) -> Tensor:
    """A map with a reflected row or column more on every side: adapters of convolutions pad with zeros."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


class Tail(nn.Module):
    """Features to a correction of the image in (-1, 1)."""

    def __init__(
        self,
        dim: int,
        in_chans: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, **dd)
        self.act = nn.ELU()
        self.conv2 = nn.Conv2d(dim, in_chans, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, in_chans, H, W]`."""
        return self.conv2(self.act(self.conv1(_framed(x)))).tanh()


class Shallow(nn.Module):
    """The first half: a U-shaped network whose blocks work at a quarter of the image's sides."""

    def __init__(
        self,
        in_chans: int,
        mid_dim: int,
        dim: int,
        out_dim: int,
        depth: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down1 = nn.Conv2d(in_chans, mid_dim, 3, stride=2, padding=1, **dd)
        self.sha1 = SeparableHybridAttention(mid_dim, **dd)
        self.down2 = nn.Conv2d(mid_dim, dim, 3, stride=2, padding=1, **dd)
        self.sha2 = SeparableHybridAttention(dim, **dd)
        self.blocks = nn.Sequential(*(Block(dim, **dd) for _ in range(depth)))
        self.up1 = nn.Conv2d(dim, mid_dim, 3, padding=1, **dd)
        self.up_sha1 = SeparableHybridAttention(mid_dim, **dd)
        self.up2 = nn.Conv2d(mid_dim, out_dim, 3, padding=1, **dd)
        self.up_sha2 = SeparableHybridAttention(out_dim, **dd)
        self.tail = Tail(out_dim, in_chans, **dd)
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` to features `[B, out_dim, H, W]` and the pseudo-haze-free images."""
        down: dict[str, Any] = {"halo": 2, "scale": Fraction(1, 2), "dim": 2}
        half = self.sha1(convolved(self.down1, image, **down))
        quarter = self.sha2(convolved(self.down2, half, **down))
        y = run_blocks(self.blocks, quarter, self.grad_checkpointing and self.training)
        up: dict[str, Any] = {"halo": 2, "scale": 2, "dim": 2}
        y = self.up_sha1(convolved(lambda y, skip: self.up1(_twice(y + skip)), y, quarter, **up))
        features = self.up_sha2(convolved(lambda y, skip: self.up2(_twice(y + skip)), y, half, **up))
        pseudo = convolved(lambda y, image: image + self.tail(y), features, image, halo=2, dim=2)
        return features, pseudo


class Density(nn.Module):
    """The density of the haze from the hazy and the pseudo-haze-free image."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(2 * in_chans, dim, 3, **dd)
        self.act = nn.ELU()
        self.sha = SeparableHybridAttention(dim, **dd)
        self.conv2 = nn.Conv2d(dim, 1, 3, padding=1, **dd)

    def forward(self, image: Tensor, pseudo: Tensor) -> Tensor:
        """Two images `[B, C, H, W]` to `[B, 1, H, W]` in (0, 1)."""

        def convolve(*images: Tensor) -> Tensor:
            return self.act(self.conv1(_framed(torch.cat(images, 1))))

        y = self.sha(convolved(convolve, image, pseudo, halo=1, dim=2))
        return convolved(lambda y: self.conv2(y).sigmoid(), y, halo=1, dim=2)


class Deep(nn.Module):
    """The second half: blocks at the image's own size, on features weighted by the density."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_in = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.aff = AdaptiveFusion(**dd)
        self.blocks = nn.Sequential(*(MultiBranchHybridAttention(dim, **dd) for _ in range(depth)))
        self.tail = Tail(dim, in_chans, **dd)
        self.grad_checkpointing = False

    def forward(self, mixed: Tensor, density: Tensor, features: Tensor) -> Tensor:
        """The correction of the hazy image.

        Args:
            mixed: an image `[B, C, H, W]`.
            density: `[B, 1, H, W]`, a factor on the features.
            features: `[B, dim, H, W]` that nobody else needs: they may be overwritten.
        """

        def fuse(mixed: Tensor, density: Tensor, features: Tensor) -> Tensor:
            return self.aff(self.conv_in(mixed), density * features)

        # The halo is for the image: no row of the features reaches another one.
        y = convolved(fuse, mixed, density, features, halo=1, dim=2, into=features)
        y = run_blocks(self.blocks, y, self.grad_checkpointing and self.training)
        return convolved(self.tail, y, halo=2, dim=2)


class PMNet(Restorer):
    """Dehazing of images `[B, in_chans, H, W]` in [0, 1], any size.

    Sides are reflect-padded on the right and bottom to multiples of 4, and the output is cropped. Rows,
    columns and whole maps are averaged: tiles give other numbers.

    Args:
        in_chans: image channels.
        mid_dim: channels at half of the sides.
        embed_dim: channels at a quarter of the sides.
        deep_dim: channels of the second half.
        depth: blocks of the first half.
        deep_depth: blocks of the second half.
        density_dim: channels of the density's network.

    Raises:
        ValueError: numbers of channels that are no multiples of 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        mid_dim: int = 64,
        embed_dim: int = 256,
        deep_dim: int = 16,
        depth: int = 8,
        deep_depth: int = 10,
        density_dim: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = (mid_dim, embed_dim, deep_dim, density_dim)
        if any(dim % 4 for dim in dims):
            raise ValueError(
                f"mid_dim, embed_dim, deep_dim and density_dim must be multiples of 4, got {dims}"
            )
        info = RestorationInfo(
            task="dehazing", channels=in_chans, min_size=3, size_multiple=4, exact_tiling=False
        )
        super().__init__(info, deep_dim)
        self.shallow = Shallow(in_chans, mid_dim, embed_dim, deep_dim, depth, **dd)
        self.density = Density(in_chans, density_dim, **dd)
        self.mix = AdaptiveFusion(**dd)
        self.deep = Deep(in_chans, deep_dim, deep_depth, **dd)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay; coarse takes the halves whole."""
        coarse_blocks = [(r"^shallow", (0,)), (r"^(?:density|mix)", (1,)), (r"^deep", (2,))]
        fine = [
            (r"^shallow\.blocks\.(\d+)", None),
            (r"^shallow\.(?:up|tail)", (1000,)),
            (r"^(?:density|mix|deep\.(?:conv_in|aff))", (1001,)),
            *((rf"^deep\.blocks\.{i}\.", (1002 + i,)) for i in range(len(self.deep.blocks))),
            (r"^deep\.tail", (99999,)),
        ]
        return {"stem": r"^shallow\.(?:down|sha)", "blocks": coarse_blocks if coarse else fine}

    def forward_all(self, x: Tensor) -> Dehazed:
        """Hazy images `[B, in_chans, H, W]` to restored and pseudo-haze-free images and the density.

        Training supervises both images; the official loss is the sum of their Charbonnier losses.

        Raises:
            ValueError: an image too small to be padded; the message says the smallest size.
        """
        return Dehazed(*(self.cropped(out, x) for out in self._dehaze(self.padded(x))))

    def restore(self, x: Tensor) -> Tensor:
        """Filled-up hazy images `[B, in_chans, H, W]` to clear ones; `forward_all` gives more."""
        return self._dehaze(x)[0]

    def _dehaze(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, pseudo = self.shallow(image)
        density = self.density(image, pseudo)
        return image + self.deep(self.mix(image, pseudo), density, features), pseudo, density


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


def _instance_norm(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Instance norm without parameters, with the statistics of `x` `[B, C, H, W]`, for bands of its rows."""
    var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    scale = (var + 1e-5).rsqrt()
    return lambda rows: torch.addcmul(-mean * scale, rows, scale)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    return {
        "in_chans": ours["shallow.down1.weight"][1],
        "mid_dim": ours["shallow.down1.weight"][0],
        "embed_dim": ours["shallow.down2.weight"][0],
        "deep_dim": ours["deep.conv_in.weight"][0],
        "depth": ours.length("shallow.blocks"),
        "deep_depth": ours.length("deep.blocks"),
        "density_dim": ours["density.conv1.weight"][0],
    }


# There is no other layout than ours.
LAYOUT = Layout(
    family="pmnet",
    model_cls=PMNet,
    marks=(r"^shallow\.blocks\.0\.cot\.", r"^density\."),
    reads={
        "shallow.down1.weight": 4,
        "shallow.down2.weight": 4,
        "deep.conv_in.weight": 4,
        "density.conv1.weight": 4,
    },
    arguments=_arguments,
    to_official=lambda weights, model: dict(weights),
)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return restoration_cfg(
        size=256,
        min_size=3,
        first_conv="shallow.down1",
        license="mit",
        paper_ids="arXiv:2111.09733",
        paper_name="Perceiving and Modeling Density for Image Dehazing",
        origin_url="https://github.com/Owen718/ECCV22-Perceiving-and-Modeling-Density-for-Image-Dehazing",
        **kwargs,
    )


# The paper's results, PSNR/SSIM on RGB: the mark for a network trained anew, as no weights can be loaded.
_RESULTS = (
    "the authors' network: Haze4K 33.49/.98, SOTS indoor 38.41/.99, SOTS outdoor 34.74/.99, "
    "Dense-Haze 16.79/.51, NH-HAZE 20.42/.73, O-HAZE 24.64/.83"
)

default_cfgs = generate_default_cfgs(
    {
        "pmnet": _cfg(
            description="the authors' weights are a scripted network and cannot be loaded", notes=(_RESULTS,)
        ),
        "pmnet_small": _cfg(),
    }
)

VARIANTS = {
    "pmnet": Variant("PMNet as published: 20.0 M parameters."),
    "pmnet_small": Variant(
        "A small PMNet for trials, no official form: 0.1 M parameters.",
        mid_dim=16,
        embed_dim=32,
        deep_dim=8,
        depth=2,
        deep_depth=3,
        density_dim=16,
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
