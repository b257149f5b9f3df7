"""The frame of hierarchical backbones on channels-last maps: stem, stages of blocks, norm, classifier.

Networks that differ in their parts (how maps are downsampled, which attention a block has) share everything
else that timm asks of a backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, Mlp, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from ._shared import check_size


class Block(nn.Module):
    """Attention, then an MLP: two residual branches with a norm before each.

    Args:
        dim: channels.
        attn: the attention.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        drop_path: stochastic depth of both branches.
        eps: of both norms.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = x + self.drop_path(self.attend(x, *args))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, *args: Any) -> Tensor:
        """The attention branch; further arguments are the attention's."""
        return self.attn(self.norm1(x), *args)


class Stage(nn.Module):
    """Downsampling and blocks on `[B, H, W, C]`."""

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.dim = dim
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)


class Pyramid(nn.Module):
    """A backbone of stages that each halve the resolution, the first at a quarter of the image.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        drop_rate: dropout before the classifier.
        stem: images to the first map, `[B, H, W, C]` in and out, as all parts.
        stages: the stages; that of the stem does not downsample.
        norm: of the last map.
        norm_eps: of the extra norms.
        extra_norms: a LayerNorm per returned stage output, as official dense backbones have.
        min_size: smallest input side in pixels.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        stem: nn.Module,
        stages: Sequence[Stage],
        norm: nn.Module,
        norm_eps: float,
        extra_norms: bool,
        min_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [stage.dim for stage in stages]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.min_size = min_size
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.extra_norms = (
            nn.ModuleList(nn.LayerNorm(dim, eps=norm_eps, **dd) for dim in dims) if extra_norms else None
        )
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed: tables of relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay."""
        blocks = r"^stages\.(\d+)"
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:norm|extra_norms)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they hold."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), optionally with another pooling."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, as timm defines this method.

        Args:
            x: images `[B, C, H, W]`.
            indices: which stages: the last n, a list, or all.
            norm: apply the final norm to the last stage's output.
            stop_early: do not run stages beyond the last one asked for.
            output_fmt: `"NCHW"`.
            intermediates_only: return the stage outputs alone.

        Returns:
            Stage outputs `[B, C_i, H / r_i, W / r_i]` (with `extra_norms`, each through its norm; the next
            stage sees the map before it), preceded by the final features unless `intermediates_only`.

        Raises:
            ValueError: another `output_fmt`, or an input that is too small.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        intermediates = []
        x = self._stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                out = self.norm(x) if norm and i == len(self.stages) - 1 else x
                out = out if self.extra_norms is None else self.extra_norms[i](out)
                intermediates.append(out.permute(0, 3, 1, 2))
        if intermediates_only:
            return intermediates
        x = self.norm(x) if len(stages) == len(self.stages) else x
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given stage outputs do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if prune_norm or max_index < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        if self.extra_norms is not None:
            self.extra_norms = nn.ModuleList(
                norm if i in take_indices else nn.Identity()
                for i, norm in enumerate(self.extra_norms[: max_index + 1])
            )
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the normalised last map `[B, C, H / 32, W / 32]`.

        Raises:
            ValueError: an input that is too small; the message says the smallest size.
        """
        return self.norm(self.stages(self._stem(x))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[B, num_classes]`, or with `pre_logits` to pooled features `[B, C]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def _stem(self, x: Tensor) -> Tensor:
        check_size(x, self.min_size)
        return self.stem(x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1))


def init_linear(module: nn.Module) -> None:
    """Initial weights of the linear layers: truncated normal of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
