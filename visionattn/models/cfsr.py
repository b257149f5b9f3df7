"""CFSR: light super-resolution in which a large depthwise convolution stands in for attention.

Paper: "Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach", TIP 2024,
https://arxiv.org/abs/2401.05633. Official code and weights: https://github.com/Aitical/CFSR (no licence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.bands import convolved, pixelwise
from visionattn.models.frames.restorer import (
    ResidualRestorer,
    RestorationInfo,
    RestorationTask,
    body_arguments,
    build_restoration,
    restoration_cfg,
    run_blocks,
)
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["CFSR"]

# Sobel x, Sobel y, Laplacian, row by row. The first and the last are not the textbook operators: two entries
# stand elsewhere. The official training code has them so, and released weights were merged with them.
_EDGE_MASKS = (
    ((0.0, 1.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)),
    ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    ((1.0, 0.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
)
_EDGES = ("sobel_x", "sobel_y", "laplacian")


class EdgeConv(nn.Conv2d):
    """Depthwise 3x3 convolution plus three edge detectors, each with a learned factor and bias per channel.

    Four depthwise convolutions of one input are one, with the sum of their kernels and biases; as such they
    run, in training too.

    Args:
        dim: channels.
    """

    bias: nn.Parameter
    masks: Tensor

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, 3, padding=1, groups=dim, **dd)
        self.edge_scale = nn.Parameter(torch.randn(dim, len(_EDGES), **dd) * 1e-3)
        self.edge_bias = nn.Parameter(torch.randn(dim, len(_EDGES), **dd) * 1e-3)
        self.register_buffer("masks", torch.tensor(_EDGE_MASKS, **dd), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        weight, bias = _merge_edges(self.weight, self.bias, self.edge_scale, self.edge_bias, self.masks)
        return F.conv2d(x, weight, bias, padding=1, groups=self.groups)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The plain depthwise convolution with the same outputs."""
        weight, bias = _merge_edges(self.weight, self.bias, self.edge_scale, self.edge_bias, self.masks)
        conv = nn.Conv2d(self.in_channels, self.in_channels, 3, padding=1, groups=self.groups, device="meta")
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return conv.train(self.training)


def _merge_edges(
    weight: Tensor, bias: Tensor, scale: Tensor, edge_bias: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Kernel `[C, 1, 3, 3]` and bias `[C]` of the sum of a convolution and its edge detectors."""
    weight = weight + (scale[:, :, None, None] * masks).sum(1, keepdim=True)
    return weight, bias + edge_bias.sum(1)


class ConvMod(nn.Module):
    """Convolutional modulation: values times a large depthwise convolution of their neighbourhood.

    Args:
        dim: channels.
        kernel_size: side of the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.a = nn.Linear(dim, dim, **dd)
        self.act = nn.GELU()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.norm(x)
        a = self.dwconv(self.act(self.a(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(a * self.v(x))


class EdgeMlp(nn.Module):
    """The edge-preserving feed-forward network: an MLP whose hidden layer passes an edge convolution.

    Args:
        dim: channels.
        hidden_dim: channels of the hidden layer.
        fused: whether the edge detectors are merged into a plain convolution.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        fused: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.pos = (
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
            if fused
            else EdgeConv(hidden_dim, **dd)
        )
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.act(self.fc1(self.norm(x)))
        return self.fc2(x + self.act(self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class Block(nn.Module):
    """Convolutional modulation and feed-forward network, residual branches with a factor per channel."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        fused: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reach = kernel_size // 2
        self.attn = ConvMod(dim, kernel_size, **dd)
        self.mlp = EdgeMlp(dim, int(dim * mlp_ratio), fused, **dd)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-6, **dd))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-6, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = convolved(lambda rows: rows + self.layer_scale_1 * self.attn(rows), x, halo=self.reach)
        return convolved(lambda rows: rows + self.layer_scale_2 * self.mlp(rows), x, halo=1)


class Layer(nn.Module):
    """Blocks, then one linear layer whose skip starts behind the blocks."""

    def __init__(
        self,
        dim: int,
        blocks: Sequence[Block],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = run_blocks(self.blocks, x, self.grad_checkpointing and self.training)
        return pixelwise(lambda rows: rows + self.conv(rows), x)


class CFSR(ResidualRestorer):
    """CFSR; images `[B, in_chans, H, W]` in [0, 1] to `[B, in_chans, s * H, s * W]`, of any size.

    In the training form the feed-forward networks learn edge detectors beside a convolution; `fuse()` merges
    them, without changing the outputs, into the form in which the official weights are released. Weights of
    either form load into either form.

    Nothing is global: tiles are exact if they overlap by the reach of the blocks, 63 pixels of the input as
    published.

    Args:
        in_chans: image channels; the mean colour is subtracted for 3 only.
        upscale: enlargement. With 1 the network restores at the same size: it predicts a correction that is
            added to its input.
        embed_dim: channels of the body.
        depths: blocks per layer.
        kernel_size: side of the modulating depthwise convolution.
        mlp_ratio: hidden width of the feed-forward networks as a multiple of `embed_dim`.
        img_range: factor on the image before the network, undone after it.
        task: what `info` states; by default super-resolution, or denoising at the same size.
        fused: build the merged form.

    Raises:
        ValueError: an `upscale` below 1, or an even `kernel_size`.
    """

    undecayed = ("edge_scale", "edge_bias")
    tail_halo = 1

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 4,
        embed_dim: int = 48,
        depths: Sequence[int] = (6, 6),
        kernel_size: int = 9,
        mlp_ratio: float = 2.0,
        img_range: float = 1.0,
        task: RestorationTask | None = None,
        fused: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if upscale < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"upscale must be at least 1 and kernel_size odd, got upscale={upscale}, "
                f"kernel_size={kernel_size}"
            )
        info = RestorationInfo(
            task=task or ("super-resolution" if upscale > 1 else "denoising"),
            upscale=upscale,
            channels=in_chans,
        )

        def layer(depth: int) -> Layer:
            blocks = [Block(embed_dim, kernel_size, mlp_ratio, fused, **dd) for _ in range(depth)]
            return Layer(embed_dim, blocks, **dd)

        super().__init__(info, embed_dim, map(layer, depths), img_range, eps=1e-6, **dd)
        self.conv_last = nn.Conv2d(embed_dim, upscale**2 * in_chans, 3, padding=1, **dd)

    def enlarge(self, y: Tensor) -> Tensor:
        """Features `[B, embed_dim, H, W]` to `[B, in_chans, upscale * H, upscale * W]`."""
        return F.pixel_shuffle(self.conv_last(y), self.info.upscale)

    def fuse(self) -> CFSR:
        """Merge the edge detectors into plain convolutions, in place, for inference; returns the network.

        Outputs stay equal up to rounding. On a merged network it does nothing.
        """
        for module in self.modules():
            if isinstance(module, EdgeMlp) and isinstance(module.pos, EdgeConv):
                module.pos = module.pos.fuse()
        return self


_NAMES = Names((".attn.a.2.lkb_reparam.", ".attn.dwconv."), (".attn.a.0.", ".attn.a."))
_SHUFFLED = Names(("^upsample.0.", "^conv_last."))


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our shapes, in the form that the weights have; the edge operators are constants."""
    out = {}
    for name, value in weights.items():
        if ".mlp.mask_" not in name:
            pointwise = name.endswith(".weight") and value.ndim == 4 and value.shape[2:] == (1, 1)
            out[name] = value.flatten(1) if pointwise else value
    first = f"scale_{_EDGES[0]}"
    for mlp in [name.removesuffix(first) for name in out if name.endswith(f".mlp.{first}")]:
        scales = [out.pop(f"{mlp}scale_{edge}").flatten() for edge in _EDGES]
        biases = [out.pop(f"{mlp}{edge}_bias") for edge in _EDGES]
        if len({x.shape for x in biases}) > 1 or len({x.shape for x in scales}) > 1:
            raise ValueError(f"the edge operators of {mlp.removesuffix('.')} differ in size")
        out[f"{mlp}pos.edge_scale"] = torch.stack(scales, 1)
        out[f"{mlp}pos.edge_bias"] = torch.stack(biases, 1)
    return out


def _to_official(weights: Weights, model: CFSR) -> dict[str, Tensor]:
    """Our weights in the authors' names, the training form with the edge operators that their code stores."""
    out = {}
    for name, value in weights.items():
        mlp, _, leaf = name.rpartition("pos.")
        if leaf == "edge_scale":
            for edge, scale, mask in zip(_EDGES, value.unbind(1), value.new_tensor(_EDGE_MASKS)):
                out[f"{mlp}scale_{edge}"] = scale[:, None, None, None]
                out[f"{mlp}mask_{edge}"] = mask.expand(len(scale), 1, 3, 3)
        elif leaf == "edge_bias":
            out |= {f"{mlp}{edge}_bias": bias for edge, bias in zip(_EDGES, value.unbind(1))}
        else:
            pointwise = name.endswith(".weight") and value.ndim == 2
            name = _NAMES.to_official(name)
            name = _SHUFFLED.to_official(name) if model.info.upscale > 1 else name
            out[name] = value[..., None, None] if pointwise else value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    body = body_arguments(ours)
    return {
        **body,
        "upscale": math.isqrt(ours["conv_last.weight"][0] // body["in_chans"]),
        "kernel_size": ours["layers.0.blocks.0.attn.dwconv.weight"][-1],
        "mlp_ratio": ours["layers.0.blocks.0.mlp.fc1.weight"][0] / body["embed_dim"],
        "fused": ours.first(r"\.pos\.edge_scale$") is None,
    }


def _fit(weights: dict[str, Tensor], model: CFSR) -> dict[str, Tensor]:
    """The edge detectors of a training form are merged for a model in merged form.

    In the other direction they are set to zero, which leaves the function as it is and lets them be trained
    on.
    """
    out = dict(weights)
    fused = not any(isinstance(module, EdgeConv) for module in model.modules())
    for mlp in [name.removesuffix("pos.weight") for name in out if name.endswith(".mlp.pos.weight")]:
        _convert_edges(out, mlp, fused)
    return out


def _convert_edges(state: dict[str, Tensor], mlp: str, fused: bool) -> None:
    """Bring the edge detectors of one feed-forward network in `state` to the model's form."""
    weight, bias = state[f"{mlp}pos.weight"], state[f"{mlp}pos.bias"]
    if fused and f"{mlp}pos.edge_scale" in state:
        edges = state.pop(f"{mlp}pos.edge_scale"), state.pop(f"{mlp}pos.edge_bias")
        masks = weight.new_tensor(_EDGE_MASKS)
        state[f"{mlp}pos.weight"], state[f"{mlp}pos.bias"] = _merge_edges(weight, bias, *edges, masks)
    elif not fused:
        for name in ("edge_scale", "edge_bias"):
            state.setdefault(f"{mlp}pos.{name}", weight.new_zeros(len(bias), len(_EDGES)))


LAYOUT = Layout(
    family="cfsr",
    model_cls=CFSR,
    marks=(r"\.layer_scale_1$", r"\.attn\.dwconv\.", r"\.mlp\.pos\."),
    rename=(_NAMES + _SHUFFLED).to_ours,
    convert=_convert,
    fit=_fit,
    reads={
        "conv_first.weight": 4,
        "conv_last.weight": 4,
        "layers.0.blocks.0.attn.dwconv.weight": 4,
        "layers.0.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="params",
    unlearned=("img_range",),
)


def _cfg(upscale: int, **kwargs: Any) -> dict[str, Any]:
    return restoration_cfg(
        url=f"https://github.com/Aitical/CFSR/raw/main/model_zoo/CFSR_x{upscale}.pth",
        license="none",
        paper_ids="arXiv:2401.05633",
        paper_name="Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach",
        origin_url="https://github.com/Aitical/CFSR",
        **kwargs,
    )


_RESULTS = (
    "PSNR-Y/SSIM Set5 32.33/.8964, Set14 28.73/.7842, BSD100 27.63/.7381, Urban100 26.21/.7897, "
    "Manga109 30.72/.9111"
)

default_cfgs = generate_default_cfgs(
    {
        "cfsr_x2": _cfg(2),
        "cfsr_x3": _cfg(3),
        "cfsr_x4": _cfg(4, notes=(_RESULTS,)),
    }
)

VARIANTS = {
    "cfsr_x2": Variant(
        "CFSR x2: 291 K parameters merged, 298 K in training, 1.2 GMACs for a 64x64 input.", upscale=2
    ),
    "cfsr_x3": Variant("CFSR x3: 298 K parameters merged, 305 K in training.", upscale=3),
    "cfsr_x4": Variant("CFSR x4: 307 K parameters merged, 314 K in training.", upscale=4),
}
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
