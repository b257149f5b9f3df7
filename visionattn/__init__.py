"""Vision backbones and restoration networks with 2-D attention, registered with timm.

>>> import timm, visionattn
>>> net = timm.create_model("biformer_tiny", features_only=True)
>>> sr = timm.create_model("hat_x4")
>>> visionattn.load_checkpoint(sr, "HAT_SRx4.pth")
>>> y = visionattn.kernels.window_attention(q, k, v, window_size=7)
"""

from . import kernels, models
from .checkpoints import identify, load_checkpoint, save_checkpoint
from .integrations.timm_attention import accelerate, restore

__version__ = "0.1.0"
__all__ = [
    "accelerate",
    "identify",
    "kernels",
    "load_checkpoint",
    "models",
    "restore",
    "save_checkpoint",
]
