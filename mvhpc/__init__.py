"""Joint diffusion models of brain MRI and clinical data: one model for any query."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvhpc.api import load as load
    from mvhpc.api import open_dataset as open_dataset

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load`` and ``open_dataset`` on their first use: they import torch, which some commands do without."""
    if name in {"load", "open_dataset"}:
        from mvhpc import api

        return getattr(api, name)
    raise AttributeError(f"module 'mvhpc' has no attribute {name!r}")
