"""Ctrl-C: training writes a checkpoint at the first and ends at once at the second; no stage goes on as if unasked."""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

AGAIN_S = 1.0  # a terminal and a launcher may both deliver the same Ctrl-C
FIRST = "stopping after this step, with a checkpoint; Ctrl-C again ends at once"
STATUS = 128 + signal.SIGINT


@contextlib.contextmanager
def no_interrupt_is_lost() -> Iterator[None]:
    """Inside, a KeyboardInterrupt that falls into a destructor or a weak reference's callback is raised once more.

    Python prints it there and goes on.
    """
    before = sys.unraisablehook

    def raise_again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.1, _thread.interrupt_main).start()  # once this callback is over
        else:
            before(unraisable)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def interrupts_request(stop: Callable[[], None], consequence: Callable[[], str]) -> Iterator[None]:
    """Inside, the first SIGINT calls ``stop`` and the second ends the process with status 130.

    A thread receives them, since Python's own handler waits for the call that the main thread is in, as for a backward
    pass of a minute. Where SIGINT is ignored, as behind ``nohup``, or in another thread than the main one, nothing
    changes.

    Args:
        stop: asks for the end of training; called in another thread.
        consequence: says what is left of the run when it ends at once.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    reads, writes = socket.socketpair()
    writes.setblocking(False)
    listener = threading.Thread(target=_listen, args=(reads, stop, consequence), daemon=True)
    signal.signal(signal.SIGINT, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, before)
        writes.close()
        listener.join()
        reads.close()


def _listen(reads: socket.socket, stop: Callable[[], None], consequence: Callable[[], str]) -> None:
    first: float | None = None
    while numbers := reads.recv(64):
        now = time.monotonic()
        if signal.SIGINT not in numbers:
            continue
        if first is None:
            first = now
            print(f"\n{FIRST}", file=sys.stderr, flush=True)
            stop()
        elif now - first > AGAIN_S:
            print(f"\nended at once; {consequence()}", file=sys.stderr, flush=True)
            os._exit(STATUS)  # as if it were killed, which a run survives at any moment
