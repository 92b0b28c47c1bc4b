"""The choice of the engine."""

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
        module: the network, with the same weights at every worker.
        rate: the largest learning rate.
        optimizer: the other settings of AdamW, and the clipping.
        compute: precision, device, ZeRO stage, offload and compilation.
        decay: of the moving average of its weights; None for no average.
        accumulate: micro-batches per step.
        micro_batch: samples per micro-batch and worker.
        collectives: one worker gives a :class:`LocalEngine`, several a :class:`DeepSpeedEngine`.
    """
    if collectives.world == 1:
        return LocalEngine(module, rate, optimizer, compute, decay, accumulate)
    from mvhpc.training.engines.deepspeed import DeepSpeedEngine  # slow to import

    return DeepSpeedEngine(module, rate, optimizer, compute, decay, accumulate, micro_batch, collectives)
