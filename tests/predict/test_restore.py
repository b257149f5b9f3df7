"""The restoration of files: what is kept, what is refused, and that nothing half-done is left."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers the networks)
from visionattn.data import pictures
from visionattn.data.images import ImageError
from visionattn.data.pictures import Picture, read_picture, write_picture
from visionattn.errors import InputError
from visionattn.inference.tiles import run_in_tiles
from visionattn.models import RestorationInfo
from visionattn.predict.restore import RestoreOptions, make_restorer, restore_files, restore_picture

SMALL = {"depths": (1,), "embed_dim": 12, "num_heads": 2, "window_size": 8, "squeeze_factor": 6}


class Identity(torch.nn.Module):
    """Enlarges by repetition, so that what goes in is seen in what comes out."""

    def __init__(self, upscale: int = 2, **facts: object):
        super().__init__()
        facts = {"task": "super-resolution", "upscale": upscale, "min_size": 5, **facts}
        self.info = RestorationInfo(**facts)  # type: ignore[arg-type]
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == self.info.channels
        scale = self.info.upscale
        return (x * self.weight).repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def restore_one(file: Path, output: Path, **options: object) -> Path:
    ((_, written),) = restore_files(Identity(), [file], output, RestoreOptions(**options))  # type: ignore[arg-type]
    assert isinstance(written, Path), written
    return written


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    levels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, endpoint=True)
    return levels.astype(dtype)


def png_header(width: int, height: int) -> bytes:
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    good = Image.fromarray(noise(12, 20, 3))
    good.save(folder / "good.png")
    Image.fromarray(noise(12, 20, 3)).convert("CMYK").save(folder / "print.jpg")
    write_picture(Picture(torch.rand(3, 9, 7), bits=16), folder / "deep.png")
    (folder / "truncated.png").write_bytes((folder / "good.png").read_bytes()[:400])
    (folder / "text.jpg").write_text("not a photograph")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "green", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    (folder / "bomb.png").write_bytes(png_header(200_000, 200_000) + end)
    return folder


def test_a_bad_folder(bad_folder: Path, tmp_path: Path, run_tool):
    net = timm.create_model("hat_s_x2")
    save_file(net.state_dict(), tmp_path / "hat.safetensors")
    output = tmp_path / "out"
    arguments = [
        "--model",
        "hat_s_x2",
        "--checkpoint",
        str(tmp_path / "hat.safetensors"),
        "--output",
        str(output),
    ]
    status, _, errors = run_tool("restore.py", str(bad_folder), *arguments)
    assert status == 2
    assert sorted(file.name for file in output.iterdir()) == ["good_x2.png", "print_x2.png"]
    assert "deep.png: 9x7 pixels are too small: 9 per side are needed" in errors
    assert "6 of 8 images could not be used" in errors


def test_every_bad_file_is_named_with_its_reason(bad_folder: Path, tmp_path: Path):
    output = tmp_path / "out"
    results = dict(restore_files(Identity(), pictures.list_pictures(bad_folder), output))
    reasons = {file.name: str(error) for file, error in results.items() if isinstance(error, ImageError)}
    assert set(reasons) == {"bomb.png", "dot.png", "moving.gif", "text.jpg", "truncated.png"}
    for name, reason in reasons.items():
        assert name in reason
        assert "\n" not in reason
    assert "exceeds limit" in reasons["bomb.png"]
    assert "1x1 pixels are too small: 5 per side are needed" in reasons["dot.png"]
    assert "pages (3)" in reasons["moving.gif"]
    assert "not an image file" in reasons["text.jpg"]
    assert "truncated" in reasons["truncated.png"] or "broken" in reasons["truncated.png"]
    # Nothing half-written, not even under a hidden name.
    assert sorted(f.name for f in output.iterdir()) == ["deep_x2.png", "good_x2.png", "print_x2.png"]
    for file in output.iterdir():
        read_picture(file)
    assert read_picture(output / "deep_x2.png").bits == 16


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_are_kept(channels: int, tmp_path: Path):
    levels = torch.from_numpy(noise(channels, 6, 8, dtype=np.uint16).astype(np.float32)) / 65535
    colors = min(channels, 3)
    alpha = levels[colors:] if channels > colors else None
    write_picture(Picture(levels[:colors], alpha, 16), tmp_path / "deep.png")
    again = read_picture(tmp_path / "deep.png")
    assert again.bits == 16
    torch.testing.assert_close(again.color, levels[:colors], rtol=0, atol=0)
    assert (again.alpha is None) == (alpha is None)
    if alpha is not None and again.alpha is not None:
        torch.testing.assert_close(again.alpha, alpha, rtol=0, atol=0)
    written = read_picture(restore_one(tmp_path / "deep.png", tmp_path / "out"))
    torch.testing.assert_close(written.color[:, ::2, ::2], levels[:colors], rtol=0, atol=0)
    assert written.bits == 16
    if channels == 1:  # other programs can read it
        with Image.open(tmp_path / "deep.png") as image:
            assert image.mode.startswith("I;16")
            np.testing.assert_array_equal(np.array(image), (levels[0] * 65535).round().numpy())


def test_grey_transparency_and_palettes_are_kept(tmp_path: Path):
    for mode in ("L", "LA", "RGBA", "1", "P"):
        image = Image.fromarray(noise(8, 9, 3 if mode == "P" else 4)).convert(mode)
        image.save(tmp_path / f"{mode}.png")
        with Image.open(restore_one(tmp_path / f"{mode}.png", tmp_path / "out")) as written:
            assert written.size == (18, 16)
            assert written.mode == {"1": "L", "P": "RGB"}.get(mode, mode)
            expected = np.array(image.convert(written.mode))
            pixels = np.array(written)[::2, ::2]
            if mode in ("LA", "RGBA"):  # transparency is enlarged by other means
                expected, pixels = expected[..., :-1], pixels[..., :-1]
            np.testing.assert_array_equal(pixels, expected)


def test_transparency_is_enlarged_smoothly(tmp_path: Path):
    levels = np.full((8, 8, 4), 200, np.uint8)
    levels[..., 3] = 255
    levels[:, 4:, 3] = 0
    Image.fromarray(levels).save(tmp_path / "cut.png")
    alpha = read_picture(restore_one(tmp_path / "cut.png", tmp_path / "out")).alpha
    assert alpha is not None
    assert alpha.shape == (1, 16, 16)
    assert alpha[0, 8, 0] > 0.99
    assert alpha[0, 8, -1] < 0.01
    assert 0.01 < alpha[0, 8, 7] < 0.99


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    image = Image.fromarray(noise(6, 9, 3))
    image.save(tmp_path / "turned.png", exif=exif)
    from PIL import ImageOps

    upright = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")))
    with Image.open(restore_one(tmp_path / "turned.png", tmp_path / "out")) as written:
        np.testing.assert_array_equal(np.array(written)[::2, ::2], upright)
        assert written.getexif().get(0x0112, 1) == 1
        assert written.getexif()[0x010F] == "a camera"


@pytest.mark.parametrize("bits", [8, 16])
def test_the_colour_profile_is_kept(bits: int, tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_picture(Picture(torch.rand(3, 6, 6), bits=bits, profile=profile), tmp_path / "a.png")
    assert read_picture(restore_one(tmp_path / "a.png", tmp_path / "out")).profile == profile


def test_a_printing_profile_does_not_describe_what_was_converted(tmp_path: Path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "print.jpg")
    picture = read_picture(tmp_path / "print.jpg")
    assert picture.profile is None
    assert picture.color[0].mean() < 0.1 < 0.9 < picture.color[1].mean()


@pytest.mark.parametrize(("format", "ending"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_formats(format: str, ending: str, tmp_path: Path):
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "a.bmp")
    written = restore_one(tmp_path / "a.bmp", tmp_path / "out", format=format)
    assert written.name == f"a_x2.{ending}"
    with Image.open(written) as image:
        assert image.format == format.upper()
        assert image.size == (18, 14)
        assert np.abs(np.array(image.convert("RGB")).astype(int) - (0, 128, 128)).max() < 8


def test_jpeg_refuses_transparency(tmp_path: Path):
    Image.new("RGBA", (9, 9)).save(tmp_path / "a.png")
    ((_, error),) = restore_files(
        Identity(), [tmp_path / "a.png"], tmp_path / "out", RestoreOptions(format="jpeg")
    )
    assert "JPEG cannot hold transparency" in str(error)
    assert not list((tmp_path / "out").glob("*"))


def test_side_by_side(tmp_path: Path):
    Image.new("L", (9, 7), 77).save(tmp_path / "a.png")
    restore_one(tmp_path / "a.png", tmp_path / "out", side_by_side=True)
    with Image.open(tmp_path / "out/a_x2_side_by_side.png") as image:
        assert image.size == (36, 14)
        assert np.unique(np.array(image)).tolist() == [77]


def test_a_network_for_one_channel_restores_colours_one_by_one():
    net = Identity(channels=1)
    color = torch.rand(3, 6, 7)
    restored = restore_picture(make_restorer(net, RestoreOptions()), net.info, Picture(color))
    torch.testing.assert_close(restored.color[:, ::2, ::2], color)


def test_budget_ensemble_and_tiles_through_the_options(tmp_path: Path):
    net = timm.create_model("hat_x2", **SMALL).eval()
    x = torch.rand(1, 3, 40, 24)
    whole = make_restorer(net, RestoreOptions())(x)
    torch.testing.assert_close(
        make_restorer(net, RestoreOptions(memory_budget="2MB"))(x), whole, rtol=0, atol=1e-6
    )
    assert make_restorer(net, RestoreOptions(self_ensemble=True))(x).shape == whole.shape
    tiled = make_restorer(net, RestoreOptions(tile=16, tile_overlap=8))(x)
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().max() < 0.1
    half = make_restorer(net, RestoreOptions(half=True))(x)
    assert 0 < (half - whole).abs().max() < 0.1


def test_tiles_of_a_local_network_are_exact_if_they_overlap_enough():
    net = timm.create_model("cfsr_x2", depths=(1,), embed_dim=8).eval()
    x = torch.rand(1, 3, 45, 38)
    with torch.no_grad():
        whole = net(x)
        torch.testing.assert_close(run_in_tiles(net, x, net.info, 16, 8), whole, rtol=0, atol=1e-6)
        assert not torch.allclose(run_in_tiles(net, x, net.info, 16, 0), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "much"}, "memory budget: a size in bytes reads 2GB"),
        ({"tile": 20}, "multiples of 8, but are 20 and 32"),
        ({"tile": 0}, "at least 5 pixels"),
    ],
)
def test_options_are_checked_before_work_starts(options: dict, message: str, tmp_path: Path):
    net = timm.create_model("hat_x2", **SMALL).eval()
    with pytest.raises(InputError, match=message):
        next(restore_files(net, [tmp_path / "missing.png"], tmp_path / "out", RestoreOptions(**options)))


def test_unsafe_half_precision_and_other_networks_are_refused():
    net = Identity(bfloat16_safe=False)
    with pytest.raises(InputError, match="half precision is not safe"):
        make_restorer(net, RestoreOptions(half=True))
    with pytest.raises(InputError, match="does not restore images"):
        make_restorer(torch.nn.Linear(1, 1), RestoreOptions())
    with pytest.raises(InputError, match="31 channels into 31"):
        make_restorer(Identity(channels=31), RestoreOptions())


def test_the_command_line(tmp_path: Path, run_tool):
    net = timm.create_model("cfsr_x2")
    save_file(net.state_dict(), tmp_path / "cfsr.safetensors")
    Image.fromarray(noise(20, 24, 3)).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--model", "cfsr_x2", "--output", str(tmp_path / "out")]
    weights = ["--checkpoint", str(tmp_path / "cfsr.safetensors")]
    status, printed, errors = run_tool(
        "restore.py", *arguments, *weights, "--tile", "16", "--tile-overlap", "8"
    )
    assert (status, printed) == (0, f"{tmp_path}/a.png -> {tmp_path}/out/a_x2.png\n")
    assert "note: tiles with 8 pixels of overlap" in errors
    status, _, errors = run_tool("restore.py", *arguments, *weights, "--memory-budget", "1kB")
    assert status == 2
    assert "this network needs at least" in errors
    status, _, errors = run_tool("restore.py", *arguments, *weights, "--memory-budget", "lots")
    assert (status, len(errors.splitlines())) == (2, 1)
    status, printed, _ = run_tool("restore.py", "--help")
    assert status == 0
    assert "examples:" in printed


def test_grey_pictures_through_a_network_for_colours_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    for name, mode in (("a", "L"), ("b", "RGB"), ("c", "LA")):
        Image.new(mode, (12, 12)).save(tmp_path / f"in/{name}.png")
    files = sorted((tmp_path / "in").iterdir())
    kwargs = {"embed_dim": 8, "depths": (1,), "kernel_size": 3}
    colours = timm.create_model("cfsr_x2", **kwargs).eval()
    assert all(isinstance(written, Path) for _, written in restore_files(colours, files, tmp_path / "out"))
    assert capsys.readouterr().err == (
        "note: 2 grey images went through a network for colours; the mean of its channels was kept\n"
    )
    grey = timm.create_model("cfsr_x2", in_chans=1, **kwargs).eval()
    list(restore_files(grey, files, tmp_path / "out"))
    assert capsys.readouterr().err == ""


def save(path: Path, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3)).save(path)
    return path


def test_no_result_takes_the_place_of_an_input(tmp_path: Path):
    for name in ("p.png", "p_x2.png"):
        save(tmp_path / f"p/{name}")
    before = (tmp_path / "p/p_x2.png").read_bytes()
    with pytest.raises(InputError, match=r"p_x2\.png would replace the input"):
        list(restore_files(Identity(), pictures.list_pictures(tmp_path / "p"), tmp_path / "p"))
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["p.png", "p_x2.png"]
    assert (tmp_path / "p/p_x2.png").read_bytes() == before


def test_as_many_results_as_inputs(tmp_path: Path):
    files = [save(tmp_path / f"in/{name}") for name in ("a.png", "a.jpg", "a.png.png", "A.bmp")]
    written = [result for _, result in restore_files(Identity(), files, tmp_path / "out")]
    assert len(set(written)) == len(list((tmp_path / "out").iterdir())) == 4


def test_a_folder_job_names_what_cannot_be_used_and_goes_on(tmp_path: Path):
    """Names too long for a result, links to nowhere, places that are taken: each is a sentence."""
    long = save(tmp_path / "in" / ("n" * 249 + ".png"))
    lost = tmp_path / "in/lost.png"
    lost.symlink_to(tmp_path / "nowhere")
    taken, good = save(tmp_path / "in/taken.png"), save(tmp_path / "in/z.png")
    (tmp_path / "out/taken_x2.png").mkdir(parents=True)
    results = dict(restore_files(Identity(), pictures.list_pictures(tmp_path / "in"), tmp_path / "out"))
    assert results[good] == tmp_path / "out/z_x2.png"
    for file, reason in ((long, "file name too long"), (lost, "No such file"), (taken, "is a folder")):
        assert isinstance(results[file], ImageError)
        assert str(file) in str(results[file])
        assert reason in str(results[file])


def test_output_that_is_a_file_is_refused_before_work_starts(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"cannot write to .*out is no folder"):
        next(restore_files(Identity(), [save(tmp_path / "a.png")], tmp_path / "out"))


class Hungry(Identity):
    """Has no memory for what is wider than 8 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] > 8:
            raise self.error
        return super().forward(x)

    error: BaseException = MemoryError()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a primitive"),
    ],
    ids=str,
)
def test_where_memory_runs_out_the_budget_is_named_and_work_goes_on(tmp_path: Path, error: BaseException):
    net = Hungry()
    net.error = error
    large, small = save(tmp_path / "a.png", 6, 9), save(tmp_path / "b.png")
    results = dict(restore_files(net, [large, small], tmp_path / "out"))
    assert str(results[large]).startswith(
        f"{large}: memory ran out; set the memory budget (--memory-budget 2GB)"
    )
    assert results[small] == tmp_path / "out/b_x2.png"
    net.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        list(restore_files(net, [large], tmp_path / "out"))


def test_sides_that_jpeg_has_not_are_refused_before_the_network_runs(tmp_path: Path):
    net = Hungry()
    net.error = AssertionError("the network ran")
    wide = save(tmp_path / "wide.png", 5, 32_751)
    ((_, error),) = restore_files(net, [wide], tmp_path / "out", RestoreOptions(format="jpeg"))
    assert "10x65502 pixels, but a side of jpeg has at most 65500; choose PNG" in str(error)
