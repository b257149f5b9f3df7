"""The training loop on a toy: what it leaves behind, and that it repeats itself exactly."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visionattn.checkpoints.reading import read_metadata
from visionattn.engine.loop import evaluate, train
from visionattn.engine.run_folder import trained_weights
from visionattn.engine.state import TrainingState
from visionattn.errors import InputError, RunError

MakeTask = Callable[..., Any]


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    """The table of a run without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["split"] == split]
    return [{key: value for key, value in row.items() if key != "samples_per_second"} for row in found]


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(folder, "train")]


def test_a_run_leaves_everything_in_its_folder(make_task: MakeTask) -> None:
    task = make_task(train={"log_every": 4})
    result = train(task)
    folder = task.config.run_folder
    assert result.step == 18  # 3 epochs of 50 // 8 updates
    assert result.stopped_by is None
    assert len(rows(folder, "eval")) == 3
    assert [row["step"] for row in rows(folder, "train")] == ["4", "8", "12", "16", "18"]
    assert json.loads((folder / "best.json").read_text())["step"] == result.best["step"]
    environment = json.loads((folder / "environment.json").read_text())
    assert {"torch", "timm", "visionattn"} <= set(environment[0]["versions"])
    assert (folder / "pictures" / "grey.png").is_file()
    assert any((folder / "tensorboard").iterdir())
    assert not list(folder.rglob(".*"))
    torch.testing.assert_close(
        load_file(folder / "checkpoints/last.safetensors"), dict(task.model.state_dict())
    )
    assert evaluate(task) == pytest.approx(result.metrics)


def test_best_weights_are_those_that_were_judged_best(make_task: MakeTask) -> None:
    task = make_task(schedule={"steps": 40}, train={"eval_every": 4}, optimizer={"lr": 0.1})
    result = train(task)
    judged = {int(row["step"]): float(row["error"]) for row in rows(task.config.run_folder, "eval")}
    assert result.best["value"] == min(judged.values()) == judged[result.best["step"]]
    task.model.load_state_dict(load_file(task.config.run_folder / "checkpoints/best.safetensors"))
    assert evaluate(task)["error"] == pytest.approx(result.best["value"])


@pytest.mark.parametrize(
    ("interrupted_at", "options"),
    [
        (6, {}),
        (10, {"train": {"save_every": 5, "log_every": 4, "workers": 1}, "ema": {"decay": 0.9}}),
        (7, {"train": {"save_every": 2, "accumulate": 2, "batch_size": 4, "amp": "bf16"}}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, interrupted_at: int, options: dict[str, Any]
) -> None:
    whole, broken = make_task("whole", **options), make_task("broken", **options)
    expected = train(whole)

    def die(state: Any, values: Any, add: Any = TrainingState.add) -> None:
        if state.step == interrupted_at:
            raise KeyboardInterrupt
        add(state, values)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "add", die)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    again = make_task("broken", resume="auto", **options)
    result = train(again)

    assert result[:3] == expected[:3]
    for split in ("train", "eval"):
        assert rows(broken.config.run_folder, split) == rows(whole.config.run_folder, split)
    for name in ("last", "best"):
        ours, theirs = (t.config.run_folder / f"checkpoints/{name}.safetensors" for t in (again, whole))
        torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=0, atol=0)


def test_a_finished_run_resumes_to_itself(make_task: MakeTask) -> None:
    first = train(make_task())
    assert train(make_task(resume="auto")) == first


def test_a_signal_saves_and_ends_the_run(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(make_task("whole"))

    def receive(state: Any, values: Any, add: Any = TrainingState.add) -> None:
        if state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        add(state, values)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "add", receive)
        stopped = train(make_task("stopped"))
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.step == 9  # the update in which the signal is seen is completed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(make_task("stopped", resume="auto")) == expected


def test_accumulation_equals_a_large_batch(make_task: MakeTask) -> None:
    plain = {"model": {"name": "toy", "kwargs": {"dropout": 0.0, "batch_norm": False}}}
    large = make_task("large", train={"batch_size": 12}, **plain)
    small = make_task("small", train={"batch_size": 4, "accumulate": 3}, **plain)
    train(large)
    train(small)
    for name in ("loss", "absolute", "grad_norm"):
        ours, theirs = (column(task.config.run_folder, name) for task in (small, large))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_average_is_what_is_judged_and_kept(make_task: MakeTask) -> None:
    decay, seen = 0.8, []
    task = make_task(ema={"decay": decay}, train={"eval_every": None}, schedule={"steps": 6})
    loss = task.loss
    task.loss = lambda batch: seen.append(task.model[0].weight.detach().clone()) or loss(batch)
    result = train(task)
    average = seen[1]  # the weights after the first update
    for weight in [*seen[2:], task.model[0].weight.detach()]:
        average = decay * average + (1 - decay) * weight
    kept = load_file(task.config.run_folder / "checkpoints/last.safetensors")
    torch.testing.assert_close(kept["0.weight"], average)
    task.model.load_state_dict(kept)
    assert evaluate(task) == pytest.approx(result.metrics)


def test_bf16_runs_on_the_cpu(make_task: MakeTask) -> None:
    task = make_task(train={"amp": "bf16"}, schedule={"steps": 30})
    dtypes = set()
    task.model[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    train(task)
    assert dtypes == {torch.bfloat16}
    losses = column(task.config.run_folder, "loss")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_clipping_bounds_the_update(make_task: MakeTask) -> None:
    task = make_task(
        optimizer={"name": "momentum", "lr": 1.0, "weight_decay": 0.0},
        schedule={"steps": 1, "name": "constant"},
        train={"clip_grad": 0.01},
    )
    before = torch.nn.utils.parameters_to_vector(task.model.parameters()).clone()
    train(task)
    moved = torch.nn.utils.parameters_to_vector(task.model.parameters()) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert column(task.config.run_folder, "grad_norm")[0] > 0.01


def test_a_loss_that_is_not_finite_stops_with_its_step(make_task: MakeTask) -> None:
    task = make_task(train={"save_every": 1})
    task.bad_steps = {5}
    with pytest.raises(RunError, match="step 5 gave loss nan"):
        train(task)
    weights = load_file(task.config.run_folder / "checkpoints/last.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_loss_that_is_not_finite_can_be_passed_over(make_task: MakeTask) -> None:
    task = make_task(train={"nan": "skip"})
    task.bad_steps = {5}
    assert train(task).step == 18
    assert all(value.isfinite().all() for value in task.model.state_dict().values())
    assert [row["step"] for row in rows(task.config.run_folder, "train") if row["loss"] == "nan"] == ["5"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "cosine", "warmup": 2, "min_lr": 0.1}, {0: 1e-6, 2: 0.8682, 7: 0.1343}),
        ({"name": "multistep", "milestones": [4, 6]}, {0: 1.0, 4: 0.1, 7: 0.01}),
        ({"name": "step", "decay_every": 3, "decay_rate": 0.5}, {2: 1.0, 3: 0.5, 6: 0.25}),
        ({"name": "constant", "warmup": 4}, {0: 1e-6, 2: 0.5, 4: 1.0, 7: 1.0}),
        ({"name": "cosine", "cooldown": 2}, {0: 1.0, 8: 0.0, 9: 0.0}),
        (
            {"name": "points", "points": [[0, 0.2], [2, 1], [4, 1], [4, 0.1]]},
            {0: 0.2, 1: 0.6, 3: 1, 4: 0.1, 7: 0.1},
        ),
        ({"name": "points", "points": [[0, 0], [2, 1], [4, 0]], "period": 4}, {1: 0.5, 2: 1, 4: 0, 5: 0.5}),
    ],
)
def test_learning_rates(make_task: MakeTask, schedule: dict[str, Any], expected: dict[int, float]) -> None:
    task = make_task(schedule={"steps": 8, **schedule}, optimizer={"lr": 1.0}, train={"eval_every": None})
    train(task)
    rates = column(task.config.run_folder, "lr")
    assert len(rates) == 8 + schedule.get("cooldown", 0)
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=0.01, abs=1e-6)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"optimizer": {"name": "adamm"}}, "unknown optimizer 'adamm': did you mean"),
        ({"optimizer": {"kwargs": {"beta": 1}}}, "cannot make the optimizer adamw: .*beta"),
        ({"train": {"amp": "fp16"}}, "train.amp=fp16 needs a GPU"),
        ({"train": {"batch_size": 51}}, "has 50 samples, fewer than the 51 of one update"),
        ({"resume": "nowhere"}, "cannot resume from nowhere"),
    ],
)
def test_wrong_input_is_refused_before_work(
    make_task: MakeTask, sections: dict[str, Any], sentence: str
) -> None:
    task = make_task(**sections)
    with pytest.raises(InputError, match=sentence):
        train(task)
    assert not task.config.run_folder.exists()


def test_a_run_is_neither_overwritten_nor_continued_with_other_batches(make_task: MakeTask) -> None:
    train(make_task())
    with pytest.raises(InputError, match="already holds a run"):
        train(make_task())
    with pytest.raises(InputError, match="an epoch had 6 updates and would now have 12"):
        train(make_task(train={"batch_size": 4}, resume="auto"))


class Failure(Exception):
    """What a metric meets that nobody foresaw."""


def failing(task: Any, calls: set[int]) -> Any:
    """The task, whose evaluations of these numbers fail."""
    evaluate, count = task.evaluate, iter(range(100))

    def judge(loader: Any) -> dict[str, float]:
        if next(count) in calls:
            raise Failure
        return evaluate(loader)

    task.evaluate = judge
    return task


@pytest.mark.parametrize("call", [1, 2])
def test_an_evaluation_that_fails_loses_nothing(make_task: MakeTask, call: int) -> None:
    expected = train(make_task("whole"))
    broken = failing(make_task("broken"), {call})
    with pytest.raises(Failure):
        train(broken)
    folder = broken.config.run_folder
    # The weights of the very step that was to be judged are there.
    weights = load_file(folder / "checkpoints/last.safetensors")
    torch.testing.assert_close(weights, dict(broken.model.state_dict()))
    # Continued, the evaluation is made up for: all is as if it had not failed.
    assert train(make_task("broken", resume="auto"))[:3] == expected[:3]
    assert rows(folder, "eval") == rows(make_task("whole").config.run_folder, "eval")


def valued(task: Any, values: list[float | None]) -> Any:
    """The task, whose metric takes these values; None leaves it out."""
    given = iter(values)

    def judge(loader: Any) -> dict[str, float]:
        value = next(given)
        return {"count": 50.0} if value is None else {"error": value, "count": 50.0}

    task.evaluate = judge
    return task


def test_best_is_the_best_of_the_evaluations_with_a_value(
    make_task: MakeTask, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = float("nan")
    task = valued(make_task(schedule={"epochs": 5, "warmup": 0}), [nan, 3.0, None, 2.0, nan])
    result = train(task)
    assert result.step == 30
    assert (result.best["value"], result.best["step"]) == (2.0, 24)
    said = capsys.readouterr().err
    assert [step in said for step in ("error has no value at step 6:", "at step 18:", "at step 30:")] == [
        True
    ] * 3
    assert "error has no value at step 12" not in said
    assert json.loads((task.config.run_folder / "best.json").read_text())["value"] == 2.0
    assert train(make_task(resume="auto", schedule={"epochs": 5, "warmup": 0})).best == result.best


def test_without_any_value_the_last_weights_are_those_to_use(make_task: MakeTask) -> None:
    task = valued(make_task(), [float("nan"), None, None])
    result = train(task)
    assert (result.step, result.best) == (18, None)
    assert trained_weights(task.config.run_folder).name == "last.safetensors"
    assert not (task.config.run_folder / "best.json").exists()


def test_weights_say_where_they_come_from(make_task: MakeTask) -> None:
    task = make_task()
    result = train(task)
    for name, step in (("last", 18), ("best", result.best["step"])):
        texts = read_metadata(task.config.run_folder / f"checkpoints/{name}.safetensors")
        assert json.loads(texts["step"]) == step
        assert texts["made_by"].startswith("visionattn ")
        config = json.loads(texts["config"])
        assert config["optimizer"]["lr"] == 0.01
        assert not {"output", "resume"} & set(config)
