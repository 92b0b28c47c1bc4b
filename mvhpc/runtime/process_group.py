"""The process group of a run's workers. Its store listens on one address of rank 0's node, not on all interfaces."""

import socket
from datetime import timedelta

import torch.distributed as dist


def bind(host: str, port: int = 0) -> socket.socket:
    """A TCP socket bound to one address, for rank 0 of :func:`connect`.

    Args:
        host: IPv4 or IPv6 address of this node.
        port: 0 for a free one.

    Raises:
        OSError: the address is not this node's, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def connect(
    backend: str, host: str, port: int, rank: int, world: int, timeout_s: float, listener: socket.socket | None = None
) -> None:
    """Initialise ``torch.distributed`` with all workers. Collective.

    Args:
        backend: ``gloo`` or ``nccl``.
        host: address of the store.
        port: port of the store.
        rank: this worker.
        world: number of workers.
        timeout_s: of collectives, in seconds.
        listener: at rank 0 the socket bound to ``host`` and ``port``; PyTorch's store would bind to every interface.

    Raises:
        torch.distributed.DistError: not all workers connect in time.
    """
    timeout = timedelta(seconds=timeout_s)
    descriptor = listener.detach() if listener is not None else None  # the store closes it
    store = dist.TCPStore(host, port, world, is_master=rank == 0, timeout=timeout, master_listen_fd=descriptor)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
