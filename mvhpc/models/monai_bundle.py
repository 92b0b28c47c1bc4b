"""The files that make an exported model a MONAI bundle: ``configs/metadata.json`` and ``configs/inference.json``.

`python -m monai.bundle run --config_file DIR/configs/inference.json` starts it. The format is that of
https://docs.monai.io/en/stable/mb_specification.html, but for the weights, which are safetensors: a pickle runs code.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvhpc.models.bundle import BaselineModel, JointModel
from mvhpc.models.scalar_bundle import ScalarsModel

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
WHERE = "$sys.path[1]"  # MONAI puts the bundle's folder there before it runs it


def write_monai_bundle(folder: Path, model: Any) -> None:
    """Write the files; of an autoencoder, which answers no query, ``metadata.json`` alone.

    Args:
        folder: which holds ``model``.
        model: as :func:`mvhpc.models.bundle.load` returns it.
    """
    configs = folder / "configs"
    configs.mkdir(exist_ok=True)
    (configs / "metadata.json").write_text(json.dumps(metadata(model.meta), indent=1))
    if isinstance(model, ScalarsModel | JointModel | BaselineModel):
        (configs / "inference.json").write_text(json.dumps(inference(model), indent=1))


def inference(model: ScalarsModel | JointModel | BaselineModel) -> dict[str, Any]:
    """The configuration that answers queries about a raw scan, or, without a model of scalars, about packed data."""
    config: dict[str, Any] = {
        "imports": ["$import json", "$import sys", "$from pathlib import Path"],
        "bundle_root": WHERE,
        "device": "auto",
        "output": "answer.json",
        "model": {"_target_": "mvhpc.api.load", "path": "@bundle_root", "device": "@device"},
    }
    if isinstance(model, ScalarsModel) or (isinstance(model, JointModel) and model.scalars is not None):
        config |= {"scan": "scan.nii.gz", "given": {}, "want": []}
        config["answer"] = "$@model.predict(@scan, @given, @want)"
    else:
        volumes, scalars = ([v.name for v in of] for of in (model.schema.volumes, model.schema.scalars))
        given, want = (model.given, [model.want]) if isinstance(model, BaselineModel) else (volumes, scalars)
        config |= {"data": "packed", "given": given, "want": want}
        config["answer"] = "$@model.predict_people(@data, @given, @want)"
    return config | {"run": ["$Path(@output).write_text(json.dumps(@answer, indent=1))"]}


def metadata(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``metadata.json``.

    Args:
        meta: content of ``model.json``.
    """
    schema = meta.get("schema", {})
    volumes = {name: spec for name, spec in schema.items() if spec["kind"] == "volume"}
    scalars = {name: spec for name, spec in schema.items() if spec["kind"] != "volume"}
    shape = meta.get("grid", {}).get("shape")
    return {
        "schema": SCHEMA,
        "version": version("mvhpc"),
        "changelog": {version("mvhpc"): "exported"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("mvhpc", "safetensors", "nibabel")},
        "name": f"mvhpc {meta['kind']} model",
        "task": f"prediction of {', '.join(scalars)} from brain MRI" if scalars else "latents of brain MRI",
        "description": f"A {meta['kind']} model of {', '.join(schema) or 'volumes'}; see README.md.",
        "authors": "",
        "copyright": "",
        "intended_use": "research; not a medical device",
        "network_data_format": {
            "inputs": {
                name: {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": 1,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {"0": spec.get("suffix", name)},
                }
                for name, spec in volumes.items()
            },
            "outputs": {
                name: {
                    "type": "probabilities" if spec["kind"] == "categorical" else "regression",
                    "format": "classes" if spec["kind"] == "categorical" else spec.get("unit") or "number",
                    "num_channels": len(spec.get("classes", [0])),
                    "dtype": "float32",
                    "value_range": [0, 1] if spec["kind"] == "categorical" else spec.get("range"),
                    "is_patch_data": False,
                    "channel_def": {str(i): text for i, text in enumerate(spec.get("classes", [name]))},
                }
                for name, spec in scalars.items()
            },
        },
    }
