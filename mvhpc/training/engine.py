"""A network with its optimiser and the running average of its weights, in one process or spread over workers.

Both engines keep the weights in float32; ``precision: bfloat16`` computes in bfloat16 under autocast and returns
float32, the same way with one worker or many.
"""

import contextlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from mvhpc.config import Compute, ConfigError, Optimizer, choose
from mvhpc.devices import keep_thin_convolutions_exact, resolve_device, resolve_precision
from mvhpc.training.ranks import Ranks

SCHEDULES = ("constant", "cosine")


def learning_rate(step: int, total: int, base: float, optimizer: Optimizer) -> float:
    """The learning rate of a step, a pure function of it.

    Rises linearly to ``base`` over ``optimizer.warmup`` steps, then stays (``constant``) or falls to zero at ``total``
    as half a cosine (``cosine``; Loshchilov and Hutter 2017, without restarts).

    Args:
        step: 0 to total - 1.
        total: steps of the whole run.
        base: the network's largest rate.
        optimizer: its ``warmup`` and ``schedule``.
    """
    if step < optimizer.warmup:
        return base * (step + 1) / optimizer.warmup
    if choose(optimizer.schedule, SCHEDULES, "schedule") == "constant":
        return base
    progress = (step - optimizer.warmup) / max(1, total - optimizer.warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of weights: a <- d a + (1 - d) w with d = min(decay, (1 + s) / (10 + s)) at update s.

    The growing decay (as in TensorFlow's ExponentialMovingAverage) forgets the initial weights quickly.

    Args:
        weights: the live float32 tensors that are averaged; on ZeRO-3 this worker's partitions of them.
        decay: in [0, 1).
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.weights = list(weights)
        self.decay = decay
        self.values = [w.detach().clone() for w in self.weights]

    @torch.no_grad()
    def update(self, s: int) -> None:
        """Take in the present weights, as update number ``s`` (from 0)."""
        d = min(self.decay, (1 + s) / (10 + s))
        torch._foreach_lerp_(self.values, [w.detach() for w in self.weights], 1 - d)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the live weights, bit for bit; a second call swaps them back."""
        for weight, value in zip(self.weights, self.values, strict=True):
            live = weight.detach().clone()
            weight.detach().copy_(value)
            value.copy_(live)


class Engine(ABC):
    """One network being trained. Calling it is the network's forward pass.

    Attributes:
        module: the network.
        device: where it is and its inputs must be.
        grad_norm: gradient norm before clipping, over all workers, of the last update; a 0-dimensional tensor.
        updates: optimiser updates done.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        compute: Compute,
        accumulate: int,
        device: torch.device,
    ) -> None:
        self.module = module
        self.device = device
        self.grad_norm = torch.zeros(())
        self.updates = 0
        self._clip = optimizer.clip
        self._accumulate = accumulate
        self._micro = 0
        self._dtype = resolve_precision(compute.precision, device)
        if device.type == "cpu" and self._dtype == torch.bfloat16:
            keep_thin_convolutions_exact(module)
        self.average: Average | None = None  # set by subclasses once the weights are in place

    def autocast(self) -> torch.autocast:
        """The context in which the network computes."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    @abstractmethod
    def _forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output; floating tensors in it are float32."""
        with self.autocast():
            return _float32(self._forward(*args, **kwargs))

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with the weights held constant: gradients reach the inputs but not the weights.

        For the adversarial term of a generator. Needs whole weights, so not under ZeRO-3.
        """
        constants = {name: p.detach() for name, p in self.module.named_parameters()}
        with self.autocast():
            return _float32(functional_call(self.module, constants, args, kwargs))

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's share of the gradient of ``loss``, a mean over the micro-batch."""

    def step(self) -> None:
        """End a micro-batch; after the last one of a step, clip, update the weights and their average."""
        self._micro += 1
        last = self._micro == self._accumulate
        self._update(last)
        if last:
            self._micro = 0
            if self.average is not None:
                self.average.update(self.updates)
            self.updates += 1

    @abstractmethod
    def _update(self, last: bool) -> None: ...

    @abstractmethod
    def set_learning_rate(self, rate: float) -> None:
        """Use ``rate`` from the next update on."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode, without gradients, and with the averaged weights in place where there are some."""
        self.module.eval()
        self._exchange()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self._exchange()
            self.module.train()

    def _exchange(self) -> None:
        if self.average is not None:
            self.average.exchange()

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole state dict on the CPU, of what is in place now. Collective; only rank 0's result is whole."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this worker's part of all that decides the future into ``folder``. Collective."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote. Collective."""


def _float32(output: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, output)


def _adamw(module: nn.Module, rate: float, optimizer: Optimizer) -> torch.optim.AdamW:
    trained = [p for p in module.parameters() if p.requires_grad]
    first, second = optimizer.betas
    return torch.optim.AdamW(trained, lr=rate, betas=(first, second), weight_decay=optimizer.weight_decay, fused=True)


class LocalEngine(Engine):
    """One worker: plain torch."""

    def __init__(
        self,
        module: nn.Module,
        rate: float,
        optimizer: Optimizer,
        compute: Compute,
        decay: float | None,
        accumulate: int,
    ) -> None:
        device = resolve_device(compute.device)
        super().__init__(module.to(device).train(), optimizer, compute, accumulate, device)
        self.optimizer = _adamw(module, rate, optimizer)
        if decay is not None:
            self.average = Average(list(module.parameters()), decay)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulate).backward()

    def _update(self, last: bool) -> None:
        if not last:
            return
        limit = self._clip if self._clip > 0 else math.inf
        self.grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.values,
            "updates": self.updates,
        }
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        if self.average is not None:
            torch._foreach_copy_(self.average.values, state["average"])


class DeepSpeedEngine(Engine):
    """Many workers: DeepSpeed ZeRO on the process group that Ray (or a test) has set up.

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
        ranks: Ranks,
    ) -> None:
        device = resolve_device(compute.device)
        super().__init__(module.to(device).train(), optimizer, compute, accumulate, device)
        self._deepspeed = import_deepspeed(device)
        self._ranks = ranks
        if compute.zero_stage not in range(4):
            raise ConfigError(f"compute.zero_stage={compute.zero_stage}: DeepSpeed ZeRO has stages 0 to 3")
        self.stage = compute.zero_stage
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": optimizer.clip,
            # Threshold 0: no weights stay gathered between steps, where an exchange with the average would miss them.
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "torch_autocast": {
                "enabled": self._dtype != torch.float32,
                "dtype": str(self._dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # gradients travel in float32
            },
            "steps_per_print": 2**31,
        }
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=_adamw(module, rate, optimizer), config=settings, dist_init_required=False
        )
        self._engine.checkpoint_engine = weights_only_engine()
        if decay is not None:
            # (ds_tensor: this worker's partition of a weight, under ZeRO-3)
            weights = [getattr(p, "ds_tensor", p) for p in module.parameters()]
            self.average = Average(weights, decay)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 3:
            raise ValueError("frozen() needs whole weights; keep this network at compute.zero_stage=2 or below")
        return super().frozen(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _update(self, last: bool) -> None:
        if last and self.stage == 0:  # DeepSpeed knows the norm from stage 1 on
            self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        if last and self.stage > 0:
            self.grad_norm = torch.as_tensor(self._engine.get_global_grad_norm())

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def _exchange(self) -> None:
        if self.stage == 3:
            self._engine.empty_partition_cache()
        super()._exchange()

    def weights(self) -> dict[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        whole = {}
        for name, value in self.module.state_dict().items():
            parameter = parameters.get(name)
            divided = self.stage == 3 and parameter is not None
            with self._deepspeed.zero.GatheredParameters([parameter] if divided else [], enabled=divided):
                if self._ranks.rank == 0:
                    whole[name] = (value if parameter is None else parameter).detach().cpu().clone()
        return whole

    def _average_file(self, folder: Path) -> Path:
        return folder / (f"average-{self._ranks.rank:05d}.pt" if self.stage == 3 else "average.pt")

    def save(self, folder: Path) -> None:
        # DeepSpeed's own layout, which its converters (universal checkpoint, zero_to_fp32) read.
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if self.average is not None and (self.stage == 3 or self._ranks.rank == 0):
            torch.save(self.average.values, self._average_file(folder))

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise FileNotFoundError(f"{folder}: DeepSpeed finds no checkpoint in it")
        self.updates = self._engine.global_steps
        if self.average is not None:
            values = torch.load(self._average_file(folder), map_location=self.device, weights_only=True)
            torch._foreach_copy_(self.average.values, values)


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


def weights_only_engine() -> Any:
    """DeepSpeed's checkpoint files, read without running what a pickle may hold."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class WeightsOnly(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

    return WeightsOnly()


def make_engine(
    module: nn.Module,
    rate: float,
    optimizer: Optimizer,
    compute: Compute,
    decay: float | None,
    accumulate: int,
    micro_batch: int,
    ranks: Ranks,
) -> Engine:
    """The engine of one network.

    Args:
        module: the network, with equal weights at every worker.
        rate: its largest learning rate.
        optimizer: AdamW's other settings and the clipping.
        compute: precision, device and ZeRO stage.
        decay: of the running average of its weights; None for none.
        accumulate: micro-batches per step.
        micro_batch: samples in each.
        ranks: the workers; one gives a :class:`LocalEngine`, more a :class:`DeepSpeedEngine`.
    """
    if ranks.world == 1:
        return LocalEngine(module, rate, optimizer, compute, decay, accumulate)
    return DeepSpeedEngine(module, rate, optimizer, compute, decay, accumulate, micro_batch, ranks)
