"""SHViT: timm has the network; here stands how its authors' weights are recognised, loaded and written back.

Paper: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", CVPR 2024,
https://arxiv.org/abs/2401.16456. Official code and weights: https://github.com/ysj9909/SHViT (MIT), files
`releases/download/v1.0/shvit_s{1,2,3,4}.pth`.
"""

from __future__ import annotations

import re
from typing import Any

from timm.models.shvit import SHViT
from torch import Tensor, nn

from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, adopt

# The official stages behind the first begin with three modules of downsampling, two of them in two parts.
_NAMES = Names(
    ("^blocks1.#.", "^stages.0.blocks.#."),
    *(
        rule
        for i in (1, 2)
        for rule in (
            *((f"^blocks{i + 1}.0.{j}.", f"^stages.{i}.downsample.{j}.") for j in (0, 1)),
            (f"^blocks{i + 1}.1.", f"^stages.{i}.downsample.2."),
            *((f"^blocks{i + 1}.2.{j}.", f"^stages.{i}.downsample.{3 + j}.") for j in (0, 1)),
            *((f"^blocks{i + 1}.{3 + j}.", f"^stages.{i}.blocks.{j}.") for j in range(32)),
        )
    ),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "shvit_s1": {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68)},
    "shvit_s2": {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96)},
    "shvit_s3": {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96)},
    "shvit_s4": {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96)},
}
for _row in VARIANTS.values():
    _row["types"] = ("i", "s", "s")


def _fit(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """For `features_only=True` timm names the parts of sequences anew, and leaves the classifier out."""
    if isinstance(network, SHViT):
        return weights
    renamed = {re.sub(r"^(patch_embed|stages)\.", r"\1_", name): value for name, value in weights.items()}
    return {name: value for name, value in renamed.items() if not name.startswith("head.")}


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    depth = ours.lengths("stages", "blocks")
    blocks = [f"stages.{i}.blocks.0" for i in range(len(depth))]
    dims = tuple(ours[f"{block}.ffn.m.pw2.c.weight"][0] for block in blocks)
    partial, qk, types = [], [], []
    for i, (block, dim) in enumerate(zip(blocks, dims)):
        qkv = ours.get(f"{block}.mixer.m.qkv.c.weight", 4)
        rows = qkv[:2] if qkv else (_unused_width(i, dim) + 32, _unused_width(i, dim))
        partial.append(rows[1])
        qk.append((rows[0] - rows[1]) // 2)
        types.append("s" if qkv else "i")
    classifier = ours.get("head.l.weight", 2)
    return {
        "in_chans": ours["patch_embed.0.c.weight"][1],
        "num_classes": classifier[0] if classifier else 0,
        "embed_dim": dims,
        "partial_dim": tuple(partial),
        "qk_dim": tuple(qk),
        "depth": depth,
        "types": tuple(types),
    }


def _unused_width(stage: int, dim: int) -> int:
    """The width of attention in a stage without any, as the published network of this size states it."""
    rows = (row for row in VARIANTS.values() if row["embed_dim"][stage : stage + 1] == (dim,))
    return next((row["partial_dim"][stage] for row in rows), dim // 4)


LAYOUT = Layout(
    family="shvit",
    model_cls=SHViT,
    marks=(r"^stages\.1\.downsample\.2\.se\.", r"\.mixer\.m\.pre_norm\.weight$"),
    rename=_NAMES.to_ours,
    fit=_fit,
    reads={"patch_embed.0.c.weight": 4, "stages.#.blocks.0.ffn.m.pw2.c.weight": 4},
    arguments=_arguments,
    to_official=_NAMES.official_weights,
    wrapper="model",
)
adopt(LAYOUT, VARIANTS)
