"""What the tests need to know about networks; a family without an entry is tested in full size."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from torch import nn

from visionattn.models.registry.zoo import model_names

# Arguments that shrink the networks whose names begin so to milliseconds, and change nothing about their
# structure.
SMALL: dict[str, dict[str, Any]] = {
    "biformer": {"depths": (1, 2, 1, 1), "embed_dims": (32, 64, 64, 64), "n_win": 2, "topks": (1, 2, 4, -2)},
    "cfsr": {"depths": (2, 1), "embed_dim": 8},
    "catanet": {"patch_sizes": (8, 12), "num_centres": (5, 9), "group_sizes": (32, 20)},
    # A width at which the position bias matters; at the published one it is constant and not trained.
    "craft": {"depths": (1, 1), "embed_dim": 96},
    "halonet": {
        "depths": (1, 2, 1, 1),
        "embed_dim": 16,
        "num_heads": (2, 2, 4, 4),
        "block_size": 8,
        "halo": 3,
        "value_ratio": 1.5,
        "out_ratio": 1.25,
        "final_dim": 24,
    },
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
    "overlock": {
        "depths": (1, 1, 1, 1),
        "sub_depths": (2, 1),
        "embed_dims": (16, 16, 32, 32),
        "sub_num_heads": (2, 2),
        "kernel_sizes": (13, 7, 7, 7),
        "projection": 40,
    },
    "pmnet": {"mid_dim": 16, "embed_dim": 16, "deep_dim": 16, "depth": 2, "deep_depth": 2},
    "rgt": {"depths": (3, 2), "embed_dim": 96},
}

# What training does otherwise, apart from batch statistics and drop path.
TRAINED_OTHERWISE = {
    "catanet": "the centres of tokens move to the batch",
    "hsdt_ssr": "it pads in evaluation only",
    "rgt": "small maps are reduced less often",
}

_DEIT = {"depth": 4, "embed_dim": 32, "num_heads": 2}
_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
_SWIN = {"depths": (2, 2, 3, 2), "embed_dim": 16, "num_heads": (1, 2, 4, 4)}
_CSWIN = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (2, 2, 4, 4)}
for _attention in ("agent", "inline"):
    for _host, _sizes in (("deit", _DEIT), ("pvt", _PVT), ("swin", _SWIN), ("cswin", _CSWIN)):
        SMALL[f"{_attention}_{_host}"] = _sizes
# The longer names first: the first that fits counts.
for _form in ("nat_isotropic", "dinat_isotropic", "vitrpb"):
    SMALL[_form] = {"depths": (4,), "embed_dim": 32, "num_heads": (2,), "mlp_ratio": 1}
for _form in ("nat", "dinat"):
    SMALL[_form] = {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4), "mlp_ratio": 1}
SMALL["ninformer"] = {"img_size": (64, 96), "patch_size": 16, "embed_dim": 16, "hidden_dim": 24}
SMALL["l2vit"] = {"depths": (2, 2, 2, 2), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)}
SMALL["smt"] = {
    "depths": (1, 1, 2, 1),
    "embed_dims": (16, 24, 32, 48),
    "num_heads": (0, 0, 2, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "stem_kernel": 5,
}
_EFFICIENTMOD = {"depths": (1, 1, 2, 1), "embed_dims": (16, 24, 32, 40), "ratios": (1, 3)}
SMALL["efficientmod_s_conv"] = _EFFICIENTMOD
SMALL["efficientmod"] = {**_EFFICIENTMOD, "attention_depths": (0, 0, 1, 1), "mlp_ratios": (2, 2, 2, 2)}

SMALL["care"] = {"depths": (1, 2, 1, 2), "embed_dims": (16, 32, 64, 128), "head_dims": (0, 0, 8, 16)}
SMALL["fcaformer"] = {"img_size": (64, 96), "embed_dims": (16, 24, 32, 64), "depths": (1, 1, 3, 2)}
SMALL["swin_vsa"] = {**_SWIN, "global_blocks": (2, 2, 3, 2), "window_size": 3}
SMALL["vitaev2_vsa"] = {
    "depths": (1, 2, 1, 1),
    "embed_dims": (16, 16, 32, 64),
    "token_dims": (16, 32, 64, 128),
    "reduction_heads": (1, 2, 2, 4),
    "num_heads": (2, 2, 4, 4),
    "window_size": 2,
}

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
    "efficientmod_xxs": 4_736_264,
    "efficientmod_xs": 6_627_544,
    "efficientmod_s": 12_897_184,
    "efficientmod_s_conv": 12_872_336,
    "smt_t": 11_506_536,
    "smt_s": 22_550_952,
    "smt_b": 32_037_352,
    "smt_l": 80_620_264,
    "l2vit_b": 88_577_188,
    "l2vit_b_384": 88_577_188,
    "l2vit_s": 50_199_157,
    "l2vit_t": 28_596_781,
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "cfsr_x2": 298_236,
    "cfsr_x3": 304_731,
    "cfsr_x4": 313_824,
    "fcaformer_l1": 6_187_560,
    "fcaformer_l2": 16_275_870,
    "fcaformer_l3": 27_894_484,
    "fcaformer_l4": 65_638_204,
    "halonet_h0": 5_502_248,
    "halonet_h2": 9_405_608,
    "halonet_h3": 11_842_792,
    "halonet_h4": 19_103_464,
    "halonet_h5": 30_718_952,
    "halonet_h6": 43_458_280,
    "halonet_h7": 67_434_728,
    "hat_s_x1": 9_244_911,
    "care_s0": 7_340_000,
    "care_s1": 9_602_424,
    "care_s2": 19_481_288,
    "catanet_x2": 477_435,
    "catanet_x3": 549_635,
    "catanet_x4": 535_195,
    "craft_x2": 737_756,
    "craft_x3": 744_251,
    "craft_x4": 753_344,
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
    "ninformer_cifar10": 2_652_170,
    # Without the head for training on the overview, and before large convolutions are merged.
    "overlock_xt": 16_969_600,
    "overlock_t": 34_476_448,
    "overlock_s": 57_795_748,
    "overlock_b": 97_434_816,
    "pmnet": 19_993_613,
    "pmnet_small": 99_335,
    "rgt_s_x2": 10_051_055,
    "rgt_s_x3": 10_235_695,
    "rgt_s_x4": 10_198_767,
    "rgt_x2": 13_217_831,
    "rgt_x3": 13_402_471,
    "rgt_x4": 13_365_543,
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
    "swin_vsa_t": 28_779_274,
    "swin_vsa_s": 50_549_338,
    "vitaev2_vsa_s": 19_773_300,
    "vitaev2_vsa_widepcm_s": 20_342_442,
    "vitaev2_vsa_48m": 51_089_119,
    "vitaev2_vsa_b": 93_711_532,
    "vitaev2_vsa_b_ws12": 93_833_932,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}


def prefix(name: str) -> str:
    """The entry of `SMALL` for a network."""
    return next(key for key in SMALL if name.startswith(key))


def small(name: str, **kwargs: Any) -> nn.Module:
    """The network in miniature, the same at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[prefix(name)], **kwargs})


def structure(name: str) -> str:
    """What the miniature of a network is made of: equal for variants that differ in size alone."""
    net = small(name, device="meta")
    plain = (bool, int, float, str, tuple, type(None))
    facts = [
        (path, type(module).__name__, {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for path, module in net.named_modules()
    ]
    return repr((facts, [(n, tuple(p.shape)) for n, p in net.named_parameters()], getattr(net, "info", None)))


ALL = model_names()
# One variant of every structure, for what sizes do not change.
STRUCTURES = list({structure(name): name for name in reversed(ALL)}.values())[::-1]
RESTORATION = [name for name in STRUCTURES if hasattr(small(name, device="meta"), "info")]
# Networks of tokens with a class token, not of maps: their own tests stand in test_linear_hosts.py.
TOKENS = [name for name in STRUCTURES if hasattr(small(name, device="meta"), "num_prefix_tokens")]
# Backbones for images of any size, as detectors and segmenters have them.
ANY_SIZE = [
    name
    for name in STRUCTURES
    if name not in RESTORATION and not small(name, device="meta").pretrained_cfg["fixed_input_size"]
]
CLASSIFICATION = [name for name in STRUCTURES if name not in RESTORATION + TOKENS]
DROP_PATH = [
    name
    for name in STRUCTURES
    if "drop_path_rate" in inspect.signature(type(small(name, device="meta"))).parameters
]
SAME_IN_TRAINING = [name for name in STRUCTURES if not name.startswith(tuple(TRAINED_OTHERWISE))]
# One variant of every miniature, for what takes long and differs between families alone.
FAMILIES = list({prefix(name): name for name in reversed(ALL)}.values())[::-1]
