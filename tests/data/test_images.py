from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.decode import ImageError
from visionattn.data.images import (
    list_images,
    open_image,
    read_image,
    to_grey,
    to_pil,
    to_tensor,
    walk_files,
)

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_reads_any_8_bit_image_as_rgb(tmp_path: Path):
    Image.fromarray(PIXELS).save(tmp_path / "rgb.png")
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(PIXELS).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(PIXELS).convert("P").save(tmp_path / "palette.png")
    assert torch.equal(read_image(tmp_path / "rgb.png"), torch.from_numpy(PIXELS).permute(2, 0, 1))
    for name in ("grey.png", "alpha.png", "palette.png"):
        assert read_image(tmp_path / name).shape == (3, 4, 6)


def test_turns_images_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)


def test_round_trip_between_pil_and_tensor():
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert torch.equal(to_tensor(to_pil(tensor)), tensor)
    assert to_pil(tensor[:1]).mode == "L"


def test_broken_images_are_named_with_the_reason(tmp_path: Path):
    (tmp_path / "text.png").write_text("not an image")
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    for name, reason in [("text.png", "not an image"), ("cut.png", "truncated"), ("float.tif", "32 bits")]:
        with pytest.raises(ImageError, match=rf"{name}: .*{reason}"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")


def test_an_image_of_dangerous_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(PIXELS).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="large"):
        open_image(tmp_path / "large.png")


def test_lists_images_by_name(tmp_path: Path):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    for name in ("._a.jpg", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert [file.name for file in list_images(tmp_path)] == ["a.jpg", "b.PNG", "lost.png"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        list_images(tmp_path / "folder.png")


def test_linked_folders_are_walked_and_links_back_up_are_not(tmp_path: Path):
    for name in ("real/1.png", "real/.ipynb_checkpoints/1-checkpoint.png", "here/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "here/city").symlink_to(tmp_path / "real")
    (tmp_path / "here/town").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "here")
    found = [str(file.relative_to(tmp_path / "here")) for file in walk_files(tmp_path / "here")]
    assert found == ["2.png", "city/1.png", "town/1.png"]


def test_luma_of_deep_colours_is_not_rounded():
    image = torch.tensor([0.25, 0.5, 0.75]).view(3, 1, 1)
    grey = to_grey(image)
    assert grey.item() == pytest.approx((16 + 65.481 * 0.25 + 128.553 * 0.5 + 24.966 * 0.75) / 255)
    assert torch.equal(to_grey(image[:1].expand(3, -1, -1)), image[:1])
