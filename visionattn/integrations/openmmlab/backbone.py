"""The one module that makes every registered backbone a backbone of mmdetection and mmsegmentation."""

# pyright: reportMissingImports=false
# The toolboxes are installed in an environment of their own.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import group_parameters
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.checkpoints import load_checkpoint
from visionattn.errors import nearest


@MODELS.register_module()
class VisionAttnBackbone(BaseModule):
    """A registered network as a backbone: images `[B, C, H, W]` to maps `[B, C_i, H / r_i, W / r_i]`.

    It is registered in mmengine's root registry, where mmdetection and mmsegmentation both find it.

    Args:
        name: registered name of visionattn or timm; `python tools/zoo.py` lists ours.
        kwargs: arguments of the network, for instance `dict(n_win=16, extra_norms=True)`.
        out_indices: which of the network's maps to return; all by default.
        checkpoint: weights to start from, a file of the authors or of ours; read by
            `visionattn.load_checkpoint` when the runner initialises the model, as `init_cfg` would be.
        pretrained: start from the weights that the network's own record names (downloads them).
        frozen_stages: -1 for none, 0 for the stem, n for the stem and the first n stages: their parameters
            are not trained, and they stay in evaluation mode.
        norm_eval: keep batch norms in evaluation mode during training.
        grad_checkpointing: recompute blocks in the backward pass instead of storing what they hold.
        init_cfg: must stay None; it exists because the toolboxes pass it.

    Raises:
        ValueError: an unknown name, arguments or stages that the network does not have, or an `init_cfg`.
    """

    def __init__(
        self,
        name: str,
        kwargs: dict[str, Any] | None = None,
        out_indices: Sequence[int] | None = None,
        checkpoint: str | None = None,
        pretrained: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise ValueError("init_cfg is not used here: give checkpoint=FILE or pretrained=True")
        if checkpoint is not None and pretrained:
            raise ValueError("checkpoint and pretrained are both given: choose one source of weights")
        if not timm.is_model(name):
            raise ValueError(f"unknown network {name!r}: {nearest(name, timm.list_models())}")
        indices = None if out_indices is None else tuple(out_indices)
        options = {} if indices is None else {"out_indices": indices}
        self.net: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, **options, **(kwargs or {})
        )
        self.checkpoint = checkpoint
        self.norm_eval = norm_eval
        _freeze(self._network, name, frozen_stages)
        if grad_checkpointing:
            self._network.set_grad_checkpointing(True)

    @property
    def _network(self) -> Any:
        # timm wraps a network that offers its maps itself, and takes others apart.
        return getattr(self.net, "model", self.net)

    def init_weights(self) -> None:
        """Load `checkpoint`; the toolboxes call this before training, not before inference."""
        if self.checkpoint is not None and not self.is_init:
            load_checkpoint(self.net, self.checkpoint)
        self.is_init = True

    def train(self, mode: bool = True) -> VisionAttnBackbone:
        """Training mode, but for parts whose parameters are all frozen and, with `norm_eval`, batch norms."""
        super().train(mode)
        for module in self.modules() if mode else ():
            trained = [parameter.requires_grad for parameter in module.parameters()]
            frozen = bool(trained) and not any(trained)
            if frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images `[B, C, H, W]` to the maps of `out_indices`, finest first."""
        maps = self.net(x)
        if str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return tuple(maps)


def _freeze(network: Any, name: str, stages: int) -> None:
    """No gradients for the stem (`stages` 0) and the first `stages` stages; nothing for -1."""
    if stages < 0:
        return
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            f"{name} does not say which parameters belong to its stages: frozen_stages must be -1"
        )
    groups = group_parameters(network, network.group_matcher(coarse=True))
    if stages not in groups:
        raise ValueError(f"frozen_stages of {name} must be -1 to {max(groups)}, got {stages}")
    frozen = {parameter for group in range(stages + 1) for parameter in groups[group]}
    for parameter, value in network.named_parameters():
        if parameter in frozen:
            value.requires_grad_(False)
