"""Inject faults at random moments into training runs, and compare the finished runs with ones without faults.

    python -m benchmarks.faults.chaos --minutes 40 --seed 0 --root /tmp/chaos --markdown docs/reliability.md

The joint stage trains on tiny latents: on two nodes of a SLURM cluster that is started for it (ZeRO 1, 2 and 3 in turn,
one fault of each kind per run), and at the same time in single processes, with faults until the steps of a run end. A
finished run must equal a reference run without faults, bit for bit: the exported model, the last checkpoint and the
metrics of every step. Each fault adds a line to ROOT/faults.jsonl; the table covers all lines of that file.

The cluster needs Debian's slurm-wlm and munge; the single processes need the right to mount (otherwise run it under
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

MARK = "<!-- what follows is written by benchmarks/faults/chaos.py -->\n"
DESCRIPTIONS = {
    "worker killed": "a worker's process is killed (SIGKILL)",
    "head killed": "Ray's head (`gcs_server`) is killed",
    "raylet killed": "Ray's daemon of the other node is killed",
    "driver killed": "the driver is killed",
    "supervisor killed": "the supervisor of the other node is killed",
    "first supervisor killed": "the supervisor of the first node is killed",
    "srun killed": "`srun`, which started the supervisors, is killed",
    "node down": "one of the two nodes is set to DOWN",
    "preempted": "preemption by another partition",
    "out of time": "the time limit",
    "killed": "the process is killed (SIGKILL)",
    "killed writing": "it is killed while a checkpoint is being written",
    "terminated": "SIGTERM",
    "stopped": "the stop file",
    "disk full": "the disk is full for 1 to 3 s",
    "read-only": "the disk is read-only for 1 to 3 s",
    "poisoned": "NaN in a micro-batch",
    "five poisoned": "NaN in five consecutive micro-batches",
    "hang": "a step never ends (`compute.hang_minutes` of 24 s)",
    "server killed": "the MLflow server is killed, and started again 1 to 10 s later",
    "server away": "the MLflow server is down for an hour of training",
    "stage killed": "`mvhpc train joint` is killed (SIGKILL) while it writes to MLflow",
}


class Ledger:
    """All faults so far, one JSON object a line."""

    def __init__(self, root: Path, commit: str) -> None:
        self.path, self.commit, self._lock = root / "faults.jsonl", commit, threading.Lock()

    def add(self, faults: "list[Fault]") -> None:
        lines = "".join(json.dumps(dataclasses.asdict(f) | {"commit": self.commit}) + "\n" for f in faults)
        with self._lock, self.path.open("a") as file:
            file.write(lines)

    def faults(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []


def table(faults: list[dict]) -> str:
    """Markdown table of the outcomes by kind of fault."""
    lines = [
        "| fault | survived / tried | next good step after, s: median | worst | steps done again, median "
        "| samples lost or repeated | last seeds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    titles = {"slurm": "two nodes of a SLURM cluster, ZeRO-1, 2, 3", "plain": "one process", "tracked": "with MLflow"}
    for bench, title in titles.items():
        lines.append(f"| **{title}** | | | | | | |")
        for kind, word in DESCRIPTIONS.items():
            these = [f for f in faults if (f["bench"], f["kind"]) == (bench, kind)]
            if these:
                lines.append(f"| {word} | {_numbers(these)} |")
    lines.append(f"| **all** | {_numbers(faults)} |")
    commits = ", ".join(sorted({f["commit"] for f in faults}))
    lost = [f for f in faults if not f["survived"]]
    overrides = [f"* {f['kind']}, step {f['step']} of {f['run']} (seed {f['seed']}): {f['note']}" for f in lost]
    words = "\n".join(["", f"{len(lost)} faults not survived:", "", *overrides, ""]) if lost else ""
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
    parser.add_argument("--minutes", type=float, default=40, help="after which no fault is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, required=True, help="folder of all runs; on a local disk")
    parser.add_argument("--bench", choices=["both", "slurm", "plain", "hour"], default="both",
                        help="hour: one run whose MLflow server is down for an hour")  # fmt: skip
    parser.add_argument("--markdown", type=Path, help="document to write the table into, below its marker")
    parser.add_argument("--render", action="store_true", help="only render the table of earlier faults")
    options = parser.parse_args()
    root: Path = options.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    described = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    ledger = Ledger(root, described.stdout.strip())
    if not options.render:
        run_benches(root, options.seed, options.bench, time.monotonic() + 60 * options.minutes, ledger)
    if not (faults := ledger.faults()):
        raise SystemExit(f"no faults are recorded yet in {root}")
    text = table(faults)
    print(text)
    if options.markdown:
        before = options.markdown.read_text().partition(MARK)[0] if options.markdown.is_file() else ""
        write_text(options.markdown, f"{before}{MARK}\n{text}\n".rstrip("\n") + "\n")


def run_benches(root: Path, seed: int, bench: str, deadline: float, ledger: Ledger) -> None:
    """Run the chosen benches until the deadline."""
    from benchmarks.faults.processes import PLAIN, plain  # here, so that --render needs no torch
    from benchmarks.faults.slurm import SLURM, cluster, on_slurm
    from benchmarks.faults.tracked import KINDS, tracked
    from benchmarks.faults.trials import prepare, shuffled

    prepare(root)

    def processes() -> None:
        draw, number = random.Random(seed), 0
        plan = shuffled([k for k in DESCRIPTIONS if k in PLAIN], draw)
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
            zero = 1 + (seed + number) % 3  # so that short invocations begin with different stages
            kinds = draw.sample([k for k in DESCRIPTIONS if k in SLURM], len(SLURM))  # each with each stage of ZeRO
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
        # For both benches: stopping the cluster kills every process that has its environment.
        slurm: Any = stack.enter_context(cluster(root)) if nodes in benches[bench] else None
        threads = [threading.Thread(target=target) for target in benches[bench]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
