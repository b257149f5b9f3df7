"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .hat import HAT
from .rgt import RGT

__all__ = ["HAT", "RGT", "BiFormer", "RestorationInfo"]
