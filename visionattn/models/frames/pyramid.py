"""The frame of hierarchical backbones: what timm asks of a stem, stages of blocks, a norm and a classifier.

Between the parts a map is `[B, H, W, C]`; images come in and features go out as `[B, C, H, W]`, and no
permutation copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from visionattn._compat import feature_take_indices
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up, on_nhwc
from visionattn.models.frames.common import Size, StridedConv2d, check_size, init_linear, resize_tokens


class Stage(nn.Module):
    """Downsampling and blocks on `[B, H, W, C]`.

    Args:
        dim: channels of the blocks.
        downsample: from the map of the stage before.
        blocks: modules from maps to maps of the same shape.
    """

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.dim = dim
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, dim]`."""
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)


class MapSequential(nn.Sequential):
    """Convolutions and their norms, one after the other, on `[B, H, W, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H', W', C']`."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchMerging(nn.Module):
    """Swin's downsampling: four neighbours side by side, a norm, a linear layer; odd maps are filled up."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * in_dim, **dd)
        self.reduction = Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / 2, W / 2, dim]`, rounded up."""
        x = fill_up(x, (2, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # Of the four pixels, rows run fastest: (0, 0), (1, 0), (0, 1), (1, 1).
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class PatchEmbedding(nn.Module):
    """A strided convolution, a norm, and optionally a learned position embedding; `[B, H, W, C]` in and out.

    Args:
        in_dim: input channels.
        dim: output channels.
        kernel: kernel size.
        stride: factor by which the map shrinks.
        padding: zeros on every side.
        fill: whether maps that `stride` does not divide are filled up with zeros on the right and bottom.
        size: map size of the position embedding, which is resized bilinearly for others; None for no
        embedding.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        fill: bool = False,
        size: Size | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = stride
        self.fill = fill
        self.size = size
        self.proj = StridedConv2d(in_dim, dim, kernel, stride, padding, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.pos_embed = None
        if size is not None:
            self.pos_embed = trunc_normal_(
                nn.Parameter(torch.empty(1, size[0] * size[1], dim, **dd)), std=0.02
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / stride, W / stride, dim]`."""
        x = fill_up(x, (self.stride, self.stride)) if self.fill else x
        x = self.norm(on_nhwc(self.proj, x))
        if self.pos_embed is None or self.size is None:
            return x
        return x + resize_tokens(self.pos_embed, self.size, (x.shape[1], x.shape[2]), "bilinear")


class Pyramid(nn.Module):
    """A backbone of stages, each with its own resolution.

    Maps are taken behind every stage; of an isotropic network, a single stage, behind every block.

    A family whose stages hand on more than one map (tokens of earlier stages, a second branch) lets them take
    and return what they like, and overrides `map_of`.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        drop_rate: dropout before the classifier.
        stem: images to the first map.
        stages: what follows; that behind the stem does not downsample.
        norm: of the last map.
        norm_eps: of the extra norms.
        extra_norms: a LayerNorm per map that can be taken, as official dense backbones have.
        min_size: smallest input side in pixels.
        reductions: side of the image / side of the map, for every stage; by default 4, 8, 16, ...
        num_features: channels behind `norm`, where it changes them.
    """

    # Parameters whose names end so are not decayed, beyond timm's rule of one-dimensional ones.
    undecayed: tuple[str, ...] = ("relative_position_bias_table",)

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
        reductions: Sequence[int] | None = None,
        num_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [stage.dim for stage in stages]
        reductions = reductions or [4 * 2**i for i in range(len(dims))]
        levels = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions))
        ]
        if len(stages) == 1:  # isotropic
            levels = [{**levels[0], "module": f"stages.0.blocks.{i}"} for i in range(len(stages[0].blocks))]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features or dims[-1]
        self.min_size = min_size
        self.feature_info = levels
        self.is_isotropic = len(stages) == 1
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.extra_norms = None
        if extra_norms:
            self.extra_norms = nn.ModuleList(nn.LayerNorm(x["num_chs"], eps=norm_eps, **dd) for x in levels)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @staticmethod
    def count_features(**arguments: Any) -> int | None:
        """How many of the last maps `features_only=True` gives: all, of an isotropic network three."""
        return 3 if len(arguments.get("depths", ())) == 1 else None

    @property
    def levels(self) -> nn.Sequential:
        """The modules behind which maps are taken."""
        return self.stages.get_submodule("0.blocks") if self.is_isotropic else self.stages  # type: ignore

    def map_of(self, x: Any) -> Tensor:
        """The map `[B, H, W, C]` in what a stage returns."""
        return x

    def extra_norm(self, level: int, x: Tensor, state: Any) -> Tensor:
        """The extra norm of the map `[B, H, W, C]` of a level, which returned `state`."""
        assert self.extra_norms is not None
        return self.extra_norms[level](x)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm of the last map `[B, H, W, C]`."""
        return self.norm(x)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed beyond timm's rule of one-dimensional ones: biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.undecayed)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay."""
        blocks = r"^stages\.(\d+)"
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
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
        """Outputs of levels, stages or blocks, as timm defines this method.

        Args:
            x: images `[B, C, H, W]`.
            indices: which levels: the last n, a list, or all.
            norm: apply the final norm to the last output; in an isotropic network, to every one.
            stop_early: do not run levels beyond the last one asked for.
            output_fmt: `"NCHW"`.
            intermediates_only: return the outputs of levels alone.

        Returns:
            Maps `[B, C_i, H / r_i, W / r_i]` (with `extra_norms`, each through its norm; the next level sees
            the map before it), preceded by the final features unless `intermediates_only`.

        Raises:
            ValueError: another `output_fmt`, or an input that is too small.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last = len(self.levels) - 1
        levels = self.levels[: max_index + 1] if stop_early else self.levels
        # Stages recompute their blocks by themselves.
        recompute = self.is_isotropic and self.training and self.stages[0].grad_checkpointing
        intermediates = []
        x = self.embed(x)
        for i, level in enumerate(levels):
            x = checkpoint(level, x) if recompute else level(x)
            if i in take_indices:
                out = self.map_of(x)
                out = self.final_norm(out) if norm and (i == last or self.is_isotropic) else out
                out = out if self.extra_norms is None else self.extra_norm(i, out, x)
                intermediates.append(out.permute(0, 3, 1, 2))
        if intermediates_only:
            return intermediates
        x = self.final_norm(self.map_of(x)) if len(levels) == last + 1 else self.map_of(x)
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the outputs of the given levels do not need; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        if prune_norm or max_index < len(self.levels) - 1:
            self.norm = nn.Identity()
        if self.is_isotropic:
            self.stages[0].blocks = self.levels[: max_index + 1]
        else:
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
        return self.final_norm(self.map_of(self.stages(self.embed(x)))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[B, num_classes]`, or with `pre_logits` to pooled features `[B, C]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def embed(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the first map `[B, H / s, W / s, C]`.

        Raises:
            ValueError: an input that is too small; the message says the smallest size.
        """
        check_size(x, self.min_size)
        return self.stem(x.permute(0, 2, 3, 1).contiguous())
