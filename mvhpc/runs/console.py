"""What a stage shows on the screen while it runs: notes, warnings and the bar of its training, from its run folder."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from mvhpc.runs.journal import POLL_S, JournalTail
from mvhpc.runs.position import read_position
from shards.progress import Progress

REDRAW_S = 1.0
NOTE = {
    "train/loss": "loss {:.4g}",
    "train/grad_norm": "gradient {:.3g}",
    "train/lr": "rate {:.2g}",
    "system/samples_per_second": "{:.3g} samples/s",
    "system/model_tflops": "{:.3g} TFLOP/s",
    "system/utilisation_percent": "{:.0f} % used",
    "system/data_wait_percent": "{:.0f} % waiting",
    "system/memory_gib": "{:.1f} GiB",
    "system/gpu_memory_gib": "{:.1f} GiB on the GPU",
}


class Console:
    """Follows a run folder in a thread of its own, from the events that are not there yet on.

    Args:
        stage: the stage's name.
        folder: the run folder.
    """

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        self._bar: Progress | None = None
        self._drawn = 0.0
        self._reader = JournalTail(folder)
        self._reader.new()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Begin to show what happens."""
        self._thread.start()

    def close(self) -> None:
        """Show what was written so far, and end."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._stop.is_set()
            for event in self._reader.new():
                self._show(event)
            if self._bar is not None and time.monotonic() - self._drawn >= REDRAW_S:
                self._move(self._bar)
            self._stop.wait(POLL_S)
        if self._bar is not None:
            self._bar.close()

    def _show(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                if self._bar is not None:
                    self._bar.close()
                self._bar = Progress(self.stage, event["total"], "step", initial=event["step"], at_once=True)
            case "note":
                self._say(f"{self.stage}: {event['text']}")
            case "warning":
                self._say(f"step {event['step']}: {event['text']}")
            case "metrics" | "end" if self._bar is not None:
                self._bar.update(max(0, event["step"] - self._bar.done), _notes(event.get("metrics", {})))

    def _move(self, bar: Progress) -> None:
        """Move the bar to where training is."""
        self._drawn = time.monotonic()
        position = read_position(self.folder)
        if position is not None and bar.total:
            rate = (bar.total - position.step) / position.seconds_left if position.seconds_left else None
            bar.update(max(0, position.step - bar.done), rate=rate)
        bar.refresh()

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.say(text)
        else:
            print(text, file=sys.stderr, flush=True)


def _notes(metrics: dict[str, float]) -> list[str] | None:
    """What the bar says of an interval of training; None for other metrics."""
    if "train/loss" not in metrics and "system/samples_per_second" not in metrics:
        return None
    return [text.format(metrics[name]) for name, text in NOTE.items() if name in metrics]
