"""The full state of a network from a checkpoint of any number of workers and any ZeRO stage.

Partitions of ZeRO go through DeepSpeed's universal checkpoint (Lian et al. 2024, "Universal Checkpointing"). All files
are read with ``weights_only``, also by DeepSpeed, so that no code in a pickle runs.
"""

import argparse
import contextlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mvhpc.checkpoints.manifest import CheckpointError
from mvhpc.runtime.importing import require
from mvhpc.runtime.scratch import temporary_folder
from shards.environment import environment_variable

LOCAL = "state.pt"  # a checkpoint of one worker
MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"  # the first worker's
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class NetworkState:
    """Everything that determines further training of one network, by parameter name.

    Attributes:
        network: its state dict.
        moments: parameter name -> AdamW's ``step``, ``exp_avg`` and ``exp_avg_sq``; empty before the first update.
        average: running average of its parameters; empty where there is none.
        updates: optimiser updates done.
        largest_norm: the largest recent gradient norm.
    """

    network: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    largest_norm: Tensor = field(default_factory=lambda: torch.zeros(()))


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the optimiser updates, in its order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def partition(value: Tensor, rank: int, world: int) -> Tensor:
    """One worker's partition of a tensor under ZeRO-3: equal parts of the flat tensor, padded with zeros at the end."""
    size = -(-value.numel() // world)
    padded = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    return padded[rank * size : (rank + 1) * size]


def read_weights(path: Path) -> Any:
    """Load a file of tensors, also one of DeepSpeed, onto the CPU without running code in a pickle."""
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def safe_globals() -> Any:
    """A context in which ``torch.load`` accepts the few types other than tensors in DeepSpeed's files."""
    require("cluster", "a checkpoint of several workers", "deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def consolidate(folder: Path) -> NetworkState:
    """The state of one network in a checkpoint of any layout.

    Args:
        folder: ``step-NNNNNNNN/NETWORK``.

    Raises:
        FileNotFoundError: the folder has no checkpoint.
        CheckpointError: partitioned by ZeRO, and from before the first update.
    """
    if (folder / LOCAL).is_file():
        parts = torch.load(folder / LOCAL, map_location="cpu", weights_only=True, mmap=True)
        return NetworkState(
            **tree_map_only(Tensor, Tensor.contiguous, parts)
        )  # on a GPU their memory format may differ
    name = MODEL if (folder / MODEL).is_file() else MODEL_3
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: it holds no checkpoint of a network")
    model = read_weights(folder / name)
    state = NetworkState(dict(model["module"]), updates=model["global_steps"], largest_norm=model["largest_norm"])
    if model["optimizer"] is not None:  # ZeRO-0
        state.moments = {model["trained"][i]: moments for i, moments in model["optimizer"]["state"].items()}
    else:
        _add_partitioned(state, folder, {k: shape for group in model["param_shapes"] for k, shape in group.items()})
    averages = [read_weights(path) for path in sorted(folder.glob("average*.pt"))]
    if averages:
        shapes = [state.network[parameter].shape for parameter in model["parameters"]]
        sizes = [-(-shape.numel() // len(averages)) for shape in shapes]
        pieces = zip(*(average.split(sizes) for average in averages), strict=True)
        for parameter, shape, piece in zip(model["parameters"], shapes, pieces, strict=True):
            state.average[parameter] = torch.cat(piece)[: shape.numel()].view(shape)
    return state


def _add_partitioned(state: NetworkState, folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Add weights and moments that ZeRO partitions, by a temporary universal checkpoint on a local disc."""
    shard = read_weights(folder / OPTIMIZER)["optimizer_state_dict"]
    adamw = shard["base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"]["state"]
    if not adamw:
        raise CheckpointError(
            f"{folder.parent}: all updates before it were skipped, and DeepSpeed converts no such checkpoint; resume "
            "with the number of workers that wrote it, or remove the folder to begin anew"
        )
    with temporary_folder(Path(tempfile.gettempdir())) as scratch:
        _write_universal(folder, scratch)
        for name, shape in shapes.items():
            folder_of_parameter = scratch / "zero" / name
            files = {key: read_weights(folder_of_parameter / f"{key}.pt") for key in ("fp32", *MOMENTS)}
            values = {key: file["param"] if isinstance(file, dict) else file for key, file in files.items()}
            shaped = {key: value.view(shape) for key, value in values.items()}
            state.network[name] = shaped.pop("fp32")
            state.moments[name] = shaped | {"step": adamw[0]["step"].clone()}


def _write_universal(folder: Path, target: Path) -> None:
    """Convert DeepSpeed's checkpoint of one network to its universal checkpoint.

    Args:
        folder: ``step-NNNNNNNN/NETWORK``.
        target: an existing folder; gets ``zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt`` among others.
    """
    require("cluster", "a checkpoint of several workers", "deepspeed")
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # missing in DeepSpeed's files of stages 1 and 2
    )
    quiet = io.StringIO()
    # torch.load runs no code in a pickle then, whatever its arguments
    safe = environment_variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with safe_globals(), safe, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(arguments)
