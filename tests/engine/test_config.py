"""Configuration files, overrides, and the sentences that wrong ones are answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from visionattn.engine.config import RunConfig, describe_options, parse_config, read_config
from visionattn.engine.yaml_io import dump_yaml
from visionattn.errors import InputError
from visionattn.tasks import TASKS, config_class, load_config

BASE = """
task: classification
model: {name: test_vit}
data: {source: digits}
optimizer: {lr: 1e-3}
schedule: {epochs: 3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_defaults_and_overrides(base: Path) -> None:
    config = load_config(
        base, ["train.batch_size=8", "model.kwargs.depths=[1, 2]", "train.amp=no", "ema.decay=.9"]
    )
    assert config.train.batch_size == 8
    assert config.model.kwargs == {"depths": [1, 2]}
    assert config.optimizer.lr == 0.001
    assert config.train.amp == "no"
    assert config.ema.decay == 0.9
    assert config.run_folder == Path("runs/base")


def test_no_two_configurations_share_a_run_folder() -> None:
    names = [path.stem for path in (Path(__file__).parents[2] / "configs").glob("*/*.yaml")]
    assert len(names) > 50
    assert sorted(names) == sorted(set(names))


def test_bases_merge_deeply_and_in_order(base: Path, tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text("model: {kwargs: {a: 1, b: 1}}\ntrain: {seed: 1}\n")
    inner = tmp_path / "inner"
    inner.mkdir()
    top = inner / "top.yaml"
    top.write_text("_base_: [../base.yaml, ../second.yaml]\nmodel: {kwargs: {b: 2}}\ntrain: {workers: 0}\n")
    config = load_config(top)
    assert config.model.name == "test_vit"
    assert config.model.kwargs == {"a": 1, "b": 2}
    assert (config.train.seed, config.train.workers) == (1, 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-2.5e+1", -25.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("3", 3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("1e-3x", "1e-3x"),
        ("[1, 2e2]", [1, 200.0]),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_yaml_scalars(base: Path, text: str, value: object) -> None:
    assert read_config(base, [f"x={text}"])["x"] == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.batchsize=3", "unknown key train.batchsize: did you mean train.batch_size"),
        ("trian.seed=3", "unknown key trian: did you mean train"),
        ("lr=1e-3", "unknown key lr: did you mean optimizer.lr?"),
        ("data.sorce=digits", "unknown key data.sorce: did you mean data.source"),
        ("zzz=1", "unknown key zzz: valid are augment, data, ema"),
        ("train.batch_size=many", "train.batch_size should be a valid integer"),
        ("train.batch_size=0", "should be greater than 0, but 0 was given"),
        ("train.amp=bf8", "train.amp should be 'no', 'bf16' or 'fp16', but 'bf8' was given"),
        ("train=3", "train must be a section with keys such as batch_size"),
        ("model.name=null", "model.name should be a valid string, but None was given"),
        ("optimizer.lr=.nan", "optimizer.lr should be a finite number"),
        ("schedule.steps=10", "give exactly one of epochs and steps (both are given"),
        ("schedule.epochs=null", "give exactly one of epochs and steps (neither is given"),
        ("schedule.warmup=3", "warmup (3) must be shorter than the run (3)"),
        ("schedule.name=step", "a step schedule needs decay_every"),
        ("schedule.name=multistep", "a multistep schedule needs milestones"),
        ("schedule.name=points", "a points schedule needs points"),
        ("task=clasification", "unknown task 'clasification': did you mean classification?"),
        ("task=null", "the configuration names no task"),
        ("task=[classification]", "unknown task ['classification']"),
        ("train.seed", "an override reads key=value"),
        ("train..seed=1", "an override reads key=value"),
        ("train.seed=[1", "cannot read train.seed=[1 as YAML"),
        ("data.class_names={a: 1, a: 2}", "key 'a' is given twice"),
    ],
)
def test_wrong_options_get_one_sentence(base: Path, override: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(base, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "must hold `key: value` lines, but holds a list"),
        ("a: [1\n", "as YAML"),
        ("a: 1\na: 2\n", "key 'a' is given twice"),
        ("_base_: 5\n", "_base_ must be a path or a list of paths, but is 5"),
        ("_base_: [5]\n", "_base_ must be a path or a list of paths"),
        ("5: a\n", "5 is no name of an option"),
        ("a: !!float x\n", "as YAML"),
        ("a: !!timestamp x\n", "as YAML"),
        ("a: " + "[" * 3000, "as YAML"),
        ("a: " + "9" * 5000, "as YAML"),
        ("_base_: own.yaml\n", "includes itself"),
        ("_base_: missing.yaml\n", "there is no configuration file"),
    ],
)
def test_wrong_files_get_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_config(path)


def test_several_errors_stand_in_one_sentence(base: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(base, ["train.sed=1", "optimizer.lr=-1"])
    both = str(caught.value).split("; ")
    assert any("unknown key train.sed" in part for part in both)
    assert any("optimizer.lr should be greater than 0" in part for part in both)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_option_is_described(task: str) -> None:
    lines = describe_options(config_class({"task": task})).splitlines()
    assert any(line.startswith("train.batch_size ") and "32" in line for line in lines)
    assert all(len(line.split("  ")) >= 4 and line.split("  ")[-1].strip() for line in lines), lines


def test_resolved_configuration_reads_back(base: Path, tmp_path: Path) -> None:
    config = load_config(base, ["optimizer.betas=[0.9, 0.99]"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json")))
    assert load_config(folder) == config


def test_base_class_validates_alone() -> None:
    config = parse_config({"task": "any", "model": {"name": "a"}, "schedule": {"steps": 5}}, RunConfig)
    assert config.schedule.length == 5


def test_encodings_of_yaml(tmp_path: Path) -> None:
    path, text = tmp_path / "a.yaml", "# Größe\ntask: classification\n"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert read_config(path)["task"] == "classification"
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(InputError, match=r"cannot read .*a\.yaml as UTF-8"):
            read_config(path)


def test_names_of_classes_are_given_once(base: Path) -> None:
    with pytest.raises(InputError, match=r"data\.class_names: the name 'a' is given twice"):
        load_config(base, ["data.class_names=[a, b, a]"])
