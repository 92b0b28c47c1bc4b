"""What is wrong with a subject's prediction, in plain words."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mvhpc.inference.prediction_tables import Row
from mvhpc.models.typicality import UNUSUAL
from mvhpc.variables import Value
from shards.schema import Schema


def recipe_flag(ours: Any, theirs: Any) -> list[str]:
    """What is wrong with all scans of a data set whose preprocessing is not the model's.

    Args:
        ours: recipe of the model's data; None where it is not known.
        theirs: of the data.
    """
    if ours == theirs:
        return []
    if ours is None:
        return ["the scans were preprocessed, those of the training were not"]
    if theirs is None:
        return ["the scans were not preprocessed, those of the training were"]
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return [f"the scans were preprocessed differently from those of the training ({', '.join(keys)})"]


def row_flag(
    schema: Schema,
    ranges: Mapping[str, Sequence[float]],
    p_values: Mapping[str, Tensor],
    given: Mapping[str, Value],
    answers: Row,
    want: Sequence[str],
) -> list[str]:
    """What is wrong with one subject.

    Args:
        schema: of the model.
        ranges: number -> least and greatest value in training.
        p_values: by given volume, of the scan's two distances, (2,).
        given: scalars of the subject, None where missing.
        answers: the subject's row.
        want: names of the wanted scalars.
    """
    words = []
    for name, p in p_values.items():
        shape, detail = (p < UNUSUAL).tolist()
        if shape or detail:
            what = " and ".join(
                ["in its overall anatomy or contrast"] * shape + ["in its details (artefacts, noise)"] * detail
            )
            words.append(f"{name} is unlike the scans of the training {what}")
    for name, (low, high) in ranges.items():
        unit = f" {schema[name].unit}" if schema[name].unit else ""
        span = f"{low:g} to {high:g}{unit}"
        value = given.get(name)
        if value is not None and not low <= float(value) <= high:
            words.append(f"{name} {float(value):g} lies outside of the training's {span}")
        predicted = answers.get(name)
        if name in want and predicted is not None and not low <= predicted <= high:
            words.append(f"the predicted {name} lies outside of the training's {span}")
    return words
