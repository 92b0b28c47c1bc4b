"""Paths in what leaves this machine (MLflow, exported models, pages), without the names of machines and people."""

from pathlib import Path
from typing import Any

from mvhpc.runs.mlflow_store import SQLITE


def without_places(value: Any, root: Path | None = None) -> Any:
    """A configuration with absolute paths, and sqlite URIs of such, cut to the part below ``root`` or the last one.

    Args:
        value: of any depth; what is no path stays.
        root: a folder that paths may be relative to.
    """
    if isinstance(value, dict):
        return {key: without_places(v, root) for key, v in value.items()}
    if isinstance(value, list):
        return [without_places(v, root) for v in value]
    if not isinstance(value, str):
        return value
    scheme = SQLITE if value.startswith(SQLITE) else ""
    path = Path(value.removeprefix(scheme))
    if not path.is_absolute():
        return value
    return scheme + (path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name)
