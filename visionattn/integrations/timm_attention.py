"""Our kernels inside timm's own networks: Swin, Swin V2, MaxViT, CoAtNet, DaViT, HaloNet, SHViT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from timm.layers import RelPosBiasTf
from timm.layers.halo_attn import HaloAttn
from timm.models import davit, maxxvit, shvit, swin_transformer, swin_transformer_v2
from torch import nn

from visionattn.integrations import timm_blocks, timm_windows

_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: timm_blocks.FusedSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: timm_blocks.FusedSwinV2Block,
    maxxvit.PartitionAttentionCl: timm_blocks.FusedPartitionAttentionCl,
    maxxvit.ParallelPartitionAttention: timm_blocks.FusedParallelPartitionAttention,
    maxxvit.PartitionAttention2d: timm_blocks.FusedPartitionAttention2d,
    maxxvit.Attention2d: timm_blocks.FusedAttention2d,
    davit.SpatialBlock: timm_blocks.FusedSpatialBlock,
    HaloAttn: timm_blocks.FusedHaloAttn,
    shvit.SHSA: timm_blocks.FusedSHSA,
}
_CPU: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.WindowAttention: timm_windows.FusedWindowAttention,
    swin_transformer_v2.WindowAttention: timm_windows.FusedCosineAttention,
    RelPosBiasTf: timm_windows.SlidingRelPosBias,
    HaloAttn: timm_blocks.FusedHaloAttn,
    shvit.StageBlock: timm_windows.ChannelsLastStage,
    nn.Linear: timm_windows.OneDnnLinear,
}
_ORIGINALS = {ours: timms for table in (_KERNELS, _CPU) for timms, ours in table.items()}

_ACROSS_CHANNELS = "attention across channels, for which there is no kernel"
_AS_FAST = "timm's own formulation is as fast on the CPU"
_REASONS: dict[type[nn.Module], str] = {
    davit.ChannelAttention: _ACROSS_CHANNELS,
    davit.ChannelAttentionV2: _ACROSS_CHANNELS,
}
_CPU_REASONS: dict[type[nn.Module], str] = {
    **_REASONS,
    maxxvit.AttentionCl: _AS_FAST,
    maxxvit.Attention2d: _AS_FAST,
    davit.WindowAttention: _AS_FAST,
    shvit.SHSA: _AS_FAST,
}


@dataclass(frozen=True)
class Acceleration:
    """The report of `accelerate`.

    Attributes:
        model: the network.
        swapped: modules that now compute otherwise: name in the network to class.
        kept: attention that stays timm's: name in the network to the reason.
    """

    model: nn.Module = field(repr=False)
    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def undo(self) -> None:
        """Let every module of the network compute as timm wrote it, as `decelerate` does."""
        decelerate(self.model)

    def __str__(self) -> str:
        lines = [f"swapped: {count} x {kind}" for kind, count in Counter(self.swapped.values()).items()]
        lines += [f"kept: {count} x {why}" for why, count in Counter(self.kept.values()).items()]
        return (
            "\n".join(lines)
            or "nothing to swap: no attention of Swin, MaxViT, CoAtNet, DaViT, HaloNet or SHViT"
        )


def accelerate(model: nn.Module, device: torch.device | str | None = None) -> Acceleration:
    """Let our kernels compute the attention of a timm network, in place.

    Swin, Swin V2, MaxViT and CoAtNet in all forms, DaViT's windows, halo attention and SHViT's single head.
    Weights, their names, outputs, training, `features_only` and `torch.compile` stay; forward hooks on
    attention modules inside a swapped block no longer run. Where attention dropout is on, timm's formulation
    runs in training.

    On the CPU only what was measured to be faster there is swapped, and the linear layers as well, of any
    network, whose product is then `visionattn.kernels.product`.

    Args:
        model: from `timm.create_model`, or any module with such a network inside.
        device: where the network will run; by default where its parameters are.

    Returns:
        What was swapped, and what was not and why; its `undo()`, or `decelerate`, takes it back.
    """
    decelerate(model)
    first = next(model.parameters(), None)
    kind = torch.device(device).type if device is not None else "cpu" if first is None else first.device.type
    table, reasons = (_CPU, _CPU_REASONS) if kind == "cpu" else (_KERNELS, _REASONS)
    report = Acceleration(model)
    for name, module in _walk(model):
        original = next((c for c in table if isinstance(module, c)), None)
        if original is None or (original is nn.Linear and type(module) is not nn.Linear):
            reason = reasons.get(type(module))
        elif type(module) is not original:
            reason = f"{type(module).__name__} is not timm's own {original.__name__}"
        elif kind == "cpu" and getattr(module, "block_stride", 1) > 1:  # halo attention with fewer queries
            reason = _AS_FAST
        else:
            reason = None
            module.__class__ = table[original]  # pyright: ignore[reportAttributeAccessIssue]
            report.swapped[name] = table[original].__name__
        if reason is not None:
            report.kept[name] = reason
    return report


def decelerate(model: nn.Module) -> None:
    """Undo `accelerate`: every module computes as timm wrote it."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name; what lies inside a block whose attention is a kernel is its own affair."""
    yield prefix, model
    if type(model) not in _KERNELS.values():
        for name, child in model.named_children():
            yield from _walk(child, f"{prefix}.{name}" if prefix else name)
