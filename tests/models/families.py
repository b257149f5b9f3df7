"""What the tests need to know about networks; a family without an entry is tested in full size."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from visionattn.benchmark.zoo import model_names

# Arguments that shrink a network to milliseconds and change nothing about its structure.
SMALL: dict[str, dict[str, Any]] = {
    "biformer": {"depths": (1, 2, 1, 1), "embed_dims": (32, 64, 64, 64), "n_win": 2, "topks": (1, 2, 4, -2)},
    "hat": {
        "depths": (2, 2),
        "embed_dim": 24,
        "num_heads": 2,
        "window_size": 8,
        "compress_ratio": 3,
        "squeeze_factor": 2,
    },
}

# Learnable parameters of the published networks.
PARAMETERS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "hat_s_x2": 9_473_471,
    "hat_s_x3": 9_658_111,
    "hat_s_x4": 9_621_183,
    "hat_x2": 20_624_795,
    "hat_x3": 20_809_435,
    "hat_x4": 20_772_507,
    "hat_l_x2": 40_698_863,
    "hat_l_x3": 40_883_503,
    "hat_l_x4": 40_846_575,
}


def family(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def small(name: str, **kwargs: Any) -> nn.Module:
    """The network in miniature, the same at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL.get(family(name), {}), **kwargs})


RESTORATION = [name for name in model_names() if hasattr(small(name, device="meta"), "info")]
CLASSIFICATION = [name for name in model_names() if name not in RESTORATION]
# One variant of every family, where what is tested does not differ between variants.
FAMILIES = list({family(name): name for name in reversed(model_names())}.values())
