"""The one training loop, and evaluation. Read `train` from top to bottom: it is all that happens."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import distribute_bn
from torch import nn

from visionattn.engine.batches import batch_count, endless_batches, seed_all
from visionattn.engine.config import TrainConfig
from visionattn.engine.distributed import expecting_others
from visionattn.engine.keeper import Keeper, has_value
from visionattn.engine.network import evaluating
from visionattn.engine.recorder import Recorder
from visionattn.engine.run_folder import RunFolder, read_state
from visionattn.engine.setup import create_accelerator, create_scheduler, distribute, make_plan
from visionattn.engine.sharding import gathered, unsynchronized, whole
from visionattn.engine.signals import StopSignals
from visionattn.engine.state import TrainingState
from visionattn.engine.task import Task
from visionattn.errors import RunError


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        step: updates made since the beginning of the run.
        metrics: the last evaluation; empty where none was reached.
        best: the best evaluation: `metric`, `value`, `step`, `file`; None where none was reached.
        stopped_by: the signal that ended the run early, None for a complete run.
    """

    step: int
    metrics: dict[str, float]
    best: dict[str, Any] | None
    stopped_by: signal.Signals | None


@expecting_others()
def train(task: Task) -> Result:
    """Train a task's network in place as its configuration says, on however many processes there are.

    Raises:
        InputError: the data or the run folder cannot be used; nothing was trained.
        RunError: a loss was not finite, the disk is full, or another process of the run is gone.
    """
    options, folder = task.config.train, RunFolder(task.config.run_folder)
    state_file = folder.find_state(task.config.resume)
    accelerator = create_accelerator(options)
    main = accelerator.is_main_process
    train_loader, eval_loader = task.train_loader(), task.eval_loader()
    config = task.config  # complete now that the data is open
    plan = make_plan(config, batch_count(train_loader))

    network, optimizer, ema = distribute(task, config, accelerator)
    scheduler = create_scheduler(config.schedule, plan, optimizer.optimizer)
    state = TrainingState(task.model, task.adversary, optimizer, accelerator.scaler, ema, plan)
    if state_file is not None:
        state.load_state_dict(read_state(state_file))
    scheduler.step_update(state.step)
    if options.compile:
        task.model.compile()  # in place, so that the names in the state dict stay

    if main:
        folder.start(config, str(accelerator.device))
    batches = endless_batches(train_loader, plan.updates_per_epoch, options.accumulate, state.step)
    stop = False
    keeper = Keeper(task, state, folder, main)
    with StopSignals() as signals, Recorder(config, state, accelerator) as recorder:
        if state.unjudged:  # the evaluation in which the run ended
            _judge(task, state, eval_loader, accelerator, recorder, keeper)
        while state.step < plan.total and not stop:
            values, stop, skipped = _update(network, optimizer, batches, state, options, accelerator, signals)
            lr = optimizer.param_groups[0]["lr"]
            state.add(values)
            if skipped:
                recorder.say(f"step {state.step} gave {_explain(values)} and is passed over")
            scheduler.step_update(state.step)
            if ema is not None:
                ema.update(task.model, step=state.step)
            recorder.advance()

            ended = state.step == plan.total
            if ended or _due(state.step, options.log_every):
                recorder.report("train", {**state.take_means(), "lr": lr})
            with recorder.paused():
                state.unjudged = ended or _due(state.step, plan.eval_every)
                if state.unjudged or stop or _due(state.step, options.save_every):
                    keeper.save()  # before they are judged: an evaluation that fails loses nothing
                if state.unjudged:
                    _judge(task, state, eval_loader, accelerator, recorder, keeper)

        stopped_by = (signals.received or signal.SIGTERM) if state.step < plan.total else None
        if stopped_by is None:
            with _judging(task, state.judged):
                if main:
                    folder.write_pictures(task.pictures())
        recorder.conclude(stopped_by)
    return Result(state.step, state.metrics, state.best, stopped_by)


@expecting_others()
def evaluate(task: Task) -> dict[str, float]:
    """The metrics of a task's network over its held-out data, under the configured precision."""
    accelerator = create_accelerator(task.config.train)
    task.to(accelerator.device)
    return evaluate_weights(task.model, task, task.eval_loader(), accelerator)


def evaluate_weights(
    model: nn.Module, task: Task, loader: Iterable[Any], accelerator: Accelerator
) -> dict[str, float]:
    """The metrics that `task.evaluate` finds for `model`, a network like the task's own."""
    if accelerator.num_processes > 1:
        distribute_bn(model, accelerator.num_processes, reduce=False)  # the statistics that will be saved
    with _judging(task, model), accelerator.autocast():
        return task.evaluate(send_to_device(batch, accelerator.device, non_blocking=True) for batch in loader)


def _judge(
    task: Task,
    state: TrainingState,
    loader: Iterable[Any],
    accelerator: Accelerator,
    recorder: Recorder,
    keeper: Keeper,
) -> None:
    """Evaluate the weights that were just saved, and keep them as the best if they are."""
    state.metrics = evaluate_weights(state.judged, task, loader, accelerator)
    state.unjudged = False
    recorder.report("eval", state.metrics)
    if not has_value(state.metrics, task.monitor):
        recorder.say(f"{task.monitor} has no value at step {state.step}: best stays what it was")
    keeper.keep_judged()


@contextmanager
def _judging(task: Task, model: nn.Module) -> Iterator[None]:
    """The task in evaluation mode with `model` in place of its network."""
    own = task.model
    with evaluating(task), evaluating(model), gathered(model):
        task.model = model
        try:
            yield
        finally:
            task.model = own


def _update(
    network: nn.Module,
    optimizer: Any,
    batches: Iterator[Any],
    state: TrainingState,
    options: TrainConfig,
    accelerator: Accelerator,
    signals: StopSignals,
) -> tuple[dict[str, float], bool, bool]:
    """One update of the weights.

    Returns:
        Losses and gradient norm, averaged over the processes; whether any process was told to stop; and
        whether the update was left out because they are not finite.
    """
    buffers = [buffer.clone() for buffer in state.model.buffers()] if options.nan == "skip" else []
    sums: dict[str, Any] = {}
    for index in range(options.accumulate):
        batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
        # Dropout, drop path and mixing follow from the position alone, so that a resumed run repeats them.
        seed_all("updates", options.seed, state.step, index, accelerator.process_index)
        last = index == options.accumulate - 1
        with nullcontext() if last else unsynchronized(network, accelerator):
            with accelerator.autocast():
                losses = network(batch)
            accelerator.backward(losses["loss"])
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / options.accumulate
    norm = accelerator.clip_grad_norm_(state.model.parameters(), options.clip_grad or math.inf)
    sums["grad_norm"] = whole(norm)

    # The only wait for the device in an update: without it a step that is not finite could not be named.
    flag = torch.tensor(float(signals.received is not None), device=accelerator.device)
    reduced: Any = accelerator.reduce(torch.stack([*sums.values(), flag]), "mean")
    *means, told = reduced.tolist()
    values = dict(zip(sums, means, strict=True))
    # A gradient that overflows in float16 is usual: the scaler skips the step and lowers its scale.
    scaled = accelerator.scaler is not None
    skipped = not (math.isfinite(values["loss"]) and (scaled or math.isfinite(values["grad_norm"])))
    if not skipped:
        optimizer.step()
    elif options.nan == "stop":
        raise RunError(
            f"step {state.step + 1} gave {_explain(values)}; "
            f"lower optimizer.lr, set train.clip_grad, or pass over such steps with train.nan=skip"
        )
    else:
        if scaled:
            optimizer.step()
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    optimizer.zero_grad()
    return values, told > 0, skipped


def _explain(values: dict[str, float]) -> str:
    return f"loss {values['loss']:g} and gradient norm {values['grad_norm']:g}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
