"""Joint diffusion models of brain MRI and clinical data: one model for any query."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvhpc.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``mvhpc.load`` on its first use: it imports torch, which commands such as submission do without."""
    if name == "load":
        from mvhpc.api import load

        return load
    raise AttributeError(f"module 'mvhpc' has no attribute {name!r}")
