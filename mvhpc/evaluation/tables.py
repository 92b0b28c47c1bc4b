"""Tables of predictions, their scores, and the scoreboard: given variables in rows, wanted ones in columns."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvhpc.evaluation.metrics import Estimate, absolute_errors, hits, mean_over_subjects, share_of_subjects
from mvhpc.models.training_people import TrainingPeople, scalar_facts
from mvhpc.records import true_value
from shards.dataset import Dataset
from shards.schema import Schema, Variable

NOTHING = "nothing"
MISSING = "n/a"
GENERATED_BY = "GeneratedBy"  # key of a table's sidecar, beside those of its columns


def sidecar(path: Path) -> Path:
    """The path of the description of a table of predictions: ``age.tsv`` -> ``age.json``."""
    return path.with_suffix(".json")


def read_predictions(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table of predictions and its description, as ``mvhpc predict`` wrote them, also in an earlier version.

    Returns:
        The table, with ``key`` and ``subject`` in place of ``participant_id`` and ``session_id``; how it was made.

    Raises:
        FileNotFoundError: where one of the two files is missing.
    """
    path = Path(path)
    for file in (path, sidecar(path)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; `mvhpc predict ... --out {path}` writes it")
    # Only "n/a" is missing: a category may well be called "NA" or "None".
    frame = pd.read_csv(path, sep="\t", na_values=[MISSING], keep_default_na=False, quoting=csv.QUOTE_NONE)
    content = json.loads(sidecar(path).read_text())
    description = content.get(GENERATED_BY, content)
    if "participant_id" in frame:
        person, session = frame.pop("participant_id").astype(str), frame.pop("session_id")
        frame.insert(0, "key", person.where(session.isna(), person + "_" + session.astype(str)))
        frame.insert(1, "subject", person)
    for variable in Schema.from_dict(description["schema"]).scalars:
        for column in (variable.name, f"{variable.name}_true"):
            if variable.kind == "categorical" and column in frame:  # a class called "1" is not a number
                frame[column] = frame[column].astype("string").astype(object).where(frame[column].notna(), None)
    return frame, description


def label(given: Sequence[str]) -> str:
    """The name of a choice of given variables: ``image, sex`` or ``nothing``."""
    return ", ".join(given) or NOTHING


def score(frame: pd.DataFrame, variable: Variable, seed: int = 0) -> Estimate | None:
    """Mean absolute error of a continuous or accuracy of a categorical variable; None where not predicted.

    Args:
        frame: predictions, with the columns ``NAME``, ``NAME_true`` and ``subject``.
        variable: what was predicted.
        seed: of the bootstrap over subjects.
    """
    if variable.name not in frame or f"{variable.name}_true" not in frame:
        return None
    people = frame["subject"].astype(str).tolist()
    both = frame[variable.name].tolist(), frame[f"{variable.name}_true"].tolist()
    if variable.kind == "categorical":
        return share_of_subjects(hits(*both), people, seed)
    return mean_over_subjects(absolute_errors(*both), people, seed=seed)


def coverage(frame: pd.DataFrame, name: str, seed: int = 0) -> Estimate | None:
    """Coverage of the predicted 90 % interval, within [0, 1]; None where there is no interval.

    Args:
        frame: predictions, with the columns ``NAME_q05``, ``NAME_q95``, ``NAME_true`` and ``subject``.
        name: of a continuous variable.
        seed: of the bootstrap over subjects.
    """
    if f"{name}_q05" not in frame:
        return None
    low, high, true = (frame[f"{name}_{c}"].to_numpy(float) for c in ("q05", "q95", "true"))
    inside = np.where(np.isfinite(true), (low <= true) & (true <= high), np.nan)
    return share_of_subjects(inside, frame["subject"].astype(str).tolist(), seed)


def constant_predictions(
    dataset: Dataset, schema: Schema, want: Sequence[str], part: str = "test", split: str = "default"
) -> pd.DataFrame:
    """Predictions that ignore the subject: the mean, or the most frequent class, of those whom models learn from.

    These are the training and the validation part, as of :meth:`mvhpc.models.training_people.TrainingPeople.constant`.

    Args:
        dataset: packed data.
        schema: of the variables.
        want: names of scalars.
        part: the subjects to predict for.
        split: which recorded split.

    Returns:
        Predictions in the form of ``mvhpc predict``: ``key``, ``subject``, ``NAME`` and ``NAME_true``.

    Raises:
        ValueError: nobody there has a value of a variable.
    """
    keys = dataset.keys(part, split)
    learnt = [*dataset.keys("train", split), *dataset.keys("validation", split)]
    people = [subject_of(key) for key in learnt]
    frame = pd.DataFrame({"key": keys, "subject": [subject_of(key) for key in keys]})
    for name in want:
        variable = schema[name]
        facts = scalar_facts([true_value(dataset, key, variable) for key in learnt], people, variable.kind)
        constant = TrainingPeople(variables={name: facts}).constant(name)
        if constant is None:
            raise ValueError(f"{dataset.folder}: nobody in split {split!r} to learn from has a value of {name}")
        frame[name] = constant
        frame[f"{name}_true"] = [true_value(dataset, key, variable) for key in keys]
    return frame


def subject_of(key: str) -> str:
    """The subject of a key ``sub-…[_ses-…]``."""
    return key.split("_ses-")[0]


@dataclass(frozen=True)
class Table:
    """Cells of text under a header; the first ``left`` columns are aligned left, the others right."""

    header: list[str]
    rows: list[list[str]]
    left: int = 1

    def text(self) -> str:
        """Aligned columns for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]

        def line(cells: list[str]) -> str:
            names = [cell.ljust(width) for cell, width in zip(cells[: self.left], widths)]
            rest = (cell.rjust(width) for cell, width in zip(cells[self.left :], widths[self.left :]))
            return "   ".join([*names, *rest]).rstrip()

        rule = "   ".join("-" * width for width in widths)
        return "\n".join([line(self.header), rule, *map(line, self.rows)])

    def latex(self) -> str:
        """A ``tabular`` for LaTeX with the package booktabs."""
        lines = [" & ".join(map(_latex, cells)) + r" \\" for cells in [self.header, *self.rows]]
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        body = [lines[0], r"\midrule", *lines[1:]]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])

    def markdown(self) -> str:
        """A table for a Markdown page."""
        rule = ["---"] * self.left + ["---:"] * (len(self.header) - self.left)
        header, *rows = ([escape_markdown(cell) for cell in cells] for cells in [self.header, *self.rows])
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
LATEX |= {"±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"}


def _latex(cell: str) -> str:
    """A cell's text with LaTeX's special characters escaped; a hyphen before a digit becomes a minus sign."""
    text = "".join(LATEX.get(c, "\\" + c if c in "&%$#_{}" else c) for c in " ".join(cell.split()))
    text = re.sub(r"(?<![\w])-(?=\d)", "$-$", text)
    return f"{{}}{text}" if text[:1] in ("[", "*") else text  # otherwise arguments of the line break before


def escape_markdown(text: str) -> str:
    """A text in one line, without what ends a cell or begins HTML, code or emphasis."""
    special = r"[\\`|*]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)"
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


def scoreboard(
    entries: Sequence[tuple[str, pd.DataFrame]], schema: Schema, want: Sequence[str], seed: int = 0
) -> Table:
    """Errors and accuracies with 95 % intervals.

    Args:
        entries: (label, predictions), top row first. Predictions with the same label are merged, as those of the folds
            of a cross-validation; a person in several of them counts as one subject.
        schema: the predicted variables.
        want: the columns, in order.
        seed: of the bootstrap.

    Returns:
        A table whose columns are the error (in the variable's unit; smaller is better) or the accuracy, and for numbers
        with predicted intervals the coverage of the 90 % interval. ``subjects`` counts those whose value is known,
        ``21 (age), 22 (sex)`` where this differs between variables.
    """
    merged: dict[str, list[pd.DataFrame]] = {}
    for name, frame in entries:
        merged.setdefault(name, []).append(frame)
    variables = [schema[name] for name in want]
    header = ["given"]
    for variable in variables:
        unit = f" ({variable.unit})" if variable.unit else ""
        header.append(f"{variable.name} accuracy" if variable.kind == "categorical" else f"{variable.name} error{unit}")
    covered = [v.name for v in variables if any(f"{v.name}_q05" in frame for _, frame in entries)]
    header += [*(f"{name} in 90 % interval" for name in covered), "subjects"]
    rows = []
    for name, frames in merged.items():
        frame = pd.concat(frames, ignore_index=True)
        scores = [score(frame, variable, seed) for variable in variables]
        inside = [coverage(frame, variable, seed) for variable in covered]
        cells = [s.format(2) if s else "-" for s in [*scores, *inside]]
        people = {variable.name: found.n for variable, found in zip(variables, scores) if found}
        rows.append([name, *cells, _subjects(people)])
    return Table(header, rows)


def _subjects(people: Mapping[str, int]) -> str:
    """``22``, or ``21 (age), 22 (sex)`` where variables are known of different people."""
    if len(set(people.values())) < 2:
        return str(next(iter(people.values()), 0))
    return ", ".join(f"{n} ({name})" for name, n in people.items())
