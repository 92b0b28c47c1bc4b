"""What the training loop costs beside a bare one, and how long a start and a resumption take; one run for all.

    python benchmarks/overhead.py [--turns 10] [--rounds 5] [--markdown FILE]

The demo's joint network on latents of phantoms, the same batches and noise for all; an untrained autoencoder encodes
them, for what is in the latents costs nothing. A bare loop has what the weights need (noise, forward, loss, backward,
clipping, AdamW, the running average) and no more: it loads in turn and logs nothing.

In a round every way of training has a thread of the same process (of the same two, with two workers), and they take
turns of ten steps, so that what else the machine does meets all alike. What stays with a network for as long as it
lives, such as where in memory it is, makes two equal loops differ by two percent: hence rounds, each with new networks.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from mvhpc.config import Compute, JointConfig, VAEConfig, load_config
from mvhpc.devices import resolve_device, resolve_precision, send
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import save_autoencoder
from mvhpc.run import execute
from mvhpc.stages import STAGES
from mvhpc.tracking import STATE, Tracker
from mvhpc.training.cluster import launch
from mvhpc.training.joint import JointTask
from mvhpc.training.loop import train
from shards.files import write_text
from shards.loader import Order

PEOPLE = 64
WARM = 5  # steps at the beginning that do not count
TURN = 10  # steps
NEVER = 10**6
CHECKPOINTS = 50  # steps between them, where they are measured
KILLED = 14  # the step (from 0) in which a worker is killed; a checkpoint every 4
ONE = ("bare torch", "ours", "ours, MLflow", f"ours, checkpoint every {CHECKPOINTS}")
TWO = ("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", f"ZeRO-1, checkpoint every {CHECKPOINTS}")


# --- what is trained ------------------------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """Phantoms, shards, an untrained autoencoder and latents, by the package's own stages."""
    vae = load_config(VAEConfig, "vae", "demo", values={"out": str(root / "vae"), "data": ""})
    torch.manual_seed(0)
    save_autoencoder(root / "vae" / "model", Autoencoder(vae.model), vae.model)
    stages: dict[str, dict[str, str | int]] = {
        "phantom": {"subjects": PEOPLE, "out": "scans"},
        "pack": {"source": "scans", "out": "packed"},
        "encode": {"data": "packed", "vae": "vae", "out": "latents"},
    }
    for stage, values in stages.items():
        paths = {key: str(root / name) if isinstance(name, str) else name for key, name in values.items()}
        execute(stage, load_config(STAGES[stage].config, stage, "demo", values=paths))


def settings(root: Path, workers: int, steps: int) -> JointConfig:
    """The demo's joint stage for ``steps`` steps, without validation and checkpoints on the way."""
    paths = {"latents": str(root / "latents"), "vae": str(root / "vae"), "out": str(root / "joint")}
    config = load_config(
        JointConfig, "joint", "demo", values={**paths, "compute.threads": 1, "compute.workers": workers}
    )
    config.training.validate_every = config.training.checkpoint_every = NEVER
    epoch = Order(JointTask(config).samples, config.training.batch, 0).steps_per_epoch
    config.training.epochs = -(-steps // epoch)
    return config


class Turns:
    """Of several threads one goes on at a time, then the next."""

    def __init__(self, count: int) -> None:
        self._order = deque(range(count))
        self._changed = threading.Condition()

    def wait(self, me: int) -> None:
        """Until it is the turn of ``me``."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == me)

    def pass_on(self, leave: bool = False) -> None:
        """End the present turn; with ``leave`` there will be no other of this thread."""
        with self._changed:
            if leave:
                self._order.popleft()
            else:
                self._order.rotate(-1)
            self._changed.notify_all()


class Timed(JointTask):
    """The joint task, trained in turns with others.

    Attributes:
        seconds: of a step, a mean for each turn after the warm-up.
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
            torch.cuda.synchronize()  # what this turn has asked for is this turn's
        if self._done > WARM:
            self.seconds.append((time.perf_counter() - self._began) / TURN)
        self.turns.pass_on()
        self.turns.wait(self.me)
        self._began = time.perf_counter()


class Bare:
    """A network and AdamW as anyone writes them down, with what an engine is asked for."""

    def __init__(self, module: nn.Module, config: JointConfig, world: int) -> None:
        device = resolve_device(config.compute.device)
        self.device, self.module = device, module.to(device).train()
        self.network = DistributedDataParallel(self.module) if world > 1 else self.module
        o, self.clip, self.ema = config.optimizer, config.optimizer.clip, config.ema
        betas = (o.betas[0], o.betas[1])
        self.optimizer = torch.optim.AdamW(module.parameters(), o.lr, betas, weight_decay=o.weight_decay, fused=True)
        self.weights = [p.detach() for p in module.parameters()]
        self.average = [p.clone() for p in self.weights]
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
        torch._foreach_lerp_(self.average, self.weights, 1 - self.ema)


def bare(task: JointTask, config: JointConfig, rank: int, world: int) -> None:
    """The loop without us."""
    order = Order(task.samples, config.training.batch, config.training.seed)
    engines: Any = {"denoiser": Bare(task.networks["denoiser"], config, world)}
    device = resolve_device(config.compute.device)
    for step in range(config.training.epochs * order.steps_per_epoch):
        indices = order.part(step, rank, world)
        batch = tree_map_only(Tensor, lambda x: send(x, device), task.load(indices))
        task.step(batch, engines, step, indices)


@dataclass(frozen=True)
class Plan:
    """What the workers are told.

    Attributes:
        config: of the joint stage.
        rounds: over all ways of training.
    """

    config: JointConfig
    rounds: int

    @property
    def compute(self) -> Compute:
        """Where it runs."""
        return self.config.compute


# --- steps ----------------------------------------------------------------------------------------------------------


def run(way: str, task: Timed, config: JointConfig, folder: Path, rank: int, world: int) -> None:
    """Train to the end one way, in a folder of its own."""
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
    """MLflow beside, once it has come up: its start costs a run seconds, not every step."""
    folder.mkdir(parents=True)
    store = f"sqlite:///{folder.parent / 'mlflow.db'}"
    with Tracker("joint", config, folder, uri=store, experiment="overhead", inputs={}):
        while not json.loads((folder / STATE).read_text())["described"]:
            time.sleep(0.1)
        yield


def worker(plan: Plan, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Every way of training, round after round; seconds of a step by way, round and turn."""
    ways = ONE if world == 1 else TWO
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


def steps(root: Path, workers: int, turns: int, rounds: int) -> str:
    """A table of what a step takes each way: the mean over all turns; what it is over another way, and what checkpoints
    add, with a 95 % interval over rounds (Student's t)."""
    plan = Plan(settings(root, workers, WARM + turns * TURN + 1), rounds)
    found = launch("overhead:worker", plan, root / f"workers-{workers}", workers)
    ways = ONE if workers == 1 else TWO
    taken: dict[str, list[list[float]]] = {way: [[] for _ in range(rounds)] for way in ways}
    for key, seconds in found.items():
        way, number, _ = key.split("|")
        taken[way][int(number)].append(seconds)
    means = {way: [statistics.fmean(of_round) for of_round in of_way] for way, of_way in taken.items()}
    lines = ["| | step, ms | over the first, % | 95 % interval |", "|---|---:|---:|---:|"]
    for way in ways:
        cells = [f"{1000 * statistics.fmean(means[way]):.1f}", "", ""]
        if way != ways[0]:
            over = [ours / theirs - 1 for ours, theirs in zip(means[way], means[ways[0]], strict=True)]
            cells[1:] = _percent(over)
        lines.append(f"| {way} | {' | '.join(cells)} |")
        if "checkpoint" in way:
            cells = ["", *_percent([_checkpoints(of_round) for of_round in taken[way]])]
            lines.append(f"| - its checkpoints, over its other turns | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(shares: list[float]) -> tuple[str, str]:
    """Their mean and its 95 % interval."""
    low, high = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
    return f"{100 * statistics.fmean(shares):+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


def _checkpoints(seconds: list[float]) -> float:
    """What one adds to the steps up to the next, as a share: the turns in which one is begun and written beside the
    others, of the same network."""
    ends = [(WARM + turn * TURN) // CHECKPOINTS for turn in range(len(seconds) + 1)]
    written = [s for s, a, b in zip(seconds, ends, ends[1:]) if a != b]
    others = statistics.fmean(s for s, a, b in zip(seconds, ends, ends[1:]) if a == b)
    return TURN * (statistics.fmean(written) / others - 1) / CHECKPOINTS


# --- start and resumption -------------------------------------------------------------------------------------------


def mark(folder: Path, what: str) -> None:
    """Note the time of an event."""
    with (folder / "marks.jsonl").open("a") as file:
        file.write(json.dumps([what, time.time()]) + "\n")


class Killed(JointTask):
    """Notes its first steps; in step :data:`KILLED` worker 1 is killed, once."""

    def __init__(self, config: JointConfig, folder: Path, rank: int) -> None:
        super().__init__(config)
        self.folder, self.rank, self.begun = folder, rank, False

    def step(self, batch: dict[str, Any], engines: Any, step: int, indices: list[int]) -> dict[str, Tensor]:
        first, self.begun = not self.begun, True
        if first and self.rank == 0:
            mark(self.folder, "engines")
        if step == KILLED and self.rank == 1 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            mark(self.folder, "killed")
            os.kill(os.getpid(), signal.SIGKILL)
        scalars = super().step(batch, engines, step, indices)
        if self.rank == 0 and (first or step == KILLED):
            mark(self.folder, "first step" if first else "new step")
        return scalars


def started(config: JointConfig, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Train as worker ``rank``, noting what has been reached."""

    def reached(what: str) -> None:
        if rank == 0:
            mark(folder, what)

    reached("worker")
    import deepspeed  # noqa: F401

    reached("DeepSpeed")
    task = Killed(config, folder, rank)
    reached("data")
    return train(task, config, folder, rank, world)


def child(root: Path) -> None:
    """What the measured command does."""
    folder = root / "started"
    mark(folder, "imports")
    config = settings(root, 2, KILLED + 4)
    config.training.checkpoint_every = 4
    config.compute.retries = 2
    config.out = str(folder)
    launch("overhead:started", config, folder, 2)


def start(root: Path) -> str:
    """A table of where the time goes until the first step, and from a kill to the first new one."""
    folder = root / "started"
    folder.mkdir()
    mark(folder, "command")
    subprocess.run([sys.executable, __file__, "--child", str(root)], check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (folder / "marks.jsonl").read_text().splitlines()]
    names = [name for name, _ in events]
    cut = names.index("killed")
    words = {
        "imports": "Python and imports of the command",
        "worker": "Ray, its workers, their imports and process group",
        "DeepSpeed": "import of DeepSpeed",
        "data": "data and network",
        "engines": "engines; checkpoint read",
        "first step": "first step",
        "new step": "steps done again, and the first new one",
    }
    lines = ["| s | start | after the kill of a worker |", "|---|---:|---:|"]
    both = [dict(zip(names[:cut], _laps(events[:cut]))), dict(zip(names[cut:], _laps(events[cut:])))]
    for name, text in words.items():
        lines.append(f"| {text} | " + " | ".join(f"{laps[name]:.1f}" if name in laps else "" for laps in both) + " |")
    lines.append("| altogether | " + " | ".join(f"{sum(laps.values()):.1f}" for laps in both) + " |")
    return "\n".join(lines) + "\n"


def _laps(events: list[list[Any]]) -> list[float]:
    times = [when for _, when in events]
    return [b - a for a, b in zip([times[0], *times], times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help=f"of {TURN} steps, in a round; five or more")
    parser.add_argument("--rounds", type=int, default=5, help="two or more")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    parts: list[Callable[[Path], str]] = [
        lambda root: "One worker:\n\n" + steps(root, 1, options.turns, options.rounds),
        lambda root: "Two workers:\n\n" + steps(root, 2, options.turns, options.rounds),
        lambda root: "From the command to the first step, two workers:\n\n" + start(root),
    ]
    text = ""
    if torch.cuda.device_count() == 1:
        text, parts = f"{torch.cuda.get_device_name()}, one: no room for two workers.\n\n", parts[:1]
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        prepare(Path(name))
        for part in parts:
            text += part(Path(name)) + "\n"
            print(text, flush=True)
    if options.markdown:
        write_text(options.markdown, text)


if __name__ == "__main__":
    from overhead import main as imported  # under its importable name, which is how workers find it

    imported()
