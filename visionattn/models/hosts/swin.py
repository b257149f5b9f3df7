"""Swin, with the attention of its first blocks as a part (https://arxiv.org/abs/2103.14030)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels.checks import pair
from visionattn.layers import WindowAttention2d
from visionattn.models.frames.common import Block, Size, drop_path_rates
from visionattn.models.frames.pyramid import PatchEmbedding, PatchMerging, Pyramid, Stage
from visionattn.models.hosts.guest import Guest, Shape, pyramid_arguments
from visionattn.models.hosts.swin_buffers import bias_table, shift_mask, stored_table, window_index
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Weights


class Swin(Pyramid):
    """Swin, the first blocks of each stage with the guest's attention, the others with windows.

    Args:
        guest: the attention of the first blocks.
        global_blocks: how many of the first blocks of each stage have it.
        img_size: training size in pixels, or (height, width): that of position biases.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of a window in pixels; the windows of every second block are shifted by half of it.
        always_shift: shift windows also on maps of one window or less, as the official dense backbones do.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        guest: Guest,
        global_blocks: Sequence[int],
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        always_shift: bool = False,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, depth in enumerate(depths):
            dim, size = embed_dim * 2**i, (-(-height // (4 * 2**i)), -(-width // (4 * 2**i)))
            blocks = []
            for j in range(depth):
                if j < global_blocks[i]:
                    attn = guest.attention(dim, num_heads[i], stage=i, size=size, prefix=False, **dd)
                    blocks.append(guest.block(dim, attn, drop_path=next(rates), **dd))
                else:
                    shift = window_size // 2 if j % 2 else 0
                    attn = WindowAttention2d(dim, num_heads[i], window_size, shift, always_shift, **dd)
                    blocks.append(Block(dim, attn, drop_path=next(rates), **dd))
            stages.append(Stage(dim, PatchMerging(dim // 2, dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=PatchEmbedding(in_chans, embed_dim, 4, 4, fill=True, **dd),
            stages=stages,
            norm=nn.LayerNorm(stages[-1].dim, eps=1e-5, **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=1,
            **dd,
        )
        self.training_size = (height, width)


def layout(guest: Guest) -> Layout:
    """How weights of Swin with a guest are recognised and converted."""
    return Layout(
        family=guest.family,
        model_cls=Swin,
        marks=(r"^stages\.1\.downsample\.reduction\.", rf"\.attn\.{re.escape(guest.mark)}$"),
        rename=_NAMES.to_ours,
        convert=_convert,
        fit=lambda weights, model: guest.fit(weights, model, {_TABLE: _resize_table}),
        reads={"stem.proj.weight": 4, "stages.0.blocks.0.norm1.weight": 1},
        arguments=lambda ours, official: _arguments(ours, guest),
        to_official=_to_official,
        wrapper="model",
        unlearned=(*guest.unlearned, "window_size", "always_shift"),
    )


_TABLE = "relative_position_bias_table"
_NAMES = Names(
    ("^patch_embed.", "^stem."),
    *((f"^layers.{i}.downsample.", f"^stages.{i + 1}.downsample.") for i in range(8)),
    ("^layers.#.blocks.", "^stages.#.blocks."),
    ("^norm#.", "^extra_norms.#."),
    *CLASSIFIER,
)


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bias tables as `[heads, rows, columns]`, key minus query; without stored indices and masks."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue
        if name.endswith(_TABLE) and value.ndim == 2:
            value = bias_table(value)
        out[name] = value
    return out


def _to_official(weights: Weights, model: Swin) -> dict[str, Tensor]:
    """The authors' names and tables, with the indices and masks that their code stores."""
    out = {n: stored_table(v) if n.endswith(_TABLE) else v for n, v in weights.items()}
    for path, attn in model.named_modules():
        if not isinstance(attn, WindowAttention2d):
            continue
        block, window = path.removesuffix(".attn"), (attn.window_size, attn.window_size)
        out[f"{path}.relative_position_index"] = window_index(window)
        reduction = 4 * 2 ** int(path.split(".")[1])
        size = [-(-side // reduction) for side in model.training_size]
        if attn.shift and min(size) > attn.window_size:
            size = [-(-side // attn.window_size) * attn.window_size for side in size]
            out[f"{block}.attn_mask"] = shift_mask(size, window, (attn.shift, attn.shift))
    return _NAMES.official_weights(out)


def _arguments(ours: Shapes, guest: Guest) -> dict[str, Any] | None:
    out = pyramid_arguments(ours, guest)
    if out is None:
        return None
    out["embed_dim"] = ours["stages.0.blocks.0.norm1.weight"][0]
    if (name := ours.first(rf"\.{_TABLE}$")) and (table := ours.get(name, 3)):
        out["window_size"] = (table[1] + 1) // 2
    return out


def _resize_table(value: Tensor, target: Shape, module: Any) -> Tensor:
    return F.interpolate(value[None], size=target[1:], mode="bicubic")[0]
