"""Handwritten digits that come with scikit-learn: real data for demonstrations and tests, without a download.

1,797 grey images of 8x8 pixels, ten classes (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

CLASS_NAMES = tuple(str(digit) for digit in range(10))
_HOLD_OUT_EVERY = 5


class Digits(Dataset):
    """The digits in the form that `timm.data.create_loader` takes: `(PIL image, label)`.

    The split is fixed and stratified: of every class, in the order of the source, each fifth image is held
    out. This gives 1,442 images to train on and 355 to judge.

    Args:
        split: `"train"` or `"validation"`.
        transform: applied to the PIL image; timm's loader sets it.
        image_mode: PIL mode of the images, `"L"` (one channel) or `"RGB"`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        split: Literal["train", "validation"] = "train",
        transform: Callable[[Image.Image], Any] | None = None,
        image_mode: Literal["L", "RGB"] = "RGB",
    ) -> None:
        if split not in ("train", "validation"):
            raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
        self.transform = transform
        self.image_mode = image_mode
        images, labels = _load()
        chosen = _held_out(labels) == (split == "validation")
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.images[index]).convert(self.image_mode)
        return self.transform(image) if self.transform else image, int(self.labels[index])


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 `[1797, 8, 8]`, and labels `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install visionattn[demo]"
        ) from error
    data: Any = load_digits()
    # The source counts 0 to 16 inked pixels.
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target


def _held_out(labels: np.ndarray) -> np.ndarray:
    """Marks each fifth image of every class."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY]] = True
    return mask
