from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

import visionattn.integrations.openmmlab  # noqa: F401  (puts the loaders in place)


class Ran(Exception):
    """What the code in a malicious file would raise."""


def run() -> None:
    raise Ran


class Malicious:
    def __reduce__(self) -> tuple:
        return run, ()


class Reaching:
    def __reduce__(self) -> tuple:
        return getattr, (HistoryBuffer, "__init__")


def test_what_mmengine_stores_is_read(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("a run")
    hub.update_scalar("train/loss", np.float64(3.0))
    hub.update_scalar("train/lr", torch.tensor(2.0))
    hub.update_info("iter", 3)
    weights = {"layer.weight": torch.randn(2, 3)}
    file = tmp_path / "iter_3.pth"
    torch.save({"state_dict": weights, "message_hub": hub.state_dict(), "meta": {"iter": 3}}, file)
    content = CheckpointLoader.load_checkpoint(str(file))
    assert torch.equal(content["state_dict"]["layer.weight"], weights["layer.weight"])
    assert content["message_hub"]["log_scalars"]["train/loss"].current() == 3.0
    assert content["meta"] == {"iter": 3}


def test_safetensors_are_read(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    save_file({"layer.weight": weight}, tmp_path / "w.safetensors")
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "w.safetensors"))
    assert torch.equal(content["layer.weight"], weight)


@pytest.mark.parametrize("content", [Malicious(), Reaching()])
def test_no_code_runs(tmp_path: Path, content: object) -> None:
    file = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "meta": content}, file)
    with pytest.raises(ValueError, match="reading it could run code"):
        CheckpointLoader.load_checkpoint(str(file))


def test_addresses_are_read_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def download(address: str, file: str) -> None:
        served.append(address)
        torch.save({"state_dict": {}, "meta": Malicious()}, file)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        with pytest.raises(ValueError, match="reading it could run code"):
            CheckpointLoader.load_checkpoint("https://example.org/files/net.pth?download=1")
    assert served == ["https://example.org/files/net.pth?download=1"]
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["net.pth"]
