"""What the parts of a packing were called with, for the process that merges them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.files import write_bytes
from shards.packing.journal import Journal
from shards.schema import Schema

PATHS = ("source", "files_root", "pseudonymise", "exclusions")


def record_part(out: Path, part: tuple[int, int], source: Path, options: Mapping[str, Any], schema: Schema) -> None:
    """Record the arguments of a part in the folder of the unfinished packing.

    Args:
        out: of the data set.
        part: (I, N).
        source, options: of :func:`shards.pack.pack_part`.
        schema: that they name.
    """
    arguments = {**options, "source": source, "schema": schema.to_dict()}
    arguments |= {name: str(Path(arguments[name]).absolute()) for name in PATHS if arguments.get(name)}
    write_bytes(_file(out, *part), json.dumps(arguments).encode())


def read_parts(out: Path) -> tuple[int, Path, dict[str, Any]]:
    """The number of parts, their source and their options, which are the same for all but for the number of workers.

    Raises:
        DataError: no parts there, some that were not begun, or parts of different packings.
    """
    files = sorted(Journal.folder_of(out).glob(_file(out, "*", "*").name))
    if not files:
        raise DataError(f"{out}: no parts to merge; make them by `shards pack SOURCE {out} --part I/N`")
    found = {tuple(map(int, path.stem.split("-")[1::2])): json.loads(path.read_bytes()) for path in files}
    (first, count), arguments = next(iter(found.items()))
    for (number, other), theirs in found.items():
        names = sorted({*arguments, *theirs} - {"workers"})
        different = [name for name in names if arguments.get(name) != theirs.get(name)]
        if other != count or different:
            what = ", ".join(different) or "the number of parts"
            raise DataError(
                f"{out}: parts {first}/{count} and {number}/{other} differ in {what}: run all parts with the same "
                "arguments, or the command without --part, which takes what it can"
            )
    if missing := [f"{number}/{count}" for number in range(1, count + 1) if (number, count) not in found]:
        raise DataError(f"{out}: parts {', '.join(missing)} have not run; run them, then merge again")
    options = {**arguments, "schema": Schema.from_dict(arguments["schema"])}
    return count, Path(options.pop("source")), options


def _file(out: Path, number: int | str, count: int | str) -> Path:
    return Journal.folder_of(out) / f"arguments-{number}-of-{count}.json"
