"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .hat import HAT

__all__ = ["HAT", "BiFormer", "RestorationInfo"]
