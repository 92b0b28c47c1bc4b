"""Reading CSV and TSV files: cells, names of columns, and what a BIDS sidecar says of the columns."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import DataError, nearest
from shards.files import NOT_FETCHED, is_dangling
from shards.schema import MISSING, Schema, Value, Variable

TIME_UNITS = {
    "years": {"year", "years", "yr", "yrs", "y", "a"},
    "months": {"month", "months", "mo", "mos", "mth", "mths"},
    "weeks": {"week", "weeks", "wk", "wks"},
    "days": {"day", "days", "d"},
}
# "age in months", "age (in whole months)", "age, years and months"; a lookahead, as the words may hold the next "in"
STATED = re.compile(r"(?:\bin |[(\[,:] ?(?:in )?)(?=((?:\w+ (?:and |or )?)?\w+))")
PASSING = re.compile(r"\d[\s-]*[a-z]+|\b(?:year|month|week|day)\b")  # "the 6-month visit", "on the day of the scan"
NOT = {"not", "non", "no", "nor", "neither"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", " ": "spaces"}
NO_NAMES = re.compile(r"sep=|#\s")  # begins a line for a spreadsheet, or a comment
UNKNOWN = MISSING | {"missing", "unknown", "not available", "not reported", "not known"}  # meanings of a level
Description = Mapping[str, Mapping[str, Any]]  # column -> its entry in a sidecar


@dataclass(frozen=True)
class Sheet:
    """A CSV or TSV file.

    Attributes:
        columns: their names.
        rows: (line number, {column: cell}) of each row.
        text: of the file.
    """

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    text: str

    def renamed(self, names: Mapping[str, str]) -> "Sheet":
        """The same with ``names`` (old -> new); a column that has a new name already is left out."""
        replaced = {new for old, new in names.items() if old in self.columns and old != new}
        kept = [column for column in self.columns if column in names or column not in replaced]
        rows = [(line, {names.get(c, c): cells[c] for c in kept}) for line, cells in self.rows]
        return Sheet([names.get(c, c) for c in kept], rows, self.text)


def read_sheet(path: Path) -> Sheet:
    """Read a table; every cell stays in its row and column.

    A quotation mark is a character of its cell in a TSV, which has no quoting (BIDS). In a CSV a cell may be quoted; an
    unbalanced quotation mark is refused, and so are quoted line breaks, which it would cause. A row with fewer or more
    cells than there are columns is refused, even if the last ones are empty: others may have moved.

    Args:
        path: of a CSV (by its suffix) or a TSV.

    Raises:
        DataError: not a table; the message names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {NOT_FETCHED if is_dangling(path) else error.strerror}") from error
    except UnicodeDecodeError as error:
        if error.object.startswith(b"PK"):  # a zip file
            raise DataError(f"{path}: a spreadsheet, not text; save it as CSV") from error
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    commas = path.suffix.casefold() == ".csv"
    quoting: Any = {"delimiter": ",", "strict": True} if commas else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), **quoting)
    between = "commas" if commas else "tabs"
    first = text.partition("\n")[0][:60]
    rows = []
    try:
        columns = [c.strip() for c in next(reader, [])]
        _check_names(path, first, columns, between)
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise DataError(
                    f"{path}: line {reader.line_num}: a cell holds a line break; remove the quotation mark that is "
                    "not closed"
                )
            if any(map(str.strip, cells)):
                if len(cells) != len(columns):
                    surplus = f"remove {between} inside cells and at the ends of lines"
                    remedy = "write n/a where a value is missing" if len(cells) < len(columns) else surplus
                    raise DataError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells of {len(columns)} columns, whose names "
                        f"are in line 1 ({first!r}); {remedy}"
                    )
                rows.append((reader.line_num, {c: cell.strip() for c, cell in zip(columns, cells)}))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quotation mark not closed?") from error
    for column, count in Counter(filter(None, columns)).items():
        if count > 1:
            raise DataError(f"{path}: two columns named {column!r}")
    return Sheet(columns, rows, text)


def _check_names(path: Path, line: str, columns: list[str], wanted: str) -> None:
    """Refuse a first line without names, with quoted ones, or with another separator than ``wanted``."""
    if not any(columns):
        raise DataError(f"{path}: no names of columns in the first line")
    if NO_NAMES.match(line):
        raise DataError(f"{path}: line 1 ({line!r}) must hold the names of the columns; remove it")
    if len(columns[0]) > 1 and columns[0][0] == columns[0][-1] == '"':
        raise DataError(f"{path}: the names of the columns stand in quotation marks; remove these, a TSV has none")
    found = [name for separator, name in SEPARATORS.items() if separator in columns[0]]
    if len(columns) == 1 and found:
        raise DataError(
            f"{path}: the columns in line 1 ({line!r}) are separated by {found[0]}; save the table with {wanted} "
            "between them"
        )


def missing(cell: str) -> bool:
    """Whether a cell stands for no value."""
    return cell.casefold() in MISSING


def column_names(
    columns: Iterable[str], wanted: Mapping[str, Iterable[str]], rename: Mapping[str, str], path: Path
) -> dict[str, str]:
    """Which columns of a table stand for others: by ``rename``, or by a synonym or other capitals.

    Args:
        columns: of the table.
        wanted: column -> its synonyms.
        rename: column of the table -> wanted column, as the user gives it; comes first.
        path: of the table.

    Returns:
        Column of the table -> wanted column, where these differ.

    Raises:
        DataError: several columns could be the wanted one, or are renamed to it.
    """
    present = list(columns)
    names = {old: new for old, new in rename.items() if old in present}
    for column, count in Counter(names.values()).items():
        if count > 1:
            found = [old for old, new in names.items() if new == column]
            raise DataError(
                f"{path}: line 1: --rename gives {' and '.join(map(repr, found))} the name {column!r}; give it to one"
            )
    for column, synonyms in wanted.items():
        if column in present or column in names.values():
            continue
        words = {word.casefold() for word in (column, *synonyms)}
        found = [c for c in present if c.casefold() in words and c not in names]
        if len(found) > 1:
            choices = " or ".join(f"{c}={column}" for c in found)
            raise DataError(
                f"{path}: {' and '.join(map(repr, found))} could be {column!r}: choose by --rename {choices}"
            )
        names |= dict.fromkeys(found, column)
    return names


def read_description(path: Path, names: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """What a BIDS sidecar says of a table's columns; empty where there is none.

    Args:
        path: of the JSON file.
        names: see :func:`column_names`.

    Returns:
        Column -> its entry, also under the column's name in lower case: see :func:`entry_of`.

    Raises:
        DataError: not such a description.
    """
    if not path.is_file() and not is_dangling(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = {str(name): entry for name, entry in content.items() if isinstance(entry, Mapping)}
        folded = {name.casefold(): new.casefold() for name, new in names.items()}
        lower = {folded.get(name.casefold(), name.casefold()): entry for name, entry in entries.items()}
        return lower | {names.get(name, name): entry for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError) as error:
        why = NOT_FETCHED if is_dangling(path) else f"not a description of columns as BIDS has it ({error})"
        raise DataError(f"{path}: {why}") from error


def entry_of(column: str, description: Description) -> Mapping[str, Any]:
    """What a sidecar says of a column, whose name may have other capitals there."""
    return description.get(column) or description.get(column.casefold()) or {}


def check_units(path: Path, description: Description, schema: Schema, names: Mapping[str, str]) -> list[str]:
    """Refuse a table that has a variable in another unit of time than the schema.

    The unit is that of ``Units`` in the sidecar, else that of ``LongName`` and ``Description`` ("age in months",
    "months since birth"), else that of the column's own name (``age_months``).

    Args:
        path: of the table.
        description: of its columns.
        schema: the variables.
        names: see :func:`column_names`.

    Returns:
        A note for each column whose unit is not known or not certain, and is taken for the schema's.

    Raises:
        DataError: naming the column and both units.
    """
    notes = []
    for v in schema.scalars:
        ours = next(iter(_time_units(v.unit or "")), "")
        entry = {str(key).casefold(): str(text) for key, text in entry_of(v.column, description).items()}
        stated = entry.get("units") or entry.get("unit") or ""
        text = f"{entry.get('longname', '')}; {entry.get('description', '')}".casefold()
        of_text = {unit for words in STATED.findall(text) for unit in _time_units(words)}
        of_text = of_text or _time_units(PASSING.sub("", text))
        of_name = _time_units(" ".join(_parts(old, v.column) for old, new in names.items() if new == v.column))
        theirs = _time_units(stated) if stated else of_text or of_name
        others = sorted((theirs or _time_units(text)) - {ours})
        if theirs and ours and ours not in theirs:
            raise DataError(
                f"{path}: column {v.column!r} is in {' or '.join(others)}, the schema has {v.name} in {ours}; convert "
                "the column, set `Units` in its JSON, or give the schema that unit and a range in it"
            )
        if ours and stated and not theirs:
            notes.append(f"column {v.column!r} has the unit {stated[:40]!r} in its JSON, which is read as {ours}")
        elif ours and others:
            notes.append(f"column {v.column!r} is read as {ours}; its JSON or name has {' and '.join(others)} too")
    return notes


def parse_cell(variable: Variable, cell: str, description: Description) -> Value:
    """The value that a cell holds, by the levels of its column's description (BIDS) where these explain it.

    Raises:
        ValueError: as :meth:`shards.schema.Variable.parse`, or a word and its level that contradict each other.
    """
    levels = entry_of(variable.column, description).get("Levels")
    codes = (cell.strip(), re.sub(r"\.0+$", "", cell.strip()))  # 1.0, which programs write where values are missing
    level = next((levels[code] for code in codes if code in levels), None) if isinstance(levels, Mapping) else None
    text = str(level.get("Description", "")) if isinstance(level, Mapping) else str(level or "")
    known = variable.words()
    words = _words(text)
    meanings = {known[w] for w in words if w in known} if NOT.isdisjoint(words) else set()
    if len(meanings) != 1:
        return None if text.strip().casefold() in UNKNOWN - {""} else variable.parse(cell)
    (meaning,) = meanings
    own = known.get(cell.strip().casefold(), meaning)
    if own != meaning:
        raise ValueError(f"{variable.name}: {cell!r} is {own} by the schema and {text!r} by the levels of its sidecar")
    return meaning


def _words(text: str) -> list[str]:
    """The text itself, else its words of two letters and more."""
    whole = text.strip().casefold()
    return [whole, *(word for word in re.findall(r"\w+", whole) if len(word) > 1)]


def _parts(name: str, column: str) -> str:
    """The words of a column's name: ``age_months``, ``AgeMonths`` and, of a column ``age``, ``agemonths`` have two."""
    parts = re.sub(f"^{re.escape(column)}", r"\g<0> ", name, flags=re.IGNORECASE)
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", parts))


def _time_units(text: str) -> set[str]:
    """``years`` for ``Year``, ``yrs``, ``in year(s)``, ...; empty for what names no unit of time."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    if len(words) > 1:  # letters alone may be anything
        words = [word for word in words if len(word) > 1]
    return {name for name, known in TIME_UNITS.items() if not known.isdisjoint(words)}


def require_column(columns: Iterable[str], wanted: str, path: Path, remedy: str = "") -> None:
    """Check that a table has a column.

    Raises:
        DataError: it has not; with the nearest one.
    """
    names = list(columns)
    if wanted not in names:
        raise DataError(f"{path}: {nearest(wanted, names, 'column')}{remedy}")
