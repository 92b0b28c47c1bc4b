"""Messages between the supervisors of a job's nodes: JSON lines over one TCP connection from each node to node 0.

A connection that closes means that the node at the other end is gone: within a second where its process was killed,
within about twenty where the machine failed. Files on shared storage could not show that.
"""

import contextlib
import hmac
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
MAX_LINE = 2**16  # bytes
TIMEOUT_S = 20  # without an answer, a machine counts as failed


class _Endpoint:
    """One end of the connections.

    Attributes:
        messages: (node, message) in order of arrival; a message of None: that node is gone.
    """

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[int, Message | None]] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send ``message`` to every connected peer. A closed connection is reported by :meth:`receive`."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(line)

    def receive(self, seconds: float) -> tuple[int, Message | None] | None:
        """The next message, or None after ``seconds`` without one."""
        try:
            return self.messages.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
                peer.close()
            self._peers.clear()

    def _read(self, node: int, lines: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := lines.readline(MAX_LINE):
                self.messages.put((node, json.loads(line)))
        self.messages.put((node, None))


class RendezvousServer(_Endpoint):
    """The end of node 0, which the other nodes connect to.

    Args:
        ip: address to listen on.
        token: secret that a client must present.
    """

    def __init__(self, ip: str, token: str) -> None:
        super().__init__()
        self._token = token
        self._server = socket.create_server((ip, 0))
        self.address = f"{ip}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._register, args=(connection,), daemon=True).start()

    def _register(self, connection: socket.socket) -> None:
        _keep_alive(connection)
        lines = connection.makefile("rb")
        try:
            connection.settimeout(TIMEOUT_S)
            hello = json.loads(lines.readline(MAX_LINE))
            node = int(hello["node"])
            if not hmac.compare_digest(str(hello["token"]), self._token):
                raise ValueError
            connection.settimeout(None)
        except (OSError, ValueError, KeyError, TypeError):  # not a node of this job
            connection.close()
            return
        with self._lock:
            self._peers[node] = connection
        self.messages.put((node, {"event": "registered", "name": hello["name"]}))
        self._read(node, lines)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        super().close()


class RendezvousClient(_Endpoint):
    """The end of every other node.

    Args:
        address: ``ip:port`` of the server.
        token: secret of the job.
        node: index of this node.
        name: name of this node.

    Raises:
        OSError: the server cannot be reached.
    """

    def __init__(self, address: str, token: str, node: int, name: str) -> None:
        super().__init__()
        ip, port = address.rsplit(":", 1)
        connection = socket.create_connection((ip, int(port)), timeout=TIMEOUT_S)
        if connection.getsockname() == connection.getpeername():  # a free local port can connect to itself
            connection.close()
            raise ConnectionRefusedError(f"nothing listens at {address}")
        connection.settimeout(None)
        _keep_alive(connection)
        self._peers[0] = connection
        self.send({"node": node, "token": token, "name": name})
        lines = connection.makefile("rb")
        threading.Thread(target=self._read, args=(0, lines), daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}.items():
        if hasattr(socket, name):  # other systems than Linux: their defaults
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def free_port(ip: str) -> int:
    """A port of ``ip`` that is free at present."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def own_address(interface: str, towards: str | None) -> tuple[str, str]:
    """This node's address on the network between nodes, and the name of that interface.

    Args:
        interface: its name; empty: the interface of the route to ``towards``.
        towards: address of another node; None: the default route.

    Returns:
        (address, name of the interface).

    Raises:
        RuntimeError: there is no such interface.
    """
    import psutil

    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET] for name, found in psutil.net_if_addrs().items()
    }
    if interface:
        if not addresses.get(interface):
            known = ", ".join(name for name, found in addresses.items() if found)
            raise RuntimeError(f"there is no interface {interface!r} with an IPv4 address; available: {known}")
        return addresses[interface][0], interface
    ip = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((towards or "192.0.2.1", 9))  # a datagram socket: a route is chosen, nothing is sent
        ip = probe.getsockname()[0]
    return ip, next((name for name, found in addresses.items() if ip in found), "lo")


def connect(lookup: Callable[[], tuple[str, str] | None], node: int, name: str, seconds: float) -> RendezvousClient:
    """Connect to node 0, trying again until it can be reached.

    Args:
        lookup: returns (address, token), or None while they are not known yet.
        node: index of this node.
        name: name of this node.
        seconds: time limit.

    Raises:
        TimeoutError: node 0 was not reached within the limit.
    """
    end = time.monotonic() + seconds
    while True:
        found = lookup()
        if found is not None:
            with contextlib.suppress(OSError):
                return RendezvousClient(*found, node, name)
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)
