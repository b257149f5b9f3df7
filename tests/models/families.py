"""What the tests need to know about networks; a family without an entry is tested in full size."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from torch import nn

from visionattn.benchmark.zoo import model_names

# Arguments that shrink a network to milliseconds and change nothing about its structure.
SMALL: dict[str, dict[str, Any]] = {
    "biformer": {"depths": (1, 2, 1, 1), "embed_dims": (32, 64, 64, 64), "n_win": 2, "topks": (1, 2, 4, -2)},
    "cfsr": {"depths": (2, 1), "embed_dim": 8},
    "hat": {
        "depths": (2, 2),
        "embed_dim": 24,
        "num_heads": 2,
        "window_size": 8,
        "compress_ratio": 3,
        "squeeze_factor": 2,
    },
    # Always the learned queries: the draws of training are tested in test_hsdt.py.
    "hsdt": {"embed_dim": 4, "depth": 3, "downsample": (1,), "self_query_rate": 0.0},
    "sha_dehaze": {"mid_dim": 16, "embed_dim": 16, "deep_dim": 16, "depth": 2, "deep_depth": 2},
}

# Learnable parameters of the published networks.
PARAMETERS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "cfsr_x2": 298_236,
    "cfsr_x3": 304_731,
    "cfsr_x4": 313_824,
    "hat_s_x1": 9_244_911,
    "hat_s_x2": 9_473_471,
    "hat_s_x3": 9_658_111,
    "hat_s_x4": 9_621_183,
    "hat_x1": 20_376_471,
    "hat_x2": 20_624_795,
    "hat_x3": 20_809_435,
    "hat_x4": 20_772_507,
    "hat_l_x1": 40_450_539,
    "hat_l_x2": 40_698_863,
    "hat_l_x3": 40_883_503,
    "hat_l_x4": 40_846_575,
    "hsdt_s": 134_350,
    "hsdt_m": 521_158,
    "hsdt_l": 2_094_786,
    "hsdt_4": 35_746,
    "hsdt_24": 1_160_766,
    "hsdt_32": 2_053_174,
    "hsdt_pnp": 521_350,
    "hsdt_ssr": 521_251,
    "pmnet": 19_993_613,
    "pmnet_small": 99_335,
}


def family(name: str) -> str:
    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def small(name: str, **kwargs: Any) -> nn.Module:
    """The network in miniature, the same at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL.get(family(name), {}), **kwargs})


RESTORATION = [name for name in model_names() if hasattr(small(name, device="meta"), "info")]
DROP_PATH = [
    name
    for name in model_names()
    if "drop_path_rate" in inspect.signature(type(small(name, device="meta"))).parameters
]
# The official hsdt_ssr pads in evaluation only; test_hsdt.py tests that.
SAME_IN_TRAINING = [name for name in model_names() if name != "hsdt_ssr"]
CLASSIFICATION = [name for name in model_names() if name not in RESTORATION]
# One variant of every family, where what is tested does not differ between variants.
FAMILIES = list({family(name): name for name in reversed(model_names())}.values())
