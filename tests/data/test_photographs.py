from __future__ import annotations

import pytest

from visionattn.data import photographs
from visionattn.data.images import read_image
from visionattn.data.photographs import PHOTOGRAPHS, photograph_files

SIZES = {
    "astronaut": (512, 512),
    "rocket": (427, 640),
    "motorcycle": (500, 741),
    "china": (427, 640),
    "hubble": (872, 1000),
    "retina": (1411, 1411),
    "coffee": (400, 600),
    "chelsea": (300, 451),
    "flower": (427, 640),
}


def test_split_and_licences():
    train, held_out = photograph_files("train"), photograph_files("validation")
    assert list(train) == ["astronaut", "rocket", "motorcycle", "china", "hubble", "retina"]
    assert list(held_out) == ["coffee", "chelsea", "flower"]
    assert all(photograph.licence for photograph in PHOTOGRAPHS)


@pytest.mark.parametrize("name", SIZES)
def test_photographs_are_in_the_packages(name: str):
    files = photograph_files("train") | photograph_files("validation")
    assert tuple(read_image(files[name]).shape) == (3, *SIZES[name])


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path):
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        photograph_files("test")  # type: ignore[arg-type]
    monkeypatch.setattr(photographs, "_package_folder", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="coffee"):
        photograph_files("validation")
    monkeypatch.undo()
    monkeypatch.setattr(photographs, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=r"visionattn\[demo\]"):
        photograph_files("train")
