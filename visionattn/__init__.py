"""Vision backbones and restoration networks with 2-D attention, registered with timm.

>>> import timm, visionattn
>>> net = timm.create_model("biformer_tiny", features_only=True)
>>> sr = timm.create_model("hat_x4")
>>> visionattn.load_checkpoint(sr, "HAT_SRx4.pth")
>>> image = visionattn.run_within(sr.eval(), image, "2GB")  # large images in little memory, exactly
>>> y = visionattn.kernels.window_attention(q, k, v, window_size=7)

The import takes milliseconds: a public name brings what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionattn._registration import register_with_timm

if TYPE_CHECKING:
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
_PLACES = {
    "accelerate": "visionattn.integrations.timm_attention",
    "decelerate": "visionattn.integrations.timm_attention",
    "identify": "visionattn.checkpoints",
    "load_checkpoint": "visionattn.checkpoints",
    "run_within": "visionattn.inference",
    "save_checkpoint": "visionattn.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _PLACES:
        return import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
