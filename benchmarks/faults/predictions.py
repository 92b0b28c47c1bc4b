"""Kill `mvhpc predict` at random moments, start it again, and compare its rows with those of an undisturbed run.

    python -m benchmarks.faults.predictions --root /tmp/kills [--kills 20] [--workers 2] [--seed 0]

An untrained model of the early design predicts by chains, which takes a while for each person. With one worker the
process is killed (SIGKILL); with several, now the driver and now one of the workers, whom the driver replaces. Moments
are drawn evenly from the start of a process to some time after its first rows. The same command then continues. The
table and its rows in full precision have to be those of the undisturbed run, byte for byte, and nothing may be left of
the kills.
"""

import argparse
import contextlib
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from benchmarks.faults.processes import Forked
from mvhpc.cli import main as mvhpc
from mvhpc.config import AutoencoderConfig
from mvhpc.inference.rows import ROWS
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import save_autoencoder
from tests.conftest import pack_people, save_untrained, write_bids

PEOPLE = 160
SHARE = 0.15  # of the undisturbed run, the longest life of a process after its first rows
QUERY = ["--given", "image", "--want", "age,sex", "--split", "all", "--samples", "3", "compute.device=cpu", "batch=8"]
CHAINS = ["sampling.conditioning=clean", "sampling.steps=5", "sampling.stride=200", "compute.threads=1"]


def prepare(root: Path) -> None:
    """Pack people and write the model, unless they exist."""
    if (root / "early" / "model" / "model.json").is_file():
        return
    write_bids(root / "bids", PEOPLE)
    data = pack_people(root / "bids", (0.1, 0.1, 0.8))
    small = AutoencoderConfig(
        channels=[8, 8, 8, 16], latent_channels=4, res_blocks=1, norm_groups=4, checkpointing=False
    )
    torch.manual_seed(0)
    save_autoencoder(root / "vae" / "model", Autoencoder(small), small)
    save_untrained(data, "early", root / "vae", None)


def predict(root: str, out: str, workers: int) -> None:
    """The command, in a process of its own."""
    descriptor = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    places = ["--model", f"{root}/early", "--data", f"{root}/packed", "--out", out]
    raise SystemExit(mvhpc(["predict", *places, *QUERY, *CHAINS, f"compute.workers={workers}"]))


def first_rows(out: Path, process: Forked) -> None:
    """Wait until rows of this process are on disk, or it has ended."""
    live = out.with_name(f"{out.name}.run") / ROWS / "rows.tsv"
    before = live.stat().st_size if live.is_file() else 0
    while process.poll() is None and not (live.is_file() and live.stat().st_size > before):
        time.sleep(0.05)


def kill_worker(process: Forked, draw: random.Random) -> bool:
    """Kill one of the actors; whether there was one."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
        actors = [child for child in children if "".join(child.cmdline()).startswith("ray::Worker")]
        if actors:
            draw.choice(actors).kill()
            return True
    return False


def content(out: Path) -> list[bytes]:
    """The table, and its rows in full precision."""
    return [out.with_suffix(end).read_bytes() for end in (".tsv", ".parquet")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root, draw = options.root.resolve(), random.Random(options.seed)
    root.mkdir(parents=True, exist_ok=True)
    prepare(root)

    begin = time.monotonic()
    whole = root / f"whole-{options.seed}-{options.workers}.tsv"
    process = Forked(predict, str(root), str(whole), 1)
    first_rows(whole, process)
    started = time.monotonic() - begin
    assert process.wait(1800) == 0, f"the undisturbed run failed; see {whole}.log"
    length = time.monotonic() - begin - started
    expected = content(whole)
    print(f"undisturbed: first rows after {started:.1f} s, all {PEOPLE} after {started + length:.1f} s", flush=True)

    kills: Counter[str] = Counter()
    alive: list[float] = []
    number = runs = equal = 0
    while kills.total() < options.kills:
        out = root / f"killed-{options.seed}-{options.workers}-{number}.tsv"
        ended = False
        while not ended:
            begin = time.monotonic()
            process = Forked(predict, str(root), str(out), options.workers)
            of_worker = options.workers > 1 and draw.random() < 0.5
            while process.poll() is None and kills.total() < options.kills:
                if of_worker or draw.random() < 0.7:  # the others fall into the start of the process
                    first_rows(out, process)
                time.sleep(draw.uniform(0, SHARE * length))
                if process.poll() is None and of_worker:
                    kills["a worker"] += kill_worker(process, draw)
                elif process.poll() is None:
                    process.kill()
                    kills["the driver" if options.workers > 1 else "the process"] += 1
                    alive.append(time.monotonic() - begin)
                    break
            status = process.wait(1800)
            ended = status == 0
            assert status in (0, -9), f"status {status}; see {out}.log"
        number, runs = number + 1, runs + 1
        same = content(out) == expected and not (out.with_name(f"{out.name}.run") / ROWS).exists()
        equal += same
        print(f"run {number}: {kills.total()} kills so far; {'equal' if same else 'DIFFERENT'}", flush=True)
    counted = ", ".join(f"{name} {count} times" for name, count in sorted(kills.items()))
    life = f"; median life of a killed process {statistics.median(alive):.1f} s" if alive else ""
    print(
        f"{kills.total()} kills ({counted}) in {runs} runs, {equal} of them with the rows of the undisturbed one{life}"
    )


if __name__ == "__main__":
    main()
