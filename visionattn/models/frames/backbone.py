"""What timm asks of a backbone made of a stem, stages, a norm and a classifier: written once."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visionattn.models.frames.common import check_size


class CheckpointedStage(nn.Module):
    """A stage that can recompute its blocks in the backward pass."""

    grad_checkpointing: bool = False


class Backbone(nn.Module):
    """The methods of timm's contract; the parts come from the family.

    Attributes:
        stem: images to the first map.
        stages: `nn.Sequential` of `CheckpointedStage`s.
        norm: of the last map.
        extra_norms: a norm per returned stage output, or None.
        head: pooling and classifier.
        num_classes: classes; 0 for no classifier.
        min_size: smallest input side in pixels.
    """

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    extra_norms: nn.ModuleList | None
    head: ClassifierHead
    num_classes: int
    min_size: int

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
            if isinstance(module, CheckpointedStage):
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
                intermediates.append(self._as_nchw(out))
        if intermediates_only:
            return intermediates
        x = self.norm(x) if len(stages) == len(self.stages) else x
        return self._as_nchw(x), intermediates

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
        return self._as_nchw(self.norm(self.stages(self._stem(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[B, num_classes]`, or with `pre_logits` to pooled features `[B, C]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def _stem(self, x: Tensor) -> Tensor:
        check_size(x, self.min_size)
        # Blocks work on channels-last maps; from here on no permutation copies.
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def _as_nchw(self, x: Tensor) -> Tensor:
        """What is returned of a map between the parts."""
        return x
