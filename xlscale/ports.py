"""A port for the processes of a run to meet at."""

import contextlib
import random
import socket

PORTS = 10_000, 32_000
"""Linux gives outgoing connections ports from 32,768 upwards: one of those might be taken before anybody listens."""


def free_port() -> int:
    """A TCP port of the loopback interface, of PORTS, that nobody listens on."""
    for port in random.Random().sample(range(*PORTS), 1000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no free port in {PORTS}")
