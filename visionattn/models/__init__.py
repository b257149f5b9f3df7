"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .cfsr import CFSR
from .hat import HAT
from .hsdt import HSDT
from .sha_dehaze import PMNet

__all__ = ["CFSR", "HAT", "HSDT", "BiFormer", "PMNet", "RestorationInfo"]
