"""The address the daemon listens on, and how others reach it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

from server.settings import SettingsError

BACKLOG = 2048
SEND_BUFFER_BYTES = 128 * 1024
"""What the kernel keeps for a client that does not read; left to itself it takes megabytes for each."""
OPTIONS: Sequence[tuple[int, int, int]] = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES // 2),  # the kernel doubles it
    # A client that vanished without a word is noticed within two minutes: while nothing is sent to it by four probes,
    # else by what it does not acknowledge.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000),
)
"""Of the listening socket; on Linux, connections inherit them."""


class PortError(Exception):
    """The address cannot be had; the text is one line for the operator."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. It listens at once: a second daemon on the port fails here, not after loading its model.

    Raises SettingsError for a name that does not resolve, PortError for an address that cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise SettingsError(f"--host: cannot resolve {host!r}") from None
    # `localhost` is two addresses; clients that know only one of them know 127.0.0.1.
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        for level, option, value in OPTIONS:
            listener.setsockopt(level, option, value)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PortError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}") from None
    return listener


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a daemon that listens on `host`."""
    if host in ("0.0.0.0", "::"):  # nosec B104
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Only programs of this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
