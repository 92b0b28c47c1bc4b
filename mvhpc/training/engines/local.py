"""Training with one worker: plain torch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvhpc.checkpoints.consolidate import LOCAL, NetworkState, consolidate, trained
from mvhpc.config import Compute, Optimizer
from mvhpc.models.kernels.channels_last import channels_last_weights
from mvhpc.runtime.devices import resolve_device
from mvhpc.training.engines.base import Average, Engine, adamw, to_host


class LocalEngine(Engine):
    """One worker. ``compute.zero_stage`` and ``compute.offload`` have no effect here."""

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
        if device.type == "cuda":
            channels_last_weights(module)
        self.layout = "1 worker"
        if compute.compile:
            module.compile()
        self.optimizer = adamw(module, rate, optimizer)
        if decay is not None:
            self.average = Average(list(module.parameters()), decay)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulate).backward()

    def _update(self, last: bool) -> None:
        if not last:
            return
        self._clip_gradients(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous().clone() for name, value in self.module.state_dict().items()}

    def snapshot(self) -> dict[str, Any]:
        average = () if self.average is None else self.average.values
        state = NetworkState(
            network=dict(self.module.state_dict()),
            moments={name: self.optimizer.state[p] for name, p in trained(self.module) if p in self.optimizer.state},
            average={name: value for (name, _), value in zip(self.module.named_parameters(), average)},
            updates=self.updates,
            largest_norm=self.largest_norm,
        )
        return {LOCAL: to_host(vars(state))}

    def load(self, folder: Path, layout: str) -> None:
        state = consolidate(folder)
        self.module.load_state_dict(state.network)
        moments = {
            i: {key: _in_format_of(value, p) for key, value in state.moments[name].items()}
            for i, (name, p) in enumerate(trained(self.module))
            if name in state.moments
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.updates = state.updates
        self.largest_norm.copy_(state.largest_norm)
        if self.average is not None:
            for (name, _), value in zip(self.module.named_parameters(), self.average.values, strict=True):
                value.copy_(state.average[name])


def _in_format_of(value: Tensor, like: Tensor) -> Tensor:
    """A moment in the memory format of its weight, as the fused optimiser requires."""
    return torch.empty_like(like, device=value.device).copy_(value) if value.shape == like.shape else value
