"""Joint diffusion models of brain MRI and clinical data: one model, any question."""

__version__ = "0.1.0"
