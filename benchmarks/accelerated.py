"""timm's networks as timm ships them, to be compared with the same networks on our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
from torch import nn

from benchmarks.formulations.formulation import Formulation
from visionattn.integrations.timm_attention import accelerate, decelerate


@dataclass(frozen=True)
class TimmAsShipped(Formulation):
    """A network whose kernels are ours only after `accelerate`."""

    def prepare(self, net: nn.Module) -> None:
        """Put our kernels in."""
        accelerate(net)

    @contextmanager
    def in_place_of_kernels(self, net: nn.Module) -> Iterator[None]:
        """Inside the block, `net` computes as timm ships it."""
        decelerate(net)
        try:
            yield
        finally:
            accelerate(net)


def timm_formulation(name: str) -> TimmAsShipped:
    """Give a network of timm as timm ships it, at the size of its weights."""
    config = timm.get_pretrained_cfg(name)
    size = config.input_size[1:] if config else (224, 224)
    return TimmAsShipped({}, ((size[0], size[1]),), "as timm ships it")
