"""A summary of a packed data set, as a dictionary or as text."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shards.index import PARTS, Index
from shards.record_table import Records
from shards.schema import Value, Variable


def summarize(index: Index) -> dict[str, Any]:
    """Counts, arrays, scalars, splits and provenance of a data set, as plain values."""
    records = index.records
    assert isinstance(records, Records)
    flags = list(records.column("flags"))
    return {
        "kind": index.kind,
        "storage": index.storage,
        "records": len(records),
        "subjects": len(set(records.column("subject"))),
        "bytes": sum(f["bytes"] for f in index.files.values()),
        "files": len(index.files),
        "digest": index.digest,
        "grid": index.grid,
        "arrays": {
            name: {**spec, "count": sum(offset >= 0 for offset in records.column(f"offset.{name}"))}
            for name, spec in index.arrays.items()
        },
        "scalars": {v.name: _scalar(list(records.column(f"value.{v.name}")), v) for v in index.schema.scalars},
        "flags": dict(Counter(itertools.chain.from_iterable(flags)).most_common()),
        "flagged": sum(map(bool, flags)),
        "splits": {
            name: {
                "method": split.method,
                "seed": split.seed,
                "group": split.group,
                **{part: Counter(split.assignment.values())[part] for part in PARTS},
            }
            for name, split in index.splits.items()
        },
        "provenance": index.provenance,
    }


def _scalar(values: Sequence[Value], variable: Variable) -> dict[str, Any]:
    known = [v for v in values if v is not None]
    common = {"kind": variable.kind, "missing": len(values) - len(known)}
    if variable.kind == "categorical":
        counts = Counter(map(str, known))
        return {**common, "counts": {c: counts[c] for c in variable.classes}}
    numbers = [float(v) for v in known]
    if not numbers:
        return common
    return {
        **common,
        "unit": variable.unit,
        "mean": statistics.fmean(numbers),
        "sd": statistics.pstdev(numbers),
        "min": min(numbers),
        "max": max(numbers),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The text of ``shards inspect``."""
    return "\n".join(_lines(summary))


def _lines(content: dict[str, Any]) -> Iterator[str]:
    size = content["bytes"] / 2**20
    yield (
        f"{content['kind']}: {content['records']:,} records of {content['subjects']:,} subjects, "
        f"{content['storage']}, {size:,.1f} MiB in {content['files']} files"
    )
    yield f"digest      {content['digest'][:16]}"
    yield ""
    for name, array in content["arrays"].items():
        absent = content["records"] - array["count"]
        line = f"{name:<11} volume       {' x '.join(map(str, array['shape']))} {np.dtype(array['dtype'])}"
        if content["kind"] == "volumes" and "spacing" in content["grid"]:
            line += f", {content['grid']['spacing']:g} mm, RAS"
        yield line + (f", {absent:,} missing" if absent else "")
    for name, scalar in content["scalars"].items():
        if "counts" in scalar:
            text = ", ".join(f"{c} {n:,}" for c, n in scalar["counts"].items())
        elif "mean" in scalar:
            text = f"{scalar['mean']:.1f} (SD {scalar['sd']:.1f}) {scalar['unit']}".rstrip()
            text += f", {scalar['min']:g} to {scalar['max']:g}"
        else:
            text = "no value"
        yield f"{name:<11} {scalar['kind']:<12} {text}" + (
            f", {scalar['missing']:,} missing" if scalar["missing"] else ""
        )
    if content["flagged"]:
        counts = ", ".join(f"{flag} {count:,}" for flag, count in content["flags"].items())
        yield f"flagged     {content['flagged']:,} records by quality control: {counts}"
    if content["splits"]:
        yield ""
        width = max(len("split"), *map(len, content["splits"])) + 2
        yield f"{'split':<{width}}{'train':>10}{'validation':>12}{'test':>8}   seed  group"
        for name, split in content["splits"].items():
            yield (
                f"{name:<{width}}{split['train']:>10,}{split['validation']:>12,}{split['test']:>8,}"
                f"{split['seed']:>7}  {split['group'] or '-'}"
            )
    provenance = content["provenance"]
    if "software" in provenance:
        yield ""
        yield "made with   " + ", ".join(f"{k} {v}" for k, v in provenance["software"].items())
    if provenance.get("rejected"):
        yield f"rejected    {provenance['rejected']:,} of {provenance['rows']:,} rows, see rejected.tsv"
