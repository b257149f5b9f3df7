from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from visionattn.data.degradations.resize import bicubic_low_resolution, modcrop, to_uint8
from visionattn.data.files import pair_files
from visionattn.data.images import ImageError, read_image, to_pil
from visionattn.data.paired import PairedImages, TrainingCrops

GENERATOR = torch.Generator().manual_seed(0)


def write(path: Path, height: int, width: int) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    to_pil(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=GENERATOR)).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, height, width in [("0001", 42, 60), ("0002", 36, 33)]:
        gt = modcrop(read_image(write(tmp_path / f"gt/{name}.png", height, width)), 3)
        (tmp_path / "lq").mkdir(exist_ok=True)
        to_pil(bicubic_low_resolution(gt, 3)).save(tmp_path / f"lq/{name}x3.png")
    return tmp_path / "gt", tmp_path / "lq"


def test_folders_give_the_same_pairs_as_the_reduction(folders: tuple[Path, Path]):
    gt_files, lq_files = pair_files(*folders, "{}x3")
    stored, made = PairedImages(gt_files, 3, lq_files), PairedImages(gt_files, 3)
    assert stored.names == ["0001", "0002"]
    for a, b in zip(stored, made, strict=True):  # type: ignore[call-overload]
        assert torch.equal(a["lq"], b["lq"])
        assert torch.equal(a["gt"], b["gt"])
        assert a["gt"].shape[-1] == 3 * a["lq"].shape[-1]
    assert stored[0]["lq"].dtype == torch.float32
    assert 0.9 < stored[0]["gt"].max() <= 1


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
def test_reduced_crops_equal_crops_of_the_reduction(tmp_path: Path, upscale: int):
    files = {"a": write(tmp_path / "a.png", 61, 53)}
    from_file, from_memory = PairedImages(files, upscale), PairedImages(files, upscale, in_memory=True)
    for seed in range(20):
        torch.manual_seed(seed)
        ours = from_file.random_crop(0, 8)
        torch.manual_seed(seed)
        whole = from_memory.random_crop(0, 8)
        assert torch.equal(ours[1], whole[1])
        # The sums of the taps may be rounded differently.
        assert (ours[0].int() - whole[0].int()).abs().max() <= 1
        assert ours[0].shape == (3, 8, 8)
        assert ours[1].shape == (3, 8 * upscale, 8 * upscale)


def test_crops_are_aligned_and_follow_the_seed(folders: tuple[Path, Path]):
    gt_files, lq_files = pair_files(*folders, "{}x3")
    crops = TrainingCrops(PairedImages(gt_files, 3, lq_files, min_side=10, in_memory=True), 10, repeat=3)
    assert len(crops) == 6

    def draw(seed: int) -> list:
        torch.manual_seed(seed)
        return [crops[index] for index in range(len(crops))]

    first, again, other = draw(1), draw(1), draw(2)
    assert [pair["name"] for pair in first] == ["0001", "0002"] * 3
    assert all(torch.equal(a["lq"], b["lq"]) and torch.equal(a["gt"], b["gt"]) for a, b in zip(first, again))
    assert not all(torch.equal(a["lq"], b["lq"]) for a, b in zip(first, other))
    for pair in first:
        # A misaligned or differently flipped truth would not reduce to the input away from the borders.
        reduced = bicubic_low_resolution(to_uint8(pair["gt"]), 3)[:, 2:-2, 2:-2]
        assert (reduced.int() - to_uint8(pair["lq"]).int()[:, 2:-2, 2:-2]).abs().max() <= 1


def test_colours_are_permuted_alike(tmp_path: Path):
    Image.new("RGB", (16, 16), (10, 20, 30)).save(tmp_path / "a.png")
    images = PairedImages({"a": tmp_path / "a.png"}, 2)
    torch.manual_seed(0)
    orders = set()
    for pair in [TrainingCrops(images, 4, permute_colors=True)[0] for _ in range(50)]:
        lq, gt = (to_uint8(pair[key]).flatten(1) for key in ("lq", "gt"))
        assert torch.equal(lq[:, 0], gt[:, 0])
        orders.add(tuple(lq[:, 0].tolist()))
    assert len(orders) == 6


def test_broken_images_end_the_run_or_are_left_out(tmp_path: Path):
    files = {name: write(tmp_path / f"{name}.png", 24, 24) for name in ("a", "b", "c")}
    files["b"].write_text("not an image")
    files["c"] = write(tmp_path / "c.png", 24, 14)
    with pytest.raises(
        ImageError, match=r"2 of 3 images cannot be used: .*b\.png: not an image.*24x14 pixels"
    ):
        PairedImages(files, 2, min_side=8)
    kept = PairedImages(files, 2, min_side=8, broken_images="skip")
    assert (kept.names, sorted(kept.skipped)) == (["a"], ["b", "c"])
    with pytest.raises(ImageError, match="1 of 1 images"):
        PairedImages({"b": files["b"]}, 2, broken_images="skip")
    assert len(PairedImages(files, 2, check_images=0)) == 3


def test_inputs_must_belong_to_their_truths(folders: tuple[Path, Path]):
    gt_folder, lq_folder = folders
    gt_files, lq_files = pair_files(gt_folder, lq_folder, "{}x3")
    with pytest.raises(ImageError, match="not 2 times"):
        PairedImages(gt_files, 2, lq_files)
    with pytest.raises(FileNotFoundError, match=r"2 of 2 images .* have no input"):
        pair_files(gt_folder, lq_folder, "{}x2")
    with pytest.raises(ValueError, match=r"must hold \{\}"):
        pair_files(gt_folder, lq_folder, "x3")
    Image.new("RGB", (8, 8)).save(gt_folder / "0001.bmp")
    with pytest.raises(ValueError, match="share a name"):
        pair_files(gt_folder)
