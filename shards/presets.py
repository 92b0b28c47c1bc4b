"""Default options of the commands, from the same YAML files that the stages of mvhpc read."""

from pathlib import Path
from typing import Any

import yaml

from shards.errors import DataError, nearest

CONFIGS = Path(__file__).resolve().parent / "configs"
AUTO = "auto"  # a shape that follows from the data
STAGE_KEYS = {"source", "out", "tracking", "compute"}  # of a stage of mvhpc: here paths are arguments


def preset_file(folder: str, name: str | Path) -> Path:
    """The YAML file of a preset under ``configs/FOLDER``, or the file itself where ``name`` is a path.

    Raises:
        DataError: an unknown name, with the nearest known one.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        return path
    presets = {p.stem: p for p in sorted((CONFIGS / folder).glob("*.yaml"))}
    if str(name) not in presets:
        raise DataError(nearest(str(name), presets, f"{folder} preset"))
    return presets[str(name)]


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        DataError: a file that cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from error


def load_preset(command: str, name: str | Path = "default") -> dict[str, Any]:
    """Options of a command: ``configs/COMMAND/default.yaml``, overlaid with a preset.

    Args:
        command: ``pack``, ``phantom`` or ``preprocess``.
        name: of the preset, or a YAML file.

    Returns:
        Option -> value, without the keys that only a stage of mvhpc has.

    Raises:
        DataError: an unknown preset or key, with the nearest known one, or a value of the wrong type; names the file.
    """
    defaults = read_yaml(preset_file(command, "default"))
    path = preset_file(command, name)
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected 'key: value' lines")
    for key, value in values.items():
        if key not in defaults:
            raise DataError(f"{path}: {nearest(str(key), defaults, 'key')}")
        if key not in STAGE_KEYS and not _fits(value, defaults[key]):
            raise DataError(f"{path}: {key}: {value!r} where a value such as {defaults[key]!r} is expected")
    return {key: value for key, value in {**defaults, **values}.items() if key not in STAGE_KEYS}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the type of the default; a whole number may stand for a float or a string.

    A list of words may have any length, a list of numbers that of the default if this is not empty.
    """
    if default == [AUTO]:
        return value in (AUTO, [AUTO]) or (isinstance(value, list) and len(value) == 3 and all(map(_whole, value)))
    if default == []:  # of numbers, or nothing
        return isinstance(value, list) and all(isinstance(n, int | float) for n in value)
    if isinstance(default, list) and all(isinstance(word, str) for word in default):
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if isinstance(default, list):
        return isinstance(value, list) and len(value) == len(default) and all(map(_fits, value, default))
    allowed = {float: (float, int), str: (str, int)}.get(type(default), (type(default),))
    return isinstance(value, allowed) and isinstance(value, bool) == isinstance(default, bool)
