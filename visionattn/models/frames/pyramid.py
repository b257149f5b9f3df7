"""The frame of hierarchical backbones on channels-last maps: stem, stages of blocks, norm, classifier.

Networks that differ in their parts (how maps are downsampled, which attention a block has) share everything
else that timm asks of a backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, trunc_normal_
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from visionattn.kernels import product
from visionattn.layers.linear import Mlp, add_pixelwise
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.backbone import Backbone, CheckpointedStage
from visionattn.models.frames.common import check_size

# So many weights for a number of the patches make a product of patches faster than a convolution.
_WEIGHTS_PER_NUMBER = 4


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
        self.hidden_dim = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, self.hidden_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`x`, as the attention takes it, to the same shape."""
        return self.feed_forward(x + self.drop_path(self.attend(x, *args)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """`x` and the MLP branch; in inference on a CPU large maps are overwritten piece by piece."""

        def branch(x: Tensor) -> Tensor:
            return self.drop_path(self.mlp(self.norm2(x)))

        return add_pixelwise(x, branch, self.hidden_dim, self.training)

    def attend(self, x: Tensor, *args: Any) -> Tensor:
        """The attention branch; further arguments are the attention's."""
        return self.attn(self.norm1(x), *args)


class Stage(CheckpointedStage):
    """Downsampling and blocks on `[B, H, W, C]`."""

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.dim = dim
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, dim]`."""
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)


class Pyramid(Backbone):
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

    def _stem(self, x: Tensor) -> Tensor:
        check_size(x, self.min_size)
        return self.stem(x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1))

    def _as_nchw(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A strided convolution of `[B, H, W, C]`, as `on_nhwc`, and fast where weights outnumber the pixels.

    A convolution first copies its weights into another order, which for the small maps of late stages is most
    of the work; as a product of patches it takes them as they are.
    """
    padding: Any = conv.padding
    (height, width), (step_y, step_x) = conv.kernel_size, conv.stride
    # First of all, because the comparison of sizes would bind a traced program to them.
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return on_nhwc(conv, x)
    numbers = x.numel() * height * width // (step_y * step_x)
    if conv.weight.numel() < _WEIGHTS_PER_NUMBER * numbers:
        return on_nhwc(conv, x)
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    patches = x.unfold(1, height, step_y).unfold(2, width, step_x).flatten(3)
    return product(patches, conv.weight.flatten(1), conv.bias)


def init_linear(module: nn.Module) -> None:
    """Initial weights of the linear layers: truncated normal of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
