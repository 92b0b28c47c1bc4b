"""Training with several workers: DeepSpeed ZeRO."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvhpc.checkpoints.consolidate import MOMENTS, NetworkState, consolidate, partition, safe_globals, trained
from mvhpc.config import Compute, ConfigError, Optimizer, choose
from mvhpc.runtime.collectives import Collectives
from mvhpc.runtime.devices import resolve_device
from mvhpc.training.engines.base import Average, Engine, adamw, to_host

BUCKET = 500_000_000  # most elements in one message, DeepSpeed's default
PERSISTENT = 100_000  # elements; ZeRO-3 does not partition smaller weights, which it would gather for every layer


class DeepSpeedEngine(Engine):
    """A network trained by the workers of the initialised process group.

    Stage 0 replicates everything, 1 partitions the optimiser state, 2 also the gradients, 3 also the weights and their
    average (Rajbhandari et al. 2020).
    """

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        optimizer: Optimizer,
        compute: Compute,
        decay: float | None,
        accumulate: int,
        micro_batch: int,
        collectives: Collectives,
    ) -> None:
        device = resolve_device(compute.device)
        super().__init__(module.to(device).train(), optimizer, compute, accumulate, device)
        self._deepspeed = import_deepspeed(device)
        self._collectives = collectives
        if compute.zero_stage not in range(4):
            raise ConfigError(f"compute.zero_stage={compute.zero_stage}: DeepSpeed ZeRO has stages 0 to 3")
        if choose(compute.offload, ("none", "cpu"), "compute.offload") == "cpu" and compute.zero_stage == 0:
            raise ConfigError(
                "compute.offload=cpu needs a partitioned optimiser state; set compute.zero_stage to 1 or more"
            )
        self.stage = compute.zero_stage
        self.layout = f"{collectives.world} workers, ZeRO-{self.stage}"
        if compute.compile:
            module.compile()
        # The buffer for gradients has 2 GB by default, also for a small network.
        bucket = min(BUCKET, sum(p.numel() for p in module.parameters()))
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT,
        }
        if compute.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            # (at stage 0 DeepSpeed would clip each weight, and exchange a norm that all workers have)
            "gradient_clipping": optimizer.clip if self.stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on CPUs, without a compiler
            "torch_autocast": {
                "enabled": self._dtype != torch.float32,
                "dtype": str(self._dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # gradients are exchanged in float32
            },
            "steps_per_print": 2**31,
            "checkpoint": {"tag_validation": "Ignore"},  # the tag is the same at all workers
        }
        self._adamw = adamw(module, rate, optimizer)
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self._adamw, config=settings, dist_init_required=False
        )
        self._files: dict[str, Any] = {}  # of a snapshot being taken
        self._engine.checkpoint_engine = _memory_engine(self._files)
        for name in ("_create_checkpoint_file", "_create_zero_checkpoint_files", "_copy_recovery_script"):
            setattr(self._engine, name, lambda *_: True)  # a snapshot writes no file
        if self.stage > 0:
            self._check_norms()
        if self.stage == 3:
            self._clear_padding()
        if decay is not None:
            # (ds_tensor: this worker's partition of a weight, under ZeRO-3)
            weights = [getattr(p, "ds_tensor", p) for p in module.parameters()]
            self.average = Average(weights, decay)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Zero the padding of this worker's partitions: DeepSpeed leaves uninitialised memory there, and checkpoints of
        equal runs would differ."""
        zero = self._engine.optimizer
        for p in self.module.parameters():
            share: Tensor = p.ds_tensor  # type: ignore[attr-defined]
            size = share.numel()
            mine = min(size, max(0, p.ds_numel - self._collectives.rank * size))  # type: ignore[attr-defined]
            share[mine:] = 0
            if p.requires_grad:
                group, offset, _ = zero.grad_position[zero.get_param_id(p)]
                zero.fp32_partitioned_groups_flat[group].data[offset + mine : offset + size] = 0

    def _check_norms(self) -> None:
        """Pass ZeRO an infinite norm, at which it skips the update, where :meth:`_check` decides to skip it."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        method = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        measure = getattr(zero, method)

        def checked() -> Any:
            norm = combine_grad_norm_groups(measure()) if self.stage == 3 else torch.as_tensor(measure())
            norm = norm.to(self.device)
            norm = torch.where(self._check(norm) > 0, torch.inf, norm)
            return [norm] if self.stage == 3 else norm

        setattr(zero, method, checked)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 3:
            raise ValueError("frozen() needs unpartitioned weights; use compute.zero_stage=2 or below for this network")
        return super().frozen(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _update(self, last: bool) -> None:
        if last and self.stage == 0:  # from stage 1 on DeepSpeed computes the norm
            self._clip_gradients(self._adamw)
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _exchange(self) -> None:
        if self.stage == 3:
            self._engine.empty_partition_cache()  # else gathered small weights would not be exchanged
        super()._exchange()

    def weights(self) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        state = {}
        for name, value in self.module.state_dict().items():
            parameter = parameters.get(name)
            partitioned = self.stage == 3 and parameter is not None
            with self._deepspeed.zero.GatheredParameters([parameter] if partitioned else [], enabled=partitioned):
                if self._collectives.rank == 0:
                    state[name] = (value if parameter is None else parameter).detach().cpu().clone()
        return state

    # --- checkpoints ---

    def _average_file(self) -> str:
        return f"average-{self._collectives.rank:05d}.pt" if self.stage == 3 else "average.pt"

    def snapshot(self) -> dict[str, Any]:
        # DeepSpeed's layout, which its converters (universal checkpoint, zero_to_fp32) read.
        more = {
            "largest_norm": self.largest_norm,
            "parameters": [name for name, _ in self.module.named_parameters()],
            "trained": [name for name, _ in trained(self.module)],
        }
        self._engine.save_checkpoint(".", tag="snapshot", client_state=more, save_latest=False)
        files = dict(self._files)
        self._files.clear()
        # (below stage 3 every worker has all of it; the last one writes it, since rank 0 writes the weights)
        if self.average is not None and (self.stage == 3 or self._collectives.rank == self._collectives.world - 1):
            files[self._average_file()] = self.average.flat()
        return files

    def load(self, folder: Path, layout: str) -> None:
        if layout != self.layout:
            self._load_consolidated(folder)
            return
        if self.stage == 3:
            self._engine.empty_partition_cache()
        path, more = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise FileNotFoundError(f"{folder}: DeepSpeed finds no checkpoint there")
        self.updates = self._engine.global_steps
        self.largest_norm.copy_(more["largest_norm"])
        if self.average is not None:
            self.average.restore(torch.load(folder / self._average_file(), weights_only=True, mmap=True))

    @torch.no_grad()
    def _load_consolidated(self, folder: Path) -> None:
        """Load a checkpoint of another number of workers or another stage. Rank 0 reads it."""
        rank, world = self._collectives.rank, self._collectives.world
        state = consolidate(folder) if rank == 0 else NetworkState({})
        share = self._collectives.share
        self.updates = self._engine.global_steps = share(state.updates)
        self.largest_norm.copy_(share(state.largest_norm))
        for name, buffer in self.module.named_buffers():
            kept = share(state.network.get(name))
            if kept is not None:
                buffer.copy_(kept)
        if self.stage == 3:
            self._engine.empty_partition_cache()
        averages = iter(() if self.average is None else self.average.values)
        for name, p in self.module.named_parameters():
            value, moments = share(state.network.get(name)), share(state.moments.get(name, {}))
            assert value is not None
            live: Tensor = getattr(p, "ds_tensor", p)
            live.copy_(partition(value, rank, world) if self.stage == 3 else value)
            if p.requires_grad:
                self._set(p, value, moments)
            mean = share(state.average.get(name))
            if self.average is not None and mean is not None:
                next(averages).copy_(partition(mean, rank, world) if self.stage == 3 else mean)

    def _set(self, p: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Copy this worker's partition of a parameter and its moments into its optimiser state."""
        zero = self._engine.optimizer
        if self.stage == 0:
            if moments:
                self._adamw.state[p] = {key: m.to(p.device, copy=True) for key, m in moments.items()}
            return
        if self.stage == 3:
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            flat, cut = zero.fp32_partitioned_groups_flat[group], slice(offset, offset + size)
        elif p._hp_mapping is None:  # of another worker
            return
        else:
            place, parameter = p._hp_mapping.get_hp_fragment_address(), p._hp_mapping.lp_fragment_address
            flat = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            cut = slice(place.start, place.start + place.numel)

        def mine(tensor: Tensor) -> Tensor:
            if self.stage == 3:
                return partition(tensor, self._collectives.rank, self._collectives.world)
            return tensor.flatten()[parameter.start : parameter.start + parameter.numel]

        flat.data[cut].copy_(mine(value))
        if moments:
            adamw = zero.optimizer.state[flat]
            adamw["step"] = moments["step"].to(flat.device, copy=True)
            for key in MOMENTS:
                adamw.setdefault(key, torch.zeros_like(flat))[cut].copy_(mine(moments[key]))


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for the accelerator of ``device``."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On CPUs DeepSpeed compiles an all-reduce through shared memory at its first start. That takes a minute, and a
    # process killed meanwhile leaves a lock at which every later run hangs. Only tensor-parallel inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _memory_engine(files: dict[str, Any]) -> Any:
    """DeepSpeed's checkpoint engine, which saves into ``files`` (name -> content copied to host memory) and loads
    without running code in a pickle."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class MemoryEngine(TorchCheckpointEngine):
        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            files[Path(path).name] = to_host(state_dict)

        def load(self, path: str, map_location: Any = None) -> Any:
            with safe_globals():
                return torch.load(path, map_location=map_location, weights_only=True)

    return MemoryEngine()
