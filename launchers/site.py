"""What one site's SLURM wants of every job: `configs/cluster/NAME.yaml`."""

import re
from dataclasses import dataclass
from typing import Any

from mvhpc.config import ConfigError, load_config


@dataclass
class Site:
    """The keys of the file; see the comments of ``configs/cluster/default.yaml``."""

    partition: str
    account: str
    time: str
    gpus_per_node: int
    cpus_per_task: int
    memory: str
    signal_delay: int
    modules: list[str]
    environment: dict[str, str]
    setup: list[str]
    scratch: str
    interface: str
    sbatch: dict[str, Any]


def load_site(name: str, overrides: dict[str, Any]) -> Site:
    """The site called ``name`` (or a YAML file), with what the command line says over it.

    Raises:
        ConfigError: an unknown name or key, or a value that cannot be used.
    """
    site = load_config(Site, "cluster", name, (), {k: v for k, v in overrides.items() if v is not None})
    minutes(site.time)
    return site


def minutes(time: str) -> int:
    """A time limit in sbatch's words (``90``, ``1:30:00``, ``2-12``, ...) as whole minutes, rounded up.

    Raises:
        ConfigError: where it is none.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ConfigError(f"time {time!r}: give minutes, hours:minutes:seconds or days-hours")
    days, *parts = match.groups()
    numbers = [int(p) for p in parts if p is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        scale = [3600, 60, 1]
    else:  # minutes[:seconds] or hours:minutes:seconds
        scale = [3600, 60, 1] if len(numbers) == 3 else [60, 1]
    seconds = int(days or 0) * 86400 + sum(n * s for n, s in zip(numbers, scale))
    if seconds == 0:
        raise ConfigError(f"time {time!r} is nothing; give minutes, hours:minutes:seconds or days-hours")
    return -(-seconds // 60)
