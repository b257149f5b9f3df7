"""The configuration of a run: YAML files with `_base_` and overrides, validated by pydantic models.

`RunConfig` holds what every task has; a task subclasses it with a literal `task` and its own sections. All
options are documented by their `Field`, so that `describe_options` can list them.
"""

from __future__ import annotations

import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from visionattn.engine.yaml_io import dump_value, parse_value, read_yaml
from visionattn.errors import InputError, join_words, nearest


class Section(pydantic.BaseModel):
    """A group of options; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    def refuse_changed(self, names: Sequence[str], reason: str) -> None:
        """Refuse options that have no effect beside others, and would be passed over without a word.

        Args:
            names: of options.
            reason: why they have none, as the end of a sentence.

        Raises:
            ValueError: one of them is not as it is by default.
        """
        fields = type(self).model_fields
        changed = [name for name in names if getattr(self, name) != fields[name].get_default()]
        if changed:
            raise ValueError(f"{join_words(changed, 'and')} would be ignored: {reason}")


def _no_name_twice(names: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the name {twice[0]!r} is given twice")
    return names


UniqueNames = Annotated[list[str], Field(min_length=1), AfterValidator(_no_name_twice)]


class ModelConfig(Section):
    """The network."""

    name: str = Field(description="registered name; tools/zoo.py lists them, and timm's own work too")
    kwargs: dict[str, Any] = Field(
        default={}, description="keyword arguments of the network, passed on as they are"
    )
    checkpoint: str | None = Field(
        default=None, description="weights to start from: a .safetensors or .pth file"
    )
    pretrained: bool = Field(default=False, description="start from the published weights (downloads them)")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint are both given: choose one source of weights")
        return self


class OptimizerConfig(Section):
    """The optimizer, made by timm's `create_optimizer_v2`."""

    name: str = Field(
        default="adamw", description="any optimizer of timm, for instance adamw, sgd, lamb, muon"
    )
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate, for the whole batch of one update")
    weight_decay: float = Field(default=0.05, ge=0, description="weight decay; biases and norms are left out")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of optimizers that have one")
    betas: tuple[float, float] | None = Field(default=None, description="Adam's betas; null: its own")
    eps: float | None = Field(default=None, gt=0, description="the optimizer's epsilon; null: its own")
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="learning rate factor per layer, from the top"
    )
    kwargs: dict[str, Any] = Field(default={}, description="further keyword arguments of the optimizer")


class ScheduleConfig(Section):
    """Length of the run and learning rate over it; the unit (epochs or steps) is that of the length."""

    epochs: int | None = Field(default=None, gt=0, description="length in epochs; give either this or steps")
    steps: int | None = Field(default=None, gt=0, description="length in updates; give either this or epochs")
    name: Literal["cosine", "step", "multistep", "poly", "tanh", "constant", "points"] = Field(
        default="cosine", description="shape of the learning rate after warm-up"
    )
    warmup: float = Field(default=0, ge=0, description="linear warm-up, part of the length")
    warmup_lr: float = Field(default=1e-6, ge=0, description="learning rate at the start of warm-up")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end (cosine, poly, tanh)")
    cooldown: int = Field(default=0, ge=0, description="extra length at min_lr (cosine, poly, tanh)")
    decay_every: float | None = Field(default=None, gt=0, description="distance of the decays (step)")
    milestones: list[float] = Field(default=[], description="places of the decays (multistep)")
    points: list[tuple[float, float]] = Field(
        default=[],
        description="[place, factor of lr], joined by straight lines; two at one place are a step (points)",
    )
    period: float | None = Field(default=None, gt=0, description="length after which points begin again")
    decay_rate: float = Field(
        default=0.1, gt=0, description="factor of one decay (step, multistep); power (poly)"
    )

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            given = "neither is" if self.epochs is None else "both are"
            raise ValueError(f"give exactly one of epochs and steps ({given} given; null unsets one)")
        if self.name == "step" and self.decay_every is None:
            raise ValueError("a step schedule needs decay_every")
        if self.name == "multistep" and not self.milestones:
            raise ValueError("a multistep schedule needs milestones")
        places = [place for place, _ in self.points]
        if self.name == "points" and (places != sorted(places) or places[:1] != [0]):
            raise ValueError("a points schedule needs points in the order of their places, the first at 0")
        if self.name == "points" and self.warmup:
            raise ValueError("a points schedule has no warmup: begin with a low point")
        if self.warmup >= self.length:
            raise ValueError(f"warmup ({self.warmup:g}) must be shorter than the run ({self.length})")
        if self.cooldown and self.name not in ("cosine", "poly", "tanh"):
            raise ValueError(f"a {self.name} schedule has no cooldown")
        return self

    @property
    def length(self) -> int:
        """Epochs or steps without cool-down."""
        return typing.cast(int, self.steps if self.epochs is None else self.epochs)


class EmaConfig(Section):
    """An exponential moving average of the weights; where there is one, it is what is judged and kept."""

    decay: float | None = Field(default=None, ge=0, lt=1, description="decay per update; null: no average")
    warmup: bool = Field(default=False, description="let the decay grow from 0 at the start, for short runs")


class TrainConfig(Section):
    """The loop."""

    batch_size: int = Field(default=32, gt=0, description="samples per process and forward pass")
    eval_batch_size: int | None = Field(
        default=None, gt=0, description="the same in evaluation; null: batch_size"
    )
    accumulate: int = Field(default=1, gt=0, description="forward passes per update")
    clip_grad: float | None = Field(
        default=None, gt=0, description="largest gradient norm; null: no clipping"
    )
    amp: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="mixed precision; bf16 works on the CPU too"
    )
    nan: Literal["stop", "skip"] = Field(
        default="stop", description="on a loss or gradient that is not finite"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of weights, data order, augmentation, dropout"
    )
    workers: int = Field(default=2, ge=0, description="data loading processes per process")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="each of several processes holds all weights (ddp), or its share of them (fsdp)",
    )
    timeout: float = Field(
        default=1800, gt=0, description="seconds after which a process that hears nothing of the others ends"
    )
    eval_every: int | None = Field(
        default=1, gt=0, description="evaluation, in the schedule's unit; null: at the end"
    )
    save_every: int | None = Field(
        default=None, gt=0, description="checkpoint, in steps; every evaluation also saves"
    )
    log_every: int = Field(default=50, gt=0, description="log line, in steps")
    compile: bool = Field(default=False, description="torch.compile the network")


class RunConfig(Section):
    """A run; a task adds its own sections."""

    task: str = Field(description="what is trained")
    model: ModelConfig = Field(description="the network")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="the optimizer")
    schedule: ScheduleConfig = Field(description="length and learning rate")
    ema: EmaConfig = Field(default_factory=EmaConfig, description="average of the weights")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the loop")
    output: str | None = Field(default=None, description="run folder; null: runs/ and the name of the config")
    resume: str | None = Field(
        default=None,
        description="auto: continue what output holds, if anything; or a run folder to continue",
    )

    @property
    def run_folder(self) -> Path:
        """The folder that holds everything the run writes."""
        return Path(self.output or "runs/unnamed")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file (or the one of a run folder), its bases, and `key=value` overrides.

    Args:
        path: a YAML file, or a run folder. Its `_base_` (a path or a list, relative to the file) is read
            first; mappings are merged key by key, everything else is replaced.
        overrides: for instance ``["train.batch_size=8", "optimizer.lr=1e-3"]``; values are YAML.

    Raises:
        InputError: a file or its YAML cannot be read, or an override has no `=`.
    """
    path = Path(path)
    path = path / "config.yaml" if path.is_dir() else path
    config = override_config(_read_with_bases(path, ()), overrides)
    if odd := [key for key in config if not isinstance(key, str)]:
        raise InputError(f"{path}: {odd[0]!r} is no name of an option or section")
    if config.get("output") is None:
        config["output"] = f"runs/{path.parent.name if path.name == 'config.yaml' else path.stem}"
    return config


def override_config(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """An unvalidated configuration with `key=value` overrides, as `read_config` takes them."""
    for override in overrides:
        config = merge_sections(config, _parse_override(override))
    return dict(config)


def parse_config(config: Mapping[str, Any], config_class: type[RunConfig]) -> RunConfig:
    """Validate `config`.

    Raises:
        InputError: one sentence on all that is wrong, with the nearest valid names of unknown keys.
    """
    try:
        return config_class.model_validate(config)
    except pydantic.ValidationError as error:
        sentences = [_explain(e, config_class) for e in error.errors(include_url=False)]
        raise InputError("; ".join(sentences)) from error


def check_kinds(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values of another kind than the defaults of the same names: text for numbers, and so on.

    Args:
        where: the section of the options, for the sentence.
        given: free options of a configuration; names without a default, or with null, pass.
        defaults: values of the right kinds.

    Raises:
        InputError: a value whose numbers, texts or truth values are not those of the default.
    """
    for name, value in given.items():
        wanted = _kinds(defaults.get(name))
        if value is None or not wanted or _kinds(value) <= wanted:
            continue
        allowed = join_words(sorted(wanted), "or")
        example = dump_value(_plain(defaults[name]))
        raise InputError(f"{where}.{name} is made of {allowed}, as {example}, but {value!r} was given")


def _kinds(value: Any) -> set[str]:
    """What a value is made of, in words."""
    if isinstance(value, (list, tuple)):
        return set().union(*map(_kinds, value)) - {"null"}
    if isinstance(value, Mapping):
        return {"a mapping"}
    # A truth value is a number too, for Python alone.
    kinds = (bool, "true and false"), ((int, float), "numbers"), (str, "text")
    return {next((words for kind, words in kinds if isinstance(value, kind)), "null")} - {"null"}


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def describe_options(config_class: type[RunConfig]) -> str:
    """Every option with type, default and description, one per line."""
    rows = []
    for name, field in _leaves(config_class):
        default = "required" if field.is_required() else dump_value(field.default)
        rows.append((name, _format_type(field.annotation), default, field.description or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]) for row in rows)


def _read_with_bases(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve() if parents else path
    if path.resolve() in parents:
        raise InputError(f"{path} includes itself through _base_")
    config = read_yaml(path)
    bases = config.pop("_base_", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise InputError(f"{path}: _base_ must be a path or a list of paths, but is {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge_sections(merged, _read_with_bases(path.parent / base, (*parents, path.resolve())))
    return merge_sections(merged, config)


def merge_sections(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key, section by section; everything else of `top` replaces that of `base`."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_sections(merged[key], value) if both else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise InputError(f"an override reads key=value or section.key=value, but {text!r} was given")
    nested: Any = parse_value(value, where=text)
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _explain(error: Mapping[str, Any], config_class: type[RunConfig]) -> str:
    location = [str(part) for part in error["loc"]]
    name = ".".join(location) or "the configuration"
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}: {_nearest_key(location, config_class)}"
    if error["type"] == "missing":
        return f"{name} is missing from the configuration"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if error["type"] in ("model_type", "model_attributes_type"):
        section = _section_at(location, config_class)
        keys = f" with keys such as {join_words(list(section.model_fields)[:3], 'and')}" if section else ""
        return f"{name} must be a section{keys}, but {error['input']!r} was given"
    allowed = error["msg"].removeprefix("Input ")
    return f"{name} {allowed}, but {error['input']!r} was given"


def _nearest_key(location: Sequence[str], config_class: type[RunConfig]) -> str:
    *parents, key = location
    section = _section_at(parents, config_class)
    siblings = list(section.model_fields) if section else []
    elsewhere = [path for path, _ in _leaves(config_class) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {join_words(elsewhere, 'or')}?"
    return nearest(".".join(location), [".".join([*parents, sibling]) for sibling in siblings])


def _section_at(location: Sequence[str], config_class: type[Section]) -> type[Section] | None:
    section: type[Section] | None = config_class
    for part in location:
        field = section.model_fields.get(part) if section else None
        section = _section_of(field.annotation) if field else None
    return section


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as `Data` or `Data | None`."""
    for candidate in typing.get_args(annotation) or (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _format_type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _format_type(arguments[0])
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join(map(_format_type, arguments))
    return str(annotation).replace("typing.", "") if arguments else annotation.__name__
