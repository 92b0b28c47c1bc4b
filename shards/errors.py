"""The exceptions of this package."""

import difflib
import errno
from collections.abc import Iterable, Sequence

FULL = {errno.ENOSPC, errno.EDQUOT}  # of a disk, or of somebody's share of it
RESTORE = "restore it (shards verify --repair) or pack again"  # a damaged file of an index, of which there is a copy


class DataError(ValueError):
    """An input, argument or folder that cannot be used; the message names it and says what to do."""


class IntegrityError(DataError):
    """Stored bytes that differ from those written; the message names the damaged member."""


class TooManyRejects(DataError):
    """More rejected rows than allowed."""


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun, as ``1 scan`` or ``2 scans``."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def named(keys: Sequence[str], most: int = 10) -> str:
    """The first of some keys, and how many more there are."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def nearest(word: str, known: Iterable[str], what: str) -> str:
    """An error message for an unknown ``word``: the nearest known word, and all known words."""
    names = list(known)
    longer = [name for name in names if word.startswith(name)]  # as `eps` of `epsilon`
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.65) or longer
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {word!r}.{hint} Known: {', '.join(names) or 'none'}."


def explain(error: Exception, out: object = "the results") -> str:
    """The message of an error of a command; that of a full disk names no file by itself, and says what to do.

    Args:
        error: that ended the command.
        out: where the command writes.
    """
    if isinstance(error, OSError) and error.errno in FULL and not error.filename:
        return f"the disk of {out} is full: free some space and repeat the command"
    return str(error)
