"""The cost of the training loop beside a bare one, and the time of a start and of a resumption.

    python -m benchmarks.speed.overhead [--turns 10] [--rounds 5] [--only checkpoint] [--markdown FILE]

The demo's joint network is trained on latents of phantoms, with the same batches and noise in all ways of training; an
untrained autoencoder encodes them, for speed does not depend on the content of latents. The bare loop does what the
weights need (noise, forward, loss, backward, clipping, AdamW, the running average) and nothing else: no prefetching,
no logging. `benchmarks/speed/ways.py` describes how the ways are kept comparable.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats

from benchmarks.speed.starts import start
from benchmarks.speed.ways import CHECKPOINTS, ONE, TURN, TWO, WARM, Plan, prepare, settings
from mvhpc.runtime.ray_cluster import launch
from shards.files import write_text


def steps(root: Path, workers: int, ways: tuple[str, ...], turns: int, rounds: int) -> str:
    """A table of the time of a step in each way: the mean over all turns, and the difference from the first way and the
    cost of checkpoints, with a 95 % interval over rounds (Student's t)."""
    plan = Plan(settings(root, workers, WARM + turns * TURN + 1), ways, rounds)
    found = launch("benchmarks.speed.ways:worker", plan, root / f"workers-{workers}", plan.compute)
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
    """The cost of checkpoints as a share of a step: turns in which one is written compared with the others of the same
    network."""
    ends = [(WARM + turn * TURN) // CHECKPOINTS for turn in range(len(seconds) + 1)]
    written = [s for s, a, b in zip(seconds, ends, ends[1:]) if a != b]
    others = statistics.fmean(s for s, a, b in zip(seconds, ends, ends[1:]) if a == b)
    return TURN * (statistics.fmean(written) / others - 1) / CHECKPOINTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help=f"of {TURN} steps, per round; five or more")
    parser.add_argument("--rounds", type=int, default=5, help="two or more")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only ways of training whose name contains it; no starts"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    options = parser.parse_args()
    one, two = (tuple(way for way in ways if options.only in way) for ways in (ONE, TWO))
    if not one + two:
        parser.error(f"--only {options.only}: the ways are {'; '.join(ONE + TWO)}")
    parts: list[Callable[[Path], str]] = []
    if one:
        parts.append(lambda root: "One worker:\n\n" + steps(root, 1, one, options.turns, options.rounds))
    text = ""
    if torch.cuda.device_count() == 1:
        text = f"{torch.cuda.get_device_name()}, one GPU: not measured with two workers.\n\n"
    elif two:
        parts.append(lambda root: "Two workers:\n\n" + steps(root, 2, two, options.turns, options.rounds))
        if not options.only:
            parts.append(lambda root: "From the command to the first step, two workers:\n\n" + start(root))
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        prepare(Path(name))
        for part in parts:
            table = part(Path(name)) + "\n"
            print(table, flush=True)
            text += table
    if options.markdown:
        write_text(options.markdown, text)


if __name__ == "__main__":
    main()
