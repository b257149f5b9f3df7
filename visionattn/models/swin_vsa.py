"""Swin with varied-size windows: every head of every window chooses where its keys lie.

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022,
https://arxiv.org/abs/2204.08446. The authors published this network later, beside that of another paper
(https://arxiv.org/abs/2303.15105): https://github.com/ViTAE-Transformer/QFormer (MIT); no weights, and not
the code that gave the figures of the first paper. Its other host is `vitae_vsa.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers import VariedSizeWindowAttention2d
from visionattn.models.frames.common import Block, Size
from visionattn.models.hosts import swin
from visionattn.models.hosts.guest import Guest, host_cfg, register_guest
from visionattn.models.hosts.swin import Swin
from visionattn.models.hosts.swin_buffers import window_index
from visionattn.models.registry.names import Names
from visionattn.models.registry.variants import Layout, Variant, Weights

__all__: list[str] = []


class PositionedBlock(Block):
    """A block to whose input a depthwise 7x7 convolution of it is added first."""

    def __init__(self, dim: int, attn: nn.Module, **kwargs: Any):
        super().__init__(dim, attn, pos_kernel=7, **kwargs)


def _attention(
    dim: int, num_heads: int, *, stage: int, size: Size, prefix: bool, window_size: int = 7, **dd: Any
) -> VariedSizeWindowAttention2d:
    attn = VariedSizeWindowAttention2d(dim, num_heads, window_size, **dd)
    for parameter in attn.transform.parameters():  # at first the keys lie where the queries do
        nn.init.zeros_(parameter)
    return attn


VSA = Guest(
    family="vsa",
    attention=_attention,
    mark="transform.2.weight",
    mark_dims=4,
    # A movement and a stretch along both axes.
    heads=lambda shape: shape[0] // 4,
    block=PositionedBlock,
    options={"window_size": 7},
)
_NAMES = Names((".pos.", ".pos_embed."))


def _layout(guest: Guest) -> Layout:
    host = swin.layout(guest)

    def to_official(weights: Weights, model: Swin) -> dict[str, Tensor]:
        out = _NAMES.official_weights(host.to_official(weights, model))
        tables = [name for name in out if name.endswith(".relative_position_bias_table")]
        for name in tables:
            side = (round(out[name].shape[0] ** 0.5) + 1) // 2
            out[name.replace("_bias_table", "_index")] = window_index((side, side))
        return out

    return replace(host, rename=lambda name: host.rename(_NAMES.to_ours(name)), to_official=to_official)


def _cfg(top1: float) -> dict[str, Any]:
    return host_cfg(
        Swin,
        "",
        224,
        crop_mode="center",
        crop_pct=0.9,
        license="mit",
        paper_ids="arXiv:2204.08446",
        paper_name="VSA: Learning Varied-Size Window Attention in Vision Transformers",
        origin_url="https://github.com/ViTAE-Transformer/QFormer",
        notes=(f"ImageNet-1k top-1 {top1}",),
    )


default_cfgs = generate_default_cfgs({"swin_vsa_t": _cfg(82.24), "swin_vsa_s": _cfg(83.6)})

_VARIANTS = {
    "swin_vsa_t": Variant(
        "Swin-T with VSA: 28.8 M parameters, 4.6 GMACs at 224.", global_blocks=(2, 2, 6, 2)
    ),
    "swin_vsa_s": Variant(
        "Swin-S with VSA: 50.5 M parameters, 8.9 GMACs at 224.",
        global_blocks=(2, 2, 18, 2),
        depths=(2, 2, 18, 2),
    ),
}
register_guest(__name__, VSA, _layout, _VARIANTS)
