"""What MLflow gets of a journal: curves in groups, results of a stage as metrics, and its other scalars as tags.

MLflow shows a section of charts for each group, in the order of their names: ``loss/``, ``optimizer/``, ``system/``,
``test/``, ``validation/``. A scalar that belongs to no curve would be a chart with a single bar; it is a tag.
"""

from collections.abc import Iterable, Iterator
from typing import Any

TRAIN = "train/"
OPTIMIZER = ("grad_norm", "lr", "skipped_steps", "damaged_samples")  # of the training loop; the others are losses
ENDS = ("_low", "_high")  # of an interval


def curve(name: str) -> str:
    """The name of a metric: ``train/loss`` -> ``loss/total``, ``train/loss_image`` -> ``loss/image``, ``train/lr`` ->
    ``optimizer/lr``; names of other groups are kept."""
    if not name.startswith(TRAIN):
        return name
    part = name.removeprefix(TRAIN)
    if part.startswith(OPTIMIZER):
        return f"optimizer/{part}"
    return "loss/total" if part == "loss" else f"loss/{part.removeprefix('loss_')}"


def translate(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Journal events with MLflow's names.

    A summary becomes metrics and an event ``tags``. Its results are metrics, as ``test/age_mae``; both ends of an
    interval go into a tag of that name. Names without a group, and those that have a curve, are tags ``summary.NAME``.

    Args:
        events: of one run, in order.
    """
    curves: set[str] = set()
    for event in events:
        if event["event"] == "metrics":
            named = {curve(name): value for name, value in event["metrics"].items()}
            curves |= named.keys()
            yield event | {"metrics": named}
        elif event["event"] == "summary":
            step = event.get("step", 0)
            results, tags = _divide(event["metrics"], curves)
            yield event | {"event": "metrics", "step": step, "metrics": results}
            yield {"event": "tags", "time": event["time"], "tags": tags}
        else:
            yield event


def _divide(summary: dict[str, Any], curves: set[str]) -> tuple[dict[str, float], dict[str, str]]:
    """The results of a summary, and the tags of what is left."""
    results: dict[str, float] = {}
    tags: dict[str, str] = {}
    for name, value in summary.items():
        end = next((end for end in ENDS if name.endswith(end) and name.removesuffix(end) in summary), "")
        if end:
            continue
        number = isinstance(value, int | float)
        if number and "/" in name and name not in curves:
            results[name] = float(value)
        else:
            tags[f"summary.{name}"] = f"{value:.6g}" if isinstance(value, float) else str(value)
        if number and f"{name}_low" in summary and f"{name}_high" in summary:
            tags[name] = f"{value:.4g} [{summary[f'{name}_low']:.4g}, {summary[f'{name}_high']:.4g}]"
    return results, tags
