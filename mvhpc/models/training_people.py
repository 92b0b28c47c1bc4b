"""From whom a model learnt: its training people as keyed hashes, and what is known of each variable.

Names are hidden from a reader of ``model.json``; whoever knows a name can find out whether it is among them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mvhpc.variables import Value
from shards.index import Index, Record
from shards.schema import Schema

DIGEST = 10  # bytes of a hash: a million people and a million queries meet by chance once in 10^12 times
SCAN, PERSON = "the model learnt from this scan", "the model learnt from this person"
Facts = dict[str, Any]


@dataclass(frozen=True)
class TrainingPeople:
    """The people of a model's training and validation part.

    Attributes:
        data: digest of the packed volumes, see :attr:`shards.index.Index.digest`; empty where it is not known.
        salt: key of the hashes, hexadecimal.
        names, scans: hashes of subjects, and of the packed arrays of their volumes.
        variables: by name, ``people`` (how many have it) and of a number ``range`` and ``mean``, of a category
            ``classes`` (class -> people), of a volume ``origin`` (median of where the grid's first voxel lies in the
            scans' spaces, mm; None where it is not known).
    """

    data: str = ""
    salt: str = ""
    names: frozenset[str] = frozenset()
    scans: frozenset[str] = frozenset()
    variables: Mapping[str, Facts] = field(default_factory=dict)

    @classmethod
    def of(
        cls, index: Index, keys: Sequence[str], schema: Schema, rows: Sequence[Mapping[str, Value]]
    ) -> "TrainingPeople":
        """Of the records ``keys`` of packed volumes, or of latents.

        Args:
            index: of the data set.
            keys: of N records.
            schema: of the model.
            rows: scalars of the N records by name, None where missing.
        """
        found = {record.key: record for record in index.records}
        records = [found[key] for key in keys]
        subjects = [record.subject for record in records]
        scans = [scan for record in records for scan in scans_of(index, record)]
        content = json.dumps([sorted(set(subjects)), sorted(set(scans))])
        salt = hashlib.sha256(content.encode()).hexdigest()[:32]  # the same for the same people: exports are equal
        facts = {v.name: scalar_facts([row.get(v.name) for row in rows], subjects, v.kind) for v in schema.scalars}
        facts |= {v.name: _volume_facts(records, v.name) for v in schema.volumes}
        return cls(_volumes_of(index), salt, _hashes(subjects, salt), _hashes(scans, salt), facts)

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> "TrainingPeople":
        """From the content of ``model.json``; of a model of an earlier version nothing is known."""
        known = meta.get("training")
        if known is None:
            return cls()
        sets = {key: frozenset(known[key]) for key in ("names", "scans")}
        return cls(known["data"], known["salt"], **sets, variables=known["variables"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; sorted, so that the order gives nobody away."""
        sets = {"names": sorted(self.names), "scans": sorted(self.scans)}
        return {"data": self.data, "salt": self.salt, **sets, "variables": dict(self.variables)}

    def and_of(self, index: Index, keys: Sequence[str]) -> "TrainingPeople":
        """With further people, from whom a calibration learnt."""
        wanted = set(keys)
        records = [record for record in index.records if record.key in wanted]
        names = _hashes([record.subject for record in records], self.salt)
        scans = _hashes([scan for record in records for scan in scans_of(index, record)], self.salt)
        return TrainingPeople(self.data, self.salt, self.names | names, self.scans | scans, self.variables)

    @property
    def recorded(self) -> bool:
        """Whether it is known who they are; models of an earlier version do not say."""
        return bool(self.names)

    @property
    def ranges(self) -> dict[str, list[float]]:
        """Number -> least and greatest value in training."""
        return {name: facts["range"] for name, facts in self.variables.items() if "range" in facts}

    def constant(self, name: str) -> float | str | None:
        """The prediction that ignores the subject: the mean, or the most frequent class; None where not known."""
        facts = self.variables.get(name, {})
        classes = facts.get("classes")
        return max(classes, key=lambda c: classes[c]) if classes else facts.get("mean")

    def uniform(self, name: str) -> str:
        """That all people of the training had one value of a scalar, in words; empty where they had several."""
        facts = self.variables.get(name, {})
        classes = [c for c, people in facts.get("classes", {}).items() if people]
        low, high = facts.get("range", (0, 1))
        if len(classes) != 1 and low != high:
            return ""
        value = classes[0] if classes else f"{low:g}"
        return f"{name} is not predicted: all {facts['people']} people of the training that have it have {value}"

    def learnt(self, index: Index) -> dict[str, str]:
        """Key -> :data:`SCAN` or :data:`PERSON`, of the records of a data set from whom the model learnt.

        The same scan is the same person. The same name is the same person in the data that the model was trained on,
        and in data where somebody has both; in other data it is another person of that name.
        """
        by_scan = {r.key for r in index.records if _hashes(scans_of(index, r), self.salt) & self.scans}
        by_name = {r.key for r in index.records if _hashes([r.subject], self.salt) & self.names}
        same = _volumes_of(index) == self.data or by_scan & by_name
        return dict.fromkeys(by_name if same else (), PERSON) | dict.fromkeys(by_scan, SCAN)

    def knows_scan(self, checksum: str) -> bool:
        """Whether the model learnt from a packed volume of that SHA-256."""
        return bool(_hashes([checksum], self.salt) & self.scans)

    def namesakes(self, index: Index) -> int:
        """How many subjects have the name of a person of the training, and nothing else says that they are the same."""
        learnt = self.learnt(index)
        others = {r.subject for r in index.records if r.key not in learnt}
        return len(_hashes(sorted(others), self.salt) & self.names)

    def beyond(self, given: Mapping[str, Value], schema: Schema) -> list[str]:
        """How given scalars lie beyond what the model learnt, in words; of those that do."""
        return [text for name, value in given.items() if (text := self._beyond(name, value, schema[name].unit or ""))]

    def _beyond(self, name: str, value: Value, unit: str) -> str:
        facts = self.variables.get(name, {})
        people = f" ({facts['people']} people)" if "people" in facts else ""
        if value is None:
            return ""
        if isinstance(value, str):
            never = "classes" in facts and not facts["classes"].get(value)
            return f"{name} {value}: nobody of the training{people} had it" if never else ""
        if "range" not in facts or facts["range"][0] <= value <= facts["range"][1]:
            return ""
        low, high = facts["range"]
        return f"{name} {value:g} lies outside of the training's {low:g} to {high:g} {unit}".rstrip() + people


def scans_of(index: Index, record: Record) -> list[str]:
    """The SHA-256 of a record's packed volumes; of latents, of the volumes that they were made from."""
    if index.kind != "volumes":
        return list(index.provenance.get("scans", {}).get(record.key, []))
    return [record.checksums[v.name] for v in index.schema.volumes if v.name in record.checksums]


def _volumes_of(index: Index) -> str:
    """The digest of packed volumes; of latents, of the volumes that they were made from."""
    return index.digest if index.kind == "volumes" else str(index.provenance.get("source_sha256", ""))


def _hashes(texts: Sequence[str], salt: str) -> frozenset[str]:
    key = bytes.fromhex(salt)
    return frozenset(hashlib.blake2b(text.encode(), key=key, digest_size=DIGEST).hexdigest() for text in texts)


def scalar_facts(values: Sequence[Value], subjects: Sequence[str], kind: str) -> Facts:
    """What is known of a scalar of people, see :attr:`TrainingPeople.variables`; None where a value is missing."""
    known = [(value, subject) for value, subject in zip(values, subjects, strict=True) if value is not None]
    facts: Facts = {"people": len({subject for _, subject in known})}
    if kind == "categorical":
        return facts | {"classes": dict(sorted(Counter(str(value) for value, _ in set(known)).items()))}
    numbers = np.array([value for value, _ in known], float)
    if len(numbers):
        facts |= {"range": [float(numbers.min()), float(numbers.max())], "mean": float(numbers.mean())}
    return facts


def _volume_facts(records: Sequence[Record], name: str) -> Facts:
    having = [record for record in records if name in record.checksums]
    origins = [np.array(record.affines[name])[:3, 3] for record in having if name in record.affines]
    origin = np.median(origins, axis=0).tolist() if origins else None
    return {"people": len({record.subject for record in having}), "origin": origin}
