"""Derivatives of several sites, merged and packed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from shards.dataset import Dataset, open_dataset
from shards.pack import pack
from shards.schema import Schema

SPACING, SHAPE = 4.0, (40, 48, 40)  # mm; voxels, a box around the template's brain
SCHEMA = {
    "image": {"kind": "volume", "suffix": "T1w"},
    "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
    "sex": {"kind": "categorical", "classes": ["F", "M"], "aliases": {"female": "F", "male": "M"}},
    "site": {"kind": "categorical", "classes": ["none"]},
}


def merge(sites: Mapping[str, Path], same: Sequence[Sequence[str]], out: Path) -> Path:
    """A derivative of links to the subjects of several derivatives that have an age.

    Args:
        sites: name -> derivative of ``shards preprocess``; equal recipes, and distinct names of subjects.
        same: groups of names that are one person.
        out: folder to write; an existing one stays.
    """
    if out.exists():
        return out
    out.mkdir(parents=True)
    group = {name: names[0] for names in same for name in names}
    tables = []
    for site, source in sites.items():
        table = pd.read_csv(source / "participants.tsv", sep="\t", dtype=str, na_values=["n/a"])
        table = table[table["age"].notna()]
        tables.append(table.assign(site=site)[["participant_id", "age", "sex", "site"]])
        for name in table["participant_id"]:
            (out / name).symlink_to((source / name).resolve())
    merged = pd.concat(tables)
    merged["person"] = [group.get(name, name) for name in merged["participant_id"]]
    merged.to_csv(out / "participants.tsv", sep="\t", index=False)
    (out / "dataset_description.json").write_text((next(iter(sites.values())) / "dataset_description.json").read_text())
    return out


def packed(sites: Mapping[str, Path], same: Sequence[Sequence[str]], folds: int, out: Path) -> Dataset:
    """The people of several sites, packed at 4 mm with ``folds`` folds by person; the default split has all in train.

    Args:
        sites, same: as :func:`merge`.
        folds: 0 for none.
        out: folder for the merged and the packed data; what is there is reused.
    """
    source = merge(sites, same, out / "merged")
    if not (out / "packed" / "index.json").is_file():
        schema = {**SCHEMA, "site": {"kind": "categorical", "classes": sorted(sites)}}
        if len(sites) < 2:
            del schema["site"]
        pack(
            source,
            out / "packed",
            storage="zarr",
            schema=Schema.from_dict(schema),
            spacing=SPACING,
            shape=SHAPE,
            max_rejects="0",
            fractions=(1, 0, 0),
            group="person",
            folds=folds,
            seed=0,
            workers=1,
        )
    return open_dataset(out / "packed")
