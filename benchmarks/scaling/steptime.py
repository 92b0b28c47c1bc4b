"""A model of training on many GPUs: seconds of a step, bytes of memory, checkpoints, failures.

Operations and traffic of the networks are counted (:mod:`benchmarks.scaling.workload`); the machines' constants are in
:mod:`benchmarks.scaling.rates`. One step takes:

    computing = max(GPU, host), for each micro-batch
    GPU       = the roofline of every operator
    host      = operators x launch + rows x noising
    update    = bytes of weights, gradients, moments and average / bandwidth of memory
    exposed   = communication x (1 - hidden share)
    step      = max(computing + update + exposed, reading of the step's volumes)
"""

import math
from dataclasses import dataclass

from benchmarks.scaling.rates import Rates
from benchmarks.scaling.workload import VOXELS, Device, Work, count
from mvhpc.training.engines.deepspeed import BUCKET

NODE = 8  # GPUs
WORD = 4  # bytes: weights, gradients, moments and the average are float32, and travel so


# --- communication --------------------------------------------------------------------------------------------------


def passes(stage: int, accumulate: int = 1) -> int:
    """Passes over the bytes of all weights in one step; a pass is a reduce-scatter or an all-gather.

    Stage 0 all-reduces the gradients: a reduce-scatter and an all-gather. Stages 1 and 2 do so too in DeepSpeed 0.19
    (`use_multi_rank_bucket_allreduce`, its default), then gather the weights that each worker has updated; stage 2
    after every micro-batch, since it keeps no whole gradients. Stage 3 gathers the weights for the forward and again
    for the backward pass and reduce-scatters the gradients, for every micro-batch.
    """
    return {0: 2, 1: 3, 2: 2 * accumulate + 1, 3: 3 * accumulate}[stage]


def volume(size: float, gpus: int) -> tuple[float, float]:
    """Bytes that each GPU sends in one pass over ``size`` bytes: inside its node, and between nodes.

    First within the nodes, then each GPU its own share between them; together (N - 1) / N of ``size``.
    """
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    return size * (inside - 1) / inside, size / inside * (nodes - 1) / nodes


def communication(stage: int, work: Work, gpus: int, accumulate: int, rates: Rates) -> float:
    """Seconds of a step spent on communication that is not overlapped."""
    if gpus == 1:
        return 0.0
    near, far = volume(WORD * work.parameters, gpus)
    moving = passes(stage, accumulate) * (near / rates.nvlink + far / rates.infiniband) / rates.reached
    # Stage 3 gathers each large tensor at its layer and all small ones at once; the others use buckets.
    messages = 3 * accumulate * work.large + 1 if stage == 3 else passes(stage, accumulate) * _buckets(work)
    waiting = messages * rates.latency * math.log2(gpus)
    return (moving + waiting) * (1 - rates.hidden if stage == 3 else 1.0)


def _buckets(work: Work) -> int:
    return -(-work.parameters // BUCKET)


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One configuration of training."""

    kind: str  # joint | vae
    preset: str
    gpus: int
    batch: int
    accumulate: int
    zero_stage: int

    @property
    def rows(self) -> int:
        """Samples per GPU and micro-batch."""
        return self.batch // (self.gpus * self.accumulate)


def work_of(s: Setting, rates: Rates) -> Work:
    """Work of one micro-batch on one GPU."""
    return count(s.kind, s.preset, s.rows, device(rates))


def device(rates: Rates) -> Device:
    """The rates that an operator reaches."""
    return Device(rates.peak * rates.arithmetic, rates.bandwidth * rates.traffic)


@dataclass(frozen=True)
class Step:
    """Seconds of a step and of its parts."""

    gpu: float
    host: float
    update: float
    exposed: float
    reading: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(max(self.gpu, self.host) + self.update + self.exposed, self.reading)


def step(s: Setting, rates: Rates) -> Step:
    """The time of one step."""
    work = work_of(s, rates)
    host = work.kernels * rates.launch + (s.rows * rates.noising if s.kind == "joint" else 0.0)
    divided = s.gpus if s.zero_stage > 0 else 1
    moments = 7 * WORD * work.parameters / divided  # read: weight, gradient, two moments; written: weight, moments
    average = 3 * WORD * work.parameters / (s.gpus if s.zero_stage == 3 else 1) if s.kind == "joint" else 0.0
    read = s.rows * s.accumulate * 2 * math.prod(VOXELS) if s.kind == "vae" else 0  # float16; latents are in memory
    return Step(
        gpu=s.accumulate * work.seconds,
        host=s.accumulate * host,
        update=(moments + average) / (rates.bandwidth * rates.traffic),
        exposed=communication(s.zero_stage, work, s.gpus, s.accumulate, rates),
        reading=read / rates.loading,
    )


def memory(s: Setting, rates: Rates) -> float:
    """Bytes on each GPU."""
    work, stage = work_of(s, rates), s.zero_stage
    whole = WORD * work.parameters

    def part(since: int) -> float:
        return whole / s.gpus if stage >= since else whole

    average = part(3) if s.kind == "joint" else 0.0
    master = whole / s.gpus if stage > 0 else 0.0  # DeepSpeed's own copy of the partition that it updates
    bucket = WORD * min(BUCKET, work.parameters) if stage > 0 else 0.0
    return part(3) + part(2) + 2 * part(1) + average + master + bucket + work.activations


# --- checkpoints and failures ---------------------------------------------------------------------------------------


def interval(visible: float, between: float) -> float:
    """Young's (1974) seconds between checkpoints, the minimum of :func:`waste`.

    Args:
        visible: seconds that training stands still for a checkpoint.
        between: seconds between failures.
    """
    return math.sqrt(2 * visible * between)


def waste(seconds: float, visible: float, between: float, restart: float) -> float:
    """Lost time per useful time with a checkpoint every ``seconds``: pauses, repeated work and restarts."""
    return visible / seconds + (seconds / 2 + restart) / between


@dataclass(frozen=True)
class Saving:
    """Seconds of checkpoints, and the share of time spent on useful steps (``goodput``)."""

    visible: float
    written: float
    every: float
    goodput: float
    goodput_llama: float


def saving(s: Setting, rates: Rates) -> Saving:
    """Checkpoints at the best interval, but not before the previous one is written."""
    work = work_of(s, rates)
    whole = WORD * work.parameters
    copies = 2 if s.kind == "joint" else 1  # weights and their average
    divided = whole * (3 if s.zero_stage > 0 else 2) / s.gpus if s.zero_stage > 0 else whole * 2
    first = divided + whole * copies / (s.gpus if s.zero_stage == 3 else 1)  # of rank 0, which has most
    total = first if s.zero_stage == 0 else whole * (3 + copies)
    nodes, ranks = max(1, s.gpus // NODE), min(s.gpus, NODE)
    on_node = first if s.zero_stage == 0 else first + (ranks - 1) * (first if s.zero_stage == 3 else divided)
    visible = first / rates.snapshot
    written = (
        visible
        + first / rates.hashing
        + max(on_node / rates.writing, total / min(rates.storage, nodes * rates.writing))
    )
    restart = rates.start + rates.requeue + total / min(rates.storage, nodes * rates.writing)
    between = rates.failing * 3600 / s.gpus
    every = max(interval(visible, between), written)
    goods = [
        1 / (1 + waste(every, visible, hours * 3600 / s.gpus, restart))
        for hours in (rates.failing, rates.failing_llama)
    ]
    return Saving(visible, written, every, *goods)
