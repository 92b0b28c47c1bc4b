"""The store of a process group listens on one address."""

import subprocess
import sys

import pytest

from mvhpc.runtime.process_group import bind

CODE = """
import psutil, torch, torch.distributed as dist
from mvhpc.runtime.process_group import bind, connect
listener = bind("127.0.0.2")
connect("gloo", *listener.getsockname(), 0, 1, 60, listener)
x = torch.ones(3)
dist.all_reduce(x)
assert x.tolist() == [1, 1, 1]
print(*{c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN})
dist.destroy_process_group()
"""


def test_the_store_listens_on_its_address_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=200)
    addresses = set(done.stdout.split())
    assert "127.0.0.2" in addresses and not addresses & {"0.0.0.0", "::"}


def test_a_port_in_use_is_refused() -> None:
    with bind("127.0.0.1") as listener:
        listener.listen()
        with pytest.raises(OSError, match="in use"):
            bind(*listener.getsockname())
