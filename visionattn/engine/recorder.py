"""The course of a run as a user follows it: a progress bar or log lines, `metrics.csv`, TensorBoard."""

from __future__ import annotations

import csv
import io
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from visionattn.engine.config import RunConfig
from visionattn.engine.state import TrainingState
from visionattn.errors import as_input_error
from visionattn.files import replacing, writing


class CsvLog:
    """A table of numbers that grows by rows, and by columns when a row brings a new name.

    Args:
        path: the file.
        step: where the run stands; later rows, of a run killed after its last checkpoint, are dropped.
        unjudged: whether the evaluation at that step is to come, again or for the first time.
    """

    def __init__(self, path: Path, step: int, unjudged: bool = False) -> None:
        self.path = path
        self.columns = ["step", "epoch", "split"]
        rows: list[dict[str, str]] = []
        if path.exists():
            last = {"train": step, "eval": step - unjudged}
            with as_input_error(
                f"{path} is not the table of a run", ValueError, KeyError, TypeError, csv.Error
            ):
                whole_lines = path.read_text(encoding="utf-8").rpartition("\n")[0]
                reader = csv.DictReader(io.StringIO(whole_lines))
                rows = [row for row in reader if int(row["step"]) <= last.get(row["split"], step)]
            self.columns = list(reader.fieldnames or self.columns)
        self._rewrite(rows)

    def append(self, row: Mapping[str, float | str]) -> None:
        """Add one row."""
        new = [name for name in row if name not in self.columns]
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        # One write of a whole line, so that a kill leaves whole lines.
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._lines([row]))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        header = {name: name for name in self.columns}
        with replacing(self.path) as beside:
            beside.write_text(self._lines([header, *rows]), encoding="utf-8", newline="")

    def _lines(self, rows: list) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


class Recorder:
    """Reports the course of a run on the main process and is silent on the others.

    A context manager. On a terminal it draws a progress bar; elsewhere it prints one line per report.

    Args:
        config: the run.
        state: where the run stands; followed as it changes.
        accelerator: says which process this is and how many there are.
    """

    def __init__(self, config: RunConfig, state: TrainingState, accelerator: Accelerator) -> None:
        self.active, self.state, self.folder = accelerator.is_main_process, state, config.run_folder
        self.samples = config.train.batch_size * config.train.accumulate * accelerator.num_processes
        self.first = self.reported = state.step
        self.start = self.window = time.perf_counter()
        if self.active:
            self.csv = CsvLog(self.folder / "metrics.csv", state.step, state.unjudged)
            self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.step + 1)
            self.bar = tqdm(
                initial=state.step,
                total=state.plan.total,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )
            self.say(self._opening(config, accelerator))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.close()
            with writing(self.folder / "tensorboard"):
                self.tensorboard.close()

    def advance(self) -> None:
        """One update is done."""
        if self.active:
            self.bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the throughput."""
        before = time.perf_counter()
        yield
        self.window += time.perf_counter() - before

    def report(self, split: Literal["train", "eval"], values: Mapping[str, float]) -> None:
        """Record numbers of the present step."""
        if not self.active:
            return
        step, epoch = self.state.step, self.state.epoch
        values = {**values, **(self._throughput() if split == "train" else {})}
        self.csv.append(
            {"step": step, "epoch": "" if epoch is None else round(epoch, 4), "split": split, **values}
        )
        with writing(self.folder / "tensorboard"):
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{split}/{name}", value, step)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if split == "train" and not self.bar.disable:
            self.bar.set_postfix_str(numbers)
            return
        where = f"step {step}/{self.state.plan.total}" + ("" if epoch is None else f"  epoch {epoch:.2f}")
        left = f"  {_duration(self._seconds_left())} left" if split == "train" else ""
        self.say(f"{where}  {split}: {numbers}{left}")

    def conclude(self, stopped_by: signal.Signals | None) -> None:
        """Say how the run ended and where its results are."""
        state = self.state
        if stopped_by is not None:
            self.say(f"stopped by {stopped_by.name} at step {state.step}; saved, continue with resume=auto")
            return
        seconds = time.perf_counter() - self.start
        best = state.best
        kept = "" if best is None else f"; best {best['metric']} {best['value']:.5g} at step {best['step']}"
        self.say(
            f"{state.step} steps done, {_duration(seconds)} in this start{kept}; results in {self.folder}"
        )

    def say(self, sentence: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.active:
            tqdm.write(sentence, file=sys.stderr)
            sys.stderr.flush()

    def _opening(self, config: RunConfig, accelerator: Accelerator) -> str:
        plan = self.state.plan
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        epochs = f" ({plan.updates_per_epoch} per epoch)" if plan.updates_per_epoch else ""
        start = f"; continues at step {self.first}" if self.first else ""
        return (
            f"{config.task}: {config.model.name}, {parameters:.2f}M parameters, {plan.total} steps{epochs} "
            f"of {self.samples} samples on {accelerator.num_processes} x {accelerator.device.type}{start}"
        )

    def _throughput(self) -> dict[str, float]:
        now = time.perf_counter()
        done, self.reported = self.state.step - self.reported, self.state.step
        elapsed, self.window = now - self.window, now
        return {"samples_per_second": done * self.samples / elapsed}

    def _seconds_left(self) -> float:
        done = self.state.step - self.first
        return (time.perf_counter() - self.start) / done * (self.state.plan.total - self.state.step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
