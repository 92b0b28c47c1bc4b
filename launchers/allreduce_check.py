"""One rank of a test all-reduce between nodes.

`python -m launchers.allreduce_check ADDRESS RANK WORLD OUT.json`

It runs in a process of its own: where a network or a GPU hangs, only this process is killed.
"""

import json
import sys
import time
from pathlib import Path

from mvhpc.runtime.process_group import bind, connect

MEBIBYTES = {"cuda": 256, "cpu": 8}
ROUNDS = 3
TIMEOUT_S = 60


def main(address: str, rank: int, world: int, out: Path) -> None:
    """Add up rank + 1 over all ranks; write whether the sum was correct, and the bandwidth on a ring (Gbit/s)."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    host, port = address.rsplit(":", 1)
    listener = bind(host, int(port)) if rank == 0 else None
    connect("nccl" if device.type == "cuda" else "gloo", host, int(port), rank, world, TIMEOUT_S, listener)
    size = MEBIBYTES[device.type] * 2**20
    correct, seconds = True, float("inf")
    for _ in range(ROUNDS):
        numbers = torch.full((size // 4,), float(rank + 1), device=device)
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.monotonic() - start)
        correct = correct and bool((numbers == world * (world + 1) / 2).all())
    dist.destroy_process_group()
    rate = 2 * (world - 1) / world * size * 8 / seconds / 1e9
    out.write_text(json.dumps({"correct": correct, "gbit_per_second": round(rate, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
