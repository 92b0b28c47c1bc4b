"""The training loop beside a bare one, in turns of a few steps on the demo's joint network."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections.settings import Settings
from benchmarks.speed.ways import BARE, OURS, TURN, WARM, Plan, prepare, settings, worker

Job = Callable[[], dict[str, Any]]


def loop(folder: Path, sizes: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``loop``."""

    def compare() -> dict[str, Any]:
        root = folder / "phantoms"
        if not root.is_dir():
            prepare(root, sizes.people)
        config = settings(root, 1, WARM + sizes.turns * TURN + 1)
        found = worker(Plan(config, (BARE, OURS), sizes.rounds), folder / "loop", 0, 1)
        bare, ours = (
            [
                statistics.median(s for key, s in found.items() if key.startswith(f"{way}|{number}|"))
                for number in range(sizes.rounds)
            ]
            for way in (BARE, OURS)
        )
        ratios = [ours / bare for ours, bare in zip(ours, bare, strict=True)]
        return {
            "bare_step_ms": 1000 * statistics.fmean(bare),
            "ours_step_ms": 1000 * statistics.fmean(ours),
            "ratio": statistics.fmean(ratios),
            "ratio_of_rounds": ratios,
        }

    yield "ours beside a bare loop", compare
