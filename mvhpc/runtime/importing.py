"""Import of objects that tables and jobs name."""

import importlib
from typing import Any


def resolve(name: str) -> Any:
    """The object that ``module:name`` names; imports its module."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
