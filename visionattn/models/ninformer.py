"""NiNformer: blocks whose tokens are gated by a whole MLP-Mixer block; for small images of one size.

Paper: "NiNformer: A Network in Network Transformer with Token Mixing (as a) Generated Gating Function",
https://arxiv.org/abs/2403.02411. Official code: https://github.com/Abdullah-88/NiNformer (BSD-3-Clause); the
authors published no weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels.checks import pair
from visionattn.layers.linear import Linear
from visionattn.models.frames.common import Size, StridedConv2d, build_backbone, check_fixed_size
from visionattn.models.frames.tokens import TokenNetwork
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Guess, Shapes, classes_of, square
from visionattn.models.registry.variants import Layout, Variant, register

__all__ = ["NiNformer"]


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, dropout behind each; `[..., dim]` to `[..., dim]`."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Mixer(nn.Module):
    """An MLP-Mixer block: an MLP over the tokens, then one over the channels, `[B, N, C]` in and out.

    Args:
        dim: channels.
        tokens: tokens.
        hidden_dim: hidden width of both MLPs.
        drop: dropout of both.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        hidden_dim: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.token_mlp = FeedForward(tokens, hidden_dim, drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.channel_mlp = FeedForward(dim, hidden_dim, drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class Block(nn.Module):
    """A gate and an MLP: two residual branches on tokens `[B, N, C]` that share one norm.

    The gate multiplies a projection of every token with what the mixer makes of all of them.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        hidden_dim: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.mixer = Mixer(dim, tokens, hidden_dim, drop, **dd)
        self.mlp = FeedForward(dim, hidden_dim, drop, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        y = self.norm(x)
        x = x + self.proj(y) * self.mixer(y)
        return x + self.mlp(self.norm(x))


class NiNformer(TokenNetwork):
    """NiNformer. Its token MLPs have a weight for every pair of places: images are of the training size.

    Args:
        img_size: side of the images in pixels, or (height, width).
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels.
        hidden_dim: hidden width of all MLPs.
        depth: blocks.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs (0.5 in official training).
    """

    def __init__(
        self,
        img_size: int | Size = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        embed_dim: int = 256,
        hidden_dim: int = 512,
        depth: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_size = pair("img_size", img_size)
        tokens = math.prod(side // patch_size for side in self.img_size)
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            patch_embed=StridedConv2d(in_chans, embed_dim, patch_size, patch_size, **dd),
            patch_size=patch_size,
            embed_dim=embed_dim,
            size=None,
            class_token=None,
            blocks=(Block(embed_dim, tokens, hidden_dim, proj_drop_rate, **dd) for _ in range(depth)),
            norm=nn.Identity(),
            **dd,
        )
        self.min_size = min(self.img_size)

    def init_part(self, module: nn.Module) -> None:
        """Leave the initial weights of a module as PyTorch draws them."""

    def embed(self, x: Tensor) -> tuple[Tensor, Size]:
        """Images `[B, in_chans, *img_size]` to tokens `[B, N, C]`, and the size of their map.

        Raises:
            ValueError: an image of another size.
        """
        check_fixed_size(x, self.img_size)
        return super().embed(x)


_NAMES = Names(
    ("^patcher.", "^patch_embed."),
    ("^model.#.", "^blocks.#."),
    (".mgu.Mixer.token_mix.0.", ".mixer.norm1."),
    (".mgu.Mixer.token_mix.2.", ".mixer.token_mlp."),
    (".mgu.Mixer.channel_mix.0.", ".mixer.norm2."),
    (".mgu.Mixer.channel_mix.1.", ".mixer.channel_mlp."),
    (".mgu.proj.", ".proj."),
    (".ffn.", ".mlp."),
    (".net.0.", ".fc1."),
    (".net.3.", ".fc2."),
    ("^classifier.", "^head."),
)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    dim, in_chans, patch, _ = ours["patch_embed.weight"]
    hidden_dim, tokens = ours["blocks.0.mixer.token_mlp.fc1.weight"]
    # The squarest map of so many tokens.
    rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return {
        "img_size": Guess(square(patch * rows, patch * tokens // rows)),
        "patch_size": patch,
        "in_chans": in_chans,
        "num_classes": classes_of(ours),
        "embed_dim": dim,
        "hidden_dim": hidden_dim,
        "depth": ours.length("blocks"),
    }


LAYOUT = Layout(
    family="ninformer",
    model_cls=NiNformer,
    marks=(r"^blocks\.0\.mixer\.token_mlp\.fc1\.weight$",),
    rename=_NAMES.to_ours,
    reads={"patch_embed.weight": 4, "blocks.0.mixer.token_mlp.fc1.weight": 2},
    arguments=_arguments,
    to_official=_NAMES.official_weights,
    unlearned=("img_size",),
)

default_cfgs = generate_default_cfgs(
    {
        "ninformer_cifar10": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed",
            "classifier": "head",
            "license": "bsd-3-clause",
            "paper_ids": "arXiv:2403.02411",
            "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing (as a) Generated "
            "Gating Function",
            "origin_url": "https://github.com/Abdullah-88/NiNformer",
        }
    }
)
VARIANTS = {"ninformer_cifar10": Variant("NiNformer for 32x32 pixels: 2.7 M parameters, 0.2 GMACs.")}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
