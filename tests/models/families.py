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
    "nat": {"embed_dim": 48, "mlp_ratio": 1},
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
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "nat_isotropic_base": 86_465_800,
    "dinat_isotropic_small": 21_999_736,
    "dinat_isotropic_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
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
