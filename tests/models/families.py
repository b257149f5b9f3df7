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

_DEIT = {"depth": 4, "embed_dim": 32, "num_heads": 2}
_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
_SWIN = {"depths": (2, 2, 3, 2), "embed_dim": 16, "num_heads": (1, 2, 4, 4)}
_CSWIN = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (2, 2, 4, 4)}
for _attention in ("agent", "inline"):
    for _host, _sizes in (("deit", _DEIT), ("pvt", _PVT), ("swin", _SWIN), ("cswin", _CSWIN)):
        SMALL[f"{_attention}_{_host}"] = _sizes
SMALL["l2vit"] = {"depths": (2, 2, 2, 2), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}

# Learnable parameters of the published networks.
PARAMETERS = {
    "agent_cswin_base": 73_249_696,
    "agent_cswin_base_384": 73_328_416,
    "agent_cswin_small": 32_814_100,
    "agent_cswin_tiny": 20_458_672,
    "agent_deit_base": 87_204_904,
    "agent_deit_small": 22_647_112,
    "agent_deit_small_448": 23_070_472,
    "agent_deit_tiny": 6_015_640,
    "agent_pvt_large": 48_738_180,
    "agent_pvt_medium": 35_921_746,
    "agent_pvt_medium_256": 36_083_682,
    "agent_pvt_small": 20_635_066,
    "agent_pvt_tiny": 11_570_352,
    "agent_swin_base": 88_095_096,
    "agent_swin_base_384": 88_305_016,
    "agent_swin_small": 49_666_684,
    "agent_swin_small_288": 49_707_964,
    "agent_swin_tiny": 28_902_964,
    "inline_cswin_base": 73_413_640,
    "inline_cswin_base_384": 73_413_640,
    "inline_cswin_small": 33_032_872,
    "inline_cswin_tiny": 20_604_520,
    "inline_deit_base": 23_797_096,
    "inline_deit_small": 16_734_760,
    "inline_deit_tiny": 6_477_736,
    "inline_pvt_large": 51_154_280,
    "inline_pvt_medium": 37_618_856,
    "inline_pvt_small": 21_556_136,
    "inline_pvt_tiny": 12_032_232,
    "inline_swin_base": 88_350_120,
    "inline_swin_base_384": 88_465_320,
    "inline_swin_small": 49_793_296,
    "inline_swin_tiny": 29_223_544,
    "l2vit_b": 88_577_188,
    "l2vit_b_384": 88_577_188,
    "l2vit_s": 50_199_157,
    "l2vit_t": 28_596_781,
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
    """The longest known prefix of a name; without one, the file that the network is in."""
    known = [prefix for prefix in SMALL if name.startswith(prefix)]
    return max(known, key=len) if known else timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def small(name: str, **kwargs: Any) -> nn.Module:
    """The network in miniature, the same at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL.get(family(name), {}), **kwargs})


RESTORATION = [name for name in model_names() if hasattr(small(name, device="meta"), "info")]
# Networks of tokens with a class token, not of maps: their own tests stand in test_linear_hosts.py.
TOKENS = [name for name in model_names() if hasattr(small(name, device="meta"), "num_prefix_tokens")]
CLASSIFICATION = [name for name in model_names() if name not in RESTORATION + TOKENS]
# One variant of every family, where what is tested does not differ between variants.
FAMILIES = list({family(name): name for name in reversed(model_names())}.values())
