"""The training loop: what every stage that trains networks shares.

Every quantity that decides the weights is a pure function of the configuration and the step: the samples of a batch
(:class:`shards.loader.Order`), their noise (drawn from seed, step and sample by the task), the learning rate. Hence a
run that was stopped and resumed ends with the same bits as one that was not, and the number of workers changes
nothing but the order of floating-point sums.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mvhpc.config import Compute, ConfigError, Optimizer, Training, to_dict
from mvhpc.devices import resolve_device
from mvhpc.journal import Journal
from mvhpc.randomness import generator
from mvhpc.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from mvhpc.training.engine import Engine, learning_rate, make_engine
from mvhpc.training.meters import ADVICE, Clock, Meter
from mvhpc.training.ranks import Ranks
from shards.loader import Order, prefetch

# What a configuration may change between a checkpoint and its resumption, because it does not decide the weights.
# (With a cosine schedule `training.epochs` decides them too: the rate of every step depends on it.)
FREE = (
    "out",
    "tracking.",
    "training.epochs",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep",
    "training.log_every",
    "compute.workers",
    "compute.zero_stage",
    "compute.device",
    "compute.threads",
    "compute.retries",
)


class Config(Protocol):
    """The parts of a stage's configuration that the loop reads; ``ema`` too where the task averages a network."""

    optimizer: Optimizer
    training: Training
    compute: Compute


class Task(Protocol):
    """What is trained, and what one step of it is.

    Attributes:
        networks: each gets an engine of its own; equal weights at every worker.
        learning_rates: largest rate of each network.
        averaged: the network whose weights are averaged (with the configuration's ``ema``); None for none.
        best: the network that is exported at the best validation.
        samples: how many training samples there are.
        validation: how many validation samples; 0 exports the last weights.
        score: the metric of :meth:`validate` to minimise.

    A task may also have ``figures(networks, step) -> {file name: function that writes a path}``, called by every worker
    with the averaged weights in place after each export; rank 0 alone calls the functions.
    """

    networks: dict[str, nn.Module]
    learning_rates: dict[str, float]
    averaged: str | None
    best: str
    samples: int
    validation: int
    score: str

    def load(self, indices: list[int]) -> dict[str, Any]:
        """The training samples ``indices`` as a batch in host memory; runs in prefetching threads."""

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """One micro-batch (tensors on the device): forward, ``engine.backward(loss)``, ``engine.step()``.

        Returns:
            scalars to log, means over the micro-batch.
        """

    def validate(self, indices: list[int], networks: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Metrics (B,) of the validation samples ``indices``; NaN where a metric has no value for a sample."""

    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the model into the empty ``folder``; ``states`` holds the (averaged) state dict of ``best``."""


def micro_batch(training: Training, world: int) -> int:
    """Samples per worker and micro-batch.

    Raises:
        ConfigError: where the global batch does not divide evenly.
    """
    parts = world * training.accumulate
    if training.batch < 1 or training.accumulate < 1 or training.batch % parts:
        raise ConfigError(
            f"training.batch={training.batch} does not divide evenly among {world} worker(s) x "
            f"training.accumulate={training.accumulate}; make it a multiple of {parts}"
        )
    return training.batch // parts


def train(task: Task, config: Config, folder: Path, rank: int = 0, world: int = 1) -> dict[str, float]:
    """Train ``task`` to the end, from its newest checkpoint in ``folder`` where there is one.

    Writes ``folder/checkpoints``, ``folder/model`` (the best validation, by ``task.export``), ``folder/figures`` and
    the journal. A run that was finished before returns its summary at once. A finished run with a constant schedule
    goes on when ``training.epochs`` is raised.

    Args:
        task: what is trained.
        config: its ``optimizer``, ``training`` and ``compute``.
        folder: the run folder, the same for all workers.
        rank: this worker.
        world: how many there are.

    Returns:
        the best validation's metrics (``validation/...``), ``best_step``, ``steps`` and
        ``system/samples_per_second``.

    Raises:
        ConfigError: a batch that does not divide evenly, or a configuration that is not the checkpoint's.
        CheckpointError: a damaged checkpoint, or one of another number of workers.
        FloatingPointError: a loss that is not finite.
    """
    return _Run(task, config, folder, Ranks(rank, world)).train()


class _Run:
    """The state of one call of :func:`train`."""

    def __init__(self, task: Task, config: Config, folder: Path, ranks: Ranks) -> None:
        self.task, self.config, self.folder, self.ranks = task, config, folder, ranks
        training = self.training = config.training
        self.micro_batch = micro_batch(training, ranks.world)
        if task.samples < 1:
            raise ValueError("there is not a single training sample; look at the split of the data")
        self.order = Order(task.samples, training.batch, training.seed)
        self.total = training.epochs * self.order.steps_per_epoch
        self.device = resolve_device(config.compute.device)
        self.journal = Journal(folder) if ranks.rank == 0 else None
        self.checkpoints = Checkpoints(folder / "checkpoints", training.keep, ranks)
        self.layout = f"{ranks.world} workers, ZeRO-{config.compute.zero_stage}" if ranks.world > 1 else "1 worker"
        self.meter = Meter(ranks)
        self.best: dict[str, float] = {}
        self.clock = Clock()
        self.engines: dict[str, Engine] = {}

    def train(self) -> dict[str, float]:
        self.checkpoints.sweep()
        checkpoint = self.checkpoints.latest()
        start = 0
        if checkpoint is not None:
            self._agree(checkpoint)
            start = checkpoint.step
            if start == self.total:
                return dict(checkpoint.state["summary"])
        for name, module in self.task.networks.items():
            self.engines[name] = make_engine(
                module,
                self.task.learning_rates[name],
                self.config.optimizer,
                self.config.compute if name == self.task.best else self._beside(),
                getattr(self.config, "ema", None) if name == self.task.averaged else None,
                self.training.accumulate,
                self.micro_batch,
                self.ranks,
            )
        if checkpoint is not None:
            self._resume(checkpoint)
        self._write("start", step=start, total=self.total)
        self._steps(start)
        self._write("end", step=self.total)
        return self._summary()

    def _beside(self) -> Compute:
        """Networks beside the exported one, critics, stay whole: `Engine.frozen` needs all their weights."""
        compute = self.config.compute
        return dataclasses.replace(compute, zero_stage=min(compute.zero_stage, 2))

    # --- steps ---

    def _steps(self, start: int) -> None:
        training, epoch = self.training, self.order.steps_per_epoch
        batches = self._batches(start)
        clock = self.clock = Clock(self.clock.seconds)  # building the networks was no training
        for step in range(start, self.total):
            for name, engine in self.engines.items():
                base = self.task.learning_rates[name]
                engine.set_learning_rate(learning_rate(step, self.total, base, self.config.optimizer))
            # Layers such as dropout draw from the global state: seeded anew, they too depend on the step alone.
            torch.manual_seed(generator(training.seed, "step", step, self.ranks.rank).initial_seed())
            for _ in range(training.accumulate):
                with clock.waiting():
                    indices, batch = next(batches)
                batch = tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), batch)
                scalars = self.task.step(batch, self.engines, step, indices)
                self.meter.add(step, scalars)
            clock.tick()
            done = step + 1
            last = done == self.total
            if done % training.log_every == 0 or last:
                self._log(done)
            if last or done % (training.validate_every * epoch) == 0:
                with clock.stopped():
                    self._validate(done)
            if last or done % training.checkpoint_every == 0:
                self.meter.collect()  # no checkpoint of a run that has diverged
                with clock.stopped():
                    self.checkpoints.save(done, self._save, self._state(done))

    def _batches(self, start: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        accumulate = self.training.accumulate
        rank, world = self.ranks.rank * accumulate, self.ranks.world * accumulate

        def load(unit: int) -> tuple[list[int], dict[str, Any]]:
            step, part = divmod(unit, accumulate)
            indices = self.order.part(step, rank + part, world)
            return indices, self.task.load(indices)

        return prefetch(load, range(start * accumulate, self.total * accumulate))

    def _log(self, step: int) -> None:
        metrics = {f"train/{name}": value for name, value in self.meter.mean().items()}
        for name, engine in self.engines.items():
            suffix = "" if name == self.task.best else f"_{name}"
            metrics[f"train/grad_norm{suffix}"] = float(engine.grad_norm)
            base = self.task.learning_rates[name]
            metrics[f"train/lr{suffix}"] = learning_rate(step - 1, self.total, base, self.config.optimizer)
        metrics |= self.clock.interval(self.training.batch)
        metrics["system/memory_gib"] = psutil.Process().memory_info().rss / 2**30
        if self.device.type == "cuda":
            metrics["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._write("metrics", step=step, metrics=metrics)

    # --- validation and export ---

    def _validate(self, step: int) -> None:
        self.meter.collect()
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.evaluating())
            metrics = self._metrics() if self.task.validation else {}
            score, best = metrics.get(self.task.score), self.best.get(f"validation/{self.task.score}")
            named = {f"validation/{name}": value for name, value in metrics.items()}
            if named:
                self._write("metrics", step=step, metrics=named)
            if score is None or best is None or score < best:
                self.best = {**named, "best_step": step}
                self._export(metrics)
                self._draw(step)

    def _metrics(self) -> dict[str, float]:
        """Means over the validation set, each worker taking the same number of batches, padded with weight 0."""
        size, world = self.micro_batch, self.ranks.world
        networks = {name: engine.module for name, engine in self.engines.items()}
        sums: dict[str, Tensor] = {}  # name -> (sum, count)
        for first in range(0, self.task.validation, size * world):
            begin = first + self.ranks.rank * size
            places = list(range(begin, begin + size))
            real = torch.tensor([p < self.task.validation for p in places])  # (B,)
            indices = [min(p, self.task.validation - 1) for p in places]
            for name, values in self.task.validate(indices, networks).items():
                values = values.detach().to("cpu", torch.float64)  # (B,)
                counted = real & ~values.isnan()
                pair = torch.stack([values[counted].sum(), counted.sum().double()])
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair
        if self.task.score not in sums:
            raise KeyError(f"the task validates {', '.join(sums)}, not its score {self.task.score!r}")
        names = sorted(sums)
        totals = self.ranks.sum(torch.stack([sums[name] for name in names]))  # (metrics, 2)
        means = {name: float(total / count) for name, (total, count) in zip(names, totals) if count > 0}
        if not math.isfinite(means.get(self.task.score, math.nan)):
            raise FloatingPointError(f"validation {self.task.score} is not finite; {ADVICE}")
        return means

    def _export(self, metrics: dict[str, float]) -> None:
        states = {self.task.best: self.engines[self.task.best].weights()}
        if self.ranks.rank == 0:
            part, final, old = (self.folder / name for name in (".model.part", "model", ".model.old"))
            for leftover in (part, old):
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
            self.task.export(part, states, metrics)
            if final.exists():
                final.replace(old)
            part.replace(final)
            shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()

    def _draw(self, step: int) -> None:
        draw = getattr(self.task, "figures", None)
        if draw is None:
            return
        networks = {name: engine.module for name, engine in self.engines.items()}
        figures: dict[str, Callable[[Path], None]] = draw(networks, step)
        if self.ranks.rank == 0:
            (self.folder / "figures").mkdir(exist_ok=True)
            for name, write in figures.items():
                write(self.folder / "figures" / name)
                self._write("artifact", step=step, path=f"figures/{name}")

    # --- checkpoints ---

    def _save(self, folder: Path) -> None:
        for name, engine in self.engines.items():
            engine.save(folder / name)

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "configuration": _flat(self.config),
            "layout": self.layout,
            "best": self.best,
            "seconds": self.clock.seconds,
            "meter": self.meter.state(),
            "summary": self._summary() if step == self.total else None,
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.verify(checkpoint)
        for name, engine in self.engines.items():
            engine.load(checkpoint.folder / name)
        self.best = checkpoint.state["best"]
        self.clock = Clock(checkpoint.state["seconds"])
        self.meter.restore(checkpoint.state["meter"])

    def _agree(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that another configuration wrote."""
        before, now = checkpoint.state["configuration"], _flat(self.config)
        free = [k for k in FREE if k != "training.epochs" or self.config.optimizer.schedule == "constant"]
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key) and not any(key == k or key.startswith(k) for k in free):
                raise ConfigError(
                    f"{checkpoint.folder} was trained with {key}={before.get(key)}, not {now.get(key)}; "
                    f"set it back, or train in another folder (out=...)"
                )
        if checkpoint.step > self.total:
            raise ConfigError(
                f"{checkpoint.folder} is beyond the {self.total} steps of training.epochs={self.training.epochs}; "
                f"raise it, or train in another folder (out=...)"
            )
        if checkpoint.step < self.total and checkpoint.state["layout"] != self.layout:
            raise CheckpointError(
                f"{checkpoint.folder} was written by {checkpoint.state['layout']}, and this run has {self.layout}; "
                f"set compute.workers and compute.zero_stage back to resume"
            )

    # --- words ---

    def _summary(self) -> dict[str, float]:
        rate = self.total * self.training.batch / max(self.clock.seconds, 1e-9)
        return {**self.best, "steps": self.total, "system/samples_per_second": rate}

    def _write(self, event: str, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, **fields)


def _flat(config: Any) -> dict[str, Any]:
    """A configuration as dotted key -> JSON-able value."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(config), ""))
