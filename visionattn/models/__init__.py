"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .catanet import CATANet
from .craft import CRAFT
from .hat import HAT
from .rgt import RGT

__all__ = ["CRAFT", "HAT", "RGT", "BiFormer", "CATANet", "RestorationInfo"]
