"""The networks: one file per family, registered with timm when this package is imported."""

import argparse

import torch

from . import agent_attention, inline_attention
from ._deit import DeiT
from ._hosts import PVT, CSwin, Swin
from ._restoration import RestorationInfo
from .biformer import BiFormer
from .catanet import CATANet
from .cfsr import CFSR
from .craft import CRAFT
from .hat import HAT
from .hsdt import HSDT
from .l2vit import L2ViT
from .nat import NAT
from .rgt import RGT
from .sha_dehaze import PMNet

__all__ = [
    "CFSR",
    "CRAFT",
    "HAT",
    "HSDT",
    "NAT",
    "PVT",
    "RGT",
    "BiFormer",
    "CATANet",
    "CSwin",
    "DeiT",
    "L2ViT",
    "PMNet",
    "RestorationInfo",
    "Swin",
    "agent_attention",
    "inline_attention",
]

# Official files hold, beside the weights, the options of their training: attributes without any behaviour.
# With this PyTorch reads them, also when timm asks it to, and still runs no code.
torch.serialization.add_safe_globals([argparse.Namespace])
