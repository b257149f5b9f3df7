"""Deterministic weights and inputs, so that two implementations of one network can be compared
without shipping a checkpoint.

A *parity fixture* is a safetensors file. Its metadata key ``parity`` holds one JSON object:

    family, variant     the published network, e.g. "hat", "hat_s_x4"
    source              reference repository and commit that produced the outputs
    build               the reference class and its keyword arguments
    params              number of learnable parameters of the reference
    keys                [[name, shape, dtype], ...]: the reference state dict, in its own order
    input               {"name": "input", "shape": [...], "kind": "normal" | "uniform"}
    outputs             {name: {"shape": [...], "stride": s}}: see ``compress``

Its tensors are the reference's (compressed) float32 outputs on the CPU in eval mode.

To check an implementation: build the reference state dict with ``state_dict(meta)``, pass it through
the implementation's own checkpoint conversion, load it strictly, run ``example(meta)`` in eval mode
and compare ``compress(output)`` with the stored tensors.
"""

from __future__ import annotations

import json
import math
import zlib

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FLOATS = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def tensor_for(name: str, shape, dtype: str = "float32") -> torch.Tensor | None:
    """Values of the parameter or buffer ``name``; None for integer and boolean buffers, and for
    ``num_batches_tracked``: those keep whatever the module computes for itself."""
    if dtype not in _FLOATS:
        return None
    shape = tuple(shape)
    x = _rng(name).standard_normal(shape, dtype=np.float32)
    x = np.asarray(x, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        x = 1 + 0.1 * np.abs(x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif len(shape) <= 1:
        x = 1 + 0.1 * x if leaf == "weight" else 0.1 * x
    else:
        x = x / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.ascontiguousarray(x)).to(_FLOATS[dtype]).reshape(shape)


def fill(module: torch.nn.Module) -> None:
    """Fill a *reference* module in place with ``tensor_for`` of its own state-dict names."""
    state = module.state_dict()
    for name, value in state.items():
        new = tensor_for(name, value.shape, str(value.dtype).removeprefix("torch."))
        if new is not None:
            value.copy_(new)


def keys_of(module: torch.nn.Module) -> list:
    return [[n, list(v.shape), str(v.dtype).removeprefix("torch.")] for n, v in module.state_dict().items()]


def state_dict(meta: dict) -> dict[str, torch.Tensor]:
    """The reference checkpoint that ``meta`` describes (integer buffers left out)."""
    pairs = ((n, tensor_for(n, s, d)) for n, s, d in meta["keys"])
    return {n: v for n, v in pairs if v is not None}


def example(meta: dict) -> torch.Tensor:
    spec = meta["input"]
    rng, shape = _rng(spec["name"]), tuple(spec["shape"])
    if spec["kind"] == "uniform":
        x = rng.random(shape, dtype=np.float32)
    else:
        x = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(x)


def compress(x: torch.Tensor, limit: int = 4096) -> torch.Tensor:
    """A strided sample of the flattened tensor with at most ``limit`` values."""
    flat = x.detach().float().reshape(-1)
    return flat[:: stride(flat.numel(), limit)].contiguous()


def stride(numel: int, limit: int = 4096) -> int:
    s = max(1, -(-numel // limit))
    return s + 1 if s > 1 and s % 2 == 0 else s  # odd, so that it walks through every channel


def save(
    path, module, *, family, variant, source, build, input_spec, outputs: dict[str, torch.Tensor]
) -> None:
    meta = {
        "family": family,
        "variant": variant,
        "source": source,
        "build": build,
        "params": sum(p.numel() for p in module.parameters()),
        "keys": keys_of(module),
        "input": input_spec,
        "outputs": {k: {"shape": list(v.shape), "stride": stride(v.numel())} for k, v in outputs.items()},
    }
    save_file({k: compress(v) for k, v in outputs.items()}, str(path), metadata={"parity": json.dumps(meta)})


def load(path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as f:
        return json.loads(f.metadata()["parity"]), {
            k: f.get_tensor(k)
            for k in f.keys()  # noqa: SIM118 (the file is no mapping)
        }


def error(ours: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative error ‖ours − stored‖ / ‖stored‖ of a compressed output; NaN never passes."""
    a, b = compress(ours).double(), stored.double()
    if a.shape != b.shape or not torch.isfinite(a).all():
        return math.inf
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
