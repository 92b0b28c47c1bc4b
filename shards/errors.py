"""What can go wrong with data, as the caller of this package sees it."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Input, argument or folder that cannot be used; the message names it and says what to do."""


class IntegrityError(DataError):
    """Stored bytes that are not the ones written; the message names the damaged member."""


class TooManyRejects(DataError):
    """More faulty rows than allowed."""


def nearest(word: str, known: Iterable[str], what: str) -> str:
    """The sentence that refuses ``word``: the nearest known one, and all there are."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {word!r}.{hint} Known: {', '.join(names) or 'none'}."
