"""DeiT with its attention as a part (https://arxiv.org/abs/2012.12877)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from visionattn.kernels.checks import pair
from visionattn.layers.linear import Linear
from visionattn.models.frames.common import check_size, drop_path_rates
from visionattn.models.frames.pyramid import Block, convolve, init_linear
from visionattn.models.hosts.hosts import Attention, Size, fit_tables, resize_tokens, square
from visionattn.models.registry.layout import Layout, Names, Shapes, Weights, classes_of, unwrap


class SoftmaxAttention(nn.Module):
    """Attention among all tokens `[B, N, C]`; it takes, and does not need, the size of their map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DeiT(nn.Module):
    """DeiT, the first blocks with the given attention, the others with softmax attention.

    Images whose sides the patch does not divide lose the remainder on the right and bottom, as a strided
    convolution has it. The position embedding is resized bicubically for other sizes.

    Args:
        attention: makes the attention of a block.
        global_blocks: how many of the first blocks have it.
        img_size: training size in pixels, or (height, width): that of the position embedding.
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: what the classifier sees: `"token"`, the class token; `"avg"`, `"max"` or `"avgmax"`
            of the others; `""`, all tokens.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        attention: Attention,
        global_blocks: int = 12,
        img_size: int | Size = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.size = (height // patch_size, width // patch_size)
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **dd)
        tokens = 1 + self.size[0] * self.size[1]
        self.cls_token = trunc_normal_(nn.Parameter(torch.empty(1, 1, embed_dim, **dd)), std=0.02)
        self.pos_embed = trunc_normal_(nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)), std=0.02)
        blocks = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
            if i < global_blocks:
                attn = attention(embed_dim, num_heads, stage=0, size=self.size, **dd)
            else:
                attn = SoftmaxAttention(embed_dim, num_heads, **dd)
            blocks.append(Block(embed_dim, attn, drop_path=rate, eps=1e-6, **dd))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self._set_pool(global_pool)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed: the class token and the position embedding."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they hold."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), optionally with another pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        dd: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.head.apply(init_linear)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Block outputs, as timm defines this method.

        Args:
            x: images `[B, C, H, W]`.
            indices: which blocks: the last n, a list, or all.
            return_prefix_tokens: pair every output with the class token `[B, 1, C]`.
            norm: apply the final norm to every output.
            stop_early: do not run blocks beyond the last one asked for.
            output_fmt: `"NCHW"`, or `"NLC"` for tokens.
            intermediates_only: return the block outputs alone.

        Returns:
            Patch tokens `[B, C, H / 16, W / 16]` or `[B, H * W / 256, C]` of each block, preceded by the
            final tokens `[B, 1 + H * W / 256, C]` unless `intermediates_only`.

        Raises:
            ValueError: another `output_fmt`, or an input that is too small.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, size = self._embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._run(block, x, size)
            if i not in take_indices:
                continue
            tokens = self.norm(x) if norm else x
            out = tokens[:, 1:]
            out = out.transpose(1, 2).unflatten(2, size) if output_fmt == "NCHW" else out
            intermediates.append((out, tokens[:, :1]) if return_prefix_tokens else out)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given block outputs do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to normalised tokens `[B, 1 + H * W / 256, C]`, the class token first.

        Raises:
            ValueError: an input that is too small; the message says the smallest size.
        """
        x, size = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits `[B, num_classes]`, or with `pre_logits` to pooled features `[B, C]`."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def _set_pool(self, global_pool: str) -> None:
        known = ("token", "avg", "max", "avgmax", "")
        if global_pool not in known:
            raise ValueError(f"global_pool={global_pool!r} is unknown; choose one of {known}")
        self.global_pool = global_pool

    def _embed(self, x: Tensor) -> tuple[Tensor, Size]:
        check_size(x, self.min_size)
        x = convolve(self.patch_embed, x.permute(0, 2, 3, 1))
        size = (x.shape[1], x.shape[2])
        pos = resize_tokens(self.pos_embed[:, 1:], self.size, size, "bicubic")
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, (x + pos).flatten(1, 2)], 1), size

    def _run(self, block: nn.Module, x: Tensor, size: Size) -> Tensor:
        return checkpoint(block, x, size) if self.grad_checkpointing and self.training else block(x, size)


_NAMES = Names(("^patch_embed.proj.", "^patch_embed."))


def to_ours(official: Weights) -> dict[str, Tensor]:
    """The authors' weights in our names."""
    return {_NAMES.to_ours(name): value for name, value in official.items()}


def to_official(weights: Weights, model: DeiT) -> dict[str, Tensor]:
    """Our weights in the authors' names."""
    return {_NAMES.to_official(name): value for name, value in weights.items()}


def deit_arguments(ours: Shapes, mark: str, heads: Callable[[tuple[int, ...]], int]) -> dict[str, Any]:
    """The arguments that weights tell; parameters as `host_arguments` has them."""
    dim, in_chans, patch, _ = ours["patch_embed.weight"]
    depth = ours.length("blocks")
    marked = [shape for i in range(depth) if (shape := ours.get(f"blocks.{i}.{mark}"))]
    lines = [ours.get(f"blocks.0.attn.{axis}_bias") for axis in ("ah", "aw")]
    side = math.isqrt(ours["pos_embed"][1] - 1)
    rows, columns = (lines[0][3], lines[1][4]) if lines[0] and lines[1] else (side, side)
    return {
        "in_chans": in_chans,
        "num_classes": classes_of(ours),
        "img_size": square(patch * rows, patch * columns),
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads(marked[0]),
        # Twelve, where all are: there may be fewer blocks than that.
        "global_blocks": len(marked) if len(marked) < depth else 12,
    }


def deit_layout(
    family: str, arguments: Callable[[Shapes, Shapes], dict[str, Any]], mark: str, unlearned: tuple[str, ...]
) -> Layout:
    """The layout of DeiT with an attention; parameters as `Layout` has them."""
    return Layout(
        *(family, DeiT, (r"^pos_embed$", rf"\.{re.escape(mark)}$"), to_ours, arguments, to_official),
        wrapper="model",
        unlearned=unlearned,
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: DeiT) -> dict[str, Tensor]:
    """Rename the official parameters to ours; our own names pass unchanged.

    Tables of another training size are resized as the authors do for fine-tuning.
    """
    return fit_tables(to_ours(unwrap(state_dict)[0]), model, prefix=1)
