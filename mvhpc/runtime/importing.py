"""Import of objects that tables and jobs name, and of packages that come with an extra."""

import importlib
from importlib.util import find_spec
from typing import Any

from mvhpc.config import ConfigError


def resolve(name: str) -> Any:
    """The object that ``module:name`` names; imports its module."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def require(extra: str, purpose: str, *packages: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: of this package, as ``cluster``.
        purpose: what needs them.
        packages: names by which they are imported.

    Raises:
        ConfigError: one is not; with the command that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(f"{purpose} needs {package}, which is not installed: pip install 'mvhpc[{extra}]'")
