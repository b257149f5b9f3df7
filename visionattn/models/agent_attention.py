"""Agent attention in DeiT, PVT, Swin and CSwin: softmax attention through a few agent tokens.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024,
https://arxiv.org/abs/2312.08874. Official code and weights: https://github.com/LeapLabTHU/Agent-Attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs
from torch import nn

from visionattn.layers import AgentAttention2d
from visionattn.models.frames.common import Size
from visionattn.models.hosts import cswin, deit, pvt, swin
from visionattn.models.hosts.cswin import CSwin
from visionattn.models.hosts.deit import DeiT
from visionattn.models.hosts.guest import Guest, Shape, host_cfg, register_guest
from visionattn.models.hosts.pvt import PVT
from visionattn.models.hosts.swin import Swin
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Variant

__all__: list[str] = []


def _cfg(file: str, size: int, top1: float, host: type[nn.Module], **kwargs: Any) -> dict[str, Any]:
    return host_cfg(
        host,
        f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1",
        size,
        paper_ids="arXiv:2312.08874",
        paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
        notes=(f"ImageNet-1k top-1 {top1}",),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg("57e0904221824ee7b7af", 224, 74.9, DeiT),
        "agent_deit_small.in1k": _cfg("fdd43304372541db8ea7", 224, 80.5, DeiT),
        "agent_deit_base.in1k": _cfg("5115f15fdd7e4ab58fbc", 224, 82.0, DeiT),
        "agent_deit_small_448.in1k": _cfg("a228f86241c445f1969b", 448, 83.1, DeiT),
        "agent_pvt_tiny.in1k": _cfg("13fdf0e0a7c5498c934f", 224, 78.4, PVT),
        "agent_pvt_small.in1k": _cfg("36b8be9a8863456685a3", 224, 82.2, PVT),
        "agent_pvt_medium.in1k": _cfg("4d00ecacf18b45f9b88c", 224, 83.4, PVT),
        "agent_pvt_large.in1k": _cfg("040cfe0cfbbe4762ad09", 224, 83.7, PVT),
        "agent_pvt_medium_256.in1k": _cfg("654df734121643b19c52", 256, 83.8, PVT),
        "agent_swin_tiny.in1k": _cfg("a2ddc1190c224f768a41", 224, 82.6, Swin),
        "agent_swin_small.in1k": _cfg("f607172c9fea4d6e99bb", 224, 83.7, Swin),
        "agent_swin_base.in1k": _cfg("4fcd2d0114bb490483c3", 224, 84.0, Swin),
        "agent_swin_small_288.in1k": _cfg("09760394e93b4046a25e", 288, 84.1, Swin, crop_pct=1.0),
        "agent_swin_base_384.in1k": _cfg("bb84ee9058954706a557", 384, 84.9, Swin, crop_pct=1.0),
        "agent_cswin_tiny.in1k": _cfg("8c562a74441e46d5902b", 224, 83.1, CSwin),
        "agent_cswin_small.in1k": _cfg("30eb8af675bc4b7a8747", 224, 83.9, CSwin),
        "agent_cswin_base.in1k": _cfg("c8035b0839b2410c8c9f", 224, 84.7, CSwin),
        "agent_cswin_base_384.in1k": _cfg("1239be0df44b47719432", 384, 85.8, CSwin, crop_pct=1.0),
    }
)


def _attention(
    dim: int,
    num_heads: int,
    *,
    stage: int,
    size: Size,
    prefix: bool,
    agents: Sequence[int],
    agent_shapes: Sequence[Size] | None,
    **dd: Any,
) -> AgentAttention2d:
    shape = None if agent_shapes is None else agent_shapes[stage]
    return AgentAttention2d(dim, num_heads, size, agents[stage], shape, prefix, **dd)


def _size(shapes: Shapes, attn: str) -> Size | None:
    rows, columns = shapes.get(f"{attn}.ah_bias", 5), shapes.get(f"{attn}.aw_bias", 5)
    return (rows[3], columns[4]) if rows and columns else None


def _read_options(marks: Sequence[Shape | None]) -> dict[str, Any]:
    usual = (3, 4, 7, 7)  # of stages without agents
    return {"agents": tuple(math.isqrt(m[1]) if m else usual[min(i, 3)] for i, m in enumerate(marks))}


# Variants take beside the arguments of their host
# - agents: agents per side in each stage; part of the weights;
# - agent_shapes: (rows, columns) of agents that are used in each stage, as the dense backbones of the authors
#   have more of them: Swin (9, 9), (12, 12), (14, 14), (7, 7), PVT (12, 12), (16, 16), (28, 28), (28, 28).
AGENT = Guest(
    family="agent_attention",
    attention=_attention,
    mark="an_bias",
    mark_dims=4,
    heads=lambda shape: shape[0],
    axes={"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3},
    size=_size,
    options={"agents": (3, 4, 7, 7), "agent_shapes": None},
    read_options=_read_options,
    unlearned=("agent_shapes",),
)

_DEIT_VARIANTS = {
    "agent_deit_tiny": Variant(
        "Agent-DeiT-T: 6.0 M parameters, 1.2 GMACs at 224.", agents=(7,), embed_dim=192, num_heads=3
    ),
    "agent_deit_small": Variant(
        "Agent-DeiT-S: 22.7 M parameters, 4.4 GMACs at 224.", agents=(7,), embed_dim=384, num_heads=6
    ),
    "agent_deit_small_448": Variant(
        "Agent-DeiT-S at 448: 23.1 M parameters, 17.7 GMACs.",
        agents=(7,),
        embed_dim=384,
        num_heads=6,
        img_size=448,
    ),
    "agent_deit_base": Variant(
        "Agent-DeiT-B, agents in four blocks: 87.2 M parameters, 17.6 GMACs at 224.",
        agents=(9,),
        global_blocks=4,
        embed_dim=768,
        num_heads=12,
    ),
}
_PVT_VARIANTS = {
    "agent_pvt_tiny": Variant("Agent-PVT-T: 11.6 M parameters, 2.0 GMACs at 224.", depths=(2, 2, 2, 2)),
    "agent_pvt_small": Variant("Agent-PVT-S: 20.6 M parameters, 4.0 GMACs at 224.", depths=(3, 4, 6, 3)),
    "agent_pvt_medium": Variant("Agent-PVT-M: 35.9 M parameters, 7.0 GMACs at 224.", depths=(3, 4, 18, 3)),
    "agent_pvt_medium_256": Variant(
        "Agent-PVT-M at 256: 36.1 M parameters, 9.2 GMACs.", depths=(3, 4, 18, 3), img_size=256
    ),
    "agent_pvt_large": Variant("Agent-PVT-L: 48.7 M parameters, 10.4 GMACs at 224.", depths=(3, 8, 27, 3)),
}
_SWIN_VARIANTS = {
    "agent_swin_tiny": Variant(
        "Agent-Swin-T: 28.9 M parameters, 4.5 GMACs at 224.", global_blocks=(2, 2, 6, 0)
    ),
    "agent_swin_small": Variant(
        "Agent-Swin-S: 49.7 M parameters, 8.7 GMACs at 224.", global_blocks=(2, 2, 0, 0), depths=(2, 2, 18, 2)
    ),
    "agent_swin_small_288": Variant(
        "Agent-Swin-S at 288: 49.7 M parameters, 14.6 GMACs.",
        global_blocks=(2, 2, 0, 0),
        depths=(2, 2, 18, 2),
        img_size=288,
        window_size=9,
    ),
    "agent_swin_base": Variant(
        "Agent-Swin-B: 88.1 M parameters, 15.4 GMACs at 224.",
        global_blocks=(2, 2, 2, 0),
        depths=(2, 2, 18, 2),
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
    ),
    "agent_swin_base_384": Variant(
        "Agent-Swin-B at 384: 88.3 M parameters, 46.3 GMACs.",
        global_blocks=(2, 2, 2, 0),
        depths=(2, 2, 18, 2),
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
        img_size=384,
        window_size=12,
    ),
}
_CSWIN_VARIANTS = {
    "agent_cswin_tiny": Variant("Agent-CSwin-T: 20.5 M parameters, 4.3 GMACs at 224."),
    "agent_cswin_small": Variant(
        "Agent-CSwin-S: 32.8 M parameters, 6.8 GMACs at 224.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
    ),
    "agent_cswin_base": Variant(
        "Agent-CSwin-B: 73.3 M parameters, 14.9 GMACs at 224.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
        embed_dim=96,
        num_heads=(4, 8, 16, 32),
    ),
    "agent_cswin_base_384": Variant(
        "Agent-CSwin-B at 384: 73.3 M parameters, 46.3 GMACs.",
        global_blocks=(3, 6, 0, 0),
        depths=(3, 6, 29, 2),
        embed_dim=96,
        num_heads=(4, 8, 16, 32),
        img_size=384,
        stripe=12,
    ),
}

register_guest(__name__, AGENT, deit.layout, _DEIT_VARIANTS)
register_guest(__name__, AGENT, pvt.layout, _PVT_VARIANTS)
register_guest(__name__, AGENT, swin.layout, _SWIN_VARIANTS)
register_guest(__name__, AGENT, cswin.layout, _CSWIN_VARIANTS)
