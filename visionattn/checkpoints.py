"""Read, convert, load and save network weights.

Every family's file in `models/` knows how the authors named its parameters (`checkpoint_filter_fn`); here
stands what is common to all: reading without running code, unwrapping, and saying exactly what does not fit.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models._features import FeatureGetterNet
from timm.utils import unwrap_model
from torch import Tensor, nn

# Under which keys training code stores weights; averaged weights are what the authors evaluate.
_WRAPPERS = ("params_ema", "model_ema", "state_dict_ema", "ema", "params", "model", "net", "state_dict")
# Under which names detectors and segmenters hold their backbone: our own, then the authors'.
_BACKBONES = ("backbone.body.model.", "backbone.body.", "backbone.")


@dataclass(frozen=True)
class LoadReport:
    """What did not fit when weights were loaded; all empty after a strict load.

    Attributes:
        missing: parameters and buffers of the model that the checkpoint lacks.
        unexpected: entries of the checkpoint that the model lacks.
        mismatched: entries of another shape, as `name: checkpoint shape, model shape`.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything did not fit."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names)


def load_checkpoint(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, object], strict: bool = True
) -> LoadReport:
    """Load weights into a model of the zoo: the authors' files and our own.

    Wrappers (`params_ema`, `model`, ...) and the prefix `module.` are removed, the family's names converted,
    stored index and mask buffers dropped. A model without a classifier, or made with `features_only=True`,
    takes a full checkpoint: weights of the parts it was built without are left out. The checkpoint of a
    detector or segmenter gives its backbone. `extra_norms`, which only dense backbones have, keep their
    initial values where the checkpoint has none of them.

    Args:
        model: a network from `timm.create_model`; nothing in it changes unless the load succeeds.
        source: a `.safetensors` or PyTorch file, or a state dict.
        strict: refuse a checkpoint with anything missing, unexpected or of another shape. If False, what
            fits is loaded.

    Returns:
        What did not fit; empty when strict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged or would have to run code to be read, or weights that do not fit.
    """
    network = unwrap_model(model)
    features_only = isinstance(network, FeatureGetterNet)
    network = network.model if features_only else network
    weights = unwrap_state_dict(source if isinstance(source, Mapping) else read_checkpoint(source))
    weights = weights if hasattr(network, "backbone") else _backbone_of(weights)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    weights = convert(weights, network) if convert else weights

    own = network.state_dict()
    weights = {
        name: value
        for name, value in weights.items()
        if name in own or not (_is_index(name, value) or _is_left_out(network, name, features_only))
    }
    mismatched = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    has_extra_norms = any(name.startswith("extra_norms.") for name in weights)
    missing = (name for name in own if name not in weights and not name.endswith("num_batches_tracked"))
    report = LoadReport(
        missing=tuple(name for name in missing if has_extra_norms or not name.startswith("extra_norms.")),
        unexpected=tuple(n for n in weights if n not in own),
        mismatched=tuple(
            f"{n}: {tuple(weights[n].shape)}, {tuple(own[n].shape)}" for n in own if n in mismatched
        ),
    )
    if report and strict:
        where = "the state dict" if isinstance(source, Mapping) else f"{os.fspath(source)}"
        raise ValueError(f"{where} does not fit {type(network).__name__}: {report}")
    fitting = {name: value for name, value in weights.items() if name in own and name not in mismatched}
    network.load_state_dict(fitting, strict=False)
    return report


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, object]:
    """The content of a `.safetensors` or PyTorch file on the CPU; never runs code from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, is no checkpoint, or would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than weights; reading it could run code, so it is refused"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return dict(content)


def unwrap_state_dict(content: Mapping[str, object]) -> dict[str, Tensor]:
    """The weights inside what training code saves: the first known wrapper, averaged weights first.

    Raises:
        ValueError: no weights are found.
    """
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]  # pyright: ignore[reportAssignmentType]
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"the checkpoint holds no weights; its entries are {_few(tuple(map(str, content)))}")
    while all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def save_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a model's weights as safetensors; an existing file is replaced only by a whole one.

    Args:
        model: its state dict is saved, without the wrappers of compilation or distribution.
        path: where to.
        metadata: short texts to keep with the weights.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    state = unwrap_model(model).state_dict()
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    try:
        # Not save_file, whose files only their owner can read.
        beside.write_bytes(save(weights, {"format": "pt", **(metadata or {})}))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _backbone_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of the weights of a detector or segmenter; other weights unchanged."""
    prefix = next((prefix for prefix in _BACKBONES if any(name.startswith(prefix) for name in weights)), "")
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _is_index(name: str, value: Tensor) -> bool:
    """Whether an entry is a stored index or mask, which is a function of sizes and no weight."""
    return not value.is_floating_point() or name.rsplit(".", 1)[-1] == "attn_mask"


def _is_left_out(network: nn.Module, name: str, features_only: bool) -> bool:
    """Whether a parameter belongs to a part replaced by an identity, or to a stage that was cut off."""
    module = network
    for part in name.split(".")[:-1]:
        child = dict(module.named_children()).get(part)
        if child is None:
            cut_off = isinstance(module, (nn.Sequential, nn.ModuleList)) and part.isdigit()
            return isinstance(module, nn.Identity) or (cut_off and features_only)
        module = child
    return isinstance(module, nn.Identity)


def _few(names: tuple[str, ...], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, ... {len(names) - limit} more" if len(names) > limit else shown
