"""HTML pages of predictions: one per scan, and one of the group. Each is a single file that loads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvhpc.evaluation.figures import views
from mvhpc.evaluation.page import render
from mvhpc.models.typicality import UNUSUAL
from shards.files import write_text
from shards.qc.limits import T1W
from shards.qc.wording import figure_rows
from shards.web_page import inline

TYPICALITY = "typicality"
MASK, TEMPLATE, LINE, FILL = "#ff5a4f", "#5aa2ff", "#1f5fa8", "#cfe0f3"


@dataclass(frozen=True)
class Answer:
    """A predicted variable of one scan.

    Attributes:
        name: of the variable.
        unit: of a number; may be empty.
        mean: of a number; None for a category, or without an answer.
        interval: 5 % and 95 % quantile of a number.
        curve: (x, density of x) of a number, arrays of one length.
        probabilities: class -> probability, of a category.
        note: what is known of the quality of such answers; empty for nothing.
        digits: decimal places of a number.
        given: whether an answer is given; otherwise all of the above is left out.
    """

    name: str
    unit: str = ""
    mean: float | None = None
    interval: tuple[float, float] | None = None
    curve: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    digits: int = 1

    @property
    def given(self) -> bool:
        """Whether there is an answer."""
        return self.mean is not None or bool(self.probabilities)

    def text(self) -> str:
        """The answer in one line."""
        if self.probabilities:
            best = max(self.probabilities, key=lambda name: self.probabilities[name])
            return f"{best} (probability {self.probabilities[best]:.2f})"
        if self.mean is None:
            return "not answered"
        line = f"{self.mean:.{self.digits}f} {self.unit}".strip()
        if self.interval:
            low, high = (f"{end:.{self.digits}f}" for end in self.interval)
            line += f" (90 % interval {low} to {high})"
        return line


@dataclass(frozen=True)
class Subject:
    """What the page of one scan shows.

    Attributes:
        key: ``sub-X`` or ``sub-X_ses-Y``.
        answers: in the order of the query.
        flags: what is doubtful about the scan, in words; empty if nothing is.
        volume: (H, W, D) in [0, 1], RAS; None for a scan that could not be preprocessed.
        mask: brain mask of the scan on the same grid, or None.
        template: brain mask of the template on the same grid, or None.
        figures: of quality, by name: ``typicality``, and those of :mod:`shards.qc`.
        contrast: BIDS suffix of the scan.
        page: whether there is one; a row without a scan stands in the group's table alone.
    """

    key: str
    answers: Sequence[Answer]
    flags: Sequence[str] = ()
    volume: NDArray[np.floating] | None = None
    mask: NDArray[np.floating] | None = None
    template: NDArray[np.floating] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    contrast: str = T1W
    page: bool = True


def write_pages(folder: Path, subjects: Sequence[Subject], about: str) -> None:
    """Write ``KEY.html`` of each scan, and ``index.html`` of all.

    Args:
        folder: of the pages; created where missing.
        subjects: in the order of the group's table.
        about: one line: which model predicted what, from what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for subject in (s for s in subjects if s.page):
        answers = [
            {"name": a.name, "text": a.text(), "note": a.note, "picture": _answer_picture(a) if a.given else ""}
            for a in subject.answers
        ]
        brain = "" if subject.volume is None else _brain_picture(subject.volume, subject.mask, subject.template)
        header, figures, others = figure_rows(subject.figures, subject.contrast)
        quality = {"header": header, "figures": figures, "others": others, "typicality": others.pop(TYPICALITY, None)}
        quality |= {"unusual": UNUSUAL}
        page = render("subject.html", subject=subject, answers=answers, brain=brain, about=about, **quality)
        write_text(folder / f"{subject.key}.html", page)
    rows = [
        {"key": s.key, "texts": [a.text() for a in s.answers], "flags": "; ".join(s.flags) or "ok", "page": s.page}
        for s in subjects
    ]
    names = [a.name for a in subjects[0].answers] if subjects else []
    notes = list(dict.fromkeys(a.note for s in subjects for a in s.answers if a.note))
    flagged = sum(bool(s.flags) for s in subjects)
    page = render("group.html", rows=rows, names=names, flagged=flagged, about=about, notes=notes)
    write_text(folder / "index.html", page)


def _brain_picture(
    volume: NDArray[np.floating], mask: NDArray[np.floating] | None, template: NDArray[np.floating] | None
) -> str:
    """Axial, coronal and sagittal slice with the outlines of both masks."""
    figure = Figure(figsize=(9, 3.3), facecolor="#000000", layout="constrained")
    shown = views(np.asarray(volume, np.float32))
    axes = figure.subplots(1, 3, width_ratios=[image.shape[1] for image in shown])
    for plane, (ax, image) in enumerate(zip(axes, shown)):
        ax.set_axis_off()
        ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        for outline, colour in ((template, TEMPLATE), (mask, MASK)):
            if outline is not None:
                cut = views(np.asarray(outline, np.float32))[plane]
                if cut.max() > 0.5 > cut.min():
                    ax.contour(cut, levels=[0.5], colors=[colour], linewidths=0.9)
    return inline(figure, "png")


def _answer_picture(answer: Answer) -> str:
    """The density of a number with its interval, or the probabilities of the classes."""
    if not answer.probabilities and answer.curve is None:
        return ""
    height = 0.5 + 0.34 * len(answer.probabilities) if answer.probabilities else 2.3
    figure = Figure(figsize=(7.5, height), layout="constrained")
    ax = figure.subplots()
    ax.spines[["top", "right", "left"]].set_visible(False)
    with matplotlib.rc_context({"text.parse_math": False}):  # classes may have dollar signs
        if answer.probabilities:
            _draw_probabilities(ax, answer.probabilities)
        else:
            _draw_density(ax, answer)
        return inline(figure, "svg")


def _draw_probabilities(ax: Axes, probabilities: Mapping[str, float]) -> None:
    names = list(probabilities)[::-1]
    values = [probabilities[name] for name in names]
    ax.barh(names, values, color=FILL, edgecolor=LINE, height=0.7)
    for place, value in enumerate(values):
        ax.text(value + 0.01, place, f"{value:.2f}", va="center")
    ax.set_xlim(0, 1.1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])


def _draw_density(ax: Axes, answer: Answer) -> None:
    assert answer.curve is not None
    x, density = answer.curve
    ax.plot(x, density, color=LINE)
    if answer.interval:
        low, high = answer.interval
        ax.fill_between(x, density, where=(x >= low) & (x <= high), color=FILL)
    if answer.mean is not None:
        ax.axvline(answer.mean, color=LINE, linewidth=1, linestyle="--")
    ax.set_ylim(0)
    ax.set_yticks([])
    ax.set_xlabel(f"{answer.name} ({answer.unit})" if answer.unit else answer.name)
