"""Everything that needs a GPU, in one command and at most eight minutes; a tiny version runs on a CPU.

    python benchmarks/gpu.py [--tiny] [--out FILE] [--only SECTION ...] [--seconds 480]
    python benchmarks/gpu.py --render FILE [--into docs/results-gpu.md]

Sections, of preset `h200`: `training` and `autoencoder` (step time and share of the GPU's bfloat16 peak, eager and
with the repeated blocks compiled), `inference` (predictions of age and sex from voxels, draws of them, chains of
volumes, encoding of a scan), `extraction` (the brain of a scan by deepbet), `repeatability` (two training runs of
`vae`, `baseline`, `scalars` and `joint` end with equal bits) and `loop` (the training loop beside a bare one).

Each section is a process with a time limit, so that neither a failure nor a hang nor its memory reaches the others.
Results, and the errors of what failed, are written to one JSON file after each section. The exit status is 1 where
anything failed. The documents' tables are rendered from that file, between the lines `<!-- gpu.json -->` and
`<!-- end -->`.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `benchmarks`, wherever this file is run from

from shards.files import write_text  # noqa: E402

SECTIONS = {  # name -> function, seconds at most
    "training": ("benchmarks.gpu_sections.training:joint", 140),
    "autoencoder": ("benchmarks.gpu_sections.training:autoencoder", 125),
    "inference": ("benchmarks.gpu_sections.inference:inference", 80),
    "extraction": ("benchmarks.gpu_sections.extraction:extraction", 35),
    "repeatability": ("benchmarks.gpu_sections.repeatability:repeatability", 80),
    "loop": ("benchmarks.gpu_sections.loop:loop", 40),
}
PRELOADED = ["mvhpc.training.loop", "mvhpc.training.joint", "mvhpc.training.vae", "mvhpc.inference.predictor"]


def child(name: str, tiny: bool, folder: Path, out: Path) -> None:
    """Run one section in this process; ``out`` has its results so far after each measurement."""
    os.setsid()  # so that the compiler's helpers end with this process
    from benchmarks.gpu_sections.settings import FULL, TINY

    found: dict[str, Any] = {"results": {}, "errors": {}}
    module, function = SECTIONS[name][0].split(":")
    try:
        for label, job in getattr(import_module(module), function)(folder, TINY if tiny else FULL):
            found["errors"][label] = "not finished"
            write_text(out, json.dumps(found))
            print(f"{name}: {label}", file=sys.stderr, flush=True)
            try:
                found["results"][label] = job()
                del found["errors"][label]
            except Exception as error:
                found["errors"][label] = describe(error)
            write_text(out, json.dumps(found))
    except Exception as error:
        found["errors"]["preparation"] = describe(error)
        write_text(out, json.dumps(found))


def describe(error: Exception) -> str:
    """What failed, in a line; the traceback is printed."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def section(name: str, tiny: bool, folder: Path, limit: float) -> dict[str, Any]:
    """Results and errors of one section, which is stopped after ``limit`` seconds."""
    if limit <= 0:
        return {"seconds": 0.0, "results": {}, "errors": {"time": "not started: no time was left"}}
    context, out, start = multiprocessing.get_context("forkserver"), folder / f"{name}.json", time.monotonic()
    context.set_forkserver_preload(PRELOADED)  # imported once, not once a section
    process = context.Process(target=child, args=(name, tiny, folder, out))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if process.pid is not None and late:
        for stop in (os.killpg, os.kill):  # the process alone where it has no group of its own yet
            try:
                stop(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.join()
    found: dict[str, Any] = {"results": {}, "errors": {}}
    if out.is_file():
        found = json.loads(out.read_text())
    if late:
        found["errors"]["time"] = f"stopped after its limit of {limit:.0f} s"
    elif process.exitcode:
        found["errors"]["process"] = f"ended with status {process.exitcode}"
    return {"seconds": time.monotonic() - start, **found}


def measure(tiny: bool, names: list[str], seconds: float, out: Path) -> dict[str, Any]:
    """Run the sections in turn, and write the report after each."""
    start = time.monotonic()
    report: dict[str, Any] = {
        "device": describe_device(),
        "versions": {name: version(name) for name in ("torch", "monai", "numpy", "mvhpc")},
        "commit": commit(),
        "date": date.today().isoformat(),
        "tiny": tiny,
        "sections": {},
    }
    with tempfile.TemporaryDirectory(prefix="mvhpc-gpu-") as folder:
        for name in names:
            left = seconds - (time.monotonic() - start)
            limit = left if tiny else min(left, SECTIONS[name][1])
            report["sections"][name] = section(name, tiny, Path(folder), limit)
            report["seconds"] = time.monotonic() - start
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(report, indent=1) + "\n")
    return report


def describe_device() -> dict[str, Any]:
    """The device, and the libraries that compute on it."""
    import torch

    facts: dict[str, Any] = {"name": "CPU", "torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": version("triton"),
        }
    return facts


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it; empty without Git."""
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps, to try it on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=480, help="of all sections together")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the tables of a results file")
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="with --render: write them between its markers")
    options = parser.parse_args()
    from benchmarks.gpu_sections.tables import insert, render

    if options.into and not options.render:
        parser.error("--into needs --render")
    if options.render:
        text = render(json.loads(options.render.read_text()))
        if options.into:
            insert(text, options.into)
        else:
            print(text, end="")
        return 0
    report = measure(options.tiny, options.only, options.seconds, options.out)
    print(render(report), end="")
    return int(any(found["errors"] for found in report["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
