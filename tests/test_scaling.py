"""The arithmetic of benchmarks/scaling."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling.rates import Rates
from benchmarks.scaling.steptime import (
    Setting,
    communication,
    interval,
    memory,
    passes,
    saving,
    step,
    volume,
    waste,
    work_of,
)  # fmt: skip
from benchmarks.scaling.workload import Counter, Device

RATES = Rates()


def setting(gpus: int, zero_stage: int = 1) -> Setting:
    return Setting("joint", "paper", gpus, gpus, 1, zero_stage)  # one row each: the same work at every size


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 1024])
def test_a_pass_sends_all_but_one_share(gpus: int) -> None:
    near, far = volume(1e9, gpus)
    assert near + far == pytest.approx((gpus - 1) / gpus * 1e9)
    assert far == 0 or gpus > 8


def test_zero_divides_memory_and_multiplies_messages() -> None:
    assert [passes(stage) for stage in range(4)] == [2, 3, 3, 3]
    assert [passes(stage, 4) for stage in range(4)] == [2, 3, 9, 12]  # accumulation is free of messages below stage 2
    bytes_of = [memory(setting(1024, stage), RATES) for stage in range(4)]
    assert bytes_of == sorted(bytes_of, reverse=True)
    work = work_of(setting(1), RATES)
    full = 4 * work.parameters
    assert memory(setting(1, 0), RATES) == 5 * full + work.activations  # weights, gradients, moments, average
    assert communication(3, work, 1, 1, RATES) == 0
    seconds = [communication(0, work, gpus, 1, RATES) for gpus in (1, 2, 8, 16, 1024)]
    assert seconds == sorted(seconds)


def test_more_gpus_are_never_more_efficient_and_fail_more() -> None:
    sizes = (1, 8, 32, 256, 1024)
    speeds = [step(setting(gpus, 0), RATES).seconds for gpus in sizes]  # one row a GPU: a longer step is a lower speed
    assert speeds == sorted(speeds)
    goodputs = [saving(setting(gpus), RATES).goodput for gpus in sizes]
    assert goodputs == sorted(goodputs, reverse=True)
    assert 0 < goodputs[-1] < goodputs[0] < 1


def test_the_interval_wastes_least() -> None:
    for visible, between, restart in product((0.01, 0.4), (1e4, 1e7), (0, 200)):
        tried = np.geomspace(0.01, 1e6, 20001)
        best = min(tried, key=lambda t: waste(t, visible, between, restart))
        assert interval(visible, between) == pytest.approx(best, rel=1e-2)


def test_what_is_counted() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.SiLU(), torch.nn.Linear(128, 8))
    x = torch.randn(16, 64)
    with FlopCounterMode(display=False) as torchs:
        network(x).sum().backward()
    network.zero_grad()
    with Counter(Device(1e12, 1e9)) as c:
        network(x).sum().backward()
    assert c.flops == torchs.get_total_flops()
    assert math.isclose(c.seconds, c.traffic / 1e9)  # so slow a memory bounds every operator
    gradients = sum(4 * p.numel() for p in network.parameters())
    network.zero_grad()
    assert c.alive == 0 < gradients < c.peak
