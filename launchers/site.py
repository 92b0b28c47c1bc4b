"""What the SLURM of one site needs for every job: `configs/cluster/NAME.yaml`."""

import re
from dataclasses import dataclass
from typing import Any

from mvhpc.config import ConfigError, load_config

START_S = 180  # that a job has at least before its warning signal, which SLURM may send a minute early


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
    """Load a site by its name or YAML file, overridden by the options of the command line that are not None.

    Raises:
        ConfigError: an unknown name or key, or an invalid value.
    """
    site = load_config(Site, "cluster", name, (), {k: v for k, v in overrides.items() if v is not None})
    minutes(site.time)
    return site


def check_time(site: Site) -> None:
    """Check that the time limit leaves a job some time before its warning signal.

    Raises:
        ConfigError: it does not.
    """
    least = -(-(site.signal_delay + START_S) // 60)
    if minutes(site.time) < least:
        raise ConfigError(
            f"--time {site.time}: a job starts in up to {START_S // 60} minutes and is warned {site.signal_delay} s "
            f"before its end (signal_delay); give at least --time {least}"
        )


def minutes(time: str) -> int:
    """Convert a time limit in sbatch's syntax (``90``, ``1:30:00``, ``2-12``, ...) to minutes, rounded up.

    Raises:
        ConfigError: another syntax, or zero.
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
        raise ConfigError(f"time {time!r} is zero; give minutes, hours:minutes:seconds or days-hours")
    return -(-seconds // 60)
