"""Parts and habits of backbones of every kind: sizes, stochastic depth, initial weights, the usual block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, trunc_normal_
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from visionattn.kernels import product
from visionattn.layers.bands import pixelwise
from visionattn.layers.linear import Mlp
from visionattn.layers.maps import is_known_to_be, on_nhwc

Size = tuple[int, int]
# So many weights for a number of the patches make a product of patches faster than a convolution.
_WEIGHTS_PER_NUMBER = 4


class Supervised(NamedTuple):
    """What a network gives in training that has a second classifier to learn by.

    Attributes:
        logits: of the network.
        auxiliary: of the second classifier, `[B, num_classes]` too.
        weight: of its loss beside that of `logits`.
    """

    logits: Tensor
    auxiliary: Tensor
    weight: float


def check_size(x: Tensor, min_size: int) -> None:
    """Refuse images `[B, C, H, W]` smaller than a network can take.

    Raises:
        ValueError: a side below `min_size` pixels; the message says the smallest size.
    """
    height, width = x.shape[-2:]
    if min(height, width) < min_size:
        raise ValueError(
            f"an input of {height}x{width} is too small: each side must be at least {min_size} pixels"
        )


def check_fixed_size(x: Tensor, size: Size) -> None:
    """Refuse images `[B, C, H, W]` of another size than the one that a network is made for.

    Raises:
        ValueError: what was given, and the size.
    """
    check_size(x, min(size))
    given = tuple(x.shape[-2:])
    if given != size:
        raise ValueError(
            f"an input of {given[0]}x{given[1]} does not fit: the weights are for images of "
            f"{size[0]}x{size[1]} pixels; resize it, or create the network with img_size={given}"
        )


def factory_arguments(module: nn.Module) -> dict[str, Any]:
    """Device and dtype of a module's parameters, as constructors take them; nothing where it has none."""
    like = next(module.parameters(), None)
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0 to `rate`."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def init_linear(module: nn.Module) -> None:
    """Initial weights of a linear layer: truncated normal of deviation 0.02, no bias; others stay."""
    if isinstance(module, nn.Linear):
        _init_weights(module)


def init_convolution(module: nn.Module) -> None:
    """The same of a convolution."""
    if isinstance(module, nn.Conv2d):
        _init_weights(module)


def _init_weights(module: nn.Linear | nn.Conv2d) -> None:
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def build_backbone(model_cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`; the class says how many of the last maps `features_only=True` gives."""
    feature_cfg = {"out_indices": model_cls.count_features(**kwargs), "feature_cls": "getter"}
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


class Block(nn.Module):
    """Attention, then an MLP: two residual branches with a norm before each.

    Args:
        dim: channels.
        attn: the attention.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        drop_path: stochastic depth of both branches.
        eps: of both norms.
        layer_scale: initial factor per channel of both branches, None for none.
        pos_kernel: side of a depthwise convolution that is added first, on maps; 0 for none.
    """

    # A family may have another MLP.
    mlp_cls: type[Mlp] = Mlp

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        layer_scale: float | None = None,
        pos_kernel: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = None
        if pos_kernel:
            self.pos_embed = nn.Conv2d(dim, dim, pos_kernel, padding=pos_kernel // 2, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.hidden_dim = int(dim * mlp_ratio)
        self.mlp = self.mlp_cls(dim, self.hidden_dim, **dd)
        self.ls2 = LayerScale(dim, layer_scale, **dd) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`x`, as the attention takes it, to the same shape; further arguments are the attention's."""
        if self.pos_embed is not None:
            x = x + on_nhwc(self.pos_embed, x)
        return self.feed_forward(x + self.drop_path(self.ls1(self.attend(x, *args))))

    def attend(self, x: Tensor, *args: Any) -> Tensor:
        """The attention branch, before its scale."""
        return self.attn(self.norm1(x), *args)

    def feed_forward(self, x: Tensor) -> Tensor:
        """`x` and the MLP branch; in inference on a CPU large maps are overwritten piece by piece."""

        def add_branch(x: Tensor) -> Tensor:
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

        # Stochastic depth draws for whole samples, which pieces do not know.
        return pixelwise(add_branch, x, into=None if self.training else x, hidden_dim=self.hidden_dim)


class StridedConv2d(nn.Conv2d):
    """A strided convolution, fast also where weights outnumber the pixels; for maps that are channels last.

    A convolution first copies its weights into another order, which for the small maps of late stages is most
    of the work; as a product of patches it takes them as they are. Arguments as `torch.nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`."""
        x, padding = input, self.padding
        assert not isinstance(padding, str)
        (height, width), (step_y, step_x) = self.kernel_size, self.stride
        # First of all, because the comparison of sizes would bind a traced program to them.
        plain = torch.compiler.is_compiling() or x.device.type != "cpu"
        area = height * width / (step_y * step_x)
        if plain or self.weight.numel() < _WEIGHTS_PER_NUMBER * x.numel() * area:
            return super().forward(x)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        patches = x.unfold(1, height, step_y).unfold(2, width, step_x).flatten(3)
        return product(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def resize_tokens(tokens: Tensor, size: Size, new_size: Size, mode: str) -> Tensor:
    """Position embeddings `[1, H * W, C]` as a map `[1, H', W', C]` of another size."""
    grid = tokens.unflatten(1, size)
    if is_known_to_be(new_size, size):
        return grid
    return F.interpolate(grid.permute(0, 3, 1, 2), size=new_size, mode=mode).permute(0, 2, 3, 1)


def resize_square(positions: Tensor, target: tuple[int, ...], module: Any) -> Tensor:
    """Position embeddings `[1, H * H, C]` for the map `size` of a module; those of no square stay."""
    side = round(positions.shape[1] ** 0.5)
    if side**2 != positions.shape[1]:
        return positions
    return resize_tokens(positions, (side, side), module.size, "bicubic").flatten(1, 2)
