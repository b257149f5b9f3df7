"""The networks: one file per family, registered with timm when this package is imported."""

import argparse

import torch

from visionattn.models import agent_attention, inline_attention, shvit, swin_vsa
from visionattn.models.biformer import BiFormer
from visionattn.models.care import CARE
from visionattn.models.catanet import CATANet
from visionattn.models.cfsr import CFSR
from visionattn.models.craft import CRAFT
from visionattn.models.efficientmod import EfficientMod
from visionattn.models.fcaformer import FcaFormer
from visionattn.models.frames.restorer import RestorationInfo
from visionattn.models.halonet import HaloNet
from visionattn.models.hat import HAT
from visionattn.models.hosts.cswin import CSwin
from visionattn.models.hosts.deit import DeiT
from visionattn.models.hosts.pvt import PVT
from visionattn.models.hosts.swin import Swin
from visionattn.models.hsdt import HSDT
from visionattn.models.l2vit import L2ViT
from visionattn.models.nat import NAT
from visionattn.models.ninformer import NiNformer
from visionattn.models.overlock import OverLoCK
from visionattn.models.pmnet import PMNet
from visionattn.models.rgt import RGT
from visionattn.models.smt import SMT
from visionattn.models.vitae_vsa import ViTAEVSA

__all__ = [
    "CARE",
    "CFSR",
    "CRAFT",
    "HAT",
    "HSDT",
    "NAT",
    "PVT",
    "RGT",
    "SMT",
    "BiFormer",
    "CATANet",
    "CSwin",
    "DeiT",
    "EfficientMod",
    "FcaFormer",
    "HaloNet",
    "L2ViT",
    "NiNformer",
    "OverLoCK",
    "PMNet",
    "RestorationInfo",
    "Swin",
    "ViTAEVSA",
    "agent_attention",
    "inline_attention",
    "shvit",
    "swin_vsa",
]

# Official files hold, beside the weights, the options of their training: attributes without any behaviour.
# With this PyTorch reads them, also when timm asks it to, and still runs no code.
torch.serialization.add_safe_globals([argparse.Namespace])
