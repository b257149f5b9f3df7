"""A guest is an attention that was published inside other networks: all that a host asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.models.frames.common import Block, Size, build_backbone
from visionattn.models.frames.tokens import TokenNetwork
from visionattn.models.registry.shapes import Guess, Shapes, classes_of, square
from visionattn.models.registry.variants import Layout, Variant, register

Shape = tuple[int, ...]
# How a table of one size becomes one of another: the table, the shape of the network's own, its module.
Resize = Callable[[Tensor, Shape, Any], Tensor]


def _no_size(shapes: Shapes, attn: str) -> Size | None:
    return None


def _no_options(marks: Sequence[Shape | None]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Guest:
    """An attention in the blocks of a host, and how weights tell that and how it is there.

    Attributes:
        family: the name of the family.
        attention: makes the attention of a block: called as `attention(dim, num_heads, stage=i, size=(height,
            width), prefix=..., device=..., dtype=..., **options)`, the size being that of the stage's map at
            the training size, prefix whether a class token precedes the map. A convolution of its values is
            called `dwc`.
        mark: a parameter of every such attention, for instance `"an_bias"`.
        mark_dims: its number of dimensions.
        heads: the number of heads from its shape.
        axes: tables that depend on the training size, and the axis along which they are resized linearly.
        size: the map size that tables under the attention's name were learned for; None where there are none.
        block: the block around the attention.
        options: arguments of variants beyond the host's, with their defaults.
        read_options: those that the weights tell, from the marks of the first block of every stage.
        unlearned: options that no weight tells.
    """

    family: str
    attention: Callable[..., nn.Module]
    mark: str
    mark_dims: int
    heads: Callable[[Shape], int]
    axes: Mapping[str, int] = field(default_factory=dict)
    size: Callable[[Shapes, str], Size | None] = _no_size
    block: type[Block] = Block
    options: Mapping[str, Any] = field(default_factory=dict)
    read_options: Callable[[Sequence[Shape | None]], dict[str, Any]] = _no_options
    unlearned: tuple[str, ...] = ()

    def with_options(self, **options: Any) -> Guest:
        """The guest with its options bound."""
        return replace(self, attention=partial(self.attention, **options)) if options else self

    def mark_of(self, shapes: Shapes, block: str) -> Shape | None:
        """The shape of the mark in a block; None where the block has another attention."""
        return shapes.get(f"{block}.attn.{self.mark}", self.mark_dims)

    def fit(
        self, weights: dict[str, Tensor], model: nn.Module, others: Mapping[str, Resize] | None = None
    ) -> dict[str, Tensor]:
        """Weights with tables of another training size resized: the authors' rule for fine-tuning.

        Anything else of another shape is left for the loader to refuse.

        Args:
            weights: in our layout.
            model: the network that takes them.
            others: how tables of the host are resized, by the last part of their names.
        """
        rules = {
            **{leaf: partial(_resize_line, axis=axis) for leaf, axis in self.axes.items()},
            **(others or {}),
        }
        own = model.state_dict()
        out = dict(weights)
        for name, value in weights.items():
            module, _, leaf = name.rpartition(".")
            fits = name not in own or own[name].shape == value.shape
            if not fits and leaf in rules and value.ndim == own[name].ndim:
                out[name] = rules[leaf](value, own[name].shape, model.get_submodule(module))
        return out


def pyramid_arguments(ours: Shapes, guest: Guest) -> dict[str, Any] | None:
    """The arguments of a hierarchical host that its weights tell, whichever host it is."""
    depths = ours.lengths("stages", "blocks")
    global_blocks, num_heads, guessed = [], [], False
    firsts = [guest.mark_of(ours, f"stages.{i}.blocks.0") for i in range(len(depths))]
    for i, depth in enumerate(depths):
        marks = [m for j in range(depth) if (m := guest.mark_of(ours, f"stages.{i}.blocks.{j}"))]
        table = ours.get(f"stages.{i}.blocks.{depth - 1}.attn.relative_position_bias_table", 3)
        if not (marks or table or num_heads):
            return None
        global_blocks.append(len(marks))
        # Stripes do not tell their heads, which double from stage to stage in the published networks.
        guessed |= not (marks or table)
        num_heads.append(guest.heads(marks[0]) if marks else table[0] if table else 2 * num_heads[-1])
    out: dict[str, Any] = {
        "in_chans": ours["stem.proj.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "num_heads": Guess(tuple(num_heads)) if guessed else tuple(num_heads),
        "global_blocks": tuple(global_blocks),
        "extra_norms": "extra_norms.0.weight" in ours,
        **guest.read_options(firsts),
    }
    if size := guest.size(ours, "stages.0.blocks.0.attn"):
        out["img_size"] = square(4 * size[0], 4 * size[1])
    return out


def register_guest(
    module: str, guest: Guest, layout: Callable[[Guest], Layout], variants: Mapping[str, Variant]
) -> None:
    """Register the variants of a guest in one host.

    Args:
        module: `__name__` of the guest's module.
        guest: the record.
        layout: of the host's module.
        variants: the rows by their registered names.
    """
    register(
        module,
        layout(guest),
        variants,
        builder=build_backbone,
        options=guest.options,
        prepare=lambda **options: {"guest": guest.with_options(**options)},
        # The addresses of shared files end in no name.
        name_downloads=True,
    )


def host_cfg(host: type[nn.Module], url: str, size: int, **kwargs: Any) -> dict[str, Any]:
    """A timm configuration of a network trained at `size` pixels."""
    isotropic = issubclass(host, TokenNetwork)
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None if isotropic else (size // 32, size // 32),
        "crop_pct": 224 / 256,
        # The authors resize to a square and lose the aspect ratio.
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed" if isotropic else "stem.proj",
        "classifier": "head" if isotropic else "head.fc",
        "license": "unknown",
        **kwargs,
    }


def _resize_line(value: Tensor, target: Shape, module: Any, axis: int) -> Tensor:
    line = value.movedim(axis, -1)
    resized = F.interpolate(line.flatten(0, -2)[None], size=target[axis], mode="linear")
    return resized[0].unflatten(0, line.shape[:-1]).movedim(-1, axis)
