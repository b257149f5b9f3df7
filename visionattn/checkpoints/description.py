"""What stands beside weights in a file: their network, how images become its input, names of its classes.

A description is a few short texts, as a safetensors file can hold them: `architecture` and `model_args` are
what `timm.create_model` takes, `pretrained_cfg` is timm's configuration, `input_size`, `mean`, `std` and
`class_names` repeat of it what every reader asks for, `made_by` says which library wrote the file. All but
the names are JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import pydantic
from timm.utils import unwrap_model
from torch import nn

from visionattn._compat import inside_feature_getter, recorded_arguments
from visionattn.checkpoints.reading import CheckpointError
from visionattn.models.registry.variants import known_entries

# Of timm's configuration, what is true of the published weights alone.
_OF_OTHER_WEIGHTS = (
    *("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load", "tag"),
    *("notes", "label_offset", "test_input_size", "test_crop_pct"),
)
# What `timm.create_model` takes beside the arguments of a network.
_NO_ARGUMENTS = ("device", "dtype", "cache_dir", "checkpoint_path", "scriptable", "exportable", "no_jit")
# No number in a network's arguments is larger, unless one of its weights is.
_LARGEST = 4096


class Preprocessing(pydantic.BaseModel):
    """How images become the input of a network, and what its classes are called; in timm's words."""

    input_size: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt] | None = None
    mean: tuple[pydantic.FiniteFloat, ...] | None = None
    std: tuple[pydantic.FiniteFloat, ...] | None = None
    interpolation: str | None = None
    crop_pct: pydantic.PositiveFloat | None = None
    crop_mode: str | None = None
    label_names: list[str] | None = None


class Description(NamedTuple):
    """A network in the words of the file that holds its weights.

    Attributes:
        architecture: its registered name; "" where the file does not say.
        arguments: of `timm.create_model` beside the name.
        preprocessing: of its images.
    """

    architecture: str = ""
    arguments: Mapping[str, Any] = {}
    preprocessing: Preprocessing = Preprocessing()


def describe(network: nn.Module, arguments: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The description of a network that timm made, as it is now; of others only who writes it.

    Args:
        network: also compiled, distributed, or made with `features_only=True`.
        arguments: further ones of `timm.create_model` beside those that it was made with.
    """
    made_by = {"made_by": f"visionattn {version('visionattn')}"}
    network, _ = inside_feature_getter(outer := unwrap_model(network))
    cfg: dict[str, Any] = dict(getattr(network, "pretrained_cfg", None) or {})
    if not cfg.get("architecture"):
        return made_by
    # What JSON cannot hold, as a type of layers, is left out; nothing that a configuration says is such.
    made = {**recorded_arguments(network), **recorded_arguments(outer), **(arguments or {})}
    made = {name: value for name, value in made.items() if _is_argument(name) and _is_plain(value)}
    made |= {} if "features_only" in made else _changed(network, cfg, made)
    kept = {
        name: value
        for name, value in cfg.items()
        if name not in _OF_OTHER_WEIGHTS and value is not None and _is_plain(value)
    }
    kept["num_classes"] = getattr(network, "num_classes", kept.get("num_classes", 0))
    channels, *size = cfg.get("input_size") or (3, 224, 224)
    kept["input_size"] = (made.get("in_chans", channels), *size)
    if len(kept.get("label_names", ())) != kept["num_classes"]:
        kept.pop("label_names", None)
    texts = {
        "model_args": made,
        "num_classes": kept["num_classes"],
        "pretrained_cfg": kept,
        **{name: kept[name] for name in ("input_size", "mean", "std") if name in kept},
    }
    if "label_names" in kept:
        texts["class_names"] = kept["label_names"]
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()}
    return {"architecture": cfg["architecture"], **written, **made_by}


def parse_description(texts: Mapping[str, str]) -> Description:
    """The description that a file brings.

    Raises:
        CheckpointError: a part of it is not what it must be.
    """
    arguments = _parse_object(texts, "model_args")
    stated = _parse_object(texts, "pretrained_cfg")
    if not isinstance(stated.get("label_names"), list):
        stated.pop("label_names", None)  # timm's own may be numbered, with gaps
    for name, key in (
        ("input_size", "input_size"),
        ("mean", "mean"),
        ("std", "std"),
        ("class_names", "label_names"),
    ):
        if name in texts:
            stated[key] = _parse(texts, name)
    try:
        preprocessing = Preprocessing.model_validate(stated)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"the {where} in the metadata cannot be used: {first['msg']}") from error
    return Description(
        texts.get("architecture", ""),
        {name: _as_tuples(value) for name, value in arguments.items() if _is_argument(name)},
        preprocessing,
    )


def prepare(network: nn.Module, preprocessing: Preprocessing) -> None:
    """Let a network state how its images are prepared and what its classes are called."""
    stated = preprocessing.model_dump(exclude_none=True)
    inner, _ = inside_feature_getter(network)
    for holder in {id(n): n for n in (network, inner)}.values():
        if isinstance(getattr(holder, "pretrained_cfg", None), dict) and stated:
            holder.pretrained_cfg = {**holder.pretrained_cfg, **stated}  # pyright: ignore


def believable(value: object, largest: int) -> bool:
    """Whether the numbers in a stranger's arguments could be those of a network with such weights."""
    if isinstance(value, Mapping):
        return all(believable(inner, largest) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return len(value) <= _LARGEST and all(believable(inner, largest) for inner in value)
    return not isinstance(value, (int, float)) or (
        math.isfinite(value) and abs(value) <= max(largest, _LARGEST)
    )


def _is_argument(name: str) -> bool:
    return name not in _NO_ARGUMENTS and not name.startswith("pretrained")


def _is_plain(value: object) -> bool:
    """Whether JSON holds a value, and gives it back but for tuples."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    )


def _changed(network: Any, cfg: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are other ones since the classifier was replaced (`reset_classifier`)."""
    entry = known_entries().get(cfg["architecture"])
    usual = entry.arguments if entry else {}
    pool = getattr(network, "global_pool", None) or getattr(
        getattr(network, "head", None), "global_pool", None
    )
    now = {
        "num_classes": getattr(network, "num_classes", None),
        "global_pool": getattr(pool, "pool_type", pool),
    }
    before = {"num_classes": cfg.get("num_classes"), **usual, **made}
    return {
        name: value
        for name, value in now.items()
        if isinstance(value, (int, str)) and name in before and value != before[name]
    }


def _parse(texts: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(texts[name])
    except ValueError as error:
        raise CheckpointError(f"the {name} in the metadata are no JSON: {error}") from error


def _parse_object(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    value = _parse(texts, name) if name in texts else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"the {name} in the metadata are no JSON object")
    return value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
