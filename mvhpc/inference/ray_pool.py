"""Predictions by several workers: a Ray actor per device, which reads the shards itself.

Keys are sent, rows come back, a group at a time. A worker that dies is replaced, and what it had not answered is given
to others; a subject whose worker dies again and again is reported as failed. Rows do not depend on the worker.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import ConfigError
from mvhpc.inference.answers import Answered, answers, threads_of
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.runtime.devices import resolve_device
from mvhpc.runtime.ray_cluster import WorkerError, ray_session

DEATHS = 5  # of workers in succession at one subject alone, after which it has failed
FRUITLESS = 10  # deaths in succession without any row, for each worker
PATIENCE_S = 600.0  # without a worker


class Worker:
    """One worker of the pool."""

    def __init__(self, config: PredictConfig, threads: int) -> None:
        torch.set_num_threads(1)
        self.predictor, self.threads = open_predictor(config), threads

    def ready(self) -> None:
        """Returns once the model is loaded."""

    def answer(self, keys: list[str]) -> Iterator[Answered]:
        """The rows of ``keys``, a group at a time."""
        yield from answers(self.predictor, keys, self.threads)


def pool_answers(config: PredictConfig, keys: Sequence[str], group: int, logs: Path) -> Iterator[Answered]:
    """Predict ``keys`` by ``config.compute.workers`` workers, ``config.batch`` subjects at a time.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine for the time it takes.

    Args:
        config: of the stage; ``compute.threads`` 0 divides the cores of this machine among the workers.
        keys: of the subjects.
        group: subjects of a network call.
        logs: folder for Ray's own logs where it fails.

    Yields:
        The rows of one group, in the order in which groups are done.

    Raises:
        ConfigError: more workers than Ray has cores or GPUs for.
        WorkerError: workers that die or do not start, whatever they predict.
    """
    compute, size = config.compute, max(config.batch, group)
    batches = [list(keys[i : i + size]) for i in range(0, len(keys), size)]
    workers = min(compute.workers, len(batches))
    config = replace(config, model=str(Path(config.model).absolute()), data=str(Path(config.data).absolute()))
    device = resolve_device(compute.device)
    unit, threads = "GPU" if device.type == "cuda" else "CPU", threads_of(device, compute.threads, workers)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's core writes advice to the terminal
    with ray_session(1, logs):
        import ray

        available = int(ray.cluster_resources().get(unit, 0))
        if workers > available:
            raise ConfigError(
                f"compute.workers={compute.workers}: Ray has {available} {unit}s; take that many or fewer"
            )
        options = {"num_cpus": 1, "num_gpus": int(unit == "GPU"), "scheduling_strategy": "SPREAD", "max_restarts": 0}
        actor = ray.remote(Worker).options(**options)
        yield from Pool(lambda: actor.remote(config, threads), workers, group).answer(batches)


class Pool:
    """Workers and what they have yet to answer.

    Args:
        start: starts a worker, an actor of :class:`Worker`.
        workers: how many.
        group: subjects of a network call.
    """

    def __init__(self, start: Any, workers: int, group: int) -> None:
        self.start, self.group = start, group
        self.waiting: dict[Any, Any] = {}  # what a worker is about to give -> the worker
        self.open: dict[Any, list[str]] = {}  # of these, what answers -> keys that it has not answered
        self.queue: deque[list[str]] = deque()
        self.deaths: Counter[str] = Counter()
        self.alone: dict[str, int] = {}  # subjects that are predicted alone -> deaths of their workers since then
        self.workers, self.fruitless, self.fruitful = workers, 0, False
        for _ in range(workers):
            self._new_worker()

    def _new_worker(self) -> None:
        worker = self.start()
        self.waiting[worker.ready.remote()] = worker

    def answer(self, batches: Sequence[list[str]]) -> Iterator[Answered]:
        """The rows of all batches, a group at a time."""
        import ray

        self.queue.extend(batches)
        idle: list[Any] = []
        while self.queue or self.open:
            while self.queue and idle:
                worker, keys = idle.pop(), self.queue.popleft()
                stream = worker.answer.options(num_returns="streaming").remote(keys)
                self.waiting[stream], self.open[stream] = worker, keys
            done, _ = ray.wait(list(self.waiting), num_returns=1, timeout=PATIENCE_S, fetch_local=False)
            if not done and not self.open:
                raise WorkerError(f"no worker started within {PATIENCE_S / 60:.0f} minutes")
            for source in done:
                try:
                    found = ray.get(next(source) if source in self.open else source)
                except StopIteration:
                    self.open.pop(source)
                    idle.append(self.waiting.pop(source))
                except ray.exceptions.RayActorError as error:
                    self.waiting.pop(source)
                    yield from self._died(self.open.pop(source, []), error)
                else:
                    if found is None:
                        idle.append(self.waiting.pop(source))
                        continue
                    self.fruitless, self.fruitful = 0, True
                    answered = {*(row["key"] for row in found.rows), *found.failed}
                    self.open[source] = [key for key in self.open[source] if key not in answered]
                    yield found

    def _died(self, keys: list[str], error: Exception) -> Iterator[Answered]:
        """Replace a worker. The group it was at comes last, and after a second death one by one, at once."""
        self.fruitless += 1
        if self.fruitless >= FRUITLESS * self.workers:
            reason = " ".join(f"{error}".split())
            raise WorkerError(f"{self.fruitless} workers died in succession without a row; the last one: {reason}")
        self._new_worker()
        suspects, rest = keys[: self.group], keys[self.group :]
        if rest:
            self.queue.appendleft(rest)
        self.deaths.update(suspects)
        if len(suspects) == 1 and suspects[0] in self.alone:
            (key,) = suspects
            self.alone[key] += 1
            if self.alone[key] < DEATHS:
                self.queue.appendleft([key])
            else:
                self.fruitless = 0 if self.fruitful else self.fruitless
                yield Answered([], {key: f"its worker died {DEATHS} times"})
        elif any(self.deaths[key] > 1 for key in suspects) or len(suspects) == 1:
            self.alone.update(dict.fromkeys(suspects, 0))
            self.queue.extendleft([key] for key in suspects)
        elif suspects:
            self.queue.append(suspects)
