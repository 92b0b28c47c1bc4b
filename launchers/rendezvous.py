"""What the supervisors of a job's nodes tell one another: JSON lines over one TCP connection per node to node 0.

A connection that ends says that the node at its other side is gone, within a second where its process was killed and
within some twenty where the machine is; files on shared storage could not say that.
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
LONGEST = 2**16  # bytes of a line
SILENCE_S = 20  # how long a machine may not answer


class Link:
    """One node's side.

    Attributes:
        messages: (node, message) as they come; a message of None: that node is gone.
    """

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[int, Message | None]] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def tell(self, message: Message) -> None:
        """Send ``message`` to all at the other side; one that is gone is not an error here."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(line)

    def next(self, seconds: float) -> tuple[int, Message | None] | None:
        """The next message, or None after ``seconds`` without one."""
        try:
            return self.messages.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
                peer.close()
            self._peers.clear()

    def _listen(self, node: int, connection: socket.socket, lines: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := lines.readline(LONGEST):
                self.messages.put((node, json.loads(line)))
        self.messages.put((node, None))


class Hub(Link):
    """Node 0's side: the others connect to it.

    Args:
        ip: address to listen on.
        token: what a connection must know.
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
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        _keep_alive(connection)
        lines = connection.makefile("rb")
        try:
            connection.settimeout(SILENCE_S)
            hello = json.loads(lines.readline(LONGEST))
            node = int(hello["node"])
            if not hmac.compare_digest(str(hello["token"]), self._token):
                raise ValueError
            connection.settimeout(None)
        except (OSError, ValueError, KeyError, TypeError):  # a stranger
            connection.close()
            return
        with self._lock:
            self._peers[node] = connection
        self.messages.put((node, {"event": "came", **hello.get("about", {})}))
        self._listen(node, connection, lines)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        super().close()


class Spoke(Link):
    """Another node's side.

    Args:
        address: ``ip:port`` of the hub.
        token: what it asks for.
        node: this node's number.
        about: what it should know of this node.
    """

    def __init__(self, address: str, token: str, node: int, about: Message) -> None:
        super().__init__()
        ip, port = address.rsplit(":", 1)
        connection = socket.create_connection((ip, int(port)), timeout=SILENCE_S)
        connection.settimeout(None)
        _keep_alive(connection)
        self._peers[0] = connection
        self.tell({"node": node, "token": token, "about": about})
        lines = connection.makefile("rb")
        threading.Thread(target=self._listen, args=(0, connection, lines), daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}.items():
        if hasattr(socket, name):  # elsewhere than on Linux, the system's own patience
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def free_port(ip: str) -> int:
    """A port of ``ip`` that is free now."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def own_address(interface: str, towards: str | None) -> tuple[str, str]:
    """This node's address between nodes, and its interface.

    Args:
        interface: its name; empty: the one that traffic to ``towards`` (an address; None: anywhere) leaves through.
        towards: an address of another node.

    Returns:
        (address, name of the interface).

    Raises:
        RuntimeError: an interface that is not there.
    """
    import psutil

    addresses = {
        name: [a.address for a in found if a.family == socket.AF_INET] for name, found in psutil.net_if_addrs().items()
    }
    if interface:
        if not addresses.get(interface):
            known = ", ".join(name for name, found in addresses.items() if found)
            raise RuntimeError(f"no interface {interface!r} with an IPv4 address here; there are {known}")
        return addresses[interface][0], interface
    ip = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((towards or "192.0.2.1", 9))  # of a datagram socket: nothing is sent, a route is chosen
        ip = probe.getsockname()[0]
    return ip, next((name for name, found in addresses.items() if ip in found), "lo")


def connect(read: Callable[[], tuple[str, str] | None], node: int, about: Message, seconds: float) -> Spoke:
    """The link to node 0, once it can be reached.

    Args:
        read: returns (address, token) or None while they are not known yet.
        node: this node's number.
        about: what node 0 should know of this node.
        seconds: how long to try.

    Raises:
        TimeoutError: where that was in vain.
    """
    end = time.monotonic() + seconds
    while True:
        found = read()
        if found is not None:
            with contextlib.suppress(OSError):
                address, token = found
                return Spoke(address, token, node, about)
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)
