"""Ways of training that are compared with each other, and how they take turns.

In a round each way has a thread of the same process (of the same two, with two workers). They take turns of ten steps,
so that other load on the machine affects all alike. Properties of one network, such as its place in memory, make two
equal loops differ by two percent; therefore there are several rounds, each with new networks.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from mvhpc.config import Compute, Tracking, load_config
from mvhpc.execute import execute, plan
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import save_autoencoder
from mvhpc.runs.mlflow_sync import synced
from mvhpc.runs.tracker import Tracker
from mvhpc.runtime.devices import resolve_device, resolve_precision, send
from mvhpc.stages import STAGES
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.loop import train
from mvhpc.training.vae import VAEConfig
from shards.order import Order

PEOPLE = 64
WARM = 5  # first steps, which do not count
TURN = 10  # steps
NEVER = 10**6
CHECKPOINTS = 50  # steps between two, where they are measured
BARE, OURS = "bare torch", "ours"
ONE = (BARE, OURS, "ours, MLflow", f"ours, checkpoint every {CHECKPOINTS}")
TWO = ("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", f"ZeRO-1, checkpoint every {CHECKPOINTS}")


def prepare(root: Path, people: int = PEOPLE) -> None:
    """Make phantoms, shards, an untrained autoencoder, latents and a model of scalars, by the stages of the package."""
    vae = load_config(VAEConfig, "vae", "demo", values={"out": str(root / "vae"), "data": ""})
    torch.manual_seed(0)
    save_autoencoder(root / "vae" / "model", Autoencoder(vae.model), vae.model)
    stages: dict[str, dict[str, str | int]] = {
        "phantom": {"subjects": people, "out": "scans"},
        "pack": {"source": "scans", "out": "packed"},
        "encode": {"data": "packed", "vae": "vae", "out": "latents"},
        "scalars": {"data": "packed", "out": "scalars", "training.epochs": 1, "compute.workers": 1},
    }
    for stage, values in stages.items():
        paths = {key: str(root / name) if isinstance(name, str) else name for key, name in values.items()}
        execute(plan(stage, load_config(STAGES[stage].config_class(), stage, "demo", values=paths)))


def settings(root: Path, workers: int, steps: int) -> JointConfig:
    """The demo's joint stage for ``steps`` steps, without validation or checkpoints before the end."""
    paths = {key: str(root / key) for key in ("latents", "vae", "scalars")} | {"out": str(root / "joint")}
    config = load_config(
        JointConfig, "joint", "demo", values={**paths, "compute.threads": 1, "compute.workers": workers}
    )
    config.training.validate_every = config.training.checkpoint_every = NEVER
    epoch = Order(JointTask(config).samples, config.training.batch, 0).steps_per_epoch
    config.training.epochs = -(-steps // epoch)
    return config


class Turns:
    """Lets one of several threads run at a time, in a fixed order."""

    def __init__(self, count: int) -> None:
        self._order = deque(range(count))
        self._changed = threading.Condition()

    def wait(self, me: int) -> None:
        """Block until it is the turn of thread ``me``."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == me)

    def pass_on(self, leave: bool = False) -> None:
        """End the current turn; with ``leave``, this thread gets no further one."""
        with self._changed:
            if leave:
                self._order.popleft()
            else:
                self._order.rotate(-1)
            self._changed.notify_all()


class Timed(JointTask):
    """The joint task, trained in turns with others.

    Attributes:
        seconds: mean time of a step, for each turn after the warm-up.
    """

    def __init__(self, config: JointConfig, turns: Turns, me: int) -> None:
        super().__init__(config)
        self.turns, self.me = turns, me
        self.seconds: list[float] = []
        self._done, self._began = 0, 0.0

    def step(self, batch: dict[str, Any], engines: Any, step: int, indices: list[int]) -> dict[str, Tensor]:
        if self._done >= WARM and (self._done - WARM) % TURN == 0:
            self._change()
        self._done += 1
        return super().step(batch, engines, step, indices)

    def _change(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # work queued in this turn belongs to this turn
        if self._done > WARM:
            self.seconds.append((time.perf_counter() - self._began) / TURN)
        self.turns.pass_on()
        self.turns.wait(self.me)
        self._began = time.perf_counter()


class Bare:
    """A network and AdamW without further machinery, with the interface of an engine.

    Args:
        module: the network.
        rate: of learning.
        decay: of the average of its weights; None for no average.
        config: of the joint stage.
        world: how many workers there are.
    """

    def __init__(self, module: nn.Module, rate: float, decay: float | None, config: JointConfig, world: int) -> None:
        device = resolve_device(config.compute.device)
        self.device, self.module = device, module.to(device).train()
        self.network = DistributedDataParallel(self.module) if world > 1 else self.module
        o, self.clip, self.decay = config.optimizer, config.optimizer.clip, decay
        betas = (o.betas[0], o.betas[1])
        self.optimizer = torch.optim.AdamW(module.parameters(), rate, betas, weight_decay=o.weight_decay, fused=True)
        self.weights = [p.detach() for p in module.parameters()]
        self.average = [] if decay is None else [p.clone() for p in self.weights]
        precision = resolve_precision(config.compute.precision, device)
        self.autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with self.autocast:
            return {name: x.float() for name, x in self.network(*args, **kwargs).items()}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.decay is not None:
            torch._foreach_lerp_(self.average, self.weights, 1 - self.decay)


def bare(task: JointTask, config: JointConfig, rank: int, world: int) -> None:
    """The bare training loop."""
    order = Order(task.samples, config.training.batch, config.training.seed)
    engines: Any = {
        name: Bare(module, task.learning_rates[name], config.ema if name in task.averaged else None, config, world)
        for name, module in task.networks.items()
    }
    device = resolve_device(config.compute.device)
    for step in range(config.training.epochs * order.steps_per_epoch):
        indices = order.part(step, rank, world)
        batch = tree_map_only(Tensor, lambda x: send(x, device), task.load(indices))
        task.step(batch, engines, step, indices)


@dataclass(frozen=True)
class Plan:
    """Arguments of the workers.

    Attributes:
        config: of the joint stage.
        ways: of training, of :data:`ONE` or :data:`TWO`.
        rounds: over all of them.
    """

    config: JointConfig
    ways: tuple[str, ...]
    rounds: int

    @property
    def compute(self) -> Compute:
        """Devices and workers."""
        return self.config.compute


def run(way: str, task: Timed, config: JointConfig, folder: Path, rank: int, world: int) -> None:
    """Train to the end in one way, in a folder of its own."""
    if way in (ONE[0], TWO[0]):
        bare(task, config, rank, world)
        return
    every = CHECKPOINTS if "checkpoint" in way else NEVER
    stage = int(way.removeprefix("ZeRO-")[0]) if way.startswith("ZeRO") else 0
    config = replace(
        config,
        training=replace(config.training, checkpoint_every=every),
        compute=replace(config.compute, zero_stage=stage),
        out=str(folder),
    )
    with _tracked(config, folder) if "MLflow" in way else nullcontext():
        train(task, config, folder, rank, world)


@contextmanager
def _tracked(config: JointConfig, folder: Path) -> Iterator[None]:
    """With MLflow tracking, entered once that has started: its start does not count."""
    folder.mkdir(parents=True)
    tracking = Tracking(f"sqlite:///{folder.parent / 'mlflow.db'}", "overhead")
    config = replace(config, tracking=tracking)
    with Tracker("joint", config, folder, name="joint", fingerprint="", inputs={}):
        while not synced(folder).get("described"):
            time.sleep(0.1)
        yield


def worker(plan: Plan, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Every way of training, round after round; seconds of a step by way, round and turn."""
    ways = plan.ways
    threads = torch.get_num_threads()
    found: dict[str, float] = {}

    def take_part(turns: Turns, me: int, folder: Path) -> list[float]:
        torch.set_num_threads(threads)  # OpenMP keeps it by thread
        turns.wait(me)
        try:
            task = Timed(plan.config, turns, me)
            run(ways[me], task, plan.config, folder, rank, world)
            return task.seconds
        finally:
            turns.pass_on(leave=True)

    for number in range(plan.rounds):
        turns = Turns(len(ways))
        folders = [folder / f"{way} {number}".replace(" ", "-") for way in ways]
        with ThreadPoolExecutor(len(ways)) as pool:
            taken = pool.map(take_part, [turns] * len(ways), range(len(ways)), folders)
        for way, seconds in zip(ways, taken, strict=True):
            found |= {f"{way}|{number}|{turn}": s for turn, s in enumerate(seconds)}
    return found
