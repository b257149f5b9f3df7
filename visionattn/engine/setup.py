"""Accelerator, optimizer, schedule and average of the weights, as a configuration asks for them."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from visionattn.engine.config import EmaConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from visionattn.engine.sharding import shard
from visionattn.engine.task import Task
from visionattn.errors import InputError, as_input_error, nearest

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
)


@dataclass(frozen=True)
class Plan:
    """The configured length of a run in updates.

    Attributes:
        unit: updates in one unit of the schedule: one epoch, or one step.
        total: updates of the whole run, cool-down included.
        updates_per_epoch: None where the source of the data does not know its length.
        eval_every: updates from one evaluation to the next; None means none before the end.
    """

    unit: int
    total: int
    updates_per_epoch: int | None
    eval_every: int | None


def make_plan(config: RunConfig, batches: int | None) -> Plan:
    """The plan of a run whose training loader gives `batches` per epoch and process.

    Raises:
        InputError: the length cannot be known, or an epoch is shorter than one update.
    """
    schedule, accumulate = config.schedule, config.train.accumulate
    if batches is None and schedule.epochs is not None:
        raise InputError("the training data does not know its length: give schedule.steps in place of epochs")
    if batches is not None and batches < accumulate:
        raise InputError(f"one epoch has {batches} batches, fewer than train.accumulate={accumulate}")
    updates = None if batches is None else batches // accumulate
    unit = 1 if schedule.epochs is None else updates or 1
    every = config.train.eval_every
    total = (schedule.length + schedule.cooldown) * unit
    return Plan(unit, total, updates, None if every is None else every * unit)


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator for this machine, or for the processes that torchrun or accelerate launched.

    Raises:
        InputError: the device has not the precision that is asked for, or the launcher asks for sharding.
    """
    # The state is shared by all accelerators of a process; a second run may want another precision.
    AcceleratorState._reset_state()
    with as_input_error(f"train.amp={config.amp} is not possible here", ValueError):
        accelerator = Accelerator(
            # Asked for, because accelerate joins processes on the CPU only if it is told to use the CPU.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.amp,
            gradient_accumulation_steps=config.accumulate,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))],
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise InputError(f"{launched} processes were launched, but {accelerator.num_processes} work together")
    if config.amp == "fp16" and accelerator.device.type == "cpu":  # accelerate would run in float32
        raise InputError("train.amp=fp16 needs a GPU; the CPU has bf16")
    if accelerator.distributed_type not in _SUPPORTED:
        kind = accelerator.distributed_type.value
        raise InputError(f"the launcher asks for {kind}: leave that to train.parallel, which is ddp or fsdp")
    return accelerator


def create_optimizer(
    config: OptimizerConfig, model: nn.Module, adversary: nn.Module | None = None
) -> Optimizer:
    """The optimizer for a network, with timm's parameter groups.

    An adversary becomes one more group, without weight decay: what it learns depends on no other group, so
    this is the same as an optimizer of its own.

    Raises:
        InputError: timm has no such optimizer, or it does not take these arguments.
    """
    if config.name not in list_optimizers():
        raise InputError(
            f"unknown optimizer {config.name!r}: {nearest(config.name, map(str, list_optimizers()))}"
        )
    optional = {"betas": config.betas, "eps": config.eps, "layer_decay": config.layer_decay}
    given = {key: value for key, value in optional.items() if value is not None}
    with as_input_error(f"cannot make the optimizer {config.name}", ValueError, TypeError):
        optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **given,
            **config.kwargs,
        )
        if adversary is not None:
            optimizer.add_param_group(
                {"params": list(adversary.parameters()), "lr": config.lr, "weight_decay": 0.0}
            )
        return optimizer


class PointsScheduler(Scheduler):
    """The learning rate along straight lines between given points, once or again and again.

    Args:
        optimizer: whose learning rates are the unit.
        points: step and factor, in the order of the steps, the first at 0. Two at one step are a jump.
        period: steps after which the points begin again; None lets the last factor stay.
    """

    def __init__(
        self, optimizer: Optimizer, points: Sequence[tuple[float, float]], period: float | None
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.points, self.period = points, period
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        place = t if self.period is None else t % self.period
        after = bisect.bisect_right(self.points, place, key=lambda point: point[0])
        (start, factor), *rest = self.points[after - 1 : after + 1]
        if rest:
            end, target = rest[0]
            factor += (target - factor) * (place - start) / (end - start)
        return [value * factor for value in self.base_values]


def create_scheduler(config: ScheduleConfig, plan: Plan, optimizer: Optimizer) -> Scheduler:
    """The learning rate as a function of the step, without a state of its own."""
    if config.name == "points":
        points = [(place * plan.unit, factor) for place, factor in config.points]
        return PointsScheduler(optimizer, points, config.period and config.period * plan.unit)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=config.length * plan.unit,
        warmup_epochs=round(config.warmup * plan.unit),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        cooldown_epochs=config.cooldown * plan.unit,
        decay_epochs=round((config.decay_every or 0) * plan.unit),
        decay_milestones=[round(milestone * plan.unit) for milestone in config.milestones],
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,  # every length above is in updates already
    )
    assert scheduler is not None
    return scheduler


def create_ema(config: EmaConfig, model: nn.Module, foreach: bool = True) -> ModelEmaV3 | None:
    """The average of a network's weights, on its device, if one is asked for.

    Args:
        config: decay and warm-up.
        model: the network.
        foreach: update all weights in one call, which needs them of one kind.
    """
    if config.decay is None:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup, foreach=foreach)


def distribute(
    task: Task, config: RunConfig, accelerator: Accelerator
) -> tuple[nn.Module, AcceleratedOptimizer, ModelEmaV3 | None]:
    """Put a task onto its device and, with several processes, share the work out.

    Returns:
        What computes the loss of a batch on all processes, the optimizer, and the average of the weights.
    """
    sharded = config.train.parallel == "fsdp" and accelerator.num_processes > 1
    task.to(accelerator.device)
    ema = create_ema(config.ema, task.model, foreach=not sharded)
    if not sharded:
        optimizer = create_optimizer(config.optimizer, task.model, task.adversary)
        network, optimizer = accelerator.prepare(task, optimizer)
        return network, optimizer, ema
    # Not accelerate's plugin, which refuses the CPU.
    trained = [part for part in task.children() if any(p.requires_grad for p in part.parameters())]
    for network in [*trained, *([] if ema is None else [ema.module])]:
        shard(network, accelerator.device)
    optimizer = create_optimizer(config.optimizer, task.model, task.adversary)
    return task, accelerator.prepare(optimizer), ema
