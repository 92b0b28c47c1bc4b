"""Typed configuration: dataclasses, loader (YAML and dotted overrides), errors."""

from mvhpc.config.effects import Effect, decisive, effect
from mvhpc.config.errors import ConfigError, at_least, choose
from mvhpc.config.loader import (
    CONFIGS,
    config_file,
    fingerprint,
    flatten,
    flatten_override,
    load_config,
    to_dict,
    to_yaml,
)
from mvhpc.config.sections import (
    AutoencoderConfig,
    Compute,
    DenoiserConfig,
    Device,
    DiffusionConfig,
    EncoderConfig,
    Optimizer,
    Sampling,
    Tracking,
    Training,
    Workers,
    refuse_password,
)

__all__ = [
    "CONFIGS",
    "AutoencoderConfig",
    "Compute",
    "ConfigError",
    "DenoiserConfig",
    "Device",
    "DiffusionConfig",
    "Effect",
    "EncoderConfig",
    "Optimizer",
    "Sampling",
    "Tracking",
    "Training",
    "Workers",
    "at_least",
    "choose",
    "config_file",
    "decisive",
    "effect",
    "fingerprint",
    "flatten",
    "flatten_override",
    "load_config",
    "refuse_password",
    "to_dict",
    "to_yaml",
]
