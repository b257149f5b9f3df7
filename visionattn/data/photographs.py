"""Photographs that come with scikit-image and scikit-learn: real data for restoration, without a download."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Photograph:
    """One photograph: its file inside a package, its side of the split, and the licence it is given under."""

    name: str
    package: Literal["skimage", "sklearn"]
    file: str
    split: Literal["train", "validation"]
    licence: str


# No scene stands on both sides; motorcycle_right is left out because it shows the scene of motorcycle_left.
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "train", "public domain (NASA)"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "train", "public domain (SpaceX)"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png", "train", "none stated (Middlebury 2014)"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "train", "CC BY 2.0, danielbuechele"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", "train", "public domain (NASA, ESA)"),
    Photograph("retina", "skimage", "data/retina.jpg", "train", "CC0"),
    Photograph("coffee", "skimage", "data/coffee.png", "validation", "CC0"),
    Photograph("chelsea", "skimage", "data/chelsea.png", "validation", "CC0"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "validation", "CC BY 2.0, vultilion"),
)


def photograph_files(split: Literal["train", "validation"]) -> dict[str, Path]:
    """The files of one side of the split, by the name of the photograph, where the packages were installed.

    Raises:
        ModuleNotFoundError: scikit-image or scikit-learn is not installed.
        FileNotFoundError: an installed version comes without one of the photographs.
    """
    chosen = [photograph for photograph in PHOTOGRAPHS if photograph.split == split]
    if not chosen:
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    files = {photograph.name: _package_folder(photograph.package) / photograph.file for photograph in chosen}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"the installed packages come without the photograph {name} ({file})")
    return files


def _package_folder(package: str) -> Path:
    # The files are read in place: the packages' own loaders may start a download.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the photographs come with scikit-image and scikit-learn, which are not both installed: "
            "pip install visionattn[demo]"
        )
    return Path(spec.submodule_search_locations[0])
