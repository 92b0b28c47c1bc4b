"""A network with its optimiser and the moving average of its weights, in one process or distributed over workers.

Both engines keep the weights in float32. With ``precision: bfloat16`` they compute in bfloat16 under autocast and
return float32.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.config import Compute, Optimizer
from mvhpc.models.kernels.cpu_conv3d import patch_conv3d
from mvhpc.runtime.devices import resolve_precision

SPIKE_FACTOR = 1000.0  # times the largest recent gradient norm; a larger gradient is not applied
SPIKE_AFTER = 100  # updates; earlier norms are never spikes
NORM_DECAY = 0.99  # of the largest recent norm, per update


def learning_rate(step: int, total: int, base: float, optimizer: Optimizer) -> float:
    """The learning rate of a step, a pure function of it.

    Rises linearly to ``base`` over ``optimizer.warmup`` steps, then stays (``constant``) or falls to zero at ``total``
    as half a cosine (``cosine``; Loshchilov and Hutter 2017, without restarts).

    Args:
        step: 0 to total - 1.
        total: steps of the whole run.
        base: the largest rate of the network.
        optimizer: ``warmup`` and ``schedule`` are read.
    """
    if step < optimizer.warmup:
        return base * (step + 1) / optimizer.warmup
    if optimizer.schedule == "constant":
        return base
    progress = (step - optimizer.warmup) / max(1, total - optimizer.warmup)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of weights: a <- d a + (1 - d) w with d = min(decay, (1 + s) / (10 + s)) at update s.

    The decay grows, as in TensorFlow's ExponentialMovingAverage, so that the initial weights vanish quickly.

    Args:
        weights: the float32 tensors that are averaged; under ZeRO-3 this worker's partitions.
        decay: in [0, 1).
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.weights = list(weights)
        self.decay = decay
        self.values = [w.detach().clone() for w in self.weights]

    @torch.no_grad()
    def update(self, s: int) -> None:
        """Add the present weights, as update number ``s`` (from 0)."""
        d = min(self.decay, (1 + s) / (10 + s))
        torch._foreach_lerp_(self.values, [w.detach() for w in self.weights], 1 - d)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the live weights, bit for bit; a second call swaps them back."""
        for weight, value in zip(self.weights, self.values, strict=True):
            live = weight.detach().clone()
            weight.detach().copy_(value)
            value.copy_(live)

    def flat(self) -> Tensor:
        """A copy in host memory as one flat tensor, which is written faster than hundreds of tensors."""
        flat = torch.empty(sum(value.numel() for value in self.values))
        for piece, value in zip(self._pieces(flat), self.values, strict=True):
            piece.copy_(value)
        return flat

    def restore(self, flat: Tensor) -> None:
        """Restore what :meth:`flat` returned."""
        for piece, value in zip(self._pieces(flat), self.values, strict=True):
            value.copy_(piece)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([value.numel() for value in self.values])
        return [piece.view(value.shape) for piece, value in zip(pieces, self.values, strict=True)]


class Engine(ABC):
    """One network being trained. Calling it is the network's forward pass.

    Attributes:
        module: the network.
        device: of the network and its inputs.
        grad_norm: gradient norm before clipping, over all workers, of the last step; a 0-dimensional tensor, not finite
            or negative where there is none.
        skipped: 1 where the last update was skipped because its gradient was not finite or exploded, else 0; a
            0-dimensional tensor, the same at all workers.
        updates: number of optimiser updates, skipped ones included.
        flops: of one forward pass of one micro-batch at this worker; 0 before the first.
        layout: how a checkpoint of this engine is partitioned; :meth:`load` reads every layout.
    """

    layout: str

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
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.largest_norm = torch.zeros((), device=device)  # the largest recent gradient norm
        self.updates = 0
        self.flops = 0
        self._clip = optimizer.clip
        self._accumulate = accumulate
        self._micro = 0
        self._parameters = list(module.parameters())  # collecting them takes milliseconds
        self._dtype = resolve_precision(compute.precision, device)
        if device.type == "cpu":
            patch_conv3d(module)
        self.average: Average | None = None  # set by subclasses after the weights are in place

    def autocast(self) -> torch.autocast:
        """The context in which the network computes."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    @abstractmethod
    def _forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output; floating tensors in it are float32."""
        if not self.flops:
            self._count(*args, **kwargs)
        with self.autocast():
            return _float32(self._forward(*args, **kwargs))

    def _count(self, *args: Any, **kwargs: Any) -> None:
        """Count the operations of one extra forward pass, in evaluation mode and without gradients."""
        self.module.eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"), counter:
            self.module(*args, **kwargs)
        self.module.train()
        self.flops = counter.get_total_flops()

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with the weights held constant: gradients reach the inputs but not the weights.

        For the adversarial term of a generator. Not available under ZeRO-3, which partitions the weights.
        """
        constants = {name: p.detach() for name, p in self.module.named_parameters()}
        with self.autocast():
            return _float32(functional_call(self.module, constants, args, kwargs))

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a mean over this micro-batch, to the gradient of the step."""

    def step(self) -> None:
        """End a micro-batch. After the last one of a step, clip, update the weights and their average."""
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

    def _clip_gradients(self, optimizer: torch.optim.AdamW) -> None:
        """Clip the gradients, and set whether the fused optimiser skips this update."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip if self._clip > 0 else math.inf)
        optimizer.found_inf = self._check(norm)  # type: ignore[attr-defined]

    def _check(self, norm: Tensor) -> Tensor:
        """Whether to skip the update with this gradient norm, as 1 or 0, without waiting for its device."""
        norm = norm.detach().float()
        bad = ~torch.isfinite(norm) | (norm < 0)
        if self.updates >= SPIKE_AFTER:
            bad = bad | ((norm > SPIKE_FACTOR * self.largest_norm) & (self.largest_norm > 0))
        self.largest_norm = torch.where(bad, self.largest_norm, torch.maximum(NORM_DECAY * self.largest_norm, norm))
        self.grad_norm = norm
        self.skipped = bad.float()
        return self.skipped

    @abstractmethod
    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next updates."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, with the averaged weights in place where there are some."""
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
        """The full state dict on the CPU, of the weights now in place. Collective; only rank 0 gets it."""

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """This worker's part of the full training state, copied to host memory. Collective.

        Returns:
            file name -> content for ``torch.save``.
        """

    @abstractmethod
    def load(self, folder: Path, layout: str) -> None:
        """Restore what :meth:`snapshot` returned. Collective.

        Args:
            folder: with the files of all workers.
            layout: of the engines that wrote these.
        """


def to_host(tree: Any) -> Any:
    """Copy all tensors of a nested structure to host memory."""
    return tree_map_only(
        Tensor,
        lambda x: x.detach().to("cpu", copy=True),
        tree,
        is_leaf=lambda node: isinstance(node, torch.Size),  # else it becomes a plain tuple
    )


def _float32(output: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, output)


def adamw(module: nn.Module, rate: float, optimizer: Optimizer) -> torch.optim.AdamW:
    """AdamW of the trained parameters; fused, so that ``found_inf`` skips an update without synchronisation."""
    trained = [p for p in module.parameters() if p.requires_grad]
    first, second = optimizer.betas
    return torch.optim.AdamW(trained, lr=rate, betas=(first, second), weight_decay=optimizer.weight_decay, fused=True)
