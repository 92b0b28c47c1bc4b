"""Joint diffusion models of brain MRI and clinical data: one model for any query."""

__version__ = "0.1.0"
