"""HAT: restoration by windowed self-attention, channel attention and overlapping cross-attention.

Papers: "Activating More Pixels in Image Super-Resolution Transformer", CVPR 2023,
https://arxiv.org/abs/2205.04437; "HAT: Hybrid Attention Transformer for Image Restoration",
https://arxiv.org/abs/2309.05239. Official code and weights: https://github.com/XPixelGroup/HAT (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels import overlapping_window_attention, window_attention
from visionattn.layers.bands import convolved, pixelwise, windowed
from visionattn.layers.linear import Linear, Mlp
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import drop_path_rates, init_linear
from visionattn.models.frames.restorer import (
    ResidualRestorer,
    RestorationInfo,
    RestorationTask,
    add_convolved,
    body_arguments,
    build_restoration,
    restoration_cfg,
    run_blocks,
)
from visionattn.models.hosts.swin_buffers import window_index
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["HAT"]


class ChannelAttentionBlock(nn.Module):
    """Two convolutions through a narrow middle, then a gate per channel from the mean of the whole map.

    Args:
        dim: channels.
        compress_ratio: the middle has `dim // compress_ratio` channels.
        squeeze_factor: the gate's hidden layer has `dim // squeeze_factor` channels.
    """

    def __init__(
        self,
        dim: int,
        compress_ratio: int,
        squeeze_factor: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim // compress_ratio, 3, padding=1, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // compress_ratio, dim, 3, padding=1, **dd)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim // squeeze_factor, 1, **dd),
            nn.ReLU(),
            nn.Conv2d(dim // squeeze_factor, dim, 1, **dd),
            nn.Sigmoid(),
        )

    def convolve(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        return on_nhwc(self.conv2, self.act(on_nhwc(self.conv1, x)))

    def factors(self, convolved: Tensor) -> Tensor:
        """Factors `[B, 1, 1, C]` for the output `[B, H, W, C]` of the convolutions."""
        return on_nhwc(self.gate, convolved)


class WindowAttention(nn.Module):
    """Attention in windows with a relative bias; with `overlap`, over larger windows of keys.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: side of a window of queries in pixels.
        shift: where windows begin.
        overlap: pixels by which the window of keys reaches beyond that of the queries on every side. Keys
            beyond the image are zero vectors that take part in the softmax, as in the official code.
        qkv_bias: whether the projection to queries, keys and values has a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int = 0,
        overlap: int = 0,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.overlap = overlap
        side = 2 * (window_size + overlap) - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_heads, side, side, **dd))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, top: int = 0) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`; windows are counted from row `-top`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        bias = self.relative_position_bias_table
        if self.overlap:
            out = overlapping_window_attention(q, k, v, self.window_size, self.overlap, bias=bias)
        else:
            shift = ((self.shift - top) % self.window_size, self.shift)
            out = window_attention(q, k, v, self.window_size, shift=shift, bias=bias)
        return self.proj(out.flatten(3))


class Block(nn.Module):
    """Attention, beside it optionally channel attention, then an MLP; residual branches on `[B, H, W, C]`.

    With channel attention it is HAT's hybrid attention block (HAB), with overlapping windows and without
    channel attention its overlapping cross-attention block (OCAB).

    Args:
        dim: channels.
        attn: the window attention.
        channel_attn: the channel attention block, which sees the same normalised input, or None.
        channel_scale: factor of the channel attention branch.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        drop_path: stochastic depth of the attention and MLP branches; the channel branch has none.
    """

    def __init__(
        self,
        dim: int,
        attn: WindowAttention,
        channel_attn: ChannelAttentionBlock | None,
        channel_scale: float,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channel_scale = channel_scale
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.channel_attn = channel_attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        window, shift = self.attn.window_size, self.attn.shift
        channel_attn = self.channel_attn
        if channel_attn is None:
            # A row of windows sees the rows of windows next to it.
            x = windowed(self._attend, x, window=window, halo=window)
        else:
            convolutions = convolved(lambda rows: channel_attn.convolve(self.norm1(rows)), x, halo=2)
            factors = self.channel_scale * channel_attn.factors(convolutions)

            def attend(rows: Tensor, convolutions: Tensor, top: int) -> Tensor:
                return self._attend(rows, top) + factors * convolutions

            x = windowed(attend, x, convolutions, window=window, shift=shift, into=convolutions)
        return pixelwise(lambda rows: rows + self.drop_path(self.mlp(self.norm2(rows))), x, into=x)

    def _attend(self, x: Tensor, top: int = 0) -> Tensor:
        return x + self.drop_path(self.attn(self.norm1(x), top))


class Group(nn.Module):
    """Residual hybrid attention group (RHAG): blocks, an overlapping block, a convolution, one skip."""

    def __init__(
        self,
        dim: int,
        blocks: Sequence[Block],
        overlap_attn: Block,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.overlap_attn = overlap_attn
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, device=device, dtype=dtype)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        blocks = (*self.blocks, self.overlap_attn)
        y = run_blocks(blocks, x, self.grad_checkpointing and self.training)
        return add_convolved(x, self.conv, y)


class HAT(ResidualRestorer):
    """HAT; images `[B, in_chans, H, W]` in [0, 1] to `[B, in_chans, s * H, s * W]`.

    With `upscale=1` it restores at the same size: a last convolution straight from the body predicts a
    correction that is added to the input. The authors released nothing for denoising and JPEG artefacts; this
    head, as SwinIR's, is this library's design.

    Inputs are reflect-padded on the right and bottom to a multiple of the window, and the output is cropped,
    as the official evaluation does. Global means in the channel attention make the result depend on the
    whole image: tiles give other numbers.

    Args:
        in_chans: image channels; the mean colour is subtracted for 3 only.
        upscale: 1, 2, 3, 4 or 8.
        embed_dim: channels of the body.
        depths: hybrid attention blocks per group.
        num_heads: attention heads.
        window_size: side of a window in pixels.
        compress_ratio: narrowing of the channel attention's convolutions.
        squeeze_factor: narrowing of its gate.
        conv_scale: factor of the channel attention branch.
        overlap_ratio: side of the key window in the overlapping attention is `window_size * (1 + ratio)`.
        mlp_ratio: hidden width of the MLPs as a multiple of `embed_dim`.
        qkv_bias: bias of the query, key and value projections.
        img_range: factor on the image before the network, undone after it.
        task: what `info` states; by default super-resolution, or denoising at the same size.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 (0.1 in official
            training).

    Raises:
        ValueError: another `upscale`, or an overlap that is not even.
    """

    undecayed = ("relative_position_bias_table",)

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 4,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        img_range: float = 1.0,
        task: RestorationTask | None = None,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if upscale not in (1, 2, 3, 4, 8):
            raise ValueError(f"upscale must be 1, 2, 3, 4 or 8, got {upscale}")
        overlap, odd = divmod(int(window_size * overlap_ratio), 2)
        if odd or not overlap:
            raise ValueError(
                "window_size * overlap_ratio must be an even number of pixels, "
                f"got {window_size} * {overlap_ratio}"
            )

        def attention(**kwargs: int) -> WindowAttention:
            return WindowAttention(embed_dim, num_heads, window_size, qkv_bias=qkv_bias, **kwargs, **dd)

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        layers = []
        for depth in depths:
            blocks = []
            for i in range(depth):
                attn = attention(shift=window_size // 2 if i % 2 else 0)
                channel_attn = ChannelAttentionBlock(embed_dim, compress_ratio, squeeze_factor, **dd)
                blocks.append(Block(embed_dim, attn, channel_attn, conv_scale, mlp_ratio, next(rates), **dd))
            overlap_attn = Block(embed_dim, attention(overlap=overlap), None, 0.0, mlp_ratio, **dd)
            layers.append(Group(embed_dim, blocks, overlap_attn, **dd))

        info = RestorationInfo(
            task=task or ("super-resolution" if upscale > 1 else "denoising"),
            upscale=upscale,
            channels=in_chans,
            min_size=window_size // 2 + 1,
            size_multiple=window_size,
            exact_tiling=False,
            half_safe=False,
        )
        super().__init__(info, embed_dim, layers, img_range, embed_norm=True, **dd)
        self.window_size = window_size
        self.add_tail(**dd)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, WindowAttention):
        trunc_normal_(module.relative_position_bias_table, std=0.02)


_NAMES = Names(
    ("^patch_embed.norm.", "^embed_norm."),
    ("^layers.#.residual_group.blocks.#.", "^layers.#.blocks.#."),
    ("^layers.#.residual_group.overlap_attn.", "^layers.#.overlap_attn."),
    (".conv_block.cab.0.", ".channel_attn.conv1."),
    (".conv_block.cab.2.", ".channel_attn.conv2."),
    (".conv_block.cab.3.attention.", ".channel_attn.gate."),
    (".overlap_attn.qkv.", ".overlap_attn.attn.qkv."),
    (".overlap_attn.proj.", ".overlap_attn.attn.proj."),
    (".overlap_attn.relative", ".overlap_attn.attn.relative"),
)


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our shapes, without the stored indices.

    Bias tables become `[heads, rows, columns]`, key minus query. The official window tables are query minus
    key; the official overlapping tables are indexed with an offset that makes some indices negative, so that
    they wrap round the end of the table.
    """
    out = {name: value for name, value in weights.items() if "position_index" not in name}
    for name, table in out.items():
        if name.endswith("relative_position_bias_table") and table.ndim == 2:
            table = table.unflatten(0, (round(table.shape[0] ** 0.5), -1)).permute(2, 0, 1)
            if ".overlap_attn." not in name:
                out[name] = table.flip(1, 2)
            else:
                plain = out[name.replace("overlap_attn", "blocks.0")]
                window = (round((plain.shape[0] if plain.ndim == 2 else plain[0].numel()) ** 0.5) + 1) // 2
                out[name] = _rolled(table, window, 1)
    return out


def _rolled(table: Tensor, window: int, direction: int) -> Tensor:
    """An overlapping table `[heads, rows, columns]` with the official order of entries undone, or done again.

    The official index adds window - key_window + 1 to each offset where window - 1 would make it natural.
    """
    side = table.shape[-1]
    steps = (side - window - 1) * (side + 1)
    return table.flatten(1).roll(direction * steps, 1).view_as(table)


def _to_official(weights: Weights, model: HAT) -> dict[str, Tensor]:
    """Our weights in the authors' names, with the two indices that their code stores."""
    window = model.window_size
    overlap = max(m.overlap for m in model.modules() if isinstance(m, WindowAttention))
    key_window = window + 2 * overlap
    # Key minus query, counted from an offset that makes some entries negative, see _rolled.
    overlapping = window_index((key_window, key_window), (window, window)).T
    overlapping = overlapping - (key_window - 2) * (key_window + window)
    out = {
        "relative_position_index_SA": window_index((window, window)),
        "relative_position_index_OCA": overlapping.contiguous(),
    }
    for name, value in weights.items():
        if name.endswith("relative_position_bias_table"):
            value = _rolled(value, window, -1) if ".overlap_attn." in name else value.flip(1, 2)
            value = value.flatten(1).T
        out[_NAMES.to_official(name)] = value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    body = body_arguments(ours)
    dim = body["embed_dim"]
    heads, side, _ = ours["layers.0.blocks.0.attn.relative_position_bias_table"]
    window = (side + 1) // 2
    overlap = (ours["layers.0.overlap_attn.attn.relative_position_bias_table"][1] + 1) // 2 - window
    return {
        **body,
        "num_heads": heads,
        "window_size": window,
        "compress_ratio": dim // ours["layers.0.blocks.0.channel_attn.conv1.weight"][0],
        "squeeze_factor": dim // ours["layers.0.blocks.0.channel_attn.gate.1.weight"][0],
        "overlap_ratio": 2 * overlap / window,
        "mlp_ratio": ours["layers.0.blocks.0.mlp.fc1.weight"][0] / dim,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in ours,
    }


LAYOUT = Layout(
    family="hat",
    model_cls=HAT,
    marks=(r"^layers\.0\.overlap_attn\.", r"\.channel_attn\.gate\."),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "conv_first.weight": 4,
        "layers.#.blocks.0.attn.relative_position_bias_table": 3,
        "layers.0.overlap_attn.attn.relative_position_bias_table": 3,
        "layers.0.blocks.0.channel_attn.conv1.weight": 4,
        "layers.0.blocks.0.channel_attn.gate.1.weight": 4,
        "layers.0.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="params_ema",
    unlearned=("conv_scale", "img_range"),
)


def _cfg(url: str = "", psnr: str = "", **kwargs: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "license": "apache-2.0",
        "paper_ids": ("arXiv:2205.04437", "arXiv:2309.05239"),
        "paper_name": "Activating More Pixels in Image Super-Resolution Transformer",
        "origin_url": "https://github.com/XPixelGroup/HAT",
        "description": "weights: https://drive.google.com/drive/folders/1HpmReFfoUqUbnAOQ7rvOeNU3uf_m69w0",
        "notes": (psnr,) if psnr else (),
    }
    return restoration_cfg(url=url, min_size=9, **{**facts, **kwargs})


def _psnr(*values: float) -> str:
    """PSNR on Y in the order of the paper's tables."""
    sets = ("Set5", "Set14", "BSD100", "Urban100", "Manga109")
    return "PSNR-Y " + ", ".join(f"{name} {value:.2f}" for name, value in zip(sets, values))


_MIRROR = "https://huggingface.co/Acly/hat/resolve/main/"

# Tags name the training: `df2k` from scratch, `imagenet_df2k` pretrained on ImageNet, `real_gan` for
# photographs. The authors share a folder, from which nothing can be loaded directly; two of its files have a
# mirror with an address each.
default_cfgs = generate_default_cfgs(
    {
        "hat_s_x1": _cfg(description=""),
        "hat_s_x2.df2k": _cfg(),
        "hat_s_x3.df2k": _cfg(),
        "hat_s_x4.df2k": _cfg(psnr=_psnr(32.92, 29.15, 27.97, 27.87, 32.35)),
        "hat_x1": _cfg(description=""),
        "hat_x2.df2k": _cfg(psnr=_psnr(38.63, 34.86, 32.62, 34.45, 40.26)),
        "hat_x2.imagenet_df2k": _cfg(psnr=_psnr(38.73, 35.13, 32.69, 34.81, 40.71)),
        "hat_x3.df2k": _cfg(psnr=_psnr(35.07, 31.08, 29.54, 30.23, 35.53)),
        "hat_x3.imagenet_df2k": _cfg(psnr=_psnr(35.16, 31.33, 29.59, 30.70, 35.84)),
        "hat_x4.imagenet_df2k": _cfg(
            _MIRROR + "HAT_SRx4_ImageNet-pretrain.pth", _psnr(33.18, 29.38, 28.05, 28.37, 32.87)
        ),
        "hat_x4.df2k": _cfg(psnr=_psnr(33.04, 29.23, 28.00, 27.97, 32.48)),
        "hat_x4.real_gan": _cfg(),
        "hat_x4.real_gan_sharper": _cfg(_MIRROR + "Real_HAT_GAN_sharper.pth"),
        "hat_l_x1": _cfg(description=""),
        "hat_l_x2.imagenet_df2k": _cfg(),
        "hat_l_x3.imagenet_df2k": _cfg(),
        "hat_l_x4.imagenet_df2k": _cfg(psnr=_psnr(33.30, 29.47, 28.09, 28.60, 33.09)),
    }
)


_HAT_S: dict[str, Any] = {"embed_dim": 144, "compress_ratio": 24, "squeeze_factor": 24}
_HAT_L: dict[str, Any] = {"depths": (6,) * 12}

VARIANTS = {
    "hat_s_x1": Variant(
        'HAT-S at the same size, for `task="denoising"` or `"jpeg"`; not an official form.',
        **_HAT_S,
        upscale=1,
    ),
    "hat_s_x2": Variant("HAT-S x2: 9.5 M parameters.", **_HAT_S, upscale=2),
    "hat_s_x3": Variant("HAT-S x3: 9.7 M parameters.", **_HAT_S, upscale=3),
    "hat_s_x4": Variant("HAT-S x4: 9.6 M parameters, 54.6 GMACs for a 64x64 input.", **_HAT_S, upscale=4),
    "hat_x1": Variant(
        'HAT at the same size, for `task="denoising"` or `"jpeg"`; not an official form.', upscale=1
    ),
    "hat_x2": Variant("HAT x2: 20.6 M parameters.", upscale=2),
    "hat_x3": Variant("HAT x3: 20.8 M parameters.", upscale=3),
    "hat_x4": Variant("HAT x4: 20.8 M parameters, 103.9 GMACs for a 64x64 input.", upscale=4),
    "hat_l_x1": Variant(
        'HAT-L at the same size, for `task="denoising"` or `"jpeg"`; not an official form.',
        **_HAT_L,
        upscale=1,
    ),
    "hat_l_x2": Variant("HAT-L x2: 40.7 M parameters.", **_HAT_L, upscale=2),
    "hat_l_x3": Variant("HAT-L x3: 40.9 M parameters.", **_HAT_L, upscale=3),
    "hat_l_x4": Variant("HAT-L x4: 40.8 M parameters, 203.0 GMACs for a 64x64 input.", **_HAT_L, upscale=4),
}
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
