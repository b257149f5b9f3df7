"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .catanet import CATANet
from .cfsr import CFSR
from .craft import CRAFT
from .hat import HAT
from .hsdt import HSDT
from .rgt import RGT
from .sha_dehaze import PMNet

__all__ = ["CFSR", "CRAFT", "HAT", "HSDT", "RGT", "BiFormer", "CATANet", "PMNet", "RestorationInfo"]
