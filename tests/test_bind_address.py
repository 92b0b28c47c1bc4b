"""The address at which programs listen that were told none."""

import os
import subprocess
import sys

from mvhpc.runtime.bind_address import only_at

BIND = """
import socket
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, ""),
    (socket.AF_INET6, socket.SOCK_STREAM, "::"),
    (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.9"),
    (socket.AF_INET, socket.SOCK_DGRAM, ""),
):
    with socket.socket(family, kind) as server:
        server.bind((address, 0))
        print(server.getsockname()[0])
"""


def test_tcp_servers_at_all_addresses_are_at_one_and_everything_else_stays() -> None:
    """Also in the children of a child; a socket of both families is reached at the IPv4 address."""
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BIND!r}], check=True)"
    command = [sys.executable, "-c", script]

    def told(more: dict[str, str]) -> list[str]:
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True)
        assert not done.stderr
        return done.stdout.split()

    assert told({}) == ["0.0.0.0", "::", "127.0.0.9", "0.0.0.0"]
    assert told(only_at("127.0.0.3")) == ["127.0.0.3", "::ffff:127.0.0.3", "127.0.0.9", "0.0.0.0"]


def test_what_was_loaded_before_is_loaded_still() -> None:
    ours = only_at("127.0.0.1", {})["LD_PRELOAD"]
    assert only_at("127.0.0.1", {"LD_PRELOAD": "/lib/other.so"})["LD_PRELOAD"] == f"{ours}:/lib/other.so"
