"""Vision backbones and restoration networks with 2-D attention, registered with timm.

>>> import timm, visionattn
>>> net = timm.create_model("biformer_tiny", features_only=True)
>>> sr = timm.create_model("hat_x4")
>>> visionattn.load_checkpoint(sr, "HAT_SRx4.pth")
>>> image = visionattn.run_within(sr.eval(), image, "2GB")  # large images in little memory, exactly
>>> y = visionattn.kernels.window_attention(q, k, v, window_size=7)
"""

from visionattn import kernels, models
from visionattn.checkpoints import identify, load_checkpoint, save_checkpoint
from visionattn.inference import run_within
from visionattn.integrations.timm_attention import accelerate, decelerate

__version__ = "0.1.0"
__all__ = [
    "accelerate",
    "decelerate",
    "identify",
    "kernels",
    "load_checkpoint",
    "models",
    "run_within",
    "save_checkpoint",
]
