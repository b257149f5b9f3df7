"""Images with a class for every pixel, as ADE20K and Cityscapes come: folders of images and of class maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from visionattn.data.decode import ImageError, opened, orientation, upright
from visionattn.data.images import EXTENSIONS, open_image, to_tensor, walk_files

IGNORED = 255  # pixels of this value in a class map are neither learned nor judged


class LabelMaps(Dataset):
    """Images and class maps by the same path, but for the ends of their names.

    A sample is an image `tv_tensors.Image` uint8 `[3, H, W]` and classes, `tv_tensors.Mask` int64 `[H, W]`.

    Args:
        images: folder of the images, with any folders inside.
        labels: folder of the class maps: images of one channel or with a palette, whose values are classes.
        num_classes: classes.
        image_suffix: how the names of images end, `_leftImg8bit.png` for Cityscapes; by default as those of
            images do.
        label_suffix: what stands in its place in the names of class maps, `_gtFine_labelTrainIds.png` for
            Cityscapes.
        reduce_zero_label: value 0 is ignored and 1 is the first class, as in ADE20K.

    Attributes:
        files: image and class map of every sample.

    Raises:
        FileNotFoundError: a folder is missing or empty, or images have no class map.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        num_classes: int,
        image_suffix: str | None = None,
        label_suffix: str = ".png",
        reduce_zero_label: bool = False,
    ) -> None:
        self.num_classes, self.reduce_zero_label = num_classes, reduce_zero_label
        images, labels = Path(images), Path(labels)
        for kind, folder in (("images", images), ("class maps", labels)):
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder of {kind} {folder}")
        self.files: list[tuple[Path, Path]] = []
        for image in walk_files(images):
            suffix = image_suffix or (image.suffix if image.suffix.lower() in EXTENSIONS else None)
            if suffix and image.name.endswith(suffix):
                relative = str(image.relative_to(images)).removesuffix(suffix)
                self.files.append((image, labels / f"{relative}{label_suffix}"))
        if not self.files:
            raise FileNotFoundError(f"the folder {images} holds no image (*{image_suffix or ''})")
        missing = [label for _, label in self.files if not label.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.files)} images in {images} have no class map: "
                f"there is no {missing[0]}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, labels = self.files[index]
        return tv_tensors.Image(to_tensor(open_image(image))), tv_tensors.Mask(self._classes(labels))

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.files[index][0]

    def classes(self, index: int) -> Tensor:
        """The classes `[H, W]` of sample `index`, without its image."""
        return self._classes(self.files[index][1])

    def why_broken(self, index: int, read: bool = True) -> str | None:
        """Why sample `index` cannot be used, naming the file; None where it can.

        Args:
            index: which sample.
            read: decode both files; False asks nothing, because they are there.
        """
        if not read:
            return None
        image, labels = self.files[index]
        try:
            height, width = open_image(image).size[::-1]
            classes = self._classes(labels)
        except (ImageError, FileNotFoundError) as error:
            return f"sample {index}: {error}"
        if classes.shape != (height, width):
            shape = f"{classes.shape[0]}x{classes.shape[1]}"
            return f"sample {index}: {labels} has {shape} pixels, but {image} has {height}x{width}"
        wrong = classes[((classes >= self.num_classes) | (classes < 0)) & (classes != IGNORED)]
        if len(wrong):
            value = int(wrong[0]) + self.reduce_zero_label
            return f"sample {index}: {labels} has the value {value}, beyond the {self.num_classes} classes"
        return None

    def remove_images(self, indices: Sequence[int]) -> None:
        """Leave out samples."""
        gone = set(indices)
        self.files = [files for index, files in enumerate(self.files) if index not in gone]

    def _classes(self, path: Path) -> Tensor:
        classes = torch.from_numpy(read_class_map(path).astype(np.int64))
        if self.reduce_zero_label:
            if (classes == IGNORED + 1).any():
                raise ImageError(f"{path}: the value {IGNORED + 1} would become that of ignored pixels")
            classes = torch.where((classes == 0) | (classes == IGNORED), IGNORED, classes - 1)
        return classes


def read_class_map(path: str | Path) -> np.ndarray:
    """The values of a class map `[H, W]`, upright as the image is; of a palette its indices.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is damaged, or has colours in place of classes.
    """
    with opened(path) as image:
        image.load()
        values = upright(np.asarray(image), orientation(image))
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ImageError(f"{path}: a class map has one whole number per pixel, but this is of another kind")
    return values
