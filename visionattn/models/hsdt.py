"""HSDT: hyperspectral denoising with attention among bands, guided by learned queries.

Paper: "Hybrid Spectral Denoising Transformer with Guided Attention", ICCV 2023,
https://arxiv.org/abs/2303.09040. Official code and weights: https://github.com/Zeqiang-Lai/HSDT (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.as_made import is_as_made
from visionattn.layers.bands import convolved, pixelwise
from visionattn.layers.linear import Linear
from visionattn.layers.volumes import DownConv, SpectralSpatialConv, UpConv, VolumeConv, on_ndhwc
from visionattn.models.frames.restorer import (
    RestorationInfo,
    Restorer,
    build_restoration,
    restoration_cfg,
    run_blocks,
)
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["HSDT", "HSDTSSR"]

Query = Literal["learned", "self"]


class GuidedSpectralAttention(nn.Module):
    """Attention among bands (GSSA): one mixing matrix of bands for all pixels, from the mean of every band.

    The means are compared with a bank of learned queries, one per band, or with each other. In training each
    call draws one of the two, as long as there is a query for every band.

    Args:
        dim: channels.
        num_bands: learned queries.
        query: what the means are compared with in evaluation.
        self_query_rate: how often a call in training compares them with each other.
    """

    def __init__(
        self,
        dim: int,
        num_bands: int,
        query: Query = "learned",
        self_query_rate: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_bands = num_bands
        self.query = query
        self.self_query_rate = self_query_rate
        self.queries = Linear(dim, num_bands, **dd)
        self.v = Linear(dim, dim, bias=False, **dd)
        self.proj = Linear(dim, dim, bias=False, **dd)

    def weights(self, x: Tensor) -> Tensor:
        """The mixing matrix `[B, D, D]` for a map `[B, D, H, W, C]`."""
        return self._logits(x.mean((2, 3))).softmax(-1).to(x.dtype)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Rows of a map `[B, D, H, W, C]`, mixed and added to themselves."""
        mixed = (weights @ x.flatten(2)).view_as(x)
        # Bands are mixed alike in all channels and channels alike in all bands, so that the two projections
        # of values may follow the mixing as one.
        if is_as_made(Linear, self.proj, self.v):
            return x + F.linear(mixed, self.proj.weight @ self.v.weight)
        return x + self.proj(self.v(mixed))

    def _logits(self, means: Tensor) -> Tensor:
        learnable = means.shape[1] == self.num_bands
        if self.training and learnable:
            # Both are computed, so that every parameter takes part in every step, and the draw is PyTorch's,
            # so that recomputation in the backward pass repeats it.
            itself = torch.rand((), device=means.device) < self.self_query_rate
            return torch.where(itself, means @ means.mT, self.queries(means))
        return self.queries(means) if self.query == "learned" else means @ means.mT


class SelfModulatedMlp(nn.Module):
    """SM-FFN: an MLP plus a gated linear layer of the same input."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, 2 * dim, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(2 * dim, dim, **dd)
        self.gated = Linear(dim, 2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        return self.fc2(self.act(self.fc1(x))) + F.glu(self.gated(x))


class Block(nn.Module):
    """Convolution, batch norm, attention among bands, feed-forward network; `[B, D, H, W, C]`."""

    def __init__(
        self,
        conv: SpectralSpatialConv | DownConv | UpConv,
        dim: int,
        attn: GuidedSpectralAttention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = conv
        self.bn = nn.BatchNorm3d(dim, **dd)
        self.attn = attn
        self.mlp = SelfModulatedMlp(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv.on_map(x, self._normalise)
        weights = self.attn.weights(x)
        return pixelwise(lambda rows: self.mlp(self.attn(rows, weights)), x, dim=2, into=x)

    def _normalise(self, x: Tensor) -> Tensor:
        return on_ndhwc(self.bn, x)


class HSDT(Restorer):
    """HSDT; hyperspectral images `[B, bands, H, W]` in [0, 1] to the same shape, of any height and width.

    The official shape `[B, 1, bands, H, W]` is taken and returned too. Images whose sides cannot be halved
    often enough are reflect-padded on the right and bottom, and the output is cropped. The attention compares
    means of whole bands: tiles give other numbers.

    Args:
        in_chans: bands, and learned queries in every block (31 in official weights).
        query: `"learned"` needs exactly as many bands as learned queries; `"self"` compares bands with each
            other and takes any number, with the same weights.
        embed_dim: channels at full resolution; every halving of the sides doubles them.
        depth: blocks of the encoder, and of the decoder.
        downsample: which blocks of the encoder halve the sides.
        noise_map: whether the network takes a map of the noise level beside the image.
        self_query_rate: how often, in training, a block compares bands with each other instead of with the
            learned queries; 0.5 in official training.

    Raises:
        ValueError: an unknown `query`, or a `downsample` that the encoder lacks.
    """

    def __init__(
        self,
        in_chans: int = 31,
        query: Query = "learned",
        embed_dim: int = 16,
        depth: int = 5,
        downsample: Sequence[int] = (1, 3),
        noise_map: bool = False,
        self_query_rate: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if query not in ("learned", "self"):
            raise ValueError(f"query={query!r} is unknown; choose 'learned' or 'self'")
        if not set(downsample) <= set(range(depth)):
            raise ValueError(f"downsample must name blocks from 0 to {depth - 1}, got {tuple(downsample)}")
        multiple = 2 ** len(downsample)
        info = RestorationInfo(
            task="hyperspectral-denoising",
            channels=in_chans,
            min_size=multiple // 2 + 1,
            size_multiple=multiple,
            exact_tiling=False,
        )
        super().__init__(info, embed_dim)
        self.num_bands = in_chans
        self.query = query
        self.noise_map = noise_map

        def block(conv: type[Any], dims: Sequence[int], dim: int) -> Block:
            attn = GuidedSpectralAttention(dim, in_chans, query, self_query_rate, **dd)
            return Block(conv(*dims, **dd), dim, attn, **dd)

        encoder, decoder, dim = [], [], embed_dim
        for i in range(depth):
            if i in downsample:
                encoder.append(block(DownConv, (dim,), 2 * dim))
                decoder.append(block(UpConv, (2 * dim,), dim))
                dim *= 2
            else:
                encoder.append(block(SpectralSpatialConv, (dim, dim), dim))
                decoder.append(block(SpectralSpatialConv, (dim, dim), dim))
        self.head = block(SpectralSpatialConv, (2 if noise_map else 1, embed_dim), embed_dim)
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(reversed(decoder))
        self.tail = VolumeConv(embed_dim, 1, 3, padding=1, **dd)
        self.grad_checkpointing = False
        self.apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay; coarse and fine are the same."""
        depth = len(self.encoder)
        blocks: list[tuple[str, tuple[int, ...] | None]] = [(r"^encoder\.(\d+)", None)]
        blocks += [(rf"^decoder\.{i}\.", (depth + i,)) for i in range(depth)]
        return {"stem": r"^(?:proj|head)", "blocks": [*blocks, (r"^tail", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """Input maps `[B, D, H, W, 1 or 2]` to features `[B, D, H, W, embed_dim]`."""
        recompute = self.grad_checkpointing and self.training
        skips = [self.head(x)]
        for block in self.encoder:
            skips.append(run_blocks((block,), skips[-1], recompute))
        y = skips.pop()
        for block in self.decoder:
            y = run_blocks((block,), y, recompute)
            y = pixelwise(torch.add, y, skips.pop(), dim=2, into=y)
        return y

    def forward(self, x: Tensor, noise_level: Tensor | float | None = None) -> Tensor:
        """Noisy images to clean ones, unclipped.

        Args:
            x: images `[B, bands, H, W]` or `[B, 1, bands, H, W]`; where the network takes a noise map, also
                `[B, 2, bands, H, W]`, the second being that map.
            noise_level: standard deviation of the noise, for a network that takes a noise map and an image
                without one: anything that broadcasts to `[B, bands, H, W]`; none given is 0.

        Returns:
            `[B, bands, H, W]` or `[B, 1, bands, H, W]`, as the images came.

        Raises:
            ValueError: a shape, a number of bands or a noise level that the network cannot take, or an image
                too small to be padded; the message says the smallest size.
        """
        maps = self._input_maps(x, noise_level)
        padded = self.padded(maps.flatten(1, 2)).unflatten(1, maps.shape[1:3])
        y = self.cropped(self.restore(padded), x)
        return y if x.dim() == 5 else y[:, 0]

    def restore(self, x: Tensor) -> Tensor:
        """Filled-up input maps `[B, 1 or 2, D, H, W]` to clean images `[B, 1, D, H, W]`."""
        y = self.forward_features(x.permute(0, 2, 3, 4, 1).contiguous())

        def tail(y: Tensor, x: Tensor) -> Tensor:
            return x + on_ndhwc(self.tail, y)

        return convolved(tail, y, x[:, :1].permute(0, 2, 3, 4, 1), halo=1, dim=2).permute(0, 4, 1, 2, 3)

    def _input_maps(self, x: Tensor, noise_level: Tensor | float | None) -> Tensor:
        """`[B, 1 or 2, D, H, W]`: the image, and the noise map if the network takes one."""
        maps = x if x.dim() == 5 else x[:, None]
        if maps.dim() != 5 or maps.shape[1] not in (1, 1 + self.noise_map):
            raise ValueError(
                f"images must be [B, bands, H, W] or [B, {1 + self.noise_map}, bands, H, W], "
                f"got {tuple(x.shape)}"
            )
        if self.query == "learned" and maps.shape[2] != self.num_bands:
            raise ValueError(
                f"{self.num_bands} learned queries cannot take {maps.shape[2]} bands: create the network "
                f"with query='self', or with in_chans={maps.shape[2]} to train it anew"
            )
        wanted = self.noise_map and maps.shape[1] == 1
        if noise_level is not None and not wanted:
            where = "the images bring a noise map" if self.noise_map else "this network takes no noise map"
            raise ValueError(f"noise_level was given, but {where}")
        if wanted:
            level = 0.0 if noise_level is None else noise_level
            level = torch.as_tensor(level, device=x.device, dtype=x.dtype)
            maps = torch.cat((maps, level.expand_as(maps[:, 0])[:, None]), 1)
        return maps


class HSDTSSR(HSDT):
    """HSDT for spectral super-resolution; RGB images `[B, in_chans, H, W]` in [0, 1] to `[B, bands, H, W]`.

    One linear layer per pixel guesses the bands, which HSDT corrects. In evaluation, zeros are appended on
    the right and bottom up to the next multiple of 8, to a divisible side too, as in the official code.

    Args:
        in_chans: image channels.
        bands: bands of the output.
        **kwargs: of `HSDT`.
    """

    def __init__(self, in_chans: int = 3, bands: int = 31, **kwargs: Any):
        super().__init__(bands, **kwargs)
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, bands, 1, bias=False, **dd)
        self.info = replace(
            self.info, task="spectral-super-resolution", channels=in_chans, out_channels=bands
        )
        _init_weights(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """RGB images `[B, in_chans, H, W]` to `[B, bands, H, W]`, unclipped."""
        height, width = x.shape[-2:]
        if not self.training:
            x = F.pad(x, (0, 8 - width % 8, 0, 8 - height % 8))
        return super().forward(F.leaky_relu(self.proj(x)))[..., :height, :width]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.xavier_normal_(module.weight)  # what the authors advise
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_NAMES = Names(
    ("^encoder.layers.#.", "^encoder.#."),
    ("^decoder.layers.#.", "^decoder.#."),
    (".attn.attn.attn_proj.", ".attn.queries."),
    (".attn.attn.value_proj.", ".attn.v."),
    (".attn.attn.fc.", ".attn.proj."),
    (".attn.ffn.w_1.", ".mlp.fc1."),
    (".attn.ffn.w_2.", ".mlp.fc2."),
    (".attn.ffn.w_3.", ".mlp.gated."),
    ("^encoder.#.conv.weight$", "^encoder.#.conv.conv.weight$"),
    ("^decoder.#.conv.weight$", "^decoder.#.conv.conv.weight$"),
    (".conv.dw_conv.0.", ".conv.spatial1."),
    (".conv.dw_conv.2.", ".conv.spatial2."),
    (".conv.pw_conv.", ".conv.spectral."),
)


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """3-D convolutions of one band, or of one pixel, become 2-D ones."""
    out = {}
    for name, value in weights.items():
        if value.ndim == 5 and ".spatial" in name:
            value = value.squeeze(2)
        elif value.ndim == 5 and ".spectral" in name:
            value = value.squeeze(4)
        out[name] = value
    return out


def _to_official(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Our weights in the authors' names."""
    out = {}
    for name, value in weights.items():
        value = value.unsqueeze(2) if ".spatial" in name else value
        out[_NAMES.to_official(name)] = value.unsqueeze(4) if ".spectral" in name else value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    depth = ours.length("encoder")
    return {
        "in_chans": ours["head.attn.queries.weight"][0],
        "embed_dim": ours["head.conv.spatial1.weight"][0],
        "depth": depth,
        "downsample": tuple(i for i in range(depth) if f"encoder.{i}.conv.conv.weight" in ours),
        "noise_map": ours["head.conv.spatial1.weight"][1] == 2,
    }


def _arguments_ssr(ours: Shapes, official: Shapes) -> dict[str, Any]:
    arguments = _arguments(ours, official)
    bands = arguments.pop("in_chans")
    return {**arguments, "bands": bands, "in_chans": ours["proj.weight"][1]}


_READS = {"head.attn.queries.weight": 2, "head.conv.spatial1.weight": 4}
_MARKS = (r"^head\.conv\.spectral\.", r"\.mlp\.gated\.")
LAYOUT = Layout(
    family="hsdt",
    model_cls=HSDT,
    marks=_MARKS,
    rename=_NAMES.to_ours,
    convert=_convert,
    reads=_READS,
    arguments=_arguments,
    to_official=_to_official,
    wrapper="net",
    unlearned=("query",),
)
_LAYOUT_SSR = replace(
    LAYOUT,
    model_cls=HSDTSSR,
    marks=(*_MARKS, r"^proj\.weight$"),
    reads={**_READS, "proj.weight": 4},
    arguments=_arguments_ssr,
)


def _cfg(notes: Sequence[str] = (), channels: int = 31, **kwargs: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "first_conv": "head.conv.spatial1",
        "license": "mit",
        "paper_ids": "arXiv:2303.09040",
        "paper_name": "Hybrid Spectral Denoising Transformer with Guided Attention",
        "origin_url": "https://github.com/Zeqiang-Lai/HSDT",
        "description": "weights: https://github.com/Zeqiang-Lai/HSDT/releases/tag/v1.0" if notes else "",
        "notes": tuple(notes),
    }
    return restoration_cfg(channels=channels, **{"min_size": 3, **facts, **kwargs})


def _gaussian(*results: str) -> list[str]:
    """PSNR/SSIM/SAM on ICVL by the standard deviation of the noise."""
    levels = ("30", "50", "70", "blind")
    return [f"ICVL sigma {level}: PSNR/SSIM/SAM {result}" for level, result in zip(levels, results)]


def _complex(*psnr: float) -> list[str]:
    """PSNR on ICVL by the kind of noise."""
    kinds = ("non-iid", "stripe", "deadline", "impulse", "mixture")
    return [f"ICVL {kind}: PSNR {value:.2f}" for kind, value in zip(kinds, psnr)]


# Tags name the noise of the training. The weights are assets of a release page, not addresses of their own.
default_cfgs = generate_default_cfgs(
    {
        "hsdt_s.icvl_gaussian": _cfg(
            _gaussian("43.31/.990/.047", "41.16/.985/.055", "39.66/.980/.064", "42.57/.988/.051")
        ),
        "hsdt_s.icvl_complex": _cfg(_complex(43.46, 43.13, 42.97, 41.11, 40.22)),
        "hsdt_m.icvl_gaussian": _cfg(
            _gaussian("44.02/.991/.041", "41.82/.986/.049", "40.33/.981/.055", "43.32/.989/.045")
        ),
        "hsdt_m.icvl_complex": _cfg(_complex(44.56, 44.29, 44.18, 41.28, 40.46)),
        "hsdt_l.icvl_gaussian": _cfg(
            _gaussian("44.31/.992/.041", "42.09/.987/.048", "40.59/.982/.054", "43.59/.989/.044"),
            min_size=5,
        ),
        "hsdt_l.icvl_complex": _cfg(_complex(44.94, 44.69, 44.55, 42.02, 41.07), min_size=5),
        "hsdt_4": _cfg(),
        "hsdt_24": _cfg(),
        "hsdt_32": _cfg(),
        "hsdt_pnp": _cfg(),
        "hsdt_ssr": _cfg(channels=3, first_conv="proj"),
    }
)

VARIANTS = {
    "hsdt_s": Variant("HSDT-S: 0.13 M parameters, 189 GMACs for 31 bands of 512x512.", embed_dim=8),
    "hsdt_m": Variant("HSDT-M: 0.52 M parameters, 750 GMACs for 31 bands of 512x512.", embed_dim=16),
    "hsdt_l": Variant(
        "HSDT-L: 2.09 M parameters, 1045 GMACs for 31 bands of 512x512.",
        embed_dim=16,
        depth=7,
        downsample=(1, 3, 5),
    ),
    "hsdt_4": Variant("HSDT of 4 channels: 0.04 M parameters.", embed_dim=4),
    "hsdt_24": Variant("HSDT of 24 channels: 1.16 M parameters.", embed_dim=24),
    "hsdt_32": Variant("HSDT of 32 channels: 2.05 M parameters.", embed_dim=32),
    "hsdt_pnp": Variant(
        "HSDT-M that is told the level of the noise, for plug-and-play restoration: 0.52 M parameters.",
        noise_map=True,
    ),
}
_VARIANTS_SSR = {
    "hsdt_ssr": Variant(
        "HSDT-M behind a linear layer, for spectral super-resolution of RGB images: 0.52 M parameters."
    ),
}
# The longer form first: weights with its linear layer have the marks of the other too.
register(__name__, _LAYOUT_SSR, _VARIANTS_SSR, builder=build_restoration)
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
