"""PVT, Swin and CSwin, with their attention as a part: the hosts that linear attentions were published in.

Papers: PVT https://arxiv.org/abs/2102.12122, Swin https://arxiv.org/abs/2103.14030, CSwin
https://arxiv.org/abs/2107.00652. A family names an attention and how many of the first blocks of each stage
have it; the others keep the attention of the host.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import window_attention
from visionattn.kernels.checks import pair
from visionattn.layers import WindowAttention2d
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up, is_known_to_be, on_nhwc
from visionattn.models.frames.common import drop_path_rates
from visionattn.models.frames.pyramid import Block, Pyramid, Stage, convolve
from visionattn.models.registry.layout import (
    CLASSIFIER,
    Layout,
    Names,
    Shapes,
    Weights,
    classes_of,
    shift_mask,
    unwrap,
    window_index,
)

# Called as `attention(dim, num_heads, stage=i, size=(height, width), device=..., dtype=...)`, the size being
# that of the stage's map at the training size.
Attention = Callable[..., nn.Module]
Size = tuple[int, int]


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
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.pos_embed = None
        if size is not None:
            self.pos_embed = trunc_normal_(
                nn.Parameter(torch.empty(1, size[0] * size[1], dim, **dd)), std=0.02
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / stride, W / stride, dim]`."""
        x = fill_up(x, (self.stride, self.stride)) if self.fill else x
        x = self.norm(convolve(self.proj, x))
        if self.pos_embed is None or self.size is None:
            return x
        return x + resize_tokens(self.pos_embed, self.size, (x.shape[1], x.shape[2]), "bilinear")


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
        self.norm = nn.LayerNorm(4 * in_dim, eps=1e-5, **dd)
        self.reduction = Linear(4 * in_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / 2, W / 2, dim]`, rounded up."""
        x = fill_up(x, (2, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # Swin lists the four neighbours column by column.
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class StripeAttention(nn.Module):
    """CSwin's attention: half of the heads in vertical, half in horizontal stripes, or all in one window.

    A depthwise 3x3 convolution of the values, which sees zeros beyond its stripe, replaces a position bias. A
    last stripe may be narrower.

    Args:
        dim: channels.
        num_heads: attention heads.
        stripe: width of a stripe in pixels; None for one window of the whole map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.stripe = stripe
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        branches = 1 if stripe is None else 2
        width = dim // branches
        self.lepe = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd) for _ in range(branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        windows = [(height, width)]
        if self.stripe is not None:
            windows = [(height, self.stripe), (self.stripe, width)]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        branches = []
        for part, window, lepe in zip(qkv.chunk(len(windows), 4), windows, self.lepe):
            q, k, v = part.unbind(3)
            out = window_attention(q, k, v, window).flatten(3)
            branches.append(out + _convolve_windows(lepe, v.flatten(3), window))
        return self.proj(torch.cat(branches, -1) if len(branches) > 1 else branches[0])


class StreamBlock(Block):
    """A block whose attention also sees the mean of its input before the norm: that of InLine-CSwin."""

    def attend(self, x: Tensor) -> Tensor:
        """The attention branch."""
        return self.attn(self.norm1(x), mean=x.mean((1, 2)))


class PVT(Pyramid):
    """The pyramid vision transformer, every block with the given attention.

    Args:
        attention: makes the attention of a block.
        img_size: training size in pixels, or (height, width): that of the position embeddings.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        embed_dims: channels per stage.
        mlp_ratios: hidden width of the MLPs per stage, as a multiple of its channels.
        extra_norms: a LayerNorm per returned stage output.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        attention: Attention,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        sizes = [(height // (4 * 2**i), width // (4 * 2**i)) for i in range(len(depths))]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        downsample = [
            PatchEmbedding(in_dim, dim, step, step, size=size, **dd)
            for in_dim, dim, step, size in zip((in_chans, *embed_dims), embed_dims, (4, 2, 2, 2), sizes)
        ]
        stages = []
        for i, (dim, depth, size) in enumerate(zip(embed_dims, depths, sizes)):
            blocks = [
                Block(
                    dim,
                    attention(dim, num_heads[i], stage=i, size=size, **dd),
                    mlp_ratios[i],
                    next(rates),
                    eps=1e-6,
                    **dd,
                )
                for _ in range(depth)
            ]
            stages.append(Stage(dim, downsample[i] if i else nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=downsample[0],
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=extra_norms,
            min_size=32,
            **dd,
        )


class Swin(Pyramid):
    """The Swin transformer, the first blocks of each stage with the given attention, the others with windows.

    Args:
        attention: makes the attention of a block.
        global_blocks: how many of the first blocks of each stage have it.
        img_size: training size in pixels, or (height, width): that of position biases.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of a window in pixels; the windows of every second block are shifted by half of it.
        always_shift: shift windows also on maps of one window or less, as the official dense backbones do.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        attention: Attention,
        global_blocks: Sequence[int],
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        always_shift: bool = False,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, depth in enumerate(depths):
            dim, size = embed_dim * 2**i, (-(-height // (4 * 2**i)), -(-width // (4 * 2**i)))
            blocks = []
            for j in range(depth):
                if j < global_blocks[i]:
                    attn = attention(dim, num_heads[i], stage=i, size=size, **dd)
                else:
                    shift = window_size // 2 if j % 2 else 0
                    attn = WindowAttention2d(dim, num_heads[i], window_size, shift, always_shift, **dd)
                blocks.append(Block(dim, attn, drop_path=next(rates), **dd))
            stages.append(Stage(dim, PatchMerging(dim // 2, dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=PatchEmbedding(in_chans, embed_dim, 4, 4, fill=True, **dd),
            stages=stages,
            norm=nn.LayerNorm(stages[-1].dim, eps=1e-5, **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=1,
            **dd,
        )
        self.training_size = (height, width)


class CSwin(Pyramid):
    """The CSwin transformer, its first stages with the given attention, the others with cross-shaped windows.

    The last stage attends inside one window of the whole map.

    Args:
        attention: makes the attention of a block.
        block: the blocks that have it.
        global_blocks: how many of the first blocks of each stage have it.
        img_size: training size in pixels, or (height, width): that of position biases.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        stripe: width of a stripe in pixels.
        extra_norms: a LayerNorm per returned stage output.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        attention: Attention,
        block: type[Block] = Block,
        global_blocks: Sequence[int] = (2, 4, 0, 0),
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripe: int = 7,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        last = len(depths) - 1
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            # The stem's convolution rounds to the nearest quarter, the others round up.
            size = (-(-((height + 1) // 4) // 2**i), -(-((width + 1) // 4) // 2**i))
            blocks = []
            for j in range(depth):
                if j < global_blocks[i]:
                    attn = attention(dim, num_heads[i], stage=i, size=size, **dd)
                    blocks.append(block(dim, attn, drop_path=next(rates), **dd))
                else:
                    attn = StripeAttention(dim, num_heads[i], None if i == last else stripe, **dd)
                    blocks.append(Block(dim, attn, drop_path=next(rates), **dd))
            down = PatchEmbedding(dim // 2, dim, 3, 2, 1, **dd) if i else nn.Identity()
            stages.append(Stage(dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=PatchEmbedding(in_chans, embed_dim, 7, 4, 2, **dd),
            stages=stages,
            norm=nn.LayerNorm(stages[-1].dim, eps=1e-5, **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=3,
            **dd,
        )


def resize_tokens(tokens: Tensor, size: Size, new_size: Size, mode: str) -> Tensor:
    """Position embeddings `[1, H * W, C]` as a map `[1, H', W', C]` of another size."""
    grid = tokens.unflatten(1, size)
    if is_known_to_be(new_size, size):
        return grid
    return F.interpolate(grid.permute(0, 3, 1, 2), size=new_size, mode=mode).permute(0, 2, 3, 1)


def _convolve_windows(conv: nn.Module, x: Tensor, window: Size) -> Tensor:
    """A convolution of `[B, H, W, C]` that sees zeros beyond each window."""
    height, width = x.shape[1:3]
    x = fill_up(x, window).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    rows, columns = x.shape[1:3]
    x = on_nhwc(conv, x.flatten(0, 2)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _downsample(stage: int) -> str:
    return f"stages.{stage}.downsample." if stage else "stem."


_SWIN = (
    ("^patch_embed.", "^stem."),
    *((f"^layers.{i}.downsample.", f"^stages.{i + 1}.downsample.") for i in range(8)),
    ("^layers.#.blocks.", "^stages.#.blocks."),
    ("^norm#.", "^extra_norms.#."),
    *CLASSIFIER,
)
# Stages are counted from 1 in PVT and CSwin.
_PVT = (
    *((f"^patch_embed{i + 1}.", f"^{_downsample(i)}") for i in range(8)),
    *((f"^pos_embed{i + 1}$", f"^{_downsample(i)}pos_embed$") for i in range(8)),
    *((f"^block{i + 1}.", f"^stages.{i}.blocks.") for i in range(8)),
    *CLASSIFIER,
)
_CSWIN = (
    ("^stage1_conv_embed.0.", "^stem.proj."),
    ("^stage1_conv_embed.2.", "^stem.norm."),
    *((f"^merge{i}.conv.", f"^stages.{i}.downsample.proj.") for i in range(1, 8)),
    *((f"^merge{i}.norm.", f"^stages.{i}.downsample.norm.") for i in range(1, 8)),
    *((f"^stage{i + 1}.", f"^stages.{i}.blocks.") for i in range(8)),
    ("^stages.#.blocks.#.qkv.", "^stages.#.blocks.#.attn.qkv."),
    ("^stages.#.blocks.#.proj.", "^stages.#.blocks.#.attn.proj."),
    (".attns.#.get_v.", ".attn.lepe.#."),
    *((f".attns.0.{table}_bias$", f".attn.{table}_bias$") for table in ("an", "na", "ah", "aw", "ha", "wa")),
    (".attns.0.residual.", ".attn.residual."),
    *CLASSIFIER,
)
_NAMES = {PVT: Names(*_PVT), Swin: Names(*_SWIN), CSwin: Names(*_CSWIN)}
# A parameter of every global attention in a host, and its heads from its shape.
GlobalHeads = tuple[str, Callable[[tuple[int, ...]], int]]
_GLOBAL_MARKS = ("attn.an_bias", "attn.residual.0.weight")


def to_ours(official: Weights) -> dict[str, Tensor]:
    """The authors' weights of the three hosts, whose names do not clash, in our names.

    PVT's separate query and key-value projections are joined. Swin's bias tables become `[heads, rows,
    columns]`, key minus query. Stored indices and masks are left out.
    """
    out: dict[str, Tensor] = {}
    for name, value in official.items():
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue
        for names in _NAMES.values():
            name = names.to_ours(name)
        if name.endswith("relative_position_bias_table") and value.ndim == 2:
            side = round(value.shape[0] ** 0.5)
            value = value.unflatten(0, (side, side)).permute(2, 0, 1).flip(1, 2)
        out[name] = value
    # The same official name is the convolution of a global attention and that of stripes.
    for name in [name for name in out if ".attn.lepe.0." in name]:
        block, _, leaf = name.partition("attn.lepe.0.")
        if any(block + mark in out for mark in _GLOBAL_MARKS):
            out[f"{block}attn.dwc.{leaf}"] = out.pop(name)
    for name in [name for name in out if ".attn.q." in name]:
        joined = name.replace(".attn.q.", ".attn.qkv.")
        out[joined] = torch.cat([out.pop(name), out.pop(name.replace(".attn.q.", ".attn.kv."))])
    return out


def to_official(weights: Weights, model: Pyramid) -> dict[str, Tensor]:
    """Our weights of a host in the authors' names, with the indices and masks that their code stores."""
    host = type(model)
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if host is CSwin:
            name = name.replace(".attn.dwc.", ".attn.lepe.0.")
        if name.endswith("relative_position_bias_table"):
            value = value.flip(1, 2).flatten(1).T
        name = _NAMES[host].to_official(name)
        if host is PVT and ".attn.qkv." in name:
            dim = value.shape[0] // 3
            out[name.replace(".qkv.", ".q.")] = value[:dim]
            out[name.replace(".qkv.", ".kv.")] = value[dim:]
        else:
            out[name] = value
    if isinstance(model, Swin):
        out |= _swin_buffers(model)
    return out


def _swin_buffers(model: Swin) -> dict[str, Tensor]:
    out = {}
    for path, attn in model.named_modules():
        if not isinstance(attn, WindowAttention2d):
            continue
        block, window = path.removesuffix(".attn"), (attn.window_size, attn.window_size)
        out[f"{path}.relative_position_index"] = window_index(window)
        reduction = 4 * 2 ** int(path.split(".")[1])
        size = [-(-side // reduction) for side in model.training_size]
        if attn.shift and min(size) > attn.window_size:
            size = [-(-side // attn.window_size) * attn.window_size for side in size]
            out[f"{block}.attn_mask"] = shift_mask(size, window, (attn.shift, attn.shift))
    return {_NAMES[Swin].to_official(name): value for name, value in out.items()}


def host_arguments(ours: Shapes, mark: str, heads: Callable[[tuple[int, ...]], int]) -> dict[str, Any]:
    """The arguments of a host that its weights tell.

    Args:
        ours: shapes in our layout.
        mark: a parameter that every global attention has, for instance `"attn.an_bias"`.
        heads: the number of heads from its shape.
    """
    depths = ours.lengths("stages", "blocks")
    dims = tuple(ours[f"stages.{i}.blocks.0.norm1.weight"][0] for i in range(len(depths)))
    global_blocks, num_heads = [], []
    for i, depth in enumerate(depths):
        marked = [shape for j in range(depth) if (shape := ours.get(f"stages.{i}.blocks.{j}.{mark}"))]
        table = ours.get(f"stages.{i}.blocks.{depth - 1}.attn.relative_position_bias_table")
        global_blocks.append(len(marked))
        # Stripes do not tell their heads, which double from stage to stage.
        num_heads.append(heads(marked[0]) if marked else table[0] if table else 2 * num_heads[-1])
    out: dict[str, Any] = {
        "in_chans": ours["stem.proj.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "num_heads": tuple(num_heads),
        "extra_norms": "extra_norms.0.weight" in ours,
    }
    lines = [ours.get(f"stages.0.blocks.0.attn.{axis}_bias") for axis in ("ah", "aw")]
    if lines[0] and lines[1]:
        out["img_size"] = square(4 * lines[0][3], 4 * lines[1][4])
    if tokens := ours.get("stem.pos_embed"):
        ratios = (ours[f"stages.{i}.blocks.0.mlp.fc1.weight"][0] / dim for i, dim in enumerate(dims))
        side = 4 * math.isqrt(tokens[1])
        return {"img_size": side, **out, "embed_dims": dims, "mlp_ratios": tuple(ratios)}
    out |= {"embed_dim": dims[0], "global_blocks": tuple(global_blocks)}
    if name := ours.first(r"\.relative_position_bias_table$"):
        out["window_size"] = (ours[name][1] + 1) // 2
    return out


def square(height: int, width: int) -> int | Size:
    """A size as an argument: one number where both sides are equal."""
    return height if height == width else (height, width)


def host_layouts(
    family: str, arguments: Callable[[Shapes, Shapes], dict[str, Any]], mark: str, unlearned: tuple[str, ...]
) -> tuple[Layout, ...]:
    """The layouts of the three hosts with one attention; parameters of the arguments as `Layout` has them."""
    tells = {
        PVT: (r"^stem\.pos_embed$", ()),
        Swin: (r"^stages\.1\.downsample\.reduction\.", ("window_size", "always_shift")),
        CSwin: (r"\.attn\.lepe\.0\.", ("stripe",)),
    }
    return tuple(
        Layout(
            *(family, host, (pattern, rf"\.{re.escape(mark)}$"), to_ours, arguments, to_official),
            wrapper="model",
            unlearned=(*unlearned, *own),
        )
        for host, (pattern, own) in tells.items()
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Pyramid) -> dict[str, Tensor]:
    """Rename the official parameters to ours; our own names pass unchanged.

    Tables of another training size are resized as the authors do for fine-tuning.
    """
    return fit_tables(to_ours(unwrap(state_dict)[0]), model)


def fit_tables(weights: dict[str, Tensor], model: nn.Module, prefix: int = 0) -> dict[str, Tensor]:
    """Resize what was learned for another image or window size: the authors' rule for fine-tuning.

    Lines of agent biases are resized linearly, position embeddings (after `prefix` tokens without a place)
    and tables of relative biases bicubically. Anything else of another shape is left for the loader to
    refuse.
    """
    own = model.state_dict()
    out = dict(weights)
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        if name not in own or own[name].shape == value.shape:
            continue
        target = own[name].shape
        if leaf in _LINES and value.ndim == len(target):
            axis = _LINES[leaf]
            line = value.movedim(axis, -1)
            resized = F.interpolate(line.flatten(0, 2), size=target[axis], mode="linear")
            out[name] = resized.unflatten(0, line.shape[:3]).movedim(-1, axis)
        elif leaf == "relative_position_bias_table":
            out[name] = F.interpolate(value[None], size=target[1:], mode="bicubic")[0]
        elif leaf == "pos_embed" and round((value.shape[1] - prefix) ** 0.5) ** 2 == value.shape[1] - prefix:
            side = round((value.shape[1] - prefix) ** 0.5)
            size: Size = model.get_submodule(module).size  # pyright: ignore[reportAssignmentType]
            grid = resize_tokens(value[:, prefix:], (side, side), size, "bicubic")
            out[name] = torch.cat([value[:, :prefix], grid.flatten(1, 2)], 1)
    return out


# The axis along which a line of agent biases runs.
_LINES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
