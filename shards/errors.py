"""The exceptions of this package."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """An input, argument or folder that cannot be used; the message names it and says what to do."""


class IntegrityError(DataError):
    """Stored bytes that differ from those written; the message names the damaged member."""


class TooManyRejects(DataError):
    """More rejected rows than allowed."""


def nearest(word: str, known: Iterable[str], what: str) -> str:
    """An error message for an unknown ``word``: the nearest known word, and all known words."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {word!r}.{hint} Known: {', '.join(names) or 'none'}."
