"""Files that strangers made: each is refused in one sentence or loads rightly, and no code of theirs runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from visionattn.checkpoints import CheckpointError, identify, load_checkpoint

SIZES: dict[str, Any] = {"embed_dim": 8, "depths": (1,), "fused": True}
TRACE = "it_ran"


def network(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cfsr_x2", **{**SIZES, **kwargs})


WEIGHTS: dict[str, Tensor] = network(seed=1).state_dict()


def as_zip(content: Any = None, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS if content is None else content, file, **kwargs)
    return file.getvalue()


def as_old(content: Any = None) -> bytes:
    return as_zip(content, _use_new_zipfile_serialization=False)


def flipped(data: bytes, place: float) -> bytes:
    index = int(place * len(data))
    return data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :]


def repacked(data: bytes, **kwargs: Any) -> bytes:
    """A PyTorch file written anew as another archive, for instance compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", **kwargs) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def bomb() -> bytes:
    """A megabyte that unpacks to a gigabyte, in the place of a weight."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(as_zip())) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            if name.endswith("data/0"):
                with new.open(name, "w", force_zip64=True) as entry:
                    for _ in range(64):
                        entry.write(bytes(1 << 20))
            else:
                new.writestr(name, old.read(name))
    return file.getvalue()


def overlapping() -> bytes:
    """An archive whose directory lists one stored part a thousand times."""
    data = as_zip({"w": torch.zeros(5000)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
        count = len(archive.namelist())
    entries = data[
        start : data.index(b"PK\x06\x06", start) if b"PK\x06\x06" in data[start:] else len(data) - 22
    ]
    directory = entries * 1000
    total = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, count * 1000 & 0xFFFF, count * 1000 & 0xFFFF, 0, start, 0
    )
    end = bytearray(total)
    end[12:16] = struct.pack("<L", len(directory))
    return data[:start] + directory + bytes(end)


class Runs:
    """Unpickling it makes a folder, by a function of the reader's choice."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def makes_folder(folder: Path) -> Runs:
    return Runs(os.mkdir, str(folder / TRACE))


def evaluates(folder: Path) -> Runs:
    return Runs(eval, f"__import__('os').mkdir({str(folder / TRACE)!r})")


def in_namespace(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(lr=makes_folder(folder))


def safetensors_header(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


def nested(depth: int) -> Any:
    content: Any = WEIGHTS
    for _ in range(depth):
        content = [content]
    return {"model": content}


WHOLE, OLD, SAFE = as_zip(), as_old(), save(WEIGHTS)
LAYER = "conv_first.weight"
INSIDE = WHOLE.index(WEIGHTS[LAYER].numpy().tobytes()) + 40.5  # between two bytes
Write = Callable[[Path], Any]
F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

# Name of the file, what it holds, and what the sentence says.
REFUSED: dict[str, tuple[str, bytes | Write, str]] = {
    "empty": ("w.pth", b"", "no readable checkpoint"),
    "empty safetensors": ("w.safetensors", b"", "no readable checkpoint"),
    "text": ("w.pth", b"<html>Sign in to download</html>", "is damaged or holds more"),
    "text as safetensors": ("w.safetensors", b"<html>Sign in</html>", "no readable checkpoint"),
    "zeros": ("w.pth", bytes(4096), "damaged|no readable"),
    "noise": (
        "w.pth",
        torch.randint(0, 256, (4096,)).to(torch.uint8).numpy().tobytes(),
        "damaged|no readable",
    ),
    "an image": ("w.pth", b"\x89PNG\r\n\x1a\n" + bytes(64), "damaged|no readable"),
    "half": ("w.pth", WHOLE[: len(WHOLE) // 2], "no readable checkpoint"),
    "without its end": ("w.pth", WHOLE[:-30], "no readable checkpoint"),
    "half of the old format": ("w.pth", OLD[: len(OLD) // 2], "damaged|no readable"),
    "head of the old format": ("w.pth", OLD[:40], "damaged|no readable"),
    "half of safetensors": ("w.safetensors", SAFE[: len(SAFE) // 2], "no readable checkpoint"),
    "head of safetensors": ("w.safetensors", SAFE[:20], "no readable checkpoint"),
    "a bit of a weight": ("w.pth", flipped(WHOLE, INSIDE / len(WHOLE)), "damaged: the checksum of its part"),
    "a bit of the directory": ("w.pth", flipped(WHOLE, 1 - 300 / len(WHOLE)), "damaged|no readable"),
    "a bit of the pickle": ("w.pth", flipped(WHOLE, 300 / len(WHOLE)), "damaged|no readable"),
    "a bit of the old format": ("w.pth", flipped(OLD, 0.02), "damaged|no readable|does not fit|no network"),
    "a bit of the length of safetensors": ("w.safetensors", flipped(SAFE, 0), "no readable checkpoint"),
    "a bit of the header of safetensors": (
        "w.safetensors",
        flipped(SAFE, 12 / len(SAFE)),
        "no readable|does not fit|no network",
    ),
    "compressed": ("w.pth", repacked(WHOLE, compression=zipfile.ZIP_DEFLATED), "compressed archive"),
    "a zip bomb": ("w.pth", bomb(), "compressed archive"),
    "a part listed a thousand times": ("w.pth", overlapping(), "no readable checkpoint"),
    "a foreign archive": (
        "w.pth",
        repacked(as_zip([1])).replace(b"data.pkl", b"data.txt"),
        "no readable|damaged",
    ),
    "a pickle that makes a folder": (
        "w.pth",
        lambda d: as_zip({**WEIGHTS, "x": makes_folder(d)}),
        "could run code",
    ),
    "one in the old format": ("w.pth", lambda d: as_old({**WEIGHTS, "x": makes_folder(d)}), "could run code"),
    "a plain one": ("w.pth", lambda d: pickle.dumps(makes_folder(d)), "could run code"),
    "one that evaluates text": ("w.pt", lambda d: as_zip({"model": evaluates(d)}), "could run code"),
    "one in the options": (
        "w.pth",
        lambda d: as_zip({"model": WEIGHTS, "args": in_namespace(d)}),
        "could run",
    ),
    "one of the first protocol": ("w.bin", lambda d: pickle.dumps(makes_folder(d), 0), "could run code"),
    "a module": ("w.pth", as_zip(nn.Linear(2, 2)), "could run code"),
    "a pickle named safetensors": ("w.safetensors", WHOLE, "no readable checkpoint"),
    "safetensors named pth": ("w.pth", SAFE, "damaged|no readable"),
    "a length beyond the file": (
        "w.safetensors",
        struct.pack("<Q", 1 << 60) + b"{}",
        "no readable checkpoint",
    ),
    "offsets beyond the file": (
        "w.safetensors",
        safetensors_header({"w": {**F32, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "no readable checkpoint",
    ),
    "overlapping offsets": (
        "w.safetensors",
        safetensors_header({"a": F32, "b": F32}, bytes(16)),
        "no readable",
    ),
    "a negative shape": (
        "w.safetensors",
        safetensors_header({"a": {**F32, "shape": [-4]}}, bytes(16)),
        "no read",
    ),
    "an unknown type": (
        "w.safetensors",
        safetensors_header({"a": {**F32, "dtype": "X"}}, bytes(16)),
        "no readable",
    ),
    "a header that is no JSON": ("w.safetensors", safetensors_header(b"{{{{", bytes(16)), "no readable"),
    "a number shown a million times": (
        "w.pth",
        as_zip({LAYER: torch.zeros(1).expand(1 << 20, 1 << 20)}),
        "more than its .* bytes can store",
    ),
    "a sparse tensor": ("w.pth", as_zip({"w": torch.eye(3).to_sparse()}), "no plain array"),
    "a tensor without memory": ("w.pth", as_zip({"w": torch.zeros(3, device="meta")}), "no plain array"),
    "a list": ("w.pth", as_zip([torch.zeros(3)]), "holds a list, not a state dict"),
    "a tensor": ("w.pth", as_zip(torch.zeros(3)), "holds a Tensor, not a state dict"),
    "a number": ("w.pth", as_zip(3), "holds a int, not a state dict"),
    "no weights": ("w.pth", as_zip({"epoch": 3, "model": {}}), "holds no weights"),
    "names that are numbers": ("w.pth", as_zip({1: torch.zeros(3)}), "holds no weights"),
    "itself": ("w.pth", as_zip(itself()), "holds no weights"),
    "lists of lists": ("w.pth", as_zip(nested(40)), "nested deeper than 32"),
    "another network": (
        "w.pth",
        as_zip(nn.Linear(3, 3).state_dict()),
        "does not fit|no network",
    ),
    "other shapes": (
        "w.pth",
        as_zip({**WEIGHTS, LAYER: torch.zeros(8, 3, 5, 5)}),
        "1 of another shape|belongs to no network",
    ),
    "a missing weight": (
        "w.pth",
        as_zip({k: v for k, v in WEIGHTS.items() if k != LAYER}),
        "missing|no network",
    ),
    "an unknown weight": ("w.pth", as_zip({**WEIGHTS, "layers.0.x": torch.zeros(3)}), "unexpected"),
    "a scalar for a matrix": ("w.pth", as_zip({**WEIGHTS, LAYER: torch.tensor(1.0)}), "shape|no network"),
}


def written(case: str, folder: Path) -> Path:
    name, content, _ = REFUSED[case]
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content(folder))
    return path


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_refused_in_one_sentence(case: str, tmp_path: Path):
    path = written(case, tmp_path)
    net = network()
    for read in (lambda: load_checkpoint(net, path), lambda: identify(path)):
        with pytest.raises(CheckpointError, match=REFUSED[case][2]) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert not (tmp_path / TRACE).exists()
    before = network().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_pickles_would_run(tmp_path: Path):
    # Otherwise nothing is proved by the absence of their folder.
    pickle.loads(pickle.dumps(makes_folder(tmp_path)))
    assert (tmp_path / TRACE).exists()


def test_there_are_many():
    assert len(REFUSED) >= 40


def no_file(folder: Path) -> Path:
    return folder / "absent.pth"


def directory(folder: Path) -> Path:
    return folder


def link_to_itself(folder: Path) -> Path:
    (folder / "a.pth").symlink_to(folder / "b.pth")
    (folder / "b.pth").symlink_to(folder / "a.pth")
    return folder / "a.pth"


def dangling(folder: Path) -> Path:
    (folder / "a.safetensors").symlink_to(folder / "gone")
    return folder / "a.safetensors"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.pth")
    return folder / "pipe.pth"


@pytest.mark.parametrize("make", [no_file, directory, link_to_itself, dangling, pipe])
def test_no_file(make: Callable[[Path], Path], tmp_path: Path):
    path = make(tmp_path)
    for read in (lambda: load_checkpoint(network(), path), lambda: identify(path)):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            read()


# Odd files that are right.
LOADED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "whole": ("w.pth", as_zip),
    "the old format": ("w.pth", as_old),
    "safetensors": ("w.safetensors", lambda: SAFE),
    "wrappers in wrappers": ("w.pt", lambda: as_zip({"model": {"state_dict": {"params_ema": WEIGHTS}}})),
    "an unknown wrapper": ("w.pt", lambda: as_zip({"weights_of_my_net": WEIGHTS, "epoch": 3})),
    "prefixes": ("w.pth", lambda: as_zip({f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()})),
    "options of a training": (
        "w.pth",
        lambda: as_zip({"model": WEIGHTS, "args": argparse.Namespace(lr=1.0, epochs=300, opt="adamw")}),
    ),
    "an optimizer": ("w.pth", lambda: as_zip({"net": WEIGHTS, "optimizer": {"state": {0: {"step": 7}}}})),
    "a wrapper inside itself": ("w.pth", lambda: as_zip({"params": WEIGHTS, "log": itself()})),
    "stored again without compression": ("w.pth", lambda: repacked(WHOLE)),
    "tensors that share memory": (
        "w.pth",
        lambda: as_zip(
            {k: torch.cat([v.flatten(), v.flatten()])[: v.numel()].view_as(v) for k, v in WEIGHTS.items()}
        ),
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_loaded(case: str, tmp_path: Path):
    name, content = LOADED[case]
    (tmp_path / name).write_bytes(content())
    net = network()
    assert not load_checkpoint(net, tmp_path / name)
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in net.state_dict().items())
    assert identify(tmp_path / name).name == "cfsr_x2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_precisions(dtype: torch.dtype, suffix: str, tmp_path: Path):
    path = tmp_path / f"w.{suffix}"
    rounded = {name: value.to(dtype) for name, value in WEIGHTS.items()}
    path.write_bytes(as_zip(rounded) if suffix == "pth" else save(rounded))
    net = network()
    load_checkpoint(net, path)
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rounded[name].float())
    assert identify(path).arguments == {"embed_dim": 8, "depths": (1,), "fused": True}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_loaded_with_a_warning(number: float, tmp_path: Path):
    broken = {**WEIGHTS, LAYER: torch.full_like(WEIGHTS[LAYER], number)}
    (tmp_path / "w.pth").write_bytes(as_zip(broken))
    net = network()
    with pytest.warns(
        UserWarning, match=r"w.pth holds numbers that are not finite, in 1 weights \(conv_first"
    ):
        load_checkpoint(net, tmp_path / "w.pth")
    assert not net.state_dict()[LAYER].isfinite().any()


@pytest.mark.parametrize("data", [WHOLE, OLD], ids=["zip", "old"])
def test_any_flipped_bit_loads_or_is_refused(data: bytes, tmp_path: Path):
    net, path = network(), tmp_path / "w.pth"
    sentences = []
    for place in torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist():
        path.write_bytes(flipped(data, place))
        try:
            load_checkpoint(net, path)
        except CheckpointError as error:
            sentences.append(str(error))
    assert sentences
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("text", "shown"), [("hello\n", "hello"), ("weights: [1]\n", "weights: [1]"), ("<html>", "<html>")]
)
def test_a_text_is_shown_to_be_one(text: str, shown: str, tmp_path: Path):
    (tmp_path / "w.pth").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(f"(it begins with the text {shown!r})")) as caught:
        identify(tmp_path / "w.pth")
    assert "w.pth is " in str(caught.value)
