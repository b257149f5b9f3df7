"""Agent attention in DeiT, PVT, Swin and CSwin: softmax attention through a few agent tokens.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024,
https://arxiv.org/abs/2312.08874. Official code and weights: https://github.com/LeapLabTHU/Agent-Attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.layers import AgentAttention2d
from visionattn.models.hosts.build import build_host, host_cfg
from visionattn.models.hosts.deit import DeiT, deit_arguments, deit_layout
from visionattn.models.hosts.hosts import PVT, Attention, CSwin, Size, Swin, host_arguments, host_layouts
from visionattn.models.registry.layout import Shapes

__all__: list[str] = []


def _cfg(file: str, size: int, top1: float, host: type[nn.Module], **kwargs: Any) -> dict[str, Any]:
    return host_cfg(
        host,
        f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1",
        size,
        license="unknown",
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


def _attention(agents: Sequence[int], agent_shapes: Sequence[Size] | None, prefix: bool) -> Attention:
    """What the hosts call to make an attention: agents per side of each stage, and the shapes in use."""

    def make(dim: int, num_heads: int, *, stage: int, size: Size, **dd: Any) -> AgentAttention2d:
        shape = None if agent_shapes is None else agent_shapes[stage]
        return AgentAttention2d(dim, num_heads, size, agents[stage], shape, prefix, **dd)

    return make


def _create(
    host: type[nn.Module],
    variant: str,
    pretrained: bool,
    agents: Sequence[int] = (3, 4, 7, 7),
    agent_shapes: Sequence[Size] | None = None,
    **kwargs: Any,
) -> Any:
    """A network of a host class; arguments beyond the host's, for every variant of this file:

    Args:
        host: the class of the network.
        variant: its registered name.
        pretrained: load the authors' weights.
        agents: agents per side in each stage; part of the weights.
        agent_shapes: (rows, columns) of agents that are used in each stage, as the dense backbones of the
        authors
            have more of them: Swin (9, 9), (12, 12), (14, 14), (7, 7), PVT (12, 12), (16, 16), (28, 28), (28,
            28).
        kwargs: arguments of the host.
    """
    kwargs["attention"] = _attention(agents, agent_shapes, prefix=host is DeiT)
    settings = {"agents": agents, "agent_shapes": agent_shapes}
    return build_host(host, variant, pretrained, settings=settings, **kwargs)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    out = host_arguments(ours, _MARK, lambda shape: shape[0])
    tables = [ours.get(f"stages.{i}.blocks.0.{_MARK}") for i in range(len(out["depths"]))]
    usual = (3, 4, 7, 7)  # of stages without agents
    out["agents"] = tuple(math.isqrt(t[1]) if t else usual[min(i, 3)] for i, t in enumerate(tables))
    return out


def _arguments_deit(ours: Shapes, official: Shapes) -> dict[str, Any]:
    out = deit_arguments(ours, _MARK, lambda shape: shape[0])
    return {**out, "agents": (math.isqrt(ours[f"blocks.0.{_MARK}"][1]),)}


_MARK = "attn.an_bias"
LAYOUTS = (
    *host_layouts("agent_attention", _arguments, _MARK, ("agent_shapes",)),
    deit_layout("agent_attention", _arguments_deit, _MARK, ("agent_shapes",)),
)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-T: 6.0 M parameters, 1.2 GMACs at 224."""
    args: dict[str, Any] = {"agents": (7,), "embed_dim": 192, "num_heads": 3}
    return _create(DeiT, "agent_deit_tiny", pretrained, **{**args, **kwargs})


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-S: 22.7 M parameters, 4.4 GMACs at 224."""
    args: dict[str, Any] = {"agents": (7,), "embed_dim": 384, "num_heads": 6}
    return _create(DeiT, "agent_deit_small", pretrained, **{**args, **kwargs})


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-S at 448: 23.1 M parameters, 17.7 GMACs."""
    args: dict[str, Any] = {"agents": (7,), "embed_dim": 384, "num_heads": 6, "img_size": 448}
    return _create(DeiT, "agent_deit_small_448", pretrained, **{**args, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> DeiT:
    """Agent-DeiT-B, agents in four blocks: 87.2 M parameters, 17.6 GMACs at 224."""
    args: dict[str, Any] = {"agents": (9,), "global_blocks": 4, "embed_dim": 768, "num_heads": 12}
    return _create(DeiT, "agent_deit_base", pretrained, **{**args, **kwargs})


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-T: 11.6 M parameters, 2.0 GMACs at 224."""
    args: dict[str, Any] = {"depths": (2, 2, 2, 2)}
    return _create(PVT, "agent_pvt_tiny", pretrained, **{**args, **kwargs})


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-S: 20.6 M parameters, 4.0 GMACs at 224."""
    args: dict[str, Any] = {"depths": (3, 4, 6, 3)}
    return _create(PVT, "agent_pvt_small", pretrained, **{**args, **kwargs})


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-M: 35.9 M parameters, 7.0 GMACs at 224."""
    args: dict[str, Any] = {"depths": (3, 4, 18, 3)}
    return _create(PVT, "agent_pvt_medium", pretrained, **{**args, **kwargs})


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-M at 256: 36.1 M parameters, 9.2 GMACs."""
    args: dict[str, Any] = {"depths": (3, 4, 18, 3), "img_size": 256}
    return _create(PVT, "agent_pvt_medium_256", pretrained, **{**args, **kwargs})


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> PVT:
    """Agent-PVT-L: 48.7 M parameters, 10.4 GMACs at 224."""
    args: dict[str, Any] = {"depths": (3, 8, 27, 3)}
    return _create(PVT, "agent_pvt_large", pretrained, **{**args, **kwargs})


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-T: 28.9 M parameters, 4.5 GMACs at 224."""
    args: dict[str, Any] = {"global_blocks": (2, 2, 6, 0)}
    return _create(Swin, "agent_swin_tiny", pretrained, **{**args, **kwargs})


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-S: 49.7 M parameters, 8.7 GMACs at 224."""
    args: dict[str, Any] = {"global_blocks": (2, 2, 0, 0), "depths": (2, 2, 18, 2)}
    return _create(Swin, "agent_swin_small", pretrained, **{**args, **kwargs})


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-S at 288: 49.7 M parameters, 14.6 GMACs."""
    args: dict[str, Any] = {
        "global_blocks": (2, 2, 0, 0),
        "depths": (2, 2, 18, 2),
        "img_size": 288,
        "window_size": 9,
    }
    return _create(Swin, "agent_swin_small_288", pretrained, **{**args, **kwargs})


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-B: 88.1 M parameters, 15.4 GMACs at 224."""
    args: dict[str, Any] = {
        "global_blocks": (2, 2, 2, 0),
        "depths": (2, 2, 18, 2),
        "embed_dim": 128,
        "num_heads": (4, 8, 16, 32),
    }
    return _create(Swin, "agent_swin_base", pretrained, **{**args, **kwargs})


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Agent-Swin-B at 384: 88.3 M parameters, 46.3 GMACs."""
    args: dict[str, Any] = {
        "global_blocks": (2, 2, 2, 0),
        "depths": (2, 2, 18, 2),
        "embed_dim": 128,
        "num_heads": (4, 8, 16, 32),
        "img_size": 384,
        "window_size": 12,
    }
    return _create(Swin, "agent_swin_base_384", pretrained, **{**args, **kwargs})


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSwin:
    """Agent-CSwin-T: 20.5 M parameters, 4.3 GMACs at 224."""
    args: dict[str, Any] = {}
    return _create(CSwin, "agent_cswin_tiny", pretrained, **{**args, **kwargs})


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSwin:
    """Agent-CSwin-S: 32.8 M parameters, 6.8 GMACs at 224."""
    args: dict[str, Any] = {"global_blocks": (3, 6, 0, 0), "depths": (3, 6, 29, 2)}
    return _create(CSwin, "agent_cswin_small", pretrained, **{**args, **kwargs})


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> CSwin:
    """Agent-CSwin-B: 73.3 M parameters, 14.9 GMACs at 224."""
    args: dict[str, Any] = {
        "global_blocks": (3, 6, 0, 0),
        "depths": (3, 6, 29, 2),
        "embed_dim": 96,
        "num_heads": (4, 8, 16, 32),
    }
    return _create(CSwin, "agent_cswin_base", pretrained, **{**args, **kwargs})


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSwin:
    """Agent-CSwin-B at 384: 73.3 M parameters, 46.3 GMACs."""
    args: dict[str, Any] = {
        "global_blocks": (3, 6, 0, 0),
        "depths": (3, 6, 29, 2),
        "embed_dim": 96,
        "num_heads": (4, 8, 16, 32),
        "img_size": 384,
        "stripe": 12,
    }
    return _create(CSwin, "agent_cswin_base_384", pretrained, **{**args, **kwargs})
