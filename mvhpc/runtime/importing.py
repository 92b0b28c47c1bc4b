"""What a name in a table or a job's settings stands for."""

import importlib
from typing import Any


def resolve(name: str) -> Any:
    """What ``module:name`` is called; the module is imported now."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)
