"""The networks: one file per family, registered with timm when this package is imported."""

from ._restoration import RestorationInfo
from .biformer import BiFormer
from .hat import HAT
from .nat import NAT

__all__ = ["HAT", "NAT", "BiFormer", "RestorationInfo"]
