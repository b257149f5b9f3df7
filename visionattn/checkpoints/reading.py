"""Reading files that strangers made: no code of theirs runs, what is damaged is refused in one sentence."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from visionattn.models.registry.unwrap import unwrap

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"  # as every protocol since the second begins
_BINARY = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl")
# Containers inside containers, beyond which a file is no checkpoint.
_DEEPEST = 32


class CheckpointError(ValueError):
    """A file that cannot be read safely, or weights that belong to no or another network; one sentence."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.safetensors` or PyTorch file on the CPU; never runs code from it.

    PyTorch files are read with `weights_only=True`. Before that their checksums are compared and their sizes
    added up, so that a small file cannot fill the memory; afterwards no tensor may show more numbers than it
    stores.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that is damaged, is no checkpoint, or would have to run code to be read.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a file, as `read_checkpoint` gives it, and the texts beside it, as `read_metadata` does.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: as `read_checkpoint` raises it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        content, texts = _read_safetensors(path)
    else:
        content, texts = _read_pickle(path), {}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    _check_tensors(content, path)
    return dict(content), texts or _texts_in(content) or _texts_beside(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts beside the weights of a file: its own, or those of the `config.json` of timm's folders.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights=False)[1] or _texts_beside(path)
    return read_with_metadata(path)[1]


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is meant as weights, by its name or by how it begins; its content may be broken."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix in _BINARY or start.startswith((_ZIP, _PICKLE)) or start[8:] == b"{"


def unwrap_state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside what training code saves: the first known wrapper, averaged weights first.

    Raises:
        CheckpointError: no weights are found.
    """
    return unwrap_with_path(content)[0]


def unwrap_with_path(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """As `unwrap_state_dict`, and the keys on the way to the weights, joined by dots.

    Raises:
        CheckpointError: no weights are found.
    """
    weights, path = unwrap(content)
    if not weights:
        raise CheckpointError(
            f"the checkpoint holds no weights; its entries are {few(tuple(map(str, content)))}"
        )
    return weights, path


def few(names: tuple[str, ...], limit: int = 4) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return f"{shown}, ... {len(names) - limit} more" if len(names) > limit else shown


def as_texts(content: Mapping[str, Any]) -> dict[str, str]:
    """Values as a safetensors file holds them: texts as they are, others as JSON."""
    return {
        name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in content.items()
    }


def _texts_in(content: Mapping[str, Any]) -> dict[str, str]:
    """The texts that `save_official` keeps where a state dict has the versions of its modules."""
    for _ in range(_DEEPEST):
        stored = getattr(content, "_metadata", None)
        texts = stored.get("", {}) if isinstance(stored, Mapping) else {}
        if isinstance(texts, Mapping) and "architecture" in texts:
            return {str(name): text for name, text in texts.items() if isinstance(text, str)}
        inner = [value for value in content.values() if isinstance(value, Mapping)]
        if len(inner) != 1:
            break
        content = inner[0]
    return {}


def _texts_beside(path: Path) -> dict[str, str]:
    """The configuration that timm writes beside `model.safetensors` and `pytorch_model.bin`."""
    file = path.with_name("config.json")
    if path.stem not in ("model", "pytorch_model") or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return {}
    names = content.pop("label_names", None)
    return as_texts({**content, **({"class_names": names} if isinstance(names, list) else {})})


def _read_safetensors(path: Path, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys()) if weights else []
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # whatever a damaged header makes its reader say
        raise _unreadable(path, error) from error


def _read_pickle(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(32)
    try:
        if start.startswith(_ZIP):
            _check_archive(path)
        # Official files hold the options of their training; what others have made safe stays so.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than weights; reading it could run code, so it is refused"
            f"{_as_text(start)}"
        ) from error
    except Exception as error:  # a damaged stream makes the unpickler fail in any way that Python knows
        raise CheckpointError(f"{_unreadable(path, error)}{_as_text(start)}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives that unpack to more than they hold, or whose content does not fit its checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise CheckpointError(
                f"{path} is no readable checkpoint: it is a compressed archive, which PyTorch does not write"
            )
        if (broken := archive.testzip()) is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of its part {broken} is wrong")


def _check_tensors(content: Mapping[Any, Any], path: Path) -> None:
    """Refuse tensors that are no plain numbers in memory, or show more of them than the file can store."""
    size = path.stat().st_size
    for value in _values(content, path):
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"{path} holds a tensor that is no plain array, but {value.layout} on {value.device}"
            )
        if value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"{path} holds a tensor of shape {tuple(value.shape)}, more than its {size} bytes can store"
            )


def _values(content: object, path: Path) -> Iterator[object]:
    """All values in nested containers, each container once."""
    seen, level = {id(content)}, [content]
    for _ in range(_DEEPEST):
        following: list[object] = []
        for container in level:
            inner = container.values() if isinstance(container, Mapping) else container
            for value in inner:  # pyright: ignore[reportGeneralTypeIssues]
                yield value
                if isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
                    seen.add(id(value))
                    following.append(value)
        if not following:
            return
        level = following
    raise CheckpointError(
        f"{path} is no readable checkpoint: its containers are nested deeper than {_DEEPEST}"
    )


def _as_text(start: bytes) -> str:
    """That a file is a text, if it begins so: a page in place of the download, or a list of files."""
    text = start.decode("ascii", errors="replace").strip()
    printable = all(sign.isprintable() or sign.isspace() for sign in text)
    return f" (it begins with the text {text!r})" if text.isascii() and text and printable else ""


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is no readable checkpoint: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # The whole message of some errors is the number or name that was not found.
    return f"{type(error).__name__} {line}" if isinstance(error, LookupError) else line
