"""What the engine knows of a task: a network, two loaders, a loss, an evaluation.

The interface follows `timm.task` (a module whose forward is the loss, so that a distributed wrapper sees one
ordinary forward call) without depending on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from visionattn.engine.config import RunConfig

if TYPE_CHECKING:
    from PIL.Image import Image


class Task(nn.Module, ABC):
    """One thing that can be trained and judged.

    Batches reach `loss` and `evaluate` on the device of the network.

    Attributes:
        config: the run, with what the task found out about it filled in.
        model: the network; its parameters are what is trained, its state dict is what is saved.
        monitor: the entry of `evaluate` that names the best checkpoint.
        higher_is_better: whether a larger `monitor` is better.
        adversary: a second network that is trained in the same steps, whose judgement enters the loss; it is
            saved in the training state alone. Made by `train_loader` at the latest; None where there is none.
        rows: what `evaluate` found for each sample, as far as the task keeps it.
    """

    config: RunConfig
    model: nn.Module
    monitor: str
    higher_is_better: bool = True
    rows: Sequence[Mapping[str, Any]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.adversary: nn.Module | None = None

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss of one batch; what a distributed wrapper calls."""
        return self.loss(batch)

    @abstractmethod
    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Scalars of one training batch. `"loss"` is minimised, every other entry only logged."""

    @abstractmethod
    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Metrics of `model` over a loader, gathered over all processes, identical on each of them."""

    @abstractmethod
    def predict(self, inputs: Any) -> Any:
        """What a user wants of `model` for raw inputs (images in, labels or images out)."""

    @abstractmethod
    def train_loader(self) -> Iterable[Any]:
        """Shuffled, augmented training batches; sized (`len`) where the source is."""

    @abstractmethod
    def eval_loader(self) -> Iterable[Any]:
        """The held-out samples, each exactly once, in order."""

    def pictures(self) -> dict[str, Image]:
        """Pictures for the run folder after training, by file name without ending; none by default."""
        return {}
