"""Load weights into networks, saying exactly what does not fit, and save them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from safetensors.torch import save
from timm.utils import unwrap_model
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter
from visionattn.checkpoints.description import describe
from visionattn.checkpoints.reading import CheckpointError, few, read_checkpoint, unwrap_state_dict
from visionattn.files import replacing
from visionattn.models.registry.variants import Layout, layout_of

# Under which names detectors and segmenters hold their backbone: our own, then the authors'.
_BACKBONES = ("backbone.body.model.", "backbone.body.", "backbone.")


@dataclass(frozen=True)
class LoadReport:
    """The misfits of a load; all empty after a strict one.

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
        return "; ".join(f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names)


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
        CheckpointError: a file that is damaged or would have to run code to be read, or weights that do not
            fit.
    """
    network, features_only = inside_feature_getter(unwrap_model(model))
    weights = unwrap_state_dict(source if isinstance(source, Mapping) else read_checkpoint(source))
    weights = convert(weights if hasattr(network, "backbone") else backbone_of(weights), network)
    report = compare(network, weights, features_only)
    where = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    if report and strict:
        raise CheckpointError(f"{where} does not fit {type(network).__name__}: {report}")
    warn_of_numbers(weights, where)
    mismatched = {entry.partition(": ")[0] for entry in report.mismatched}
    own = network.state_dict()
    network.load_state_dict(
        {n: v for n, v in weights.items() if n in own and n not in mismatched}, strict=False
    )
    return report


def convert(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights in the layout and for the sizes of a network, if it is one of the zoo.

    Raises:
        CheckpointError: weights that the family's conversion cannot take.
    """
    layout = layout_of(network)
    return fit(layout, to_ours(layout, weights), network) if layout else dict(weights)


def to_ours(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in our names and shapes.

    Raises:
        CheckpointError: weights that the family's conversion cannot take.
    """
    with _converting(layout):
        return layout.to_ours(weights)


def fit(layout: Layout, weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights in our layout for the sizes of a network.

    Raises:
        CheckpointError: weights that cannot be brought to them.
    """
    with _converting(layout):
        return layout.fit(weights, network)


@contextmanager
def _converting(layout: Layout) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        # Conversions join and reshape parameters that every checkpoint of the family has.
        name, reason = layout.model_cls.__name__, str(error).split("\n")[0] or repr(error)
        raise CheckpointError(f"the weights do not fit {name}: converting them failed ({reason})") from error


def compare(network: nn.Module, weights: Mapping[str, Tensor], features_only: bool = False) -> LoadReport:
    """Find the converted weights that do not fit a network, stored indices and parts that it lacks aside."""
    own = network.state_dict()
    kept = {
        name: value
        for name, value in weights.items()
        if name in own or not (_is_index(name, value) or _is_left_out(network, name, features_only))
    }
    has_extra_norms = any(name.startswith("extra_norms.") for name in kept)
    missing = (name for name in own if name not in kept and not name.endswith("num_batches_tracked"))
    return LoadReport(
        missing=tuple(name for name in missing if has_extra_norms or not name.startswith("extra_norms.")),
        unexpected=tuple(n for n in kept if n not in own),
        mismatched=tuple(
            f"{n}: {tuple(kept[n].shape)}, {tuple(own[n].shape)}"
            for n in own
            if n in kept and own[n].shape != kept[n].shape
        ),
    )


def warn_of_numbers(weights: Mapping[str, Tensor], where: str) -> None:
    """Warn of weights that are infinite or not a number: a broken training, or a damaged file."""
    broken = tuple(n for n, v in weights.items() if v.is_floating_point() and not v.isfinite().all())
    if broken:
        warnings.warn(
            f"{where} holds numbers that are not finite, in {len(broken)} weights ({few(broken)})",
            stacklevel=3,
        )


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's weights as safetensors; an existing file is replaced only by a whole one.

    Beside the weights stands what `identify` and the tools need of the network (`description.py`).

    Args:
        model: its state dict is saved, without the wrappers of compilation or distribution.
        path: where to.
        metadata: short texts to keep with the weights; they win over those of the description.
        weights: what to save in place of the state dict, for a model whose weights are sharded.
    """
    state = unwrap_model(model).state_dict() if weights is None else weights
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    cloned = {n: v.detach().cpu().contiguous().clone() for n, v in state.items()}
    write_weights(cloned, path, {**describe(model), **(metadata or {})})


def write_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that share no memory as safetensors; an existing file is replaced only by a whole one."""
    with replacing(path) as beside:
        # Not save_file, whose files only their owner can read.
        beside.write_bytes(save(dict(weights), {"format": "pt", **(metadata or {})}))


def backbone_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
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
