"""What a run keeps of itself: its last weights and state when they are due, its best when they are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from visionattn.engine.run_folder import RunFolder, describe_run
from visionattn.engine.sharding import whole
from visionattn.engine.state import TrainingState
from visionattn.engine.task import Task


class Keeper:
    """Writes the checkpoints of a run. With sharded weights every process must call its methods.

    Args:
        task: describes the weights.
        state: of the run.
        folder: where to.
        main: whether this process writes.
    """

    def __init__(self, task: Task, state: TrainingState, folder: RunFolder, main: bool) -> None:
        self.task, self.state, self.folder, self.main = task, state, folder, main
        self.description = {**task.description(), **describe_run(task.config)}

    def save(self) -> None:
        """Keep the present weights as the last, and everything that the next step depends on."""
        everything = self.state.state_dict()
        if self.main:
            weights = everything["ema"] or everything["model"]
            facts = {**self.description, "step": self.state.step}
            self.folder.write_weights("last", self.state.judged, weights, facts)
            self.folder.write_state(everything)

    def keep_judged(self) -> None:
        """Keep what an evaluation found, and the judged weights if they are the best so far.

        The best is the best of the evaluations in which the monitored metric had a value, the first of equal
        ones. Where it never has one, a run has last weights alone, which are then those that the tools use.
        """
        state, task = self.state, self.task
        if has_value(state.metrics, task.monitor) and self._is_better(state.metrics[task.monitor]):
            state.best = {
                "metric": task.monitor,
                "value": state.metrics[task.monitor],
                "step": state.step,
                "file": "checkpoints/best.safetensors",
            }
            weights = whole(state.judged.state_dict())
            if self.main:
                facts = {**self.description, **state.best}
                self.folder.write_weights("best", state.judged, weights, facts)
                self.folder.write_json("best.json", {**state.best, "metrics": state.metrics})
        everything = state.state_dict()
        if self.main:
            self.folder.write_state(everything)

    def _is_better(self, value: float) -> bool:
        sign = 1 if self.task.higher_is_better else -1
        return self.state.best is None or sign * value > sign * self.state.best["value"]


def has_value(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether an evaluation found a value of a metric."""
    return not math.isnan(metrics.get(name, math.nan))
