"""The error for invalid configurations, and checks of values."""

from collections.abc import Mapping, Sequence

from shards.errors import nearest


class ConfigError(ValueError):
    """An invalid configuration; the message names the key, file or preset and what to do."""


class MissingKeys(ConfigError):
    """Keys without a value.

    Args:
        stage: whose configuration it is.
        keys: their dotted names.
    """

    def __init__(self, stage: str, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        super().__init__(f"{stage}: give a value for {', '.join(keys)}, as {' '.join(f'{key}=VALUE' for key in keys)}")


def choose(word: str, known: Sequence[str], what: str) -> str:
    """``word``, if it is one of ``known``.

    Raises:
        ConfigError: naming the nearest known word.
    """
    if word not in known:
        raise ConfigError(nearest(word, known, what))
    return word


def at_least(least: float, counts: Mapping[str, float]) -> None:
    """Check that numbers, by key, are not below ``least``.

    Raises:
        ConfigError: naming the key.
    """
    for key, count in counts.items():
        if count < least:
            raise ConfigError(f"{key}={count}: at least {least} is needed")
