"""Checkpoint files for mmengine's loaders, read without running code.

mmengine tries to read a file as weights alone and, where that fails, runs the code in it. Here its loaders
for files and addresses are replaced: what mmengine itself stores beside weights (logged scalars) is known and
allowed, and anything else is refused in one sentence.
"""

# pyright: reportMissingImports=false
# The toolboxes are installed in an environment of their own.
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from visionattn.checkpoints import read_checkpoint


def read_without_code() -> None:
    """Put loaders that never run code in place of mmengine's, for files and http(s) addresses."""
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_file, force=True)
    CheckpointLoader.register_scheme(prefixes=("http://", "https://"), loader=load_from_address, force=True)


def load_from_file(filename: str, map_location: Any = None) -> dict[str, object]:
    """The content of a file on the CPU; it is copied to where the model is when it is loaded."""
    with torch.serialization.safe_globals(_logged_values()):
        return read_checkpoint(filename)


def load_from_address(filename: str, map_location: Any = None) -> dict[str, object]:
    """The content of a file behind an address; the main process downloads it once, the others wait."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(filename).path).name)
    if is_main_process() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(filename, str(file))
    barrier()
    return load_from_file(str(file))


def _logged_values() -> list[Any]:
    """The classes that mmengine's log of scalars is made of."""
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u4", "bool")),
        np._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
        np._core.multiarray.scalar,  # pyright: ignore[reportAttributeAccessIssue]
        (_method_of_history, "builtins.getattr"),
    ]


def _method_of_history(owner: object, name: str) -> Any:
    """The methods that a stored `HistoryBuffer` lists; `getattr` itself would give access to anything."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise pickle.UnpicklingError(f"{name} of {owner} is no part of a checkpoint")
    return getattr(owner, name)
