"""The training loop, shared by all stages that train networks.

Everything that determines the weights is a pure function of the configuration and the step: the samples of a batch
(:class:`shards.order.Order`), their noise (drawn by the task from seed, step and sample), the learning rate. A run that
was stopped and resumed therefore ends with the same bits as one that was not, and the number of workers changes only
the order of floating-point sums.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mvhpc.checkpoints.compatibility import check
from mvhpc.checkpoints.manifest import Checkpoint, CheckpointError
from mvhpc.checkpoints.writer import Checkpoints
from mvhpc.config import Compute, flatten
from mvhpc.runs.journal import Journal
from mvhpc.runs.position import Position, duration, remove_position, write_position
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.devices import describe_device, resolve_device, resolve_precision, send
from mvhpc.runtime.randomness import generator
from mvhpc.runtime.watchdog import Interrupted, PollInterval, Watchdog, stop_requested
from mvhpc.training.best import BestModel
from mvhpc.training.damaged import Samples
from mvhpc.training.engines.base import Engine, learning_rate
from mvhpc.training.engines.make import make_engine
from mvhpc.training.metrics import Diverged, MetricMeans, SkippedUpdates, Stopwatch, peak_tflops
from mvhpc.training.pace import Pace, advice
from mvhpc.training.task import Config, Task, micro_batch
from mvhpc.training.validation import validate
from shards.order import Order, prefetch

RETRY_FOR_S = 300.0  # how long writing a checkpoint that a run needs is tried again
RETRY_EVERY_S = 5.0


def train(task: Task, config: Config, folder: Path, rank: int = 0, world: int = 1) -> dict[str, float]:
    """Train ``task`` to the end, from its newest checkpoint in ``folder`` where there is one.

    Writes ``folder/checkpoints``, ``folder/model`` (each network at its own best validation, by ``task.export``),
    ``folder/figures`` and the journal. An update that is not finite is skipped; after several consecutive ones
    training goes back to its newest checkpoint, once per place. While storage cannot be written, checkpoints are
    missing but training goes on. It stops when the file of ``MVHPC_STOP_FILE`` appears. A checkpoint of any number of
    workers and any ZeRO stage can be resumed.

    A finished run returns its summary at once. With a constant schedule a finished run continues when
    ``training.epochs`` is raised, and an unfinished one may end at a checkpoint to which it is lowered.

    Args:
        task: networks, data and one step of training.
        config: its ``optimizer``, ``training`` and ``compute``.
        folder: the run folder, the same for all workers.
        rank: this worker.
        world: how many there are.

    Returns:
        the metrics of the exported model (``validation/...``), the last step at which a network was better
        (``best_step``), ``steps`` and ``system/samples_per_second``.

    Raises:
        ConfigError: a batch that does not divide evenly, or a configuration that is not the checkpoint's.
        CheckpointError: a damaged checkpoint, or one that cannot be written at the end.
        FloatingPointError: gradients of consecutive steps are not finite or explode, again after going back.
        Interrupted: stopped on request, after a checkpoint was written.
    """
    return _Run(task, config, folder, Collectives(rank, world)).train()


class _Run:
    """The state of one call of :func:`train`."""

    def __init__(self, task: Task, config: Config, folder: Path, collectives: Collectives) -> None:
        self.task, self.config, self.folder, self.collectives = task, config, folder, collectives
        training = self.training = config.training
        self.micro_batch = micro_batch(training, collectives.world)
        if task.samples < 1:
            raise ValueError("there are no training samples; check the split of the data")
        self.samples = Samples(task, training.damaged)
        self.order = Order(task.samples, training.batch, training.seed)
        self.total = training.epochs * self.order.steps_per_epoch
        self.device = resolve_device(config.compute.device)
        self.journal = Journal(folder) if collectives.rank == 0 else None
        self.checkpoints = Checkpoints(folder / "checkpoints", training.keep, collectives)
        self.means, self.skipped = MetricMeans(collectives), SkippedUpdates()
        self.damaged: set[str] = set()
        self.watchdog = Watchdog(config.compute.hang_minutes)
        self.stopwatch = Stopwatch()
        self.engines: dict[str, Engine] = {}

    def train(self) -> dict[str, float]:
        with contextlib.closing(self.checkpoints):
            self.checkpoints.sweep()
            checkpoint = self.checkpoints.latest()
            if checkpoint is not None:
                check(checkpoint, self.config, self.total)
                if checkpoint.step == self.total and checkpoint.state["summary"]:
                    return dict(checkpoint.state["summary"])
            self._write("note", text=self._describe())
            self._build()
            start = self._resume(checkpoint)
            try:
                with self.watchdog.armed():
                    self._attempts(start)
            finally:
                if self.journal is not None:
                    remove_position(self.folder)
            self._write("end", step=self.total)
            return self._summary()

    def _describe(self) -> str:
        """Steps, parameters, device and precision, as one line."""
        training = self.training
        sizes = (
            f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.3g} million parameters"
            for name, network in self.task.networks.items()
        )
        precision = str(resolve_precision(self.config.compute.precision, self.device)).removeprefix("torch.")
        workers = self.collectives.world
        device = (
            f"{workers} workers on {describe_device(self.device)} each"
            if workers > 1
            else (describe_device(self.device))
        )
        return (
            f"{self.total:,} steps ({training.epochs} epochs of {self.order.steps_per_epoch:,}, batch "
            f"{training.batch}); {', '.join(sizes)}; {device}, {precision}"
        )

    def _build(self) -> None:
        for name, module in self.task.networks.items():
            self.engines[name] = make_engine(
                module,
                self.task.learning_rates[name],
                self.config.optimizer,
                self.config.compute if name in self.task.exported else self._auxiliary_compute(),
                getattr(self.config, "ema", None) if name in self.task.averaged else None,
                self.training.accumulate,
                self.micro_batch,
                self.collectives,
            )
        self.best = BestModel(self.task, self.engines, self.folder, self.collectives)

    def _auxiliary_compute(self) -> Compute:
        """The settings of networks that are not exported: without ZeRO-3, since `Engine.frozen` needs all weights."""
        compute = self.config.compute
        return dataclasses.replace(compute, zero_stage=min(compute.zero_stage, 2))

    def _attempts(self, start: int) -> None:
        """All steps; goes back to the newest checkpoint once for each place where training diverges."""
        diverged: set[int] = set()
        while True:
            self._write("start", step=start, total=self.total)
            try:
                return self._steps(start)
            except Diverged as error:
                self._warn(start, self.checkpoints.finish())
                checkpoint = self.checkpoints.latest()
                if error.first in diverged or checkpoint is None:
                    raise
                diverged.add(error.first)
                with self.watchdog.paused():
                    start = self._resume(checkpoint)
                self._warn(start, f"{error.reason}; training goes back to step {start}")

    # --- steps ---

    def _steps(self, start: int) -> None:
        training, epoch = self.training, self.order.steps_per_epoch
        self.stopwatch = Stopwatch(self.stopwatch.seconds)  # building the networks does not count
        self.poll_interval, self.pace = PollInterval(start), Pace(self.total)
        if start == self.total:  # of a longer run that was stopped here, whose epochs were lowered
            with self._not_training():
                self._validate(start)
                self._checkpoint(start, required=True)
        with contextlib.closing(self._batches(start)) as batches:
            for step in range(start, self.total):
                self._step(step, batches)
                done = step + 1
                last = done == self.total
                stop = done >= self.poll_interval.next and self._poll(done) and not last
                if done % training.log_every == 0 or last:
                    self._log(done)
                improved = False
                if last or done % (training.validate_every * epoch) == 0:
                    with self._not_training():
                        improved = self._validate(done)
                if last or stop or improved or done % training.checkpoint_every == 0:
                    with self._not_training():
                        self._checkpoint(done, required=last or stop)
                if stop:
                    self._write("stopped", step=done)
                    raise Interrupted(f"stopped on request after step {done} of {self.total}; run it again to continue")

    def _step(self, step: int, batches: Generator[tuple[list[int], dict[str, Any]]]) -> None:
        for name, engine in self.engines.items():
            base = self.task.learning_rates[name]
            engine.set_learning_rate(learning_rate(step, self.total, base, self.config.optimizer))
        # Layers such as dropout draw from the global generator; seeded here, they too depend on the step alone.
        torch.manual_seed(generator(self.training.seed, "step", step, self.collectives.rank).initial_seed())
        scalars = []
        for _ in range(self.training.accumulate):
            with self.stopwatch.waiting():
                indices, batch = next(batches)
            batch = tree_map_only(Tensor, lambda x: send(x, self.device), batch)
            scalars.append(self.task.step(batch, self.engines, step, indices))
        skipped = torch.stack([engine.skipped for engine in self.engines.values()]).amax()
        self.skipped.add(step, skipped)
        for micro_batch_scalars in scalars:
            self.means.add(micro_batch_scalars, skipped)
        self.stopwatch.tick()

    @contextlib.contextmanager
    def _not_training(self) -> Generator[None]:
        """Neither the stopwatch nor the watchdog counts the time inside."""
        with self.stopwatch.stopped(), self.watchdog.paused():
            yield

    def _poll(self, done: int) -> bool:
        """Exchange the workers' states, about once a second. Returns whether to stop after ``done`` steps."""
        self.watchdog.arm()
        states = self.collectives.gather(
            (stop_requested(), self.checkpoints.report(), self.poll_interval.suggest(done))
        )
        self._warn(done, self.checkpoints.settle([report for _, report, _ in states]))
        self._tell(done)
        self.poll_interval.next = done + states[0][2]
        self.skipped.collect()
        return any(stop for stop, _, _ in states)

    def _tell(self, done: int) -> None:
        """Where training is; after the second step of this start, how long it will take."""
        if self.journal is None:
            return
        first, seconds = not self.pace.known, self.pace.left(done)
        write_position(self.folder, Position(done, self.total, seconds))
        if seconds is None or not first or done == self.total:
            return
        each = seconds / (self.total - done)
        text = f"about {duration(seconds)} left ({each:.3g} s a step; validation is not counted yet)"
        fresh = done == 2 and self.device.type == "cpu"  # a resumed run keeps its configuration
        shorter = advice(seconds, self.training.epochs, self.task.shorter) if fresh else ""
        self._write("note", text=f"{text}\n  {shorter}" if shorter else text)

    def _batches(self, start: int) -> Generator[tuple[list[int], dict[str, Any]]]:
        accumulate = self.training.accumulate
        rank, world = self.collectives.rank * accumulate, self.collectives.world * accumulate

        def load(unit: int) -> tuple[list[int], dict[str, Any]]:
            step, part = divmod(unit, accumulate)
            indices = self.order.part(step, rank + part, world)
            return indices, self.samples.load(indices)

        yield from prefetch(load, range(start * accumulate, self.total * accumulate))

    def _log(self, step: int) -> None:
        self._report_damaged(step)
        self.skipped.collect()
        metrics = {f"train/{name}": value for name, value in self.means.mean().items()}
        first, *_ = self.task.exported
        for name, engine in self.engines.items():
            suffix = "" if name == first else f"_{name}"
            norm = float(engine.grad_norm)
            metrics |= {f"train/grad_norm{suffix}": norm} if math.isfinite(norm) and norm >= 0 else {}
            base = self.task.learning_rates[name]
            metrics[f"train/lr{suffix}"] = learning_rate(step - 1, self.total, base, self.config.optimizer)
        metrics["train/skipped_steps"] = float(self.skipped.total)
        if self.samples.skip:
            metrics["train/damaged_samples"] = float(len(self.damaged))
        metrics |= self.stopwatch.interval(self.training.batch)
        # Of the exported networks alone; a backward pass costs as much as two forward passes.
        flops = 3 * sum(self.engines[name].flops for name in self.task.exported) / self.micro_batch
        metrics["system/model_tflops"] = flops * metrics["system/samples_per_second"] / 1e12
        peak = peak_tflops(self.device) if self.config.compute.precision != "float32" else None
        if peak is not None:
            utilisation = metrics["system/model_tflops"] / (peak * self.collectives.world)
            metrics["system/utilisation_percent"] = 100 * utilisation
        metrics["system/memory_gib"] = psutil.Process().memory_info().rss / 2**30
        if self.device.type == "cuda":
            metrics["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._write("metrics", step=step, metrics=metrics)

    def _report_damaged(self, step: int) -> None:
        """Damaged samples that any worker has found; the metric counts them since this start."""
        if not self.samples.skip:
            return
        found = sorted({text for texts in self.collectives.gather(self.samples.news()) for text in texts})
        for text in found:
            self._warn(step, f"sample skipped: {text}")
        self.damaged |= set(found)

    # --- validation ---

    def _validate(self, step: int) -> bool:
        """Validate, and export an improvement. Returns whether there was one."""
        self.means.collect()
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.evaluating())
            networks = {name: engine.module for name, engine in self.engines.items()}
            self.task.refresh(networks, self.collectives.rank, self.collectives.world)
            metrics = {}
            if self.task.validation:
                metrics = validate(self.task, networks, self.micro_batch, self.collectives)
                self._write("metrics", step=step, metrics={f"validation/{name}": x for name, x in metrics.items()})
            improved = self.best.take(step, metrics)
            if improved:
                self._warn(step, self.best.write())
                self._draw(networks, step)
            return improved

    def _draw(self, networks: dict[str, nn.Module], step: int) -> None:
        figures = self.task.figures(networks, step)
        if figures and self.collectives.rank == 0:
            try:
                (self.folder / "figures").mkdir(exist_ok=True)
                for name, write in figures.items():
                    write(self.folder / "figures" / name)
                    self._write("artifact", step=step, path=f"figures/{name}")
            except OSError as error:
                self._warn(step, f"a figure could not be written: {error}")

    # --- checkpoints ---

    def _checkpoint(self, step: int, required: bool) -> None:
        """Begin a checkpoint; where it is ``required``, wait for it and retry. The model is exported before it.

        Raises:
            CheckpointError: it is required and could not be written for :data:`RETRY_FOR_S` seconds.
        """
        self.means.collect()
        self.skipped.collect()
        if self.skipped.consecutive and not required:
            return  # the run may be about to go back, and then has to go back to before the first skipped update
        files = {
            f"{name}/{file}": content
            for name, engine in self.engines.items()
            for file, content in engine.snapshot().items()
        }
        state, end = self._state(step), time.monotonic() + RETRY_FOR_S
        while True:
            warning = self.best.write()
            if warning is None:
                before = self.checkpoints.begin(step, files, state, self.best.step)
                self._warn(step, before)
                warning = self.checkpoints.finish() if required else None
            self._warn(step, warning)
            if warning is None or not required:
                return
            if self.collectives.share(time.monotonic() > end):
                raise CheckpointError(
                    f"{warning}; free or repair the storage and run it again; it resumes from its last checkpoint"
                )
            time.sleep(RETRY_EVERY_S)

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "configuration": flatten(self.config),
            "layouts": {name: engine.layout for name, engine in self.engines.items()},
            "best": self.best.metrics,
            "seconds": self.stopwatch.seconds,
            "means": self.means.state(),
            "skipped": self.skipped.state(),
            "summary": self._summary() if step == self.total else None,
        }

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """Load a checkpoint. Returns the number of steps done before it."""
        if checkpoint is None:
            return 0
        self.checkpoints.verify(checkpoint)
        for name, engine in self.engines.items():
            engine.load(checkpoint.folder / name, checkpoint.state["layouts"][name])
        self.best.restore(checkpoint.state["best"])
        self.stopwatch = Stopwatch(checkpoint.state["seconds"])
        self.means.restore(checkpoint.state["means"])
        self.skipped.restore(checkpoint.state["skipped"])
        return checkpoint.step

    # --- journal ---

    def _summary(self) -> dict[str, float]:
        rate = self.total * self.training.batch / max(self.stopwatch.seconds, 1e-9)
        return {**self.best.metrics, "steps": self.total, "system/samples_per_second": rate}

    def _write(self, event: str, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, **fields)

    def _warn(self, step: int, text: str | None) -> None:
        """Record a problem that training survives."""
        if text is not None and self.collectives.rank == 0:
            self._write("warning", step=step, text=text)
            logging.getLogger(__name__).warning("step %d: %s", step, text)
