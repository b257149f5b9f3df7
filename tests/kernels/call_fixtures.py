"""Published outputs and gradients of functions: fixtures whose `call` says what is to be computed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from visionattn import kernels
from visionattn.kernels import use_backend

_FOLDER = Path(__file__).parents[1] / "parity" / "functions" / "recurrent"
# Lightning attention's decays of four heads.
_SLOPES = [0.25, 0.0625, 0.015625, 0.00390625]
_LOCAL = ("local_linear", "parallax", "gaussian")
_MODULES = ("moh", "sqa", "ss2d")


def fixtures(kind: str) -> list[Path]:
    """The files of recurrent functions (`"scan"`), or those of the others (`"local"`)."""
    files = (path for path in sorted(_FOLDER.glob("*.safetensors")) if not path.stem.startswith(_MODULES))
    is_local = kind == "local"
    return [path for path in files if path.stem.startswith(_LOCAL) == is_local]


def check(path: Path, backend: str, tolerance: float = 1e-5) -> None:
    """Compute the call of a fixture in float64, and hold output and gradients against it."""
    with safe_open(str(path), framework="pt") as file:
        call = json.loads(file.metadata()["parity"])["call"].split(";")[0]
        stored = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
    inputs = {
        name.removeprefix("input."): x.requires_grad_()
        for name, x in stored.items()
        if name.startswith("input.")
    }
    slopes = torch.tensor(_SLOPES, dtype=torch.float64)
    with use_backend(backend):
        out = eval(call, {**vars(kernels), **inputs, "slopes": slopes})
    (name,) = (name.removeprefix("output.") for name in stored if name.startswith("output."))
    wanted = [x for x in inputs if f"grad.{x}" in stored]
    found = torch.autograd.grad((out * stored[f"cotangent.{name}"]).sum(), [inputs[x] for x in wanted])
    pairs = {name: (out, stored[f"output.{name}"])}
    pairs |= {x: (gradient, stored[f"grad.{x}"]) for x, gradient in zip(wanted, found)}
    for what, (ours, theirs) in pairs.items():
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert error < tolerance, f"{path.stem}: {what} differs by {error:.1e}"
