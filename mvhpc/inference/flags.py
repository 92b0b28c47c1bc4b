"""What is wrong with a subject's prediction, in plain words."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mvhpc.inference.prediction_tables import Row
from mvhpc.models.training_people import TrainingPeople
from mvhpc.models.typicality import UNUSUAL
from mvhpc.variables import Value
from shards.copies import copies
from shards.index import Index
from shards.schema import Schema

UNKNOWN = "nothing that is given is known"


def copy_flags(index: Index, volumes: Sequence[str]) -> dict[str, str]:
    """Key -> that its volume is another record's too, bit for bit, in words; of the records where it is."""
    words = "{} is the same scan as that of {}: one of the two may be another person's"
    found: dict[str, str] = {}
    for key, (name, other) in copies(index.records, volumes).items():
        found[key] = words.format(name, other.key)
        found.setdefault(other.key, words.format(name, key))
    return found


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
    training: TrainingPeople,
    p_values: Mapping[str, Tensor],
    given: Mapping[str, Value],
    answers: Row,
    want: Sequence[str],
    learnt: str = "",
) -> list[str]:
    """What is wrong with one subject.

    Args:
        schema: of the model.
        training: from whom the model learnt.
        p_values: by given volume, of the scan's two distances, (2,).
        given: scalars of the subject, None where missing.
        answers: the subject's row.
        want: names of the wanted scalars.
        learnt: that the model learnt from this person, in words; else empty.
    """
    words = [learnt] if learnt else []
    words += [text for name in want if (text := training.uniform(name))]
    for name, p in p_values.items():
        shape, detail = (p < UNUSUAL).tolist()
        if shape or detail:
            what = " and ".join(
                ["in its overall anatomy or contrast"] * shape + ["in its details (artefacts, noise)"] * detail
            )
            words.append(f"{name} is unlike the scans of the training {what}")
    words += training.beyond(given, schema)
    for name, (low, high) in training.ranges.items():
        predicted = answers.get(name)
        if name in want and predicted is not None and not low <= predicted <= high:
            span = f"{low:g} to {high:g} {schema[name].unit or ''}".rstrip()
            words.append(f"the predicted {name} lies outside of the training's {span}")
    return words
