"""InLine attention in DeiT, PVT, Swin and CSwin: linear attention that is injective in the query.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024,
https://arxiv.org/abs/2412.06590. Official code and weights: https://github.com/LeapLabTHU/InLine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers import InLineAttention2d
from visionattn.models.frames.common import Block, Size
from visionattn.models.hosts import cswin, deit, pvt, swin
from visionattn.models.hosts.cswin import CSwin
from visionattn.models.hosts.deit import DeiT
from visionattn.models.hosts.guest import Guest, host_cfg, register_guest
from visionattn.models.hosts.pvt import PVT
from visionattn.models.hosts.swin import Swin
from visionattn.models.registry.variants import Variant

__all__: list[str] = []


def _cfg(file: str, size: int, top1: float | None, host: type[nn.Module], **kwargs: Any) -> dict[str, Any]:
    return host_cfg(
        host,
        f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1" if file else "",
        size,
        paper_ids="arXiv:2412.06590",
        paper_name="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        origin_url="https://github.com/LeapLabTHU/InLine",
        notes=() if top1 is None else (f"ImageNet-1k top-1 {top1}",),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.in1k": _cfg("1d6b8191ad6d4114b291", 224, 74.5, DeiT),
        "inline_deit_small.in1k": _cfg("2f3898b07e9247f3beb3", 288, 80.2, DeiT),
        "inline_deit_base.in1k": _cfg("10bdd726d4b0435eb34e", 448, 82.3, DeiT),
        "inline_pvt_tiny.in1k": _cfg("90ac52b1555b401eb5e6", 224, 78.2, PVT),
        "inline_pvt_small.in1k": _cfg("1ab953b2479d433080a3", 224, 82.0, PVT),
        "inline_pvt_medium.in1k": _cfg("a72aec31e6084bc0a280", 224, 83.2, PVT),
        "inline_pvt_large.in1k": _cfg("efd91318ba964f01b288", 224, 83.6, PVT),
        "inline_swin_tiny.in1k": _cfg("32810869fcc34410966b", 224, 82.4, Swin),
        "inline_swin_small.in1k": _cfg("e9657fd247c04c7cb1a1", 224, 83.6, Swin),
        "inline_swin_base.in1k": _cfg("bf23564bb64c420aafe1", 224, 84.1, Swin),
        "inline_swin_base_384.untrained": _cfg("", 384, None, Swin, crop_pct=1.0),
        "inline_cswin_tiny.in1k": _cfg("49fa2ecc543647c4b970", 224, 83.2, CSwin),
        "inline_cswin_small.in1k": _cfg("59f4e65f776f4052b93c", 224, 83.8, CSwin),
        "inline_cswin_base.in1k": _cfg("91e17121df284ae38521", 224, 84.5, CSwin),
        "inline_cswin_base_384.untrained": _cfg("", 384, 85.7, CSwin, crop_pct=1.0),
    }
)


class StreamBlock(Block):
    """A block whose attention also sees the mean of its input before the norm."""

    def attend(self, x: Tensor, *args: Any) -> Tensor:
        """The attention branch."""
        return self.attn(self.norm1(x), mean=x.mean((1, 2)))


def _attention(
    dim: int, num_heads: int, *, stage: int, size: Size, prefix: bool, static_conv: bool = False, **dd: Any
) -> InLineAttention2d:
    return InLineAttention2d(dim, num_heads, static_conv, **dd)


INLINE = Guest(
    family="inline_attention",
    attention=_attention,
    mark="residual.0.weight",
    mark_dims=3,
    # Groups of the grouped convolution that predicts the local residual.
    heads=lambda shape: shape[0] // shape[1],
)
_INLINE_CSWIN = replace(INLINE, attention=partial(_attention, static_conv=True), block=StreamBlock)

_DEIT_VARIANTS = {
    "inline_deit_tiny": Variant(
        "InLine-DeiT-T: 6.5 M parameters, 1.1 GMACs at 224.", embed_dim=192, num_heads=6
    ),
    "inline_deit_small": Variant(
        "InLine-DeiT-S, narrower than DeiT-S: 16.7 M parameters, 5.0 GMACs at 288.",
        embed_dim=320,
        num_heads=10,
        img_size=288,
    ),
    "inline_deit_base": Variant(
        "InLine-DeiT-B, narrower than DeiT-B: 23.8 M parameters, 17.2 GMACs at 448.",
        embed_dim=384,
        num_heads=12,
        img_size=448,
    ),
}
_PVT_VARIANTS = {
    "inline_pvt_tiny": Variant(
        "InLine-PVT-T: 12.0 M parameters, 2.0 GMACs at 224.", depths=(2, 2, 2, 2), num_heads=(2, 4, 10, 16)
    ),
    "inline_pvt_small": Variant(
        "InLine-PVT-S: 21.6 M parameters, 3.9 GMACs at 224.", depths=(3, 4, 6, 3), num_heads=(2, 4, 10, 16)
    ),
    "inline_pvt_medium": Variant(
        "InLine-PVT-M: 37.6 M parameters, 6.9 GMACs at 224.", depths=(3, 4, 18, 3), num_heads=(2, 4, 10, 16)
    ),
    "inline_pvt_large": Variant(
        "InLine-PVT-L: 51.2 M parameters, 10.2 GMACs at 224.", depths=(3, 8, 27, 3), num_heads=(2, 4, 10, 16)
    ),
}
_SWIN_VARIANTS = {
    "inline_swin_tiny": Variant(
        "InLine-Swin-T: 29.2 M parameters, 4.5 GMACs at 224.", global_blocks=(2, 2, 6, 0)
    ),
    "inline_swin_small": Variant(
        "InLine-Swin-S: 49.8 M parameters, 8.7 GMACs at 224.",
        global_blocks=(2, 2, 0, 0),
        depths=(2, 2, 18, 2),
    ),
    "inline_swin_base": Variant(
        "InLine-Swin-B: 88.4 M parameters, 15.4 GMACs at 224.",
        global_blocks=(2, 2, 2, 0),
        depths=(2, 2, 18, 2),
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
    ),
    "inline_swin_base_384": Variant(
        "InLine-Swin-B at 384.",
        global_blocks=(2, 2, 2, 0),
        depths=(2, 2, 18, 2),
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
        img_size=384,
        window_size=12,
    ),
}
_CSWIN_VARIANTS = {
    "inline_cswin_tiny": Variant("InLine-CSwin-T: 20.6 M parameters, 4.3 GMACs at 224."),
    "inline_cswin_small": Variant(
        "InLine-CSwin-S: 33.0 M parameters, 6.8 GMACs at 224.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
    ),
    "inline_cswin_base": Variant(
        "InLine-CSwin-B: 73.4 M parameters, 14.9 GMACs at 224.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
        embed_dim=96,
        num_heads=(4, 8, 16, 32),
    ),
    "inline_cswin_base_384": Variant(
        "InLine-CSwin-B at 384: 46.3 GMACs.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
        embed_dim=96,
        num_heads=(4, 8, 16, 32),
        img_size=384,
        stripe=12,
    ),
}

register_guest(__name__, INLINE, deit.layout, _DEIT_VARIANTS)
register_guest(__name__, INLINE, pvt.layout, _PVT_VARIANTS)
register_guest(__name__, INLINE, swin.layout, _SWIN_VARIANTS)
register_guest(__name__, _INLINE_CSWIN, cswin.layout, _CSWIN_VARIANTS)
