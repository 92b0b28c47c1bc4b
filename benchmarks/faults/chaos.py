"""Faults at random moments of real training runs, and whether the finished models are those of undisturbed runs.

    export PYTHONPATH=.:benchmarks
    python benchmarks/chaos.py --minutes 40 --seed 0 --root /tmp/chaos --markdown docs/reliability.md

The joint stage trains on tiny latents: on two nodes of a real SLURM that is started for it (ZeRO 1, 2 and 3 in turn,
each run hit once by every fault), and beside it in plain processes, which are hit again and again until their steps
are used up. A finished run must have the model, the whole last checkpoint and every step's metrics of an undisturbed
one, bit for bit. What came of each fault is a line of ROOT/faults.jsonl; the table counts all that are there, of
however many invocations.

SLURM wants Debian's slurm-wlm and munge; the plain processes need the right to mount (else run it all under
`unshare --map-root-user --mount`).
"""

import argparse
import contextlib
import dataclasses
import json
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.files import write_text

if TYPE_CHECKING:
    from benchmarks.faults.trials import Fault

MARK = "<!-- what follows is written by benchmarks/chaos.py -->\n"
WORDS = {
    "worker killed": "a worker's process is killed (SIGKILL)",
    "head killed": "Ray's head (`gcs_server`) is killed",
    "raylet killed": "Ray's daemon of the other node is killed",
    "driver killed": "the driver is killed",
    "supervisor killed": "the supervisor of the other node is killed",
    "first supervisor killed": "the supervisor of the first node is killed",
    "srun killed": "`srun`, which started the supervisors, is killed",
    "node down": "one of the two nodes is called down",
    "preempted": "preemption by another partition",
    "out of time": "the time limit",
    "killed": "the process is killed (SIGKILL)",
    "killed writing": "it is killed while a checkpoint is being written",
    "terminated": "SIGTERM, without a word before",
    "stopped": "the stop file",
    "disc full": "the disc is full for 1 to 3 s",
    "read-only": "the disc is read-only for 1 to 3 s",
    "poisoned": "NaN in a micro-batch",
    "five poisoned": "NaN in five micro-batches, one after another",
    "hang": "a step never ends (`compute.hang_minutes` of 24 s)",
    "server killed": "the MLflow server is killed, and started again 1 to 10 s later",
    "server away": "the MLflow server is away for an hour of training",
    "stage killed": "`mvhpc train joint` is killed (SIGKILL) while it fills MLflow",
}


class Ledger:
    """Every fault so far, as lines of a file."""

    def __init__(self, root: Path, commit: str) -> None:
        self.path, self.commit, self._lock = root / "faults.jsonl", commit, threading.Lock()

    def add(self, faults: "list[Fault]") -> None:
        lines = "".join(json.dumps(dataclasses.asdict(f) | {"commit": self.commit}) + "\n" for f in faults)
        with self._lock, self.path.open("a") as file:
            file.write(lines)

    def faults(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []


def table(faults: list[dict]) -> str:
    """What became of them, by kind."""
    lines = [
        "| what happens | survived / tried | next good step after, s: median | worst | steps done again, median "
        "| samples lost or repeated | last seeds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    titles = {"slurm": "two nodes of a SLURM, under ZeRO-1, 2, 3", "plain": "one process", "tracked": "with MLflow"}
    for bench, title in titles.items():
        lines.append(f"| **{title}** | | | | | | |")
        for kind, word in WORDS.items():
            these = [f for f in faults if (f["bench"], f["kind"]) == (bench, kind)]
            if these:
                lines.append(f"| {word} | {_numbers(these)} |")
    lines.append(f"| **all** | {_numbers(faults)} |")
    commits = ", ".join(sorted({f["commit"] for f in faults}))
    lost = [f for f in faults if not f["survived"]]
    told = [f"* {f['kind']}, step {f['step']} of {f['run']} (seed {f['seed']}): {f['note']}" for f in lost]
    words = "\n".join(["", f"{len(lost)} not survived:", "", *told, ""]) if lost else ""
    stages = ", ".join(f"{sum(f['zero'] == z for f in faults)} under ZeRO-{z}" for z in (1, 2, 3))
    runs = len({(f["seed"], f["run"]) for f in faults})
    return "\n".join([*lines, "", f"{runs} runs; {stages}. The package was that of commit {commits}.", words])


def _numbers(faults: list[dict]) -> str:
    seconds = [f["seconds"] for f in faults if f["seconds"] is not None]
    times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
    again = statistics.median([f["again"] for f in faults])
    samples = sum({(f["seed"], f["run"]): f["samples"] for f in faults}.values())
    seeds = ", ".join(str(s) for s in sorted({f["seed"] for f in faults})[-3:])
    stages = [sum(f["zero"] == zero for f in faults) for zero in (1, 2, 3)]
    tried = f"{len(faults)} ({', '.join(map(str, stages))})" if sum(stages) == len(faults) else f"{len(faults)}"
    return f"{sum(f['survived'] for f in faults)} / {tried} | {times} | {again:.0f} | {samples} | {seeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="until no more faults are begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, required=True, help="folder of all runs; on a local disc")
    parser.add_argument("--bench", choices=["both", "slurm", "plain", "hour"], default="both",
                        help="hour: one run whose MLflow server is away for so long")  # fmt: skip
    parser.add_argument("--markdown", type=Path, help="document whose last part becomes the table")
    parser.add_argument("--render", action="store_true", help="only the table of what was found before")
    options = parser.parse_args()
    root: Path = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    said = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    ledger = Ledger(root, said.stdout.strip())
    if not options.render:
        torment(root, options.seed, options.bench, time.monotonic() + 60 * options.minutes, ledger)
    if not (faults := ledger.faults()):
        raise SystemExit(f"no fault was tried yet in {root}")
    text = table(faults)
    print(text)
    if options.markdown:
        before = options.markdown.read_text().partition(MARK)[0] if options.markdown.is_file() else ""
        write_text(options.markdown, f"{before}{MARK}\n{text}\n".rstrip("\n") + "\n")


def torment(root: Path, seed: int, bench: str, deadline: float, ledger: Ledger) -> None:
    """Both benches, until the time is over."""
    from benchmarks.faults.processes import PLAIN, plain  # here, for the table is printed without torch
    from benchmarks.faults.slurm import SLURM, cluster, on_slurm
    from benchmarks.faults.tracked import KINDS, tracked
    from benchmarks.faults.trials import deal, prepare

    prepare(root)

    def processes() -> None:
        draw, number = random.Random(seed), 0
        plan = deal([k for k in WORDS if k in PLAIN], draw)
        while time.monotonic() < deadline:
            name = f"plain-{seed}-{number}"
            if number % 4 == 3:
                ledger.add(tracked(root, name, seed, draw.sample(KINDS, len(KINDS)), draw, deadline))
            else:
                ledger.add(plain(root, name, seed, plan, draw, deadline))
            number += 1

    def nodes() -> None:
        draw, number = random.Random(seed), 0
        while time.monotonic() < deadline:
            zero = 1 + (seed + number) % 3  # so that short invocations do not all begin with the same
            kinds = draw.sample([k for k in WORDS if k in SLURM], len(SLURM))  # each with each stage of ZeRO
            ledger.add(on_slurm(slurm, root, f"slurm-{seed}-{number}", zero, seed, kinds, draw, deadline))
            number += 1

    def hour() -> None:
        ledger.add(tracked(root, f"hour-{seed}", seed, ["server away"], random.Random(seed), deadline))

    benches: dict[str, list[Callable[[], None]]] = {
        "both": [processes, nodes],
        "plain": [processes],
        "slurm": [nodes],
        "hour": [hour],
    }
    with contextlib.ExitStack() as stack:
        # For as long as both: with the cluster ends every process that has its environment, whoever started that.
        slurm: Any = stack.enter_context(cluster(root)) if nodes in benches[bench] else None
        threads = [threading.Thread(target=target) for target in benches[bench]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
