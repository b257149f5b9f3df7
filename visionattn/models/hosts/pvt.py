"""PVT, the pyramid vision transformer, with its attention as a part (https://arxiv.org/abs/2102.12122)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels.checks import pair
from visionattn.models.frames.common import Size, drop_path_rates, resize_square
from visionattn.models.frames.pyramid import PatchEmbedding, Pyramid, Stage
from visionattn.models.hosts.guest import Guest, pyramid_arguments
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Weights


class PVT(Pyramid):
    """The pyramid vision transformer, every block with the guest's attention.

    Args:
        guest: the attention of all blocks.
        img_size: training size in pixels, or (height, width): that of the position embeddings.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        embed_dims: channels per stage.
        mlp_ratios: hidden width of the MLPs per stage, as a multiple of its channels.
        extra_norms: a LayerNorm per returned stage output.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        guest: Guest,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        sizes = [(height // (4 * 2**i), width // (4 * 2**i)) for i in range(len(depths))]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        downsample = [
            PatchEmbedding(in_dim, dim, step, step, size=size, **dd)
            for in_dim, dim, step, size in zip((in_chans, *embed_dims), embed_dims, (4, 2, 2, 2), sizes)
        ]
        stages = []
        for i, (dim, depth, size) in enumerate(zip(embed_dims, depths, sizes)):
            blocks = [
                guest.block(
                    dim,
                    guest.attention(dim, num_heads[i], stage=i, size=size, prefix=False, **dd),
                    mlp_ratios[i],
                    next(rates),
                    eps=1e-6,
                    **dd,
                )
                for _ in range(depth)
            ]
            stages.append(Stage(dim, downsample[i] if i else nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=downsample[0],
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=extra_norms,
            min_size=32,
            **dd,
        )


def layout(guest: Guest) -> Layout:
    """How weights of PVT with a guest are recognised and converted."""
    return Layout(
        family=guest.family,
        model_cls=PVT,
        marks=(r"^stem\.pos_embed$", rf"\.attn\.{re.escape(guest.mark)}$"),
        rename=_NAMES.to_ours,
        convert=_join,
        fit=lambda weights, model: guest.fit(weights, model, {"pos_embed": resize_square}),
        reads=_READS,
        arguments=lambda ours, official: _arguments(ours, guest),
        to_official=_to_official,
        wrapper="model",
        unlearned=guest.unlearned,
    )


# Stages are counted from 1.
_PARTS = ["stem.", *(f"stages.{i}.downsample." for i in range(1, 8))]
_NAMES = Names(
    *((f"^patch_embed{i + 1}.", f"^{part}") for i, part in enumerate(_PARTS)),
    *((f"^pos_embed{i + 1}$", f"^{part}pos_embed$") for i, part in enumerate(_PARTS)),
    *((f"^block{i + 1}.", f"^stages.{i}.blocks.") for i in range(8)),
    *CLASSIFIER,
)
_READS = {
    "stem.proj.weight": 4,
    "stem.pos_embed": 3,
    "stages.#.blocks.0.norm1.weight": 1,
    "stages.#.blocks.0.mlp.fc1.weight": 2,
}


def _join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The separate projections of queries and of keys with values, joined."""
    out = dict(weights)
    for name in weights:
        pair_name = name.replace(".attn.q.", ".attn.kv.")
        if pair_name != name and pair_name in weights:
            out[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([out.pop(name), out.pop(pair_name)])
    return out


def _to_official(weights: Weights, model: PVT) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in _NAMES.official_weights(weights).items():
        if ".attn.qkv." in name:
            dim = value.shape[0] // 3
            out[name.replace(".qkv.", ".q.")] = value[:dim]
            out[name.replace(".qkv.", ".kv.")] = value[dim:]
        else:
            out[name] = value
    return out


def _arguments(ours: Shapes, guest: Guest) -> dict[str, Any] | None:
    out = pyramid_arguments(ours, guest)
    if out is None:
        return None
    del out["global_blocks"]
    dims = tuple(ours[f"stages.{i}.blocks.0.norm1.weight"][0] for i in range(len(out["depths"])))
    hidden = [ours[f"stages.{i}.blocks.0.mlp.fc1.weight"][0] for i in range(len(dims))]
    side = 4 * math.isqrt(ours["stem.pos_embed"][1])
    ratios = tuple(rows / dim for rows, dim in zip(hidden, dims))
    return {"img_size": side, **out, "embed_dims": dims, "mlp_ratios": ratios}
