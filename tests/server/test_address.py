from __future__ import annotations

import socket

from server.address import SEND_BUFFER_BYTES, bind


def test_connections_notice_clients_that_vanish_and_keep_little_for_slow_ones() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            tcp = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in tcp] == [60, 15, 4, 120_000]
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == SEND_BUFFER_BYTES
