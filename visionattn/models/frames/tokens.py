"""The frame of isotropic backbones: what timm asks of patches that pass blocks of one width as tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from visionattn._compat import feature_take_indices
from visionattn.models.frames.common import Size, StridedConv2d, check_size, init_linear, resize_tokens

_POOLS = ("token", "avg", "max", "avgmax", "")


class TokenNetwork(nn.Module):
    """A backbone of tokens `[B, N, C]`: patches, and a class token first, in the middle or not at all.

    The position embedding has an entry for every token of the training size and is resized bicubically for
    others; families with other position tables override `embed`.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: what the classifier sees: `"token"`, the class token; `"avg"`, `"max"` or `"avgmax"`
            of the others; `""`, all tokens.
        drop_rate: dropout before the classifier.
        patch_embed: a convolution of images to the map of patches.
        patch_size: side of a patch in pixels.
        embed_dim: channels.
        size: map size of the position embedding; None for none.
        class_token: where the class token stands.
        blocks: modules that take tokens and the size of their map.
        norm: of the last tokens.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        patch_embed: StridedConv2d,
        patch_size: int,
        embed_dim: int,
        size: Size | None,
        class_token: Literal["first", "middle"] | None,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_size = self.min_size = patch_size
        self.size = size
        self.class_token = class_token
        self.num_prefix_tokens = 1 if class_token == "first" else 0
        self.grad_checkpointing = False
        self.patch_embed = patch_embed

        def table(count: int) -> nn.Parameter:
            return trunc_normal_(nn.Parameter(torch.empty(1, count, embed_dim, **dd)), std=0.02)

        tokens = 1 if class_token else 0
        self.cls_token = table(1) if class_token else None
        self.pos_embed = table(tokens + size[0] * size[1]) if size else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(len(self.blocks))
        ]
        self._set_pool(global_pool)
        self.apply(self.init_part)

    def init_part(self, module: nn.Module) -> None:
        """Draw the initial weights of a module of the network: of linear layers, the usual ones."""
        init_linear(module)

    @staticmethod
    def count_features(**arguments: Any) -> int | None:
        """How many of the last maps `features_only=True` gives: three, as of timm's ViTs."""
        return 3

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed: the class token and the position embedding."""
        return {name for name in ("cls_token", "pos_embed") if getattr(self, name) is not None}

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
        weight = next(self.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.head.apply(self.init_part)

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
            Patches `[B, C, h, w]` or `[B, h * w, C]` of each block, preceded by the final tokens `[B, N, C]`
            unless `intermediates_only`.

        Raises:
            ValueError: another `output_fmt`, or an input that is too small.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, size = self.embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = self._run(block, x, size)
            if i not in take_indices:
                continue
            out, token = self.split(self.norm(x) if norm else x)
            out = out.transpose(1, 2).unflatten(2, size) if output_fmt == "NCHW" else out
            intermediates.append((out, token) if return_prefix_tokens else out)
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
        """Images `[B, in_chans, H, W]` to normalised tokens `[B, N, C]`.

        Raises:
            ValueError: an input that is too small; the message says the smallest size.
        """
        x, size = self.embed(x)
        for block in self.blocks:
            x = self._run(block, x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits `[B, num_classes]`, or with `pre_logits` to pooled features `[B, C]`."""
        if self.global_pool:
            patches, token = self.split(x)
            x = token[:, 0] if self.global_pool == "token" else global_pool_nlc(patches, self.global_pool, 0)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def embed(self, x: Tensor) -> tuple[Tensor, Size]:
        """Images `[B, in_chans, H, W]` to tokens `[B, N, C]` with their positions, and their map's size."""
        check_size(x, self.min_size)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        size = (x.shape[1], x.shape[2])
        token = self.cls_token
        if self.pos_embed is not None and self.size is not None:
            patches, place = self.split(self.pos_embed)
            x = x + resize_tokens(patches, self.size, size, "bicubic")
            token = None if token is None else token + place
        x = x.flatten(1, 2)
        if token is not None:
            token = token.expand(x.shape[0], -1, -1)
            middle = x.shape[1] // 2
            parts = [token, x] if self.class_token == "first" else [x[:, :middle], token, x[:, middle:]]
            x = torch.cat(parts, 1)
        return x, size

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The patches `[B, h * w, C]` among all tokens, and the class token `[B, 1 or 0, C]`."""
        if self.class_token == "middle":
            middle = (tokens.shape[1] - 1) // 2
            patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1)
            return patches, tokens[:, middle : middle + 1]
        return tokens[:, self.num_prefix_tokens :], tokens[:, : self.num_prefix_tokens]

    def _set_pool(self, global_pool: str) -> None:
        known = _POOLS if self.class_token else _POOLS[1:]
        if global_pool not in known:
            raise ValueError(f"global_pool={global_pool!r} is unknown; choose one of {known}")
        self.global_pool = global_pool

    def _run(self, block: nn.Module, x: Tensor, size: Size) -> Tensor:
        return checkpoint(block, x, size) if self.grad_checkpointing and self.training else block(x, size)
