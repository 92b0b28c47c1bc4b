"""Checkpoints of any number of workers and any ZeRO stage, put together again.

What ZeRO has divided goes through DeepSpeed's universal checkpoint (Lian et al. 2024, "Universal Checkpointing"). All
files are read as weights alone, by DeepSpeed too: nothing runs what a pickle may hold.
"""

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mvhpc.checkpoints.manifest import CheckpointError
from mvhpc.runtime.scratch import scratch_folder

LOCAL = "state.pt"  # a checkpoint of one worker
MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"  # the first worker's
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class NetworkState:
    """All that decides the future of one network, by parameter name.

    Attributes:
        network: its state dict.
        moments: parameter name -> AdamW's ``step``, ``exp_avg`` and ``exp_avg_sq``; empty before the first update.
        average: running average of its parameters; empty where there is none.
        updates: optimiser updates done.
        usual: the largest gradient norm of late.
    """

    network: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    usual: Tensor = field(default_factory=lambda: torch.zeros(()))


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that an optimiser updates, in its order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def partition(value: Tensor, rank: int, world: int) -> Tensor:
    """The share of one worker of a tensor under ZeRO-3: equal parts of it flattened, padded with zeros at the end."""
    size = -(-value.numel() // world)
    padded = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    return padded[rank * size : (rank + 1) * size]


def read_weights(path: Path) -> Any:
    """A file of tensors, DeepSpeed's own included, onto the CPU and without running what a pickle may hold."""
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def safe_globals() -> Any:
    """The context in which ``torch.load`` takes the few types that DeepSpeed's files hold beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def consolidate(folder: Path) -> NetworkState:
    """One network's part of a checkpoint, whoever wrote it.

    Args:
        folder: ``step-XXXXXXXX/NETWORK``.

    Raises:
        FileNotFoundError: there is none in it.
        CheckpointError: divided by ZeRO, and of before the first update.
    """
    if (folder / LOCAL).is_file():
        parts = torch.load(folder / LOCAL, map_location="cpu", weights_only=True, mmap=True)
        return NetworkState(**tree_map_only(Tensor, Tensor.contiguous, parts))  # a GPU had them in an order of its own
    name = MODEL if (folder / MODEL).is_file() else MODEL_3
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint of a network in it")
    model = read_weights(folder / name)
    whole = NetworkState(dict(model["module"]), updates=model["global_steps"], usual=model["usual"])
    if model["optimizer"] is not None:  # ZeRO-0
        whole.moments = {model["trained"][i]: moments for i, moments in model["optimizer"]["state"].items()}
    else:
        _add_divided(whole, folder, {k: shape for group in model["param_shapes"] for k, shape in group.items()})
    averages = [read_weights(path) for path in sorted(folder.glob("average*.pt"))]
    if averages:
        shapes = [whole.network[parameter].shape for parameter in model["parameters"]]
        sizes = [-(-shape.numel() // len(averages)) for shape in shapes]
        pieces = zip(*(average.split(sizes) for average in averages), strict=True)
        for parameter, shape, piece in zip(model["parameters"], shapes, pieces, strict=True):
            whole.average[parameter] = torch.cat(piece)[: shape.numel()].view(shape)
    return whole


def _add_divided(whole: NetworkState, folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Add weights and moments that ZeRO has divided, from a universal checkpoint on this machine's own disc."""
    shard = read_weights(folder / OPTIMIZER)["optimizer_state_dict"]
    state = shard["base_optimizer_state" if "base_optimizer_state" in shard else "optimizer_state_dict"]["state"]
    if not state:
        raise CheckpointError(
            f"{folder.parent}: every update had been left out by then, and of that DeepSpeed writes no universal "
            "checkpoint; go on with as many workers as before, or remove the folder to begin anew"
        )
    with tempfile.TemporaryDirectory(dir=scratch_folder(tempfile.gettempdir())) as scratch:
        _write_universal(folder, Path(scratch))
        for name, shape in shapes.items():
            place = Path(scratch) / "zero" / name
            files = {key: read_weights(place / f"{key}.pt") for key in ("fp32", *MOMENTS)}
            values = {key: file["param"] if isinstance(file, dict) else file for key, file in files.items()}
            shaped = {key: value.view(shape) for key, value in values.items()}
            whole.network[name] = shaped.pop("fp32")
            whole.moments[name] = shaped | {"step": state[0]["step"].clone()}


def _write_universal(folder: Path, target: Path) -> None:
    """DeepSpeed's universal checkpoint of its own checkpoint of one network, by its own converter.

    Args:
        folder: ``step-XXXXXXXX/NETWORK``.
        target: an existing folder; gets ``zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt`` and more.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # which DeepSpeed itself leaves out of stages 1 and 2
    )
    quiet = io.StringIO()
    with safe_globals(), _weights_only(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """In it ``torch.load`` runs no pickle, whatever DeepSpeed tells it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
