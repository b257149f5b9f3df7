from __future__ import annotations

import sys

import numpy as np
import pytest
from timm.data import create_loader

from visionattn.data import digits
from visionattn.data.digits import Digits


def test_split_is_stratified_and_covers_everything():
    train, held_out = Digits("train"), Digits("validation")
    assert (len(train), len(held_out)) == (1442, 355)
    counts = np.bincount(train.labels) + np.bincount(held_out.labels)
    share = np.bincount(held_out.labels) / counts
    assert (abs(share - 0.2) < 0.01).all()
    images = np.concatenate([train.images, held_out.images])
    reference, labels = digits._load()
    assert counts.tolist() == np.bincount(labels).tolist()
    assert sorted(map(bytes, images)) == sorted(map(bytes, reference))


def test_samples_are_grey_levels_and_labels():
    image, label = Digits("validation", image_mode="L")[0]
    assert (image.mode, image.size, type(label)) == ("L", (8, 8), int)
    assert image.getextrema() == (0, 255)
    assert Digits("train")[0][0].mode == "RGB"


def test_feeds_a_loader_of_timm():
    dataset = Digits("validation")
    loader = create_loader(dataset, (3, 16, 16), batch_size=5, use_prefetcher=False, num_workers=0)
    images, labels = next(iter(loader))
    assert images.shape == (5, 3, 16, 16)
    assert labels.tolist() == dataset.labels[:5].tolist()


def test_unknown_split_and_missing_package(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        Digits("test")  # type: ignore[arg-type]
    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"visionattn\[demo\]"):
        Digits("train")
