"""Data for the fault benchmark, the record of a fault, and the comparison with a reference run."""

import hashlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvhpc.checkpoints.consolidate import consolidate, read_weights
from mvhpc.config import AutoencoderConfig, load_config
from mvhpc.execute import execute, plan
from mvhpc.inference.encode import EncodeConfig
from mvhpc.inference.encode import run as encode
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import JointModel, load, save_autoencoder
from mvhpc.models.model_folder import read_weights as read_file
from mvhpc.runs.folder import Run
from mvhpc.runs.journal import read
from mvhpc.training.scalars import ScalarsConfig
from shards.pack import pack
from shards.schema import Schema
from tests.conftest import SCHEMA, SMALL_SCALARS, write_bids
from tests.slurm_cluster import wait_for
from tests.test_slurm_faults import KEYS
from tests.toy_task import digest

BATCH, EPOCH = 2, 5  # samples of a step, steps of an epoch
RECOVERY_S = 600  # after which a fault counts as not survived


@dataclass
class Fault:
    """One fault and its outcome.

    Attributes:
        kind: a key of `chaos.DESCRIPTIONS`.
        bench: slurm, plain or tracked.
        zero: stage of ZeRO; 0 for one worker.
        seed: of the whole invocation.
        run: name of the run.
        step: the last step before it.
        when: seconds since 1970.
        seconds: until the next good step; None where there was none.
        again: steps that were repeated.
        survived: training continued by itself (or by the same command), and the finished run equals the reference.
        samples: lost or repeated in the run.
        note: the error, if any.
    """

    kind: str
    bench: str
    zero: int
    seed: int
    run: str
    step: int
    when: float
    seconds: float | None = None
    again: int = 0
    survived: bool = False
    samples: int = 0
    note: str = ""


def prepare(root: Path) -> None:
    """Pack twelve people, encode them with an untrained autoencoder and train a model of scalars, unless the data
    exist."""
    if (root / "latents" / "index.json").is_file():
        return
    small = AutoencoderConfig(
        channels=[8, 8, 8, 16], latent_channels=4, res_blocks=1, norm_groups=4, checkpointing=False
    )
    torch.manual_seed(0)
    save_autoencoder(root / "vae" / "model", Autoencoder(small), small)
    write_bids(root / "bids", 12)
    pack(
        root / "bids", root / "packed", storage="zarr", schema=Schema.from_dict(SCHEMA), spacing=8.0,
        shape=(16, 16, 16), max_rejects="0", fractions=(0.7, 0.2, 0.1), group="", folds=0, seed=0, workers=1,
        keep_suspect=True,
    )  # fmt: skip
    data = {"data": str(root / "packed"), "out": str(root / "scalars")}
    execute(plan("scalars", load_config(ScalarsConfig, "scalars", "default", (), data | SMALL_SCALARS)))
    places = {"data": str(root / "packed"), "vae": str(root / "vae"), "out": str(root / "latents")}
    encode(load_config(EncodeConfig, "encode", "default", (), places), Run(root / "latents.run"))


def keys(root: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Overrides of the joint stage's configuration."""
    places = [*(f"{key}={root / key}" for key in ("latents", "vae", "scalars")), f"out={out}"]
    length = [f"training.epochs={steps // EPOCH}", "training.validate_every=15"]
    return [*places, *KEYS, *length, *more]


# --- comparison with a reference run --------------------------------------------------------------------------------


def recovery(run: Path, when: float, restart: bool) -> tuple[float, int] | None:
    """Seconds from ``when`` to the next good step, and the number of repeated steps; None while there is none.

    Args:
        run: its folder.
        when: of the fault, seconds since 1970.
        restart: only a step after a restart of training counts.
    """
    reached, again, begun = 0, 0, not restart
    for event in read(run):
        late = event["time"] >= when
        if event["event"] == "start" and late:
            begun, again = True, max(again, reached - event["step"])
        elif event["event"] == "metrics" and "train/loss" in event["metrics"]:
            if late and begun:
                return event["time"] - when, again
            reached = max(reached, event["step"])
    return None


def points(run: Path, rolled_back: list[tuple[float, float]]) -> dict[tuple[int, str], set[str]]:
    """All metrics in a run's journal, by step and name, without those of the machine and of intervals rolled back."""
    found: dict[tuple[int, str], set[str]] = {}
    for event in read(run):
        if event["event"] != "metrics" or any(a <= event["time"] <= b for a, b in rolled_back):
            continue
        for name, value in event["metrics"].items():
            if not name.startswith("system/"):
                found.setdefault((event["step"], name), set()).add(repr(value))
    return found


def bits(run: Path) -> dict[str, str]:
    """SHA-256 of each file of weights of the exported model and of every file of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    states = {f"{newest.name}/{p.relative_to(newest)}": digest(read_weights(p)) for p in newest.rglob("*.pt")}
    model = load(run / "model", kind=JointModel)
    files = {name: read_file(model.folder, model.meta, name) for name in model.meta["networks"]}
    return states | {f"model/{name}": hashlib.sha256(content).hexdigest() for name, content in files.items()}


def audit(run: Path, whole: Path, rolled_back: list[tuple[float, float]] = []) -> tuple[int, str]:  # noqa: B006
    """Compare a finished run with a reference run.

    A repeated step must have had the same loss, gradient norm and other metrics both times, except within the
    intervals ``rolled_back``.

    Returns:
        samples lost or repeated, and a message on what differs; 0 and an empty text if nothing does.
    """
    ours, theirs = points(run, rolled_back), points(whole, [])
    wrong = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k) or len(ours.get(k, ())) != 1)
    differences = [f"{name} of step {step}" for step, name in wrong[:3]]
    mine, right = bits(run), bits(whole)
    differences += [f"bits of {name}" for name in sorted({*mine, *right}) if mine.get(name) != right.get(name)][:3]
    newest = max((run / "checkpoints").glob("step-*"))
    total = int(newest.name[5:])
    (skipped,) = {float(value) for value in ours[total, "train/skipped_steps"]}
    for network in sorted(path for path in newest.iterdir() if path.is_dir()):
        updates = {float(moments["step"]) for moments in consolidate(network).moments.values()}
        if updates != {total - skipped}:
            differences.append(f"{updates} updates of {network.name}, not {total - skipped:.0f}")
    return BATCH * len({step for step, name in wrong if name == "train/loss"}), "; ".join(differences)


def shuffled(kinds: list[str], draw: random.Random) -> Iterator[str]:
    """All kinds in random order, again and again."""
    while True:
        yield from draw.sample(kinds, len(kinds))


def apply(fault: Fault, victim: Any, act: Callable[[], float], restart: bool) -> bool:
    """Inject a fault and wait for the next good step; whether one came."""
    try:
        fault.when = time.time()
        fault.when = act()
        wait_for(lambda: recovery(victim.run, fault.when, restart) is not None, RECOVERY_S, "training does not go on")
        found = recovery(victim.run, fault.when, restart)
        assert found is not None
        fault.seconds, fault.again = round(found[0], 2), found[1]
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        fault.note = " ".join(f"{error}".split())[:300] or type(error).__name__
        return False
    fault.survived = True
    return True


def record_verdict(faults: list[Fault], samples: int, differs: str) -> None:
    """Record the result of a run's comparison in all of its faults."""
    for fault in faults:
        fault.samples = samples
        if differs:
            fault.survived, fault.note = False, f"{fault.note} {differs}".strip()
