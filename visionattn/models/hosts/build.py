"""Building a network of a host class, and what its configurations have in common."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from visionattn.models.hosts.deit import DeiT
from visionattn.models.hosts.deit import checkpoint_filter_fn as deit_filter_fn
from visionattn.models.hosts.hosts import checkpoint_filter_fn as pyramid_filter_fn
from visionattn.models.registry.layout import build


def host_cfg(host: type[nn.Module], url: str, size: int, **kwargs: Any) -> dict[str, Any]:
    """A timm configuration of a network trained at `size` pixels."""
    isotropic = host is DeiT
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None if isotropic else (size // 32, size // 32),
        "crop_pct": 224 / 256,
        # The authors resize to a square and lose the aspect ratio.
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed" if isotropic else "stem.proj",
        "classifier": "head" if isotropic else "head.fc",
        **kwargs,
    }


def build_host(host: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg` for a host class."""
    isotropic = host is DeiT
    # All shared files have the same name: without a folder each, one would be taken for the other.
    cache_dir = os.path.join(torch.hub.get_dir(), "checkpoints", variant)
    return build(
        host,
        variant,
        pretrained,
        pretrained_filter_fn=deit_filter_fn if isotropic else pyramid_filter_fn,
        feature_cfg={"out_indices": 3 if isotropic else (0, 1, 2, 3), "feature_cls": "getter"},
        cache_dir=kwargs.pop("cache_dir", None) or cache_dir,
        **kwargs,
    )
