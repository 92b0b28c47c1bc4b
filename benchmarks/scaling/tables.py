"""Predict training on 1 to 1,024 GPUs: time of a step, losses to failures, and the command to submit.

    python -m benchmarks.scaling.tables [--measure] [--markdown FILE]

``--measure`` replaces those constants that this machine can measure. ``--markdown`` writes the tables into FILE, in
place of all that follows its marker; a file without one keeps its text, and gets the marker and the tables at its end.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from benchmarks.scaling.rates import Rates, measure
from benchmarks.scaling.steptime import NODE, WORD, Setting, device, memory, passes, saving, step, volume, work_of
from benchmarks.scaling.workload import KINDS, PRESETS, count, settings
from shards.files import write_text

GPUS = (1, 4, 8, 32, 256, 1024)
ADVISED = (4, 32, 256)
PEOPLE = 9078  # of the paper's training side
PATHS = {
    "joint": {"latents": "runs/latents", "vae": "runs/vae", "scalars": "runs/scalars", "out": "runs/joint"},
    "vae": {"data": "packed", "out": "runs/vae"},
}
MARK = "<!-- What follows is printed by benchmarks/scaling/tables.py. -->"


def best(kind: str, preset: str, gpus: int, batch: int, rates: Rates) -> Setting:
    """The fastest setting that fits into memory, failures included; among equals the lowest ZeRO stage.

    Raises:
        ValueError: none fits.
    """
    fitting = []
    for stage in range(4) if gpus > 1 else range(1):
        for accumulate in (2**i for i in range(16) if batch % (gpus * 2**i) == 0):
            s = Setting(kind, preset, gpus, batch, accumulate, stage)
            if memory(s, rates) <= rates.filled * rates.memory:
                fitting.append(s)
                break  # smaller micro-batches are slower
    if not fitting:
        raise ValueError(f"{kind}, {preset}: no way to train a batch of {batch} on {gpus} GPUs fits into their memory")
    return min(fitting, key=lambda s: round(step(s, rates).seconds / saving(s, rates).goodput, 4))


def grown(kind: str, preset: str, gpus: int) -> int:
    """The preset's batch, or one row per GPU where that is more."""
    return max(settings(kind, preset).training.batch, gpus)


def speed(s: Setting, rates: Rates) -> float:
    """Samples a second while it trains."""
    return s.batch / step(s, rates).seconds


def checkpoint_every(s: Setting, rates: Rates) -> int:
    """Steps between checkpoints, to two digits."""
    steps = saving(s, rates).every / step(s, rates).seconds
    digits = max(0, math.floor(math.log10(max(steps, 1))) - 1)
    return max(1, round(steps / 10**digits) * 10**digits)


def command(s: Setting, rates: Rates) -> str:
    """The command to submit it; the learning rate grows with the square root of the batch."""
    config = settings(s.kind, s.preset)
    factor = math.sqrt(s.batch / config.training.batch)
    keys: dict[str, object] = {
        **PATHS[s.kind],
        "training.batch": s.batch,
        "training.accumulate": s.accumulate,
        "compute.zero_stage": s.zero_stage,
        "training.checkpoint_every": checkpoint_every(s, rates),
        "compute.precision": "bfloat16",
    }
    if s.kind == "joint" and config.model.scalars == "early":
        del keys["scalars"]
    if factor > 1:
        keys["optimizer.lr"] = f"{config.optimizer.lr * factor:.2g}"
        if s.kind == "vae":
            keys["discriminator_lr"] = f"{config.discriminator_lr * factor:.2g}"
    nodes, per_node = max(1, s.gpus // NODE), min(s.gpus, NODE)
    start = (
        f"python launchers/submit.py --stage {s.kind} --nodes {nodes} --gpus-per-node {per_node} --config {s.preset}"
    )
    return f"{start} \\\n    " + " ".join(f"{key}={value}" for key, value in keys.items())


# --- tables ---------------------------------------------------------------------------------------------------------


def table(head: str, rows: list[list[str]], right: bool = True) -> str:
    """A Markdown table; ``head`` holds the columns, separated by |; all but the first are aligned ``right``."""
    columns = head.split("|")
    lines = [columns, ["---", *["---:" if right else "---"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines) + "\n"


def constants(rates: Rates, measured: dict[str, str]) -> str:
    """Every constant with its source."""
    rows = []
    for f in dataclasses.fields(rates):
        source = measured.get(f.name, f.metadata["source"])
        rows.append([f.name, f"{getattr(rates, f.name):.3g}", f.metadata["unit"], source])
    return table("constant | value | of what | source", rows, right=False)


def per_sample(rates: Rates) -> str:
    """Work of one sample, by stage and preset."""
    rows = []
    for kind in KINDS:
        for preset in PRESETS:
            one, four = (count(kind, preset, rows, device(rates)) for rows in (1, 4))
            cells = [f"{one.parameters / 1e6:.0f}", f"{one.flops / 1e12:.2f}", f"{one.traffic / 1e9:.0f}"]
            cells += [f"{(four.traffic - one.traffic) / 3e9:.0f}", f"{one.kernels}", f"{1000 * one.seconds:.0f}"]
            cells += [f"{100 * four.flops / four.seconds / rates.peak:.0f}"]
            cells += [f"{one.activations / 1e9:.1f}", f"{(four.activations - one.activations) / 3e9:.1f}"]
            rows.append([f"{kind}, {preset}", *cells])
    head = "stage, preset | million weights | TFLOP | GB moved | GB of each further row | operators | GPU ms"
    return table(f"{head} | % of peak, 4 rows | activations, GB | GB of each further row", rows)


def scaled(kind: str, preset: str, rates: Rates) -> str:
    """One preset over numbers of GPUs."""
    config, rows = settings(kind, preset), []
    base = config.training.batch
    alone = best(kind, preset, 1, base, rates)
    for gpus in GPUS:
        s = best(kind, preset, gpus, grown(kind, preset, gpus), rates)
        kept = saving(s, rates)
        memories = [memory(dataclasses.replace(s, zero_stage=stage), rates) / 1e9 for stage in range(4)]
        hours = config.training.epochs * PEOPLE / speed(s, rates) / kept.goodput / 3600
        more = (1 + s.batch / base) / 2  # samples, if `base` is the critical batch (McCandlish et al. 2018)
        cells = [f"{s.batch}{'' if s.batch == base else ' (grown)'}", f"{s.rows} x {s.accumulate}", f"{s.zero_stage}"]
        cells += [f"{1000 * step(s, rates).seconds:.0f}", f"{speed(s, rates):.1f}"]
        cells += [f"{100 * speed(s, rates) / speed(alone, rates) / gpus:.0f}"]
        cells += [f"{100 * kept.goodput:.2f} / {100 * kept.goodput_llama:.2f}"]
        cells += [" / ".join(f"{m:.0f}" for m in memories), f"{hours:.1f}", f"{hours * more:.1f}"]
        rows.append([f"{gpus}", *cells])
    head = "GPUs | batch | rows x accumulate | ZeRO | step, ms | samples/s | efficiency, % | goodput, %"
    return table(f"{head} | GB a GPU, ZeRO-0 / 1 / 2 / 3 | hours | hours at worst", rows)


def made_of(kind: str, preset: str, rates: Rates) -> str:
    """The parts of a step's time, by ZeRO stage."""
    rows = []
    for gpus in ADVISED:
        found = best(kind, preset, gpus, grown(kind, preset, gpus), rates)
        for stage in range(4):
            s = dataclasses.replace(found, zero_stage=stage)
            t, kept = step(s, rates), saving(s, rates)
            near, far = (
                passes(stage, s.accumulate) * x / 1e9 for x in volume(WORD * work_of(s, rates).parameters, gpus)
            )
            ms = [f"{1000 * x:.1f}" for x in (t.gpu, t.host, t.update, t.exposed, t.reading, t.seconds)]
            checkpoint = [f"{1000 * kept.visible:.0f}", f"{kept.written:.1f}", f"{kept.every / 60:.1f}"]
            rows.append([f"{gpus}, ZeRO-{stage}", f"{near:.2f} + {far:.2f}", *ms, *checkpoint])
    head = "GPUs | GB sent inside + between nodes | GPU, ms | host | update | exposed | reading | step"
    return table(f"{head} | checkpoint stops, ms | written in, s | every, min", rows)


def report(rates: Rates, measured: dict[str, str], local: dict[str, float]) -> str:
    """The whole report, in Markdown."""
    parts = ["## Constants\n", constants(rates, measured)]
    if local:
        parts += ["Also measured on this machine; not used, for it is no GPU cluster:\n"]
        parts += [table("on this machine | value", [[name, f"{value:.3g}"] for name, value in local.items()])]
    parts += ["## Work per sample\n", per_sample(rates)]
    for kind in KINDS:
        for preset in PRESETS:
            parts += [f"## Stage {kind}, preset {preset}\n", scaled(kind, preset, rates), made_of(kind, preset, rates)]
    parts += ["## Recommended\n"]
    for kind in KINDS:
        for preset in PRESETS:
            for gpus in ADVISED:
                text = command(best(kind, preset, gpus, grown(kind, preset, gpus), rates), rates)
                parts += [f"{kind}, {preset}, {gpus} GPUs:\n\n```\n{text}\n```\n"]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what this machine can (two minutes)")
    parser.add_argument("--folder", type=Path, help="on the file system that writing is measured on")
    parser.add_argument("--markdown", type=Path, help="write the tables into this file, below its marker")
    options = parser.parse_args()
    text = report(*(measure(options.folder) if options.measure else (Rates(), {}, {})))
    print(text)
    if options.markdown:
        before = options.markdown.read_text().partition(MARK)[0]
        write_text(options.markdown, f"{before}{MARK}\n\n{text}")


if __name__ == "__main__":
    main()
