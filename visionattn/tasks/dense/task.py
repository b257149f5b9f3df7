"""Parts of a run that detection and segmentation share: loaders, prediction, pictures, weights."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn

from visionattn.checkpoints.description import describe
from visionattn.checkpoints.reading import as_texts
from visionattn.data.decode import as_rgb
from visionattn.data.images import to_pil, to_tensor
from visionattn.engine.batches import make_eval_loader, make_train_loader
from visionattn.engine.config import RunConfig
from visionattn.engine.distributed import process_index
from visionattn.engine.network import evaluating
from visionattn.engine.task import Task
from visionattn.tasks.comparison import draw_comparison
from visionattn.tasks.dense.backbone import BackboneOptions, load_dense_checkpoint, pixel_statistics
from visionattn.tasks.dense.data import Augmented, DenseImages, remove_broken_images
from visionattn.tasks.dense.drawing import in_square
from visionattn.tasks.dense.transforms import listed, plain

_PICTURED_IMAGES = 4


class DenseConfig(RunConfig):
    """A detection or segmentation run."""

    backbone: BackboneOptions = Field(
        default_factory=BackboneOptions, description="how the network is used as a backbone"
    )
    initial_weights: str | None = Field(
        default=None, description="checkpoint of other classes to start from, what it lacks staying random"
    )


class DenseTask(Task):
    """Trains heads on a network's feature maps to find something everywhere in images.

    Batches are lists of uint8 images `[3, H, W]` and of their targets.
    """

    draws = True

    def predict(self, inputs: Sequence[Image]) -> list[Any]:
        """The findings in images of any sizes and modes, one after the other."""
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            return [self.find(to_tensor(as_rgb(image)).to(device)) for image in inputs]

    def train_loader(self) -> Iterable[Any]:
        """Augmented images and their targets."""
        images = Augmented(self._checked(True), self.training_transform())
        return make_train_loader(images, self.config.train, collate=listed)

    def eval_loader(self) -> Iterable[Any]:
        """Whole images and their targets."""
        return make_eval_loader(Augmented(self._held_out), self.config.train, collate=listed)

    def description(self) -> dict[str, str]:
        """That of the backbone, with the names of the classes of the run and what its pixels become."""
        data = cast(Any, self.config).data
        body = cast(Any, self.model).backbone.body
        mean, std = pixel_statistics(body, data)
        facts = {"class_names": data.class_names, "mean": mean, "std": std}
        return {**describe(body), **as_texts({k: v for k, v in facts.items() if v is not None})}

    def pictures(self) -> dict[str, Image]:
        """Truth and findings of the first held-out images."""
        rows = []
        for index in range(min(len(self._held_out), _PICTURED_IMAGES)):
            pixels, target = self._held_out[index]
            panels = self.panels(self._held_out.path(index).name, to_pil(pixels), plain(target))
            rows.append([(label, in_square(panel)) for label, panel in panels])
        return {"comparison": draw_comparison(rows, side=384)}

    @abstractmethod
    def find(self, image: Tensor) -> Any:
        """The findings in a uint8 image `[3, H, W]`, on the CPU."""

    @abstractmethod
    def training_transform(self) -> Callable[..., Any]:
        """Random changes of a training image and its target."""

    @abstractmethod
    def panels(self, name: str, image: Image, target: Any) -> list[tuple[str, Image]]:
        """The labelled pictures of a held-out image that show truth and findings."""

    @abstractmethod
    def _open(self, training: bool) -> DenseImages:
        """The images of one side of the split."""

    def _checked(self, training: bool) -> Any:
        """Those of them that can be used."""
        images, config = self._open(training), cast(Any, self.config)
        remove_broken_images(images, config.data)
        return images

    @abstractmethod
    def check_held_out(self, images: Any) -> None:
        """Refuse held-out images for which the metric can have no value.

        Raises:
            InputError: why it has none.
        """

    @cached_property
    def _held_out(self) -> Any:
        images = self._checked(False)
        self.check_held_out(images)
        return images


def load_weights(model: nn.Module, config: DenseConfig) -> None:
    """Load what a configuration says into a detector or segmenter whose backbone is a `DenseBackbone`.

    Raises:
        InputError: a file is missing, unreadable, or does not fit.
    """
    if config.model.checkpoint is not None:
        load_dense_checkpoint(model, config.model.checkpoint)
    # A trained checkpoint holds what became of the initial weights.
    elif config.initial_weights is not None:
        left_out = load_dense_checkpoint(model, config.initial_weights, strict=False)
        if left_out and process_index() == 0:
            print(f"initial_weights: {left_out}", file=sys.stderr)
