"""Typed configuration: a dataclass tree per stage, filled from YAML and dotted overrides.

Later values override earlier ones: ``configs/STAGE/default.yaml``, the named preset or file, ``key=value`` overrides.
The dataclasses hold names and types only; values and their sources are in the YAML files.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mvhpc.config.errors import ConfigError, MissingKeys
from shards.errors import nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RENAMED = {  # key of an earlier version -> its present names, one per stage
    "readers": ("ensemble_members",),
    "questions": ("queries_per_volume", "queries"),
}
REMOVED = {  # key of an earlier version -> what is so without it
    "predict_by": "a joint model predicts by its model of scalars",
    "clean_volume_prob": "scalars are predicted by the model of scalars (mvhpc train scalars)",
}
UNDERSCORE = "\ue000"  # stands for _ in overrides while they are YAML, which reads 1_2 as 12
C = TypeVar("C")


def config_file(folder: str, name: str) -> Path:
    """The YAML file of a preset name under ``configs/folder``, or of a path.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"no configuration file {name}")
        return path
    presets = {p.stem: p for p in (CONFIGS / folder).glob("*.yaml")}
    if name not in presets:
        raise ConfigError(nearest(name, presets, f"{folder} preset"))
    return presets[name]


def _keys(kind: type, prefix: str = "") -> Iterable[str]:
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            yield from _keys(field.type, f"{prefix}{field.name}.")


def _parsed(kind: Any, layer: Any) -> Any:
    """``layer`` with strings parsed where ``kind`` has a list (``a,b``) or a mapping (``a=1,b=2``)."""
    if not isinstance(layer, Mapping | DictConfig) or not dataclasses.is_dataclass(kind):
        return layer
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    values = {}
    for key in layer:
        missing = OmegaConf.is_config(layer) and OmegaConf.is_missing(layer, key)
        value, target = MISSING if missing else layer[key], fields.get(key)
        if value is None and target is not None:
            value = ""  # ``key=``: empty
        if isinstance(value, str) and value != MISSING and typing.get_origin(target) in (list, dict):
            value = _listed(value) if typing.get_origin(target) is list else _mapped(key, value)
        _check_numbers(key, target, value)
        values[key] = _parsed(target, value)
    return OmegaConf.create(values)


def _check_numbers(key: str, kind: Any, value: Any) -> None:
    """Refuse texts such as 1_2, a slip for 1.2, where ``kind`` has numbers: OmegaConf reads them as 12."""
    numbers = list(value.values()) if isinstance(value, Mapping) else value
    if (typing.get_args(kind) or (kind,))[-1] in (int, float) and "_" in str(numbers):
        raise ConfigError(f"{key}={numbers}: a number has no _")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _mapped(key: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in _listed(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{key} {text!r}: {part!r} is not of the form name=value")
        if name in found:
            raise ConfigError(f"{key} {text!r}: {name} is named twice")
        found[name] = value
    return found


def load_config(
    kind: type[C],
    folder: str,
    name: str = "default",
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> C:
    """Build a configuration of type ``kind``.

    Layers, where later ones override earlier ones: ``configs/FOLDER/default.yaml``, the preset ``name``, ``defaults``,
    the file ``name``, ``overrides``, ``values``.

    Args:
        kind: the dataclass.
        folder: the stage's folder under ``configs/``.
        name: a preset of that folder, or a YAML file.
        overrides: ``dotted.key=value``, with values in YAML; a list also as ``a,b``, a mapping as ``a=1,b=2``.
        values: dotted key -> value, or a mapping of the keys below it.
        defaults: as ``values``, but overridden by everything that the user sets.

    Raises:
        ConfigError: an unknown preset, a misspelt key (naming the nearest valid one), or a value of the wrong type; the
            message names the file or override.
        MissingKeys: keys without value, all of them.
    """
    path = config_file(folder, name)
    user_file = path.parent != CONFIGS / folder
    files = [_read_yaml(file) for file in dict.fromkeys([config_file(folder, "default"), path])]
    layers = files[:1] if user_file else files
    layers += _nested(defaults or {})
    layers += files[1:] if user_file else []
    layers += [_read_override(override) for override in overrides]
    layers += _nested(values or {})
    node = OmegaConf.structured(kind)
    for source, layer in layers:
        node = _merge(kind, node, source, layer)
    if missing := OmegaConf.missing_keys(node):
        raise MissingKeys(folder, [key for key in _keys(kind) if key in missing])
    return OmegaConf.to_object(node)  # type: ignore[return-value]


def keys_without_default(folder: str) -> list[str]:
    """The keys that have no value in ``configs/FOLDER/default.yaml``."""
    node = _read_yaml(config_file(folder, "default"))[1]
    missing = OmegaConf.missing_keys(node)
    return [str(key) for key in node if key in missing]


def _read_yaml(path: Path) -> tuple[str, Any]:
    try:
        return str(path), OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error


def _read_override(override: str) -> tuple[str, Any]:
    if "=" not in override:
        raise ConfigError(f"{override!r}: an override has the form key=value")
    key, _, text = override.partition("=")
    try:
        layer = OmegaConf.from_dotlist([f"{key}={text.replace('_', UNDERSCORE)}"])
        return override, _with_underscores(OmegaConf.to_container(layer))
    except Exception as error:
        raise ConfigError(f"{override!r}: {error}") from error


def _with_underscores(node: Any) -> Any:
    """``node`` with what :data:`UNDERSCORE` stands for, in keys too."""
    if isinstance(node, dict):
        return {_with_underscores(key): _with_underscores(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_underscores(value) for value in node]
    return node.replace(UNDERSCORE, "_") if isinstance(node, str) else node


def _nested(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys as nested mappings, one layer each."""
    layers = []
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append((key, value))
    return layers


def _merge(kind: type, node: Any, source: str, layer: Any) -> Any:
    """``node`` overridden by one layer."""
    layer = _parsed(kind, layer)
    try:
        node = OmegaConf.merge(node, layer)
        for key in OmegaConf.missing_keys(layer) if isinstance(layer, DictConfig) else ():
            OmegaConf.update(node, key, MISSING)  # merging does not reset such keys
        return node
    except ConfigKeyError as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
        raise ConfigError(f"{source}: {_unknown(kind, key, source)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error


def _unknown(kind: type, key: str, source: str) -> str:
    """The message for an unknown key: what became of it, or the nearest key, and what ``kind.HINT`` adds."""
    known, last = list(_keys(kind)), key.rpartition(".")[2]
    if last in REMOVED:
        remedy = f"delete its line from {source}" if Path(source).suffix in {".yaml", ".yml"} else "leave it out"
        return f"`{key}` is no key any more: {REMOVED[last]}; {remedy}"
    names = RENAMED.get(last, ())
    renamed = next((k for k in known if k.rpartition(".")[2] in names), None)
    return f"`{key}` is called {renamed} now" if renamed else nearest(key, known, "key") + getattr(kind, "HINT", "")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def flatten(values: Any) -> dict[str, Any]:
    """Nested mappings, or a configuration, as dotted key -> value."""
    node = to_dict(values) if dataclasses.is_dataclass(values) else values
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= {f"{key}.{k}": v for k, v in flatten(value).items()} if isinstance(value, Mapping) else {key: value}
    return flat


def flatten_override(override: str) -> dict[str, Any]:
    """The dotted keys that an override ``key=value`` sets."""
    return flatten(_read_override(override)[1])


def to_yaml(config: Any) -> str:
    """A configuration as YAML, which :func:`load_config` can read."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def fingerprint(*parts: Any) -> str:
    """SHA-256 (16 hex digits) of configurations and other JSON-serialisable values."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
