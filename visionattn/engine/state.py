"""Where a run stands: everything that its next step depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from visionattn.engine.setup import Plan
from visionattn.engine.sharding import whole, whole_optimizer_state
from visionattn.errors import InputError, as_input_error


@dataclass
class TrainingState:
    """The parts of a run that change with every step. Random numbers and learning rate follow from `step`.

    Attributes:
        model: the network in training.
        adversary: the network that is trained against it, if there is one.
        optimizer: its optimizer, as accelerate wraps it.
        scaler: the gradient scaler of float16 training.
        ema: the average of the weights.
        plan: the length of the run.
        step: updates made.
        sums: sums of the losses since the last log line.
        count: number of updates in `sums`.
        metrics: the last evaluation.
        unjudged: whether the present weights are due to be evaluated.
        best: the best evaluation so far: `metric`, `value`, `step`, `file`.
    """

    model: nn.Module
    adversary: nn.Module | None
    optimizer: Any
    scaler: Any
    ema: ModelEmaV3 | None
    plan: Plan
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    unjudged: bool = False
    best: dict[str, Any] | None = None

    @property
    def judged(self) -> nn.Module:
        """The weights that are evaluated and kept: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def epoch(self) -> float | None:
        """Epochs done; None where the source of the data has none."""
        per_epoch = self.plan.updates_per_epoch
        return None if per_epoch is None else self.step / per_epoch

    def add(self, values: dict[str, float]) -> None:
        """Count one update whose losses are `values`."""
        self.step += 1
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """The mean losses since the last call."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, numbers, strings, lists and dicts, which `torch.load` reads safely.

        With sharded weights every process must call it.
        """
        state = {
            "step": self.step,
            "updates_per_epoch": self.plan.updates_per_epoch,
            "model": self.model.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "sums": self.sums,
            "count": self.count,
            "metrics": self.metrics,
            "unjudged": self.unjudged,
            "best": self.best,
        }
        return whole(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state` stood.

        Raises:
            InputError: the state belongs to another network, or to another size of the batch of one update.
        """
        if state["updates_per_epoch"] != self.plan.updates_per_epoch:
            raise InputError(
                f"cannot resume: an epoch had {state['updates_per_epoch']} updates and would now have "
                f"{self.plan.updates_per_epoch}; keep the data and train.batch_size x accumulate x processes"
            )
        with as_input_error(
            "cannot resume: the state is of another network or optimizer", RuntimeError, ValueError
        ):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(whole_optimizer_state(state["optimizer"], self.optimizer))
            if self.adversary is not None:
                self.adversary.load_state_dict(state["adversary"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"] or state["model"])
            if self.scaler is not None and state["scaler"] is not None:
                self.scaler.load_state_dict(state["scaler"])
        self.step, self.sums, self.count = state["step"], state["sums"], state["count"]
        self.metrics, self.best = state["metrics"], state["best"]
        self.unjudged = state.get("unjudged", False)  # states of former versions are always judged
