"""Numbers as people write them."""

from collections.abc import Callable
from typing import Any, TypeVar

N = TypeVar("N", int, float)


def parse_number(kind: Callable[[Any], N], text: Any) -> N:
    """A number of a kind, ``int`` or ``float``; Python's own functions read 1_2, a slip for 1.2, as 12.

    Raises:
        ValueError: no number of this kind.
    """
    return kind(text.replace("_", "?") if isinstance(text, str) else text)
