"""Folders, LMDB and cubes as places of paired images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from visionattn.data.degradations.pipeline import Degradation
from visionattn.data.degradations.resize import bicubic_low_resolution
from visionattn.data.files import (
    LmdbImage,
    list_by_stem,
    pair_files,
    read_depth,
    read_planes,
)
from visionattn.data.images import ImageError, read_image, to_pil
from visionattn.data.paired import PairedImages, TrainingCrops
from visionattn.data.pictures import Picture, read_picture, write_picture
from visionattn.data.prepare import cut_pieces, make_lmdb

GENERATOR = torch.Generator().manual_seed(0)


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gt").mkdir()
    for name in ("0001_s001", "0001_s002", "0002_s001"):
        to_pil(picture(24, 20)).save(tmp_path / f"gt/{name}.png")
    return tmp_path / "gt"


def test_lmdb_round_trip_in_basicsr_layout(folder: Path, tmp_path: Path):
    lmdb = pytest.importorskip("lmdb")
    assert make_lmdb(folder, tmp_path / "gt.lmdb") == 3
    assert not list(tmp_path.glob(".*"))
    meta = (tmp_path / "gt.lmdb/meta_info.txt").read_text().splitlines()
    assert meta[0] == "0001_s001.png (24,20,3) 1"
    with lmdb.open(str(tmp_path / "gt.lmdb"), readonly=True, lock=False) as environment:
        assert environment.begin().get(b"0001_s001")[:4] == b"\x89PNG"
    images = list_by_stem(tmp_path / "gt.lmdb")
    assert list(images) == ["0001_s001", "0001_s002", "0002_s001"]
    for name, source in images.items():
        assert torch.equal(read_planes(source, 3), read_image(folder / f"{name}.png"))
    missing = LmdbImage(str(tmp_path / "gt.lmdb"), "0009")
    with pytest.raises(ImageError, match=r"gt\.lmdb/0009: the database has no such key"):
        read_planes(missing, 3)
    with pytest.raises(ValueError, match="something at"):
        make_lmdb(folder, tmp_path / "gt.lmdb")


def test_pairs_from_lmdb_in_worker_processes(folder: Path, tmp_path: Path):
    pytest.importorskip("lmdb")
    (tmp_path / "lq").mkdir()
    for file in folder.iterdir():
        to_pil(bicubic_low_resolution(read_image(file), 2)).save(tmp_path / "lq" / file.name)
    make_lmdb(folder, tmp_path / "gt.lmdb")
    make_lmdb(tmp_path / "lq", tmp_path / "lq.lmdb")
    stored = PairedImages(*_files(tmp_path / "gt.lmdb", tmp_path / "lq.lmdb"))
    plain = PairedImages(*_files(folder, tmp_path / "lq"))
    for a, b in zip(DataLoader(stored, num_workers=2), plain, strict=True):  # type: ignore[arg-type]
        assert torch.equal(a["lq"][0], b["lq"])
        assert torch.equal(a["gt"][0], b["gt"])


def _files(gt: Path, lq: Path) -> tuple:
    gt_files, lq_files = pair_files(gt, lq)
    return gt_files, 2, lq_files


def test_a_damaged_or_missing_lmdb_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"no LMDB .*none\.lmdb with a meta_info"):
        list_by_stem(tmp_path / "none.lmdb")
    (tmp_path / "bad.lmdb").mkdir()
    (tmp_path / "bad.lmdb/meta_info.txt").write_text("a.png (4,4,3) 1\n")
    (tmp_path / "empty.lmdb").mkdir()
    (tmp_path / "empty.lmdb/meta_info.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"empty\.lmdb lists no image"):
        list_by_stem(tmp_path / "empty.lmdb")
    (tmp_path / "bad.lmdb/data.mdb").write_bytes(b"not a database" * 1000)
    files = list_by_stem(tmp_path / "bad.lmdb")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install visionattn\[lmdb\]"):
            read_planes(files["a"], 3)
        with pytest.raises(ModuleNotFoundError, match=r"pip install visionattn\[lmdb\]"):
            make_lmdb(folder, tmp_path / "new.lmdb")
        assert not (tmp_path / "new.lmdb").exists()
    pytest.importorskip("lmdb")
    with pytest.raises(ImageError, match=r"bad\.lmdb: "):
        read_planes(files["a"], 3)


def test_several_inputs_of_one_truth(tmp_path: Path):
    for name in ("clear/1", "clear/10", "hazy/1_1_0.9", "hazy/1_2_0.7", "hazy/10_1_0.8"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        to_pil(picture(8, 8)).save(tmp_path / f"{name}.png")
    truths, inputs = pair_files(tmp_path / "clear", tmp_path / "hazy", "{}_*")
    assert inputs is not None
    assert {name: source.stem for name, source in truths.items()} == {  # type: ignore[union-attr]
        "1_1_0.9": "1",
        "1_2_0.7": "1",
        "10_1_0.8": "10",
    }
    assert list(truths) == list(inputs)
    (tmp_path / "hazy/10_1_0.8.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* have no input .*10_\*"):
        pair_files(tmp_path / "clear", tmp_path / "hazy", "{}_*")


def test_cubes(tmp_path: Path):
    cube = torch.rand(5, 9, 8, generator=GENERATOR)
    np.save(tmp_path / "a.npy", cube.permute(1, 2, 0).numpy())
    savemat(
        tmp_path / "b.mat", {"gt": cube.permute(1, 2, 0).numpy(), "input": cube.permute(1, 2, 0).numpy() * 2}
    )
    savemat(tmp_path / "c.mat", {"radiance": (cube.permute(1, 2, 0) * 65535).numpy().astype(np.uint16)})
    assert torch.equal(read_planes(tmp_path / "a.npy", 5), cube)
    assert torch.equal(read_planes(tmp_path / "b.mat", 5), cube)
    assert torch.equal(read_planes(tmp_path / "b.mat", 5, "input"), 2 * cube)
    torch.testing.assert_close(read_planes(tmp_path / "c.mat", 5), cube, atol=2e-5, rtol=0)
    assert list(list_by_stem(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gt": np.zeros((4, 4, 3))}, r"shape \(4, 4, 3\) is not \[H, W, 5 bands\]"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "holds x, y, but no array called gt"),
        ({"gt": np.full((4, 4, 5), np.nan)}, "not finite"),
        ({"gt": np.full((4, 4, 5), 900.0)}, r"values reach 900, but must lie in \[0, 1\]"),
        ({"gt": "text"}, "holds no numbers"),
    ],
)
def test_bad_cubes_are_named(tmp_path: Path, content: dict, message: str):
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(ImageError, match=message) as caught:
        read_planes(tmp_path / "a.mat", 5)
    assert str(caught.value).startswith(str(tmp_path / "a.mat"))


def test_broken_files_and_bands_that_files_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.npy", "a.mat"):
        (tmp_path / name).write_bytes(b"\x93NUMPY broken" if name == "a.npy" else b"broken" * 40)
        with pytest.raises(ImageError, match=name):
            read_planes(tmp_path / name, 5)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match="an image file has no 5 bands"):
        read_planes(tmp_path / "b.png", 5)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_planes(tmp_path / "c.npy", 5)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install visionattn\[hyperspectral\]"):
        read_planes(tmp_path / "a.mat", 5)


def test_grey_images(tmp_path: Path):
    grey = picture(8, 8)[:1]
    to_pil(grey).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert torch.equal(read_planes(tmp_path / "grey.png", 1), grey)
    assert read_planes(tmp_path / "red.png", 1).unique().tolist() == [81]


def test_depth_maps(tmp_path: Path):
    depth = torch.rand(6, 7, generator=GENERATOR).numpy()
    Image.fromarray((depth * 65535).astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray((depth * 255).astype(np.uint8)).save(tmp_path / "b.png")
    np.save(tmp_path / "c.npy", depth * 9)
    assert read_depth(tmp_path / "a.png").shape == (1, 6, 7)
    np.testing.assert_allclose(read_depth(tmp_path / "a.png")[0], depth, atol=2e-5)
    np.testing.assert_allclose(read_depth(tmp_path / "b.png")[0], depth, atol=4e-3)
    np.testing.assert_allclose(read_depth(tmp_path / "c.npy")[0], depth * 9, rtol=1e-6)
    Image.new("RGB", (4, 4)).save(tmp_path / "d.png")
    with pytest.raises(ImageError, match="a depth map has one channel"):
        read_depth(tmp_path / "d.png")
    (tmp_path / "e.png").write_text("no")
    with pytest.raises(ImageError, match=r"e\.png"):
        read_depth(tmp_path / "e.png")


def test_crops_are_degraded_after_they_are_cut_with_their_depth(tmp_path: Path):
    """Haze of a known strength tells whether truth and depth are flipped and cut alike."""
    gt = picture(40, 30)
    to_pil(gt).save(tmp_path / "a.png")
    np.save(tmp_path / "depth.npy", gt[0].numpy() / np.float32(255))
    haze = Degradation([{"name": "haze", "beta": 1.0, "airlight": 1.0}])
    images = PairedImages(
        {"a": tmp_path / "a.png"}, 1, {"a": tmp_path / "depth.npy"}, degradation=haze, min_side=20
    )
    crops = TrainingCrops(images, 12, repeat=8, degraded_size=20)
    torch.manual_seed(0)
    for pair in [crops[index] for index in range(8)]:
        assert pair["lq"].shape == pair["gt"].shape == (3, 12, 12)
        expected = 1 - (1 - pair["gt"]) * torch.exp(-pair["gt"][:1])
        torch.testing.assert_close(pair["lq"], expected)
    assert torch.equal(images[0]["lq"], images[0]["lq"])


def test_degraded_crops_follow_the_seed_and_whole_images_have_one(folder: Path):
    noise = Degradation([{"name": "gaussian_noise", "sigma": [5, 50]}])
    images = PairedImages(list_by_stem(folder), 1, degradation=noise, min_side=8, in_memory=True)
    crops = TrainingCrops(images, 8)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return crops[0]["lq"]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    differences = [pair["lq"] - pair["gt"] for pair in images]  # type: ignore[attr-defined]
    torch.testing.assert_close(differences[0], differences[1], atol=1e-6, rtol=0)


def test_truths_are_cut_to_their_inputs(tmp_path: Path):
    gt, small = picture(31, 30), picture(10, 12)
    to_pil(gt).save(tmp_path / "gt.png")
    to_pil(small).save(tmp_path / "lq.png")
    files = {"a": tmp_path / "gt.png"}, 2, {"a": tmp_path / "lq.png"}
    assert torch.equal(PairedImages(*files)[0]["gt"], gt[:, :20, :24] / 255)
    assert torch.equal(PairedImages(*files, cut="centre")[0]["gt"], gt[:, 5:25, 3:27] / 255)
    to_pil(picture(9, 9)).save(tmp_path / "lq.png")
    with pytest.raises(ImageError, match="31x30 pixels, which is not 2 times the 9x9 of its input"):
        PairedImages(*files)
    assert PairedImages(*files, cut="centre")[0]["gt"].shape == (3, 18, 18)
    to_pil(picture(16, 15)).save(tmp_path / "lq.png")
    with pytest.raises(ImageError, match="not 2 times the 16x15"):
        PairedImages(*files, cut="centre")


def test_lmdb_keys_with_blanks_dots_and_folders(tmp_path: Path):
    pytest.importorskip("lmdb")
    names = ["a b", "c.d (1)", " e", "f (3,4,3) 1"]
    for name in names:
        (tmp_path / "gt").mkdir(exist_ok=True)
        to_pil(picture(8, 8)).save(tmp_path / f"gt/{name}.png")
    make_lmdb(tmp_path / "gt", tmp_path / "gt.lmdb")
    stored = list_by_stem(tmp_path / "gt.lmdb")
    assert sorted(stored) == sorted(names)
    for name, source in stored.items():
        assert torch.equal(read_planes(source, 3), read_image(tmp_path / f"gt/{name}.png"))
    meta = tmp_path / "gt.lmdb/meta_info.txt"
    meta.write_text("000/1.png (8,8,3) 1\n001/1.png (8,8,3) 1\n")
    assert list(list_by_stem(tmp_path / "gt.lmdb")) == ["000/1", "001/1"]
    meta.write_text("1.png (8,8,3) 1\n1.jpg (8,8,3) 1\n")
    with pytest.raises(ValueError, match="has the key '1' twice"):
        list_by_stem(tmp_path / "gt.lmdb")
    meta.write_bytes("Größe.png (8,8,3) 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"meta_info\.txt is not UTF-8"):
        list_by_stem(tmp_path / "gt.lmdb")


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\udcff"])
def test_names_that_cannot_be_keys_are_refused_before_anything_is_written(tmp_path: Path, name: str):
    pytest.importorskip("lmdb")
    (tmp_path / "gt").mkdir()
    to_pil(picture(8, 8)).save(tmp_path / f"gt/{name}.png")
    with pytest.raises(ValueError, match="cannot be a key of an LMDB"):
        make_lmdb(tmp_path / "gt", tmp_path / "gt.lmdb")
    assert [file.name for file in tmp_path.iterdir()] == ["gt"]


def test_16_bits_and_transparency_go_through_lmdb_and_pieces(tmp_path: Path):
    pytest.importorskip("lmdb")
    deep = torch.randint(0, 65536, (4, 8, 8), generator=GENERATOR).float() / 65535
    write_picture(Picture(deep[:3], deep[3:], bits=16), tmp_path / "gt/a.png")
    make_lmdb(tmp_path / "gt", tmp_path / "gt.lmdb")
    assert cut_pieces(tmp_path / "gt.lmdb", tmp_path / "pieces", 4, 4) == 4
    assert (tmp_path / "gt.lmdb/meta_info.txt").read_text() == "a.png (8,8,4) 1\n"
    (source,) = list_by_stem(tmp_path / "gt.lmdb").values()
    torch.testing.assert_close(read_planes(source, 3), deep[:3], rtol=0, atol=0)
    piece = read_picture(tmp_path / "pieces/a_s004.png")
    assert piece.bits == 16
    assert piece.alpha is not None
    torch.testing.assert_close(torch.cat((piece.color, piece.alpha)), deep[:, 4:, 4:], rtol=0, atol=0)


def test_training_on_16_bits(tmp_path: Path):
    """Crops and their reduced inputs are those of the whole picture, of which no bit is lost."""
    deep = torch.randint(0, 65536, (3, 16, 16), generator=GENERATOR).float() / 65535
    write_picture(Picture(deep, bits=16), tmp_path / "gt/a.png")
    images = PairedImages(list_by_stem(tmp_path / "gt"), 2)
    torch.testing.assert_close(images[0]["gt"], deep, rtol=0, atol=0)
    assert torch.equal(images[0]["lq"], bicubic_low_resolution(deep, 2) / 255)
    lq, gt = images.random_crop(0, 8)
    assert torch.equal(gt, images[0]["gt"])
    assert lq is not None
    assert torch.equal(lq / 255, images[0]["lq"])


def test_deep_depth_maps_of_other_formats(tmp_path: Path):
    depth = np.random.default_rng(0).integers(0, 65536, (6, 7))
    (tmp_path / "a.pgm").write_bytes(b"P5\n7 6\n65535\n" + depth.astype(">u2").tobytes())
    Image.fromarray((depth / 65535).astype(np.float32)).save(tmp_path / "b.tif")
    for name in ("a.pgm", "b.tif"):
        np.testing.assert_allclose(read_depth(tmp_path / name)[0], depth / 65535, rtol=1e-6)


def test_an_input_of_two_truths_is_refused(tmp_path: Path):
    for name in ("clear/1", "clear/1_1", "hazy/1_1_0.9", "hazy/1_2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        to_pil(picture(8, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"hazy/1_1_0\.9\.png may be the input of 1 and of 1_1"):
        pair_files(tmp_path / "clear", tmp_path / "hazy", "{}_*")
