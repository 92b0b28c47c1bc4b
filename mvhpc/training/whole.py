"""Checkpoints of any number of workers and any ZeRO stage, put together again in host memory.

What DeepSpeed's converters (``ds_to_universal``, ``zero_to_fp32``) do through folders of files, and without running
what a pickle may hold: the files are read as weights alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

LOCAL = "state.pt"  # a checkpoint of one worker
MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_*_mp_rank_00_optim_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Whole:
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


def read_whole(folder: Path) -> Whole:
    """One network's part of a checkpoint, whoever wrote it.

    Args:
        folder: ``step-XXXXXXXX/NETWORK``.

    Raises:
        FileNotFoundError: there is none in it.
    """
    if (folder / LOCAL).is_file():
        parts = torch.load(folder / LOCAL, map_location="cpu", weights_only=True, mmap=True)
        return Whole(**tree_map_only(Tensor, Tensor.contiguous, parts))  # a GPU had them in an order of its own
    name = MODEL if (folder / MODEL).is_file() else MODEL_3
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint of a network in it")
    model = read_weights(folder / name)
    whole = Whole(dict(model["module"]), updates=model["global_steps"], usual=model["usual"])
    names: list[str] = model["trained"]
    if model["optimizer"] is not None:  # ZeRO-0
        whole.moments = {names[i]: moments for i, moments in model["optimizer"]["state"].items()}
    else:
        files = sorted(folder.glob(OPTIMIZER), key=lambda path: int(path.name.split("_")[3]))
        shards = [read_weights(path)["optimizer_state_dict"] for path in files]
        for parameter, fp32, moments in _zero3(shards, model) if name == MODEL_3 else _zero12(shards, model):
            whole.network[parameter] = fp32
            if moments:
                whole.moments[parameter] = moments
    averages = [read_weights(path) for path in sorted(folder.glob("average*.pt"))]
    if averages:
        for parameter, pieces in zip(model["parameters"], zip(*averages, strict=True), strict=True):
            whole.average[parameter] = _join(list(pieces), whole.network[parameter].shape)
    return whole


Shard = tuple[str, Tensor, dict[str, Tensor]]  # name, weight, AdamW's moments of a parameter


def _join(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat([piece.flatten() for piece in pieces])[: shape.numel()].view(shape)


def _zero12(shards: list[Any], model: Any) -> Iterator[Shard]:
    """ZeRO-1 and 2: all parameters of a group flattened into one, which is cut evenly among the workers."""
    for group in range(len(shards[0]["single_partition_of_fp32_groups"])):
        pieces: dict[str, dict[str, list[Tensor]]] = {}
        steps: list[Tensor] = []
        for shard in shards:
            state = shard["base_optimizer_state"]["state"].get(group, {})
            steps += [state["step"]] if state else []
            flat = {key: state[key] for key in MOMENTS if state}
            flat["fp32"] = shard["single_partition_of_fp32_groups"][group]
            for name, where in shard["param_slice_mappings"][group].items():
                for key, values in flat.items():
                    piece = values[where.start : where.start + where.numel]
                    pieces.setdefault(name, {}).setdefault(key, []).append(piece)
        for name, parts in pieces.items():
            whole = {key: _join(values, model["module"][name].shape) for key, values in parts.items()}
            yield name, whole.pop("fp32"), whole | ({"step": steps[0].clone()} if steps else {})


def _zero3(shards: list[Any], model: Any) -> Iterator[Shard]:
    """ZeRO-3: every parameter cut evenly among the workers, the cuts of a group one after another."""
    for group, shapes in enumerate(model["param_shapes"]):
        flats = []
        for shard in shards:
            state = shard["optimizer_state_dict"]["state"].get(group, {})
            flats.append({"fp32": shard["fp32_flat_groups"][group]} | state)
        offset = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(shards))
            whole = {
                key: _join([flat[key][offset : offset + size] for flat in flats], shape)
                for key in ("fp32", *MOMENTS)
                if key in flats[0]
            }
            offset += size
            yield name, whole.pop("fp32"), whole | ({"step": flats[0]["step"].clone()} if "step" in flats[0] else {})
