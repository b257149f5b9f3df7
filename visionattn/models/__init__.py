"""The networks: one file per family, registered with timm when this package is imported."""

from . import agent_attention, inline_attention
from ._deit import DeiT
from ._hosts import PVT, CSwin, Swin
from ._restoration import RestorationInfo
from .biformer import BiFormer
from .hat import HAT
from .l2vit import L2ViT

__all__ = [
    "HAT",
    "PVT",
    "BiFormer",
    "CSwin",
    "DeiT",
    "L2ViT",
    "RestorationInfo",
    "Swin",
    "agent_attention",
    "inline_attention",
]
