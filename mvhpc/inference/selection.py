"""Who of a data set is answered, who is left out and why, and from whom of them the model learnt."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import choose_part, subjects
from shards.dataset import Dataset

NAMED = 3  # keys in one message


@dataclass(frozen=True)
class Selection:
    """The records of a data set that a query is about.

    Attributes:
        part: of the split.
        keys: of the records.
        left_out: reason -> keys of the other records.
        learnt: key -> words, of the selected records from whom the model learnt.
        unit: ``people``, or ``visits`` where somebody has several.
        warnings: for the user.
        rejected: how many rows of the source were not packed, in words; empty for none.
    """

    part: str
    keys: list[str]
    left_out: dict[str, list[str]]
    learnt: dict[str, str]
    unit: str
    warnings: list[str]
    rejected: str = ""

    @classmethod
    def of(cls, dataset: Dataset, part: str, split: str, training: TrainingPeople) -> "Selection":
        """Select records for a model.

        Args:
            dataset: packed volumes.
            part: ``train``, ``validation``, ``test``, ``all``; or ``auto``: ``test`` of the data that the model was
                trained on, ``all`` of other data.
            split: which recorded split.
            training: from whom the model learnt.

        Raises:
            ConfigError: an unknown part or split, or an empty part.
        """
        index = dataset.index
        choose_part(part, auto=True)
        if part == "auto":
            part = "test" if training.recorded and index.digest == training.data else "all"
        keys = subjects(dataset, part, split)
        chosen, assignment = set(keys), index.split(split).assignment
        left_out: dict[str, list[str]] = {}
        for key in dataset.keys(None):
            if key not in chosen:
                reason = f"in the {assignment[key]} part" if key in assignment else "in no part of the split"
                left_out.setdefault(reason, []).append(key)
        learnt = {key: words for key, words in training.learnt(index).items() if key in chosen}
        unit = "people" if len({r.subject for r in index.records}) == len(index.records) else "visits"
        warnings, rejected = _warnings(dataset, keys, learnt, unit, training), _rejected(dataset)
        return cls(part, keys, left_out, learnt, unit, warnings, rejected)

    def describe(self, unanswered: Mapping[str, str]) -> dict[str, Any]:
        """JSON-able: how many of how many, and who was left out.

        Args:
            unanswered: key -> reason, of selected records without an answer.
        """
        reasons = self._reasons(unanswered)
        return {
            "people": len(self.keys) - len(unanswered),
            "of": len(self.keys) + sum(map(len, self.left_out.values())),
            "left_out": [{"reason": reason, "people": keys} for reason, keys in reasons.items()],
            "rejected": self.rejected,
            "learnt_from": sorted(self.learnt),
        }

    def words(self, unanswered: Mapping[str, str]) -> str:
        """How many of how many are answered, and who is left out, in one line."""
        facts = self.describe(unanswered)
        line = f"{facts['people']} of {facts['of']} {self.unit} answered"
        reasons = [f"{len(keys)} {reason} ({few(keys)})" for reason, keys in self._reasons(unanswered).items()]
        line = f"{line}; left out: {', '.join(reasons)}" if reasons else line
        return f"{line}; {self.rejected}" if self.rejected else line

    def _reasons(self, unanswered: Mapping[str, str]) -> dict[str, list[str]]:
        reasons = {reason: list(keys) for reason, keys in self.left_out.items()}
        for key, reason in unanswered.items():
            reasons.setdefault(reason, []).append(key)
        return reasons

    def warn(self, query: str) -> None:
        """Print the warnings on stderr."""
        for warning in self.warnings:
            print(f"{query}: warning: {warning}", file=sys.stderr)


def few(keys: Sequence[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def _warnings(
    dataset: Dataset, keys: Sequence[str], learnt: Mapping[str, str], unit: str, training: TrainingPeople
) -> list[str]:
    found = []
    if not training.recorded:
        found.append("the model does not say from whom it learnt, so some of these people may be among them")
    if learnt:
        found.append(
            f"the model learnt from {len(learnt)} of these {len(keys)} {unit} ({few(sorted(learnt))}): their answers "
            "look better than those of new people"
        )
    elif namesakes := training.namesakes(dataset.index):
        found.append(
            f"{namesakes} people have the name of a person of the training and another scan; if they are the same "
            "people, their answers look better than those of new people"
        )
    return found


def _rejected(dataset: Dataset) -> str:
    provenance = dataset.index.provenance
    rejected = provenance.get("rejected")
    listed = f"({dataset.folder.name}/rejected.tsv)"
    return (
        f"{rejected} of {provenance['rows']} rows of the source were rejected in packing {listed}" if rejected else ""
    )
