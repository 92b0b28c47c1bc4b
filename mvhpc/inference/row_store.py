"""The rows of a query on disk while it is being answered: Parquet files that are complete or absent, and a TSV.

An interrupted query continues from them. They are removed when its table is written.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvhpc.inference.parquet import read_rows, write_parquet
from mvhpc.inference.prediction_tables import Row, tsv_lines
from shards.files import write_text
from shards.schema import Schema

QUERY, LIVE = "query.json", "rows.tsv"
EVERY_S, SHARE = 1.0, 0.01  # rows are written after a second, or after a hundredth of the time so far


class RowStore:
    """Rows by key; one process at a time writes to a folder.

    Args:
        folder: of the rows; what another query left there is removed.
        query: all that decides the bits of a row, JSON-able.
        schema: of the model.
        want: the predicted variables.

    Attributes:
        rows: key -> row, of the subjects answered so far.
        live: a TSV of the rows on disk, which grows, for whoever wants to look at them.
    """

    def __init__(self, folder: Path, query: Mapping[str, Any], schema: Schema, want: Sequence[str]) -> None:
        self.folder, self.schema, self.want, self.live = folder, schema, list(want), folder / LIVE
        self._new: list[Row] = []
        identity = json.dumps(query, indent=1, sort_keys=True)
        path = folder / QUERY
        if not path.is_file() or path.read_text() != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text(path, identity)
        parts = sorted(folder.glob("part-*.parquet"))
        self.rows: dict[str, Row] = {row["key"]: row for part in parts for row in read_rows(part)}
        self._number = len(parts)
        self._start = self._last = time.monotonic()
        self.live.unlink(missing_ok=True)
        self._append(list(self.rows.values()))

    def add(self, rows: Sequence[Row]) -> bool:
        """Add rows of subjects that have none yet; return whether all rows so far are on disk."""
        self._new += rows
        self.rows |= {str(row["key"]): row for row in rows}
        now = time.monotonic()
        if now - self._last < max(EVERY_S, SHARE * (now - self._start)):
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Write the rows that are not on disk yet."""
        self._last = time.monotonic()
        if self._new:
            write_parquet(self.folder / f"part-{self._number:06d}.parquet", self._new, self.schema, self.want)
            self._append(self._new)
            self._new, self._number = [], self._number + 1

    def _append(self, rows: Sequence[Row]) -> None:
        if rows:
            with self.live.open("a") as file:
                file.writelines(tsv_lines(rows, header=not file.tell()))
