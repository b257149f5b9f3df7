"""The interface of tasks, which is all that the engine knows of them.

The interface follows `timm.task` (a module whose forward is the loss, so that a distributed wrapper sees one
ordinary forward call) without depending on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from visionattn.checkpoints.description import describe
from visionattn.engine.config import RunConfig
from visionattn.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class NamedImages(NamedTuple):
    """Images that a user names for a network to be judged on, in place of those of its configuration.

    Attributes:
        truths: a folder or LMDB of true images; None leaves the images as they are.
        inputs: that of their inputs; None: they are made.
        template: name of an input, with {} for that of its truth.
        self_ensemble: whether to average over flips and transpositions.
    """

    truths: str | None = None
    inputs: str | None = None
    template: str | None = None
    self_ensemble: bool = False


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
        draws: whether `show` answers by a picture.
        rows: what `evaluate` found for each sample, as far as the task keeps it.
        metrics: names of what `evaluate` may find; empty where they are not known before.
    """

    config: RunConfig
    model: nn.Module
    monitor: str
    higher_is_better: bool = True
    draws: bool = False
    rows: Sequence[Mapping[str, Any]] = ()
    metrics: Sequence[str] = ()

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
        """Metrics of `model` over a loader, gathered over all processes, identical on each of them.

        One that has no value for these samples is not a number, or is left out.
        """

    @abstractmethod
    def predict(self, inputs: Any) -> Any:
        """The answers of `model` to raw inputs: labels or images for images."""

    def show(self, image: Image) -> Any:
        """The answer to one image as users see it: a picture, or names with their probabilities.

        The most probable name comes first. By default it is the answer of `predict` itself.
        """
        return self.predict([image])[0]

    @classmethod
    def judge_named(cls, images: NamedImages) -> dict[str, Any]:
        """The options of a configuration, section by section, with which the named images are judged.

        Raises:
            InputError: the task judges no other images than those of its configuration.
        """
        raise InputError(f"{cls.__name__} judges the images of its configuration alone, not named ones")

    @abstractmethod
    def train_loader(self) -> Iterable[Any]:
        """Shuffled, augmented training batches; sized (`len`) where the source is."""

    @abstractmethod
    def eval_loader(self) -> Iterable[Any]:
        """The held-out samples, each exactly once, in order.

        Raises:
            InputError: there are none, or such that the metric `monitor` can have no value.
        """

    def description(self) -> dict[str, str]:
        """What is kept with the weights, so that they can be used without this configuration."""
        return describe(self.model)

    def pictures(self) -> dict[str, Image]:
        """Pictures for the run folder after training, by file name without ending; none by default."""
        return {}
