"""The engine that suits the number of workers."""

from torch import nn

from mvhpc.config import Compute, Optimizer
from mvhpc.runtime.collectives import Collectives
from mvhpc.training.engines.base import Engine
from mvhpc.training.engines.local import LocalEngine


def make_engine(
    module: nn.Module,
    rate: float,
    optimizer: Optimizer,
    compute: Compute,
    decay: float | None,
    accumulate: int,
    micro_batch: int,
    collectives: Collectives,
) -> Engine:
    """The engine of one network.

    Args:
        module: the network, with equal weights at every worker.
        rate: its largest learning rate.
        optimizer: AdamW's other settings and the clipping.
        compute: precision, device, ZeRO stage, offload and compilation.
        decay: of the running average of its weights; None for none.
        accumulate: micro-batches per step.
        micro_batch: samples in each.
        collectives: the workers; one gives a :class:`LocalEngine`, more a :class:`DeepSpeedEngine`.
    """
    if collectives.world == 1:
        return LocalEngine(module, rate, optimizer, compute, decay, accumulate)
    from mvhpc.training.engines.deepspeed import DeepSpeedEngine  # slow to import

    return DeepSpeedEngine(module, rate, optimizer, compute, decay, accumulate, micro_batch, collectives)
