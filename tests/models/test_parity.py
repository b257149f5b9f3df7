"""Every fixture of the published networks: same parameters, same outputs, whichever implementation runs.

A new family adds a folder to `tests/parity`. A fixture whose variant is no registered name, or that needs
arguments, is listed in the `arguments.json` of its folder: keyword arguments of `timm.create_model`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import parity
import pytest
import timm
import torch
from _pytest.mark.structures import ParameterSet
from safetensors import safe_open
from torch import Tensor, nn

import visionattn

TOLERANCE = 1e-5


def fixtures() -> list[Path]:
    """Files with the outputs of a network; others in the tree hold the outputs of metrics."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "parity").glob("*/*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            if "parity" in file.metadata():
                found.append(path)
    return found


@lru_cache(maxsize=1)
def build(path: Path) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The network with the fixture's weights, the stored outputs and the input."""
    meta, stored = parity.load(path)
    table = path.with_name("arguments.json")
    arguments = json.loads(table.read_text()) if table.exists() else {}
    net = timm.create_model(**arguments.get(path.stem, {"model_name": meta["variant"]}))
    assert sum(p.numel() for p in net.parameters()) == meta["params"]
    report = visionattn.load_checkpoint(net, parity.state_dict(meta), strict=True)
    assert not report
    return net.eval(), stored, parity.example(meta)


def outputs(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the network gives, under the names that fixtures use."""
    if hasattr(net, "forward_all"):
        return net.forward_all(image)._asdict()
    out = net(image)
    if isinstance(out, list):  # features_only
        return {f"feature{i}": feature for i, feature in enumerate(out)}
    if hasattr(net, "info"):
        return {"image": out}
    # Of a network of tokens, fixtures hold the last map after the final norm.
    last = {"indices": 1, "norm": True} if hasattr(net, "num_prefix_tokens") else {}
    features = net.forward_intermediates(image, **last, intermediates_only=True)
    return {"logits": out, **{f"feature{i}": feature for i, feature in enumerate(features)}}


def test_there_are_fixtures():
    assert len(fixtures()) >= 5


def cases() -> list[ParameterSet]:
    return [
        # Dense attention over all pixels of an image takes minutes and gigabytes.
        pytest.param(
            path,
            backend,
            marks=[pytest.mark.slow] if backend == "reference" and "image" in parity.load(path)[1] else [],
            id=f"{path.stem}-{backend}",
        )
        for path in fixtures()
        for backend in ("reference", "torch")
    ]


@pytest.mark.parametrize(("path", "backend"), cases())
def test_parity(path: Path, backend: str):
    net, stored, image = build(path)
    with torch.inference_mode(), visionattn.kernels.use_backend(backend):
        ours = outputs(net, image)
    errors = {name: parity.error(ours[name], expected) for name, expected in stored.items()}
    assert all(error <= TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("path", fixtures(), ids=lambda path: path.stem)
def test_parity_while_gradients_are_recorded(path: Path):
    # The implementations take another way then.
    net, stored, image = build(path)
    ours = outputs(net, image)
    errors = {name: parity.error(ours[name], expected) for name, expected in stored.items()}
    assert all(error <= TOLERANCE for error in errors.values()), errors
