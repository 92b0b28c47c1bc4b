"""Figures of quality control in words, with their units and limits, for pages."""

import math
import re
from collections.abc import Mapping, Sequence

from shards.qc.limits import INF, LIMITS, T1W, Limit, explain

PERCENT = "%"
FIGURES = {  # figure -> its name in words, unit, decimal places
    "hounsfield": ("air in Hounsfield units", PERCENT, 1),
    "flat": ("neighbouring voxels that are exactly equal", PERCENT, 1),
    "negative": ("negative voxels", PERCENT, 1),
    "voxel_mm": ("longest edge of a voxel", "mm", 1),
    "unoriented": ("header without orientation (1: yes)", "", 0),
    "header_sizes": ("pixdim beside the sform's voxel sizes", PERCENT, 1),
    "shear_degrees": ("axes off right angles", "degrees", 1),
    "header_degrees": ("qform turned against sform", "degrees", 1),
    "height_mm": ("from bottom to top", "mm", 0),
    "length_mm": ("from back to front", "mm", 0),
    "width_mm": ("from left to right", "mm", 0),
    "compact": ("signal in its bounding box", PERCENT, 1),
    "blur": ("width of edges", "voxels", 1),
    "gap": ("rays that cross a dark layer under a bright one", PERCENT, 1),
    "signal_outside": ("signal around the brain", PERCENT, 1),
    "volume_ml": ("volume", "ml", 0),
    "empty_faces": ("empty border of the image", PERCENT, 1),
    "cut": ("cross-section at the border of the image", PERCENT, 1),
    "outliers": ("voxels far brighter or darker than tissue", PERCENT, 2),
    "peak": ("strongest voxels, white matter being 1", "", 2),
    "solid": ("tissue within the outline", PERCENT, 1),
    "likeness": ("correlation with an average outline", "", 2),
    "upright": ("how much better it fits a brain than turned ones do", "", 3),
    "fluid": ("fluid and cortex, white matter being 1", "", 2),
    "rim": ("cortex, white matter being 1", "", 2),
    "blur_inside": ("width of edges inside of the brain", "voxels", 1),
    "box": ("sides of the packed box that it reaches", "", 0),
    "affine_covered": ("template's brain that is covered", PERCENT, 1),
    "affine_overlap": ("overlap with the template's brain (Dice)", "", 2),
    "affine_similarity": ("correlation with the template", "", 2),
    "rigid_covered": ("template's brain that is covered", PERCENT, 1),
    "rigid_overlap": ("overlap with the template's brain (Dice)", "", 2),
    "rigid_similarity": ("correlation with the template", "", 2),
}
STAGES = {"scan": "preprocess.", "brain": "preprocess.brain.", "packed": ""}  # column -> prefix of its figures


def figure_rows(
    figures: Mapping[str, float], contrast: str = T1W
) -> tuple[list[str], list[list[str]], dict[str, float]]:
    """A table of the figures that have a limit, and the other figures.

    Args:
        figures: of a record, without the variable's name; ``preprocess.FIGURE`` are of the scan as it came or of its
            registration, ``preprocess.brain.FIGURE`` of its brain, the others of the packed volume.
        contrast: BIDS suffix of the scan.

    Returns:
        The header; a row for each figure: its name in words, its limit, and its value in each state of the scan, empty
        where the limit does not hold; and the figures without a limit.
    """
    rest = dict(figures)
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for figure in FIGURES:
        limits = [x for x in LIMITS if x.figure == figure and (contrast == T1W or not x.t1w)]
        for stage, prefix in STAGES.items():
            holds = stage != "scan" or all(x.heads or x.step == "registered" for x in limits)
            if limits and holds and prefix + figure in rest:
                _, cells = rows.setdefault(figure, (_range(figure, limits), {}))
                cells[stage] = _value(figure, rest.pop(prefix + figure))
    used = [stage for stage in STAGES if any(stage in cells for _, cells in rows.values())]
    table = [[FIGURES[f][0], limit, *(cells.get(stage, "") for stage in used)] for f, (limit, cells) in rows.items()]
    return ["figure", "limit", *used], table, rest


def _value(figure: str, value: float) -> str:
    """``44.3 %``, ``162 mm`` or ``0.95``."""
    _, unit, places = FIGURES[figure]
    return f"{100 * value if unit == PERCENT else value:.{places}f} {unit}".rstrip()


def _range(figure: str, limits: Sequence[Limit]) -> str:
    """The range that all limits of a figure allow: ``at most 25 %``, ``500 to 2400 ml``."""
    _, unit, places = FIGURES[figure]
    low, high = max(limit.low for limit in limits), min(limit.high for limit in limits)
    high = high if unit or places else math.floor(high)  # a count
    least, most = (f"{100 * x if unit == PERCENT else x:g}" for x in (low, high))
    text = f"at most {most}" if low == 0 else f"at least {least}" if high in (1, INF) else f"{least} to {most}"
    return f"{text} {unit}".rstrip()


def flag_words(flag: str, values: Sequence[float]) -> str:
    """What a flag of several records means, in the words of its limit.

    Args:
        flag: see :func:`shards.qc.limits.explain`.
        values: of the figure, in the flagged records; a range of them stands where the words have the figure.
    """
    ends = [explain(flag, {flag: value}) for value in (min(values), max(values))]
    first, last = (re.split(r"(-?\d[\d.]*)", text) for text in ends)
    if first[::2] != last[::2]:  # of two limits
        return " / ".join(ends)
    return "".join(a if a == b else f"{a} to {b}" for a, b in zip(first, last))
