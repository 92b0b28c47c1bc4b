"""Many workers: DeepSpeed ZeRO. Nothing else imports DeepSpeed, but for the names in its files (``whole.py``)."""

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

BUCKET = 500_000_000  # elements that DeepSpeed gathers into one message at most, its default
KEPT = 100_000  # elements: weights smaller than that stay whole under ZeRO-3, instead of being fetched for every layer


class DeepSpeedEngine(Engine):
    """A network on the process group that Ray (or a test) has set up.

    Stage 0 copies everything, 1 divides the optimiser state among the workers, 2 the gradients too, 3 the weights
    and their average too (Rajbhandari et al. 2020).
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
                "compute.offload=cpu needs an optimiser that is divided; set compute.zero_stage to 1 or more"
            )
        self.stage = compute.zero_stage
        self.layout = f"{collectives.world} workers, ZeRO-{self.stage}"
        if compute.compile:
            module.compile()
        # Gradients are exchanged from a buffer, of 2 GB by default, however small the network.
        bucket = min(BUCKET, sum(p.numel() for p in module.parameters()))
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": KEPT,
        }
        if compute.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            # (of stage 0 DeepSpeed would clip weight by weight, and exchange a norm that all workers have)
            "gradient_clipping": optimizer.clip if self.stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, and needs no compiler
            "torch_autocast": {
                "enabled": self._dtype != torch.float32,
                "dtype": str(self._dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # gradients travel in float32
            },
            "steps_per_print": 2**31,
            "checkpoint": {"tag_validation": "Ignore"},  # the workers would agree on a constant
        }
        self._adamw = adamw(module, rate, optimizer)
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self._adamw, config=settings, dist_init_required=False
        )
        self._files: dict[str, Any] = {}  # of a snapshot being taken
        self._engine.checkpoint_engine = _memory_engine(self._files)
        for name in ("_create_checkpoint_file", "_create_zero_checkpoint_files", "_copy_recovery_script"):
            setattr(self._engine, name, lambda *_: True)  # a snapshot touches no disc
        if self.stage > 0:
            self._judge_norms()
        if self.stage == 3:
            self._clear_padding()
        if decay is not None:
            # (ds_tensor: this worker's partition of a weight, under ZeRO-3)
            weights = [getattr(p, "ds_tensor", p) for p in module.parameters()]
            self.average = Average(weights, decay)

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Set to zero what rounds a worker's part of a weight up: DeepSpeed leaves there what was in memory before, and
        checkpoints of equal runs would differ in it."""
        zero = self._engine.optimizer
        for p in self.module.parameters():
            share: Tensor = p.ds_tensor  # type: ignore[attr-defined]
            size = share.numel()
            mine = min(size, max(0, p.ds_numel - self._collectives.rank * size))  # type: ignore[attr-defined]
            share[mine:] = 0
            if p.requires_grad:
                group, offset, _ = zero.grad_position[zero.get_param_id(p)]
                zero.fp32_partitioned_groups_flat[group].data[offset + mine : offset + size] = 0

    def _judge_norms(self) -> None:
        """Have ZeRO, which leaves out updates whose norm is infinite, see such a norm where :meth:`_judge` says so."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        method = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        measure = getattr(zero, method)

        def judged() -> Any:
            norm = combine_grad_norm_groups(measure()) if self.stage == 3 else torch.as_tensor(measure())
            norm = norm.to(self.device)
            norm = torch.where(self._judge(norm) > 0, torch.inf, norm)
            return [norm] if self.stage == 3 else norm

        setattr(zero, method, judged)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 3:
            raise ValueError("frozen() needs whole weights; keep this network at compute.zero_stage=2 or below")
        return super().frozen(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _update(self, last: bool) -> None:
        if last and self.stage == 0:  # from stage 1 on DeepSpeed measures the norm
            self._clip_and_judge(self._adamw)
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _exchange(self) -> None:
        if self.stage == 3:
            self._engine.empty_partition_cache()  # small weights stay gathered otherwise, and would miss it
        super()._exchange()

    def weights(self) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        whole = {}
        for name, value in self.module.state_dict().items():
            parameter = parameters.get(name)
            divided = self.stage == 3 and parameter is not None
            with self._deepspeed.zero.GatheredParameters([parameter] if divided else [], enabled=divided):
                if self._collectives.rank == 0:
                    whole[name] = (value if parameter is None else parameter).detach().cpu().clone()
        return whole

    # --- checkpoints ---

    def _average_file(self) -> str:
        return f"average-{self._collectives.rank:05d}.pt" if self.stage == 3 else "average.pt"

    def snapshot(self) -> dict[str, Any]:
        # DeepSpeed's own layout, which its converters (universal checkpoint, zero_to_fp32) read.
        more = {
            "usual": self.usual,
            "parameters": [name for name, _ in self.module.named_parameters()],
            "trained": [name for name, _ in trained(self.module)],
        }
        self._engine.save_checkpoint(".", tag="snapshot", client_state=more, save_latest=False)
        files = dict(self._files)
        self._files.clear()
        # (below stage 3 all have the whole of it, and rank 0 writes the weights already)
        if self.average is not None and (self.stage == 3 or self._collectives.rank == self._collectives.world - 1):
            files[self._average_file()] = self.average.flat()
        return files

    def load(self, folder: Path, layout: str) -> None:
        if layout != self.layout:
            self._load_whole(folder)
            return
        if self.stage == 3:
            self._engine.empty_partition_cache()
        path, more = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise FileNotFoundError(f"{folder}: DeepSpeed finds no checkpoint in it")
        self.updates = self._engine.global_steps
        self.usual.copy_(more["usual"])
        if self.average is not None:
            self.average.restore(torch.load(folder / self._average_file(), weights_only=True, mmap=True))

    @torch.no_grad()
    def _load_whole(self, folder: Path) -> None:
        """Take up a checkpoint of another number of workers or another stage, read by rank 0 for all."""
        rank, world = self._collectives.rank, self._collectives.world
        whole = consolidate(folder) if rank == 0 else NetworkState({})
        share = self._collectives.share
        self.updates = self._engine.global_steps = share(whole.updates)
        self.usual.copy_(share(whole.usual))
        for name, buffer in self.module.named_buffers():
            kept = share(whole.network.get(name))
            if kept is not None:
                buffer.copy_(kept)
        if self.stage == 3:
            self._engine.empty_partition_cache()
        averages = iter(() if self.average is None else self.average.values)
        for name, p in self.module.named_parameters():
            value, moments = share(whole.network.get(name)), share(whole.moments.get(name, {}))
            assert value is not None
            live: Tensor = getattr(p, "ds_tensor", p)
            live.copy_(partition(value, rank, world) if self.stage == 3 else value)
            if p.requires_grad:
                self._set(p, value, moments)
            mean = share(whole.average.get(name))
            if self.average is not None and mean is not None:
                next(averages).copy_(partition(mean, rank, world) if self.stage == 3 else mean)

    def _set(self, p: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Put a parameter's weight and moments where this worker's optimiser has its share of them."""
        zero = self._engine.optimizer
        if self.stage == 0:
            if moments:
                self._adamw.state[p] = {key: m.to(p.device, copy=True) for key, m in moments.items()}
            return
        if self.stage == 3:
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            flat, cut = zero.fp32_partitioned_groups_flat[group], slice(offset, offset + size)
        elif p._hp_mapping is None:  # another worker's
            return
        else:
            place, whole = p._hp_mapping.get_hp_fragment_address(), p._hp_mapping.lp_fragment_address
            flat = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            cut = slice(place.start, place.start + place.numel)

        def mine(tensor: Tensor) -> Tensor:
            if self.stage == 3:
                return partition(tensor, self._collectives.rank, self._collectives.world)
            return tensor.flatten()[whole.start : whole.start + whole.numel]

        flat.data[cut].copy_(mine(value))
        if moments:
            state = zero.optimizer.state[flat]
            state["step"] = moments["step"].to(flat.device, copy=True)
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(flat))[cut].copy_(mine(moments[key]))


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which accelerator to use."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On CPUs DeepSpeed's first start compiles an all-reduce through shared memory, for about a minute and behind a lock
    # that hangs every later run once a process is killed in it. Only tensor-parallel inference would use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _memory_engine(files: dict[str, Any]) -> Any:
    """DeepSpeed's files, saved into ``files`` (name -> a copy of the content in host memory) and read as weights alone,
    without running what a pickle may hold."""
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
