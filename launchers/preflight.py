"""Checks before training, for problems that would make a job fail or slow. Each problem names its node.

Every node checks itself and writes a report to the run folder; node 0 compares the reports and lists all problems.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mvhpc.runtime.cudnn import cudnn_fault

PACKAGES = ["mvhpc", "torch", "deepspeed", "ray", "monai", "numpy", "zarr", "safetensors"]
FREE_GIB = 1.0  # least free space of the run folder (checkpoints) and the scratch folder (Ray's session)
GPU_FAULTS = {  # part of a name in `nvidia-smi -q -x` -> the meaning of any value that is not healthy
    "uncorrectable": "has uncorrected memory errors",
    "remapped_row_pending": "has memory rows to remap; it needs a reset",
    "remapped_row_failure": "has memory rows that cannot be remapped",
    "pending_retirement": "has memory pages to retire; it needs a reset",
    "hw_slowdown": "is slowed down by its hardware (heat or power)",
}
HEALTHY = {"0", "No", "Not Active", "N/A", ""}


def examine(run: Path, inputs: Mapping[str, Sequence[str]], scratch: Path, gpus: int) -> dict[str, Any]:
    """Check this node.

    Args:
        run: the run folder.
        inputs: configuration key -> paths that the stage reads.
        scratch: this node's scratch folder.
        gpus: number of the job's GPUs on this node.

    Returns:
        ``versions``, and ``problems`` without the node's name.
    """
    problems = [*_folder(run), *_scratch(scratch), *_gpus(gpus), *_cudnn(gpus)]
    for key, paths in inputs.items():
        for path in paths:
            problems += _readable(key, Path(path))
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"versions": versions, "problems": problems}


def _folder(run: Path) -> list[str]:
    probe = run / "jobs" / f".probe-{platform.node()}-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return [f"cannot write to the run folder {run} ({error.strerror}); check its permissions and quota"]
    free = shutil.disk_usage(run).free / 2**30
    if free < FREE_GIB:
        return [f"only {free:.1f} GiB are free in the run folder {run}; make room for checkpoints"]
    return []


def _scratch(scratch: Path) -> list[str]:
    problems = []
    free = shutil.disk_usage(scratch).free / 2**30
    if free < FREE_GIB:
        problems.append(
            f"only {free:.1f} GiB are free in {scratch.parent}; set another `scratch` in the cluster's YAML"
        )
    return problems


def _readable(key: str, path: Path) -> list[str]:
    """Read the first bytes of an input's index and of one of its data files."""
    try:
        files = [path]
        if not path.is_file():
            next(path.iterdir(), None)
            files = [path / "index.json", path / "model" / "model.json", *sorted(path.glob("*.tar"))[:1]]
        for file in files:
            if file.is_file():
                with file.open("rb") as content:
                    content.read(4096)
    except OSError as error:
        return [f"cannot read {key}={path} ({error.strerror}); is it on a file system that all nodes share?"]
    return []


def _gpus(expected: int) -> list[str]:
    if expected == 0:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, check=True, timeout=60)
        found = ElementTree.fromstring(done.stdout).findall("gpu")
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        return [f"nvidia-smi fails ({error}); exclude the node and report it to the site"]
    problems = []
    if len(found) < expected:
        problems.append(f"{expected} GPUs were requested and nvidia-smi lists {len(found)}; exclude the node")
    for number, gpu in enumerate(found):
        for part in [gpu.find("ecc_errors/volatile"), *gpu]:
            for entry in part if part is not None else ():
                meaning = next((m for word, m in GPU_FAULTS.items() if word in entry.tag), None)
                if meaning and (entry.text or "").strip() not in HEALTHY:
                    problems.append(f"GPU {number} {meaning}; exclude the node and report it to the site")
    return list(dict.fromkeys(problems))


def _cudnn(gpus: int) -> list[str]:
    """Check for faulty cuDNN versions. Another process imports torch, which this one would keep in memory."""
    if gpus == 0:
        return []
    command = [sys.executable, "-c", "import torch; print(torch.backends.cudnn.version() or 0)"]
    try:
        version = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    except subprocess.SubprocessError as error:
        return [f"torch cannot be imported ({error})"]
    fault = cudnn_fault(int(version))
    return [] if fault is None else [fault]


def find_problems(reports: Mapping[str, Mapping[str, Any]], missing: Sequence[str] = ()) -> list[str]:
    """All problems of all nodes.

    Args:
        reports: node name -> the result of :func:`examine`, with ``allreduce`` if that was checked.
        missing: nodes without a report.
    """
    problems = [f"{node}: {problem}" for node, report in reports.items() for problem in report["problems"]]
    problems += [
        f"{node}: its report is not in the run folder; is that on a file system that all nodes share?"
        for node in missing
    ]
    versions = {node: report["versions"] for node, report in reports.items()}
    for name in sorted({name for found in versions.values() for name in found}):
        versions_of = {node: found.get(name, "none") for node, found in versions.items()}
        most_common, _ = Counter(versions_of.values()).most_common(1)[0]
        problems += [
            f"{node}: {name} {version} where other nodes have {most_common}; let all nodes use one environment"
            for node, version in versions_of.items()
            if version != most_common
        ]
    for node, report in reports.items():
        if (found := report.get("allreduce")) is None:
            continue
        if "error" in found:
            problems.append(
                f"{node}: the test all-reduce failed ({found['error']}); set the `interface` between nodes in the "
                f"cluster's YAML, or exclude the node"
            )
        elif not found["correct"]:
            problems.append(
                f"{node}: the test all-reduce returned a wrong sum; exclude the node and report it to the site"
            )
    return problems
