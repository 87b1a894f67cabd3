"""The two ends of the socketpair between front-end and engine.

A frame is a 4-byte little-endian length followed by that many bytes of msgpack: one message of the unions in
`scheduler.messages`. The engine's threads use `EngineChannel` (blocking), the front-end's event loop uses
`ClientChannel` (an asyncio protocol). The pair is inherited by the engine process and reachable from nowhere else;
still, every frame is decoded against the exact message types and anything else is a `ProtocolError`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import msgspec

from scheduler.messages import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Longest payload. A 131,072-token prompt needs 0.5 MiB; the rest is room for merged outputs and very long prompts."""

_RECEIVE_BYTES = 256 * 1024
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

Message = TypeVar("Message")


class ChannelError(Exception):
    """The channel cannot be used any more."""


class ChannelClosed(ChannelError):  # noqa: N818
    """The other process closed its end or died."""


class ProtocolError(ChannelError):
    """The other end sent, or we were about to send, something that is not a frame of this protocol."""


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One frame, ready to be written. `ProtocolError` when it is longer than `MAX_FRAME_BYTES`."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder(Generic[Message]):
    """Bytes in, in pieces of any size; messages out, in order."""

    def __init__(self, message_type: Any) -> None:
        self._decode: Callable[[bytearray], Message] = msgspec.msgpack.Decoder(message_type).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that `data` completes. `ProtocolError` on anything else; then the stream is lost."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise ProtocolError(f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES}")
                body = start + _LENGTH.size
                if len(buffer) < body + length:
                    break
                start = body + length
                yield self._message(buffer[body:start])
        finally:
            del buffer[:start]

    def _message(self, payload: bytearray) -> Message:
        try:
            return self._decode(payload)
        except Exception as error:
            # Beside its own errors msgspec lets UnicodeDecodeError and RecursionError through. Whatever it is, what
            # cannot be decoded is not of this protocol.
            raise ProtocolError(f"a frame of {len(payload)} bytes is not a message: {error}") from error


class EngineChannel:
    """The engine's end: blocking, where nothing else is said; one thread receives, one at a time sends."""

    def __init__(self, sock: socket.socket) -> None:
        self.unsent = memoryview(b"")
        """The rest of a frame that `try_send` found room for the beginning of."""
        self._sock = sock
        self._decoder = FrameDecoder[ToEngine](ToEngine)
        self._received: deque[ToEngine] = deque()

    def receive(self) -> ToEngine:
        """The next message. `ChannelClosed` when the front-end is gone, `ProtocolError` on junk."""
        while not self._received:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("end of file")
            self._received.extend(self._decoder.feed(data))
        return self._received.popleft()

    def send(self, message: FromEngine) -> None:
        """Block until the message is in the socket's buffer. `ChannelClosed` when the front-end is gone."""
        frame = encode_frame(message)
        self.flush()
        self._send_all(frame)

    def try_send(self, message: FromEngine) -> bool:
        """Put a message into the socket's buffer, without blocking. False: there is no room. Of what it has room for in
        part the rest is left `unsent`. `ChannelClosed` when the front-end is gone."""
        if self.unsent:
            return False
        frame = encode_frame(message)
        try:
            sent = self._sock.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        self.unsent = memoryview(frame)[sent:]
        return True

    def flush(self) -> None:
        """Block until nothing is `unsent`. `ChannelClosed` when the front-end is gone."""
        if self.unsent:
            rest, self.unsent = self.unsent, memoryview(b"")
            self._send_all(rest)

    def _send_all(self, data: bytes | memoryview) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def close(self) -> None:
        self._sock.close()


class ClientChannel(asyncio.Protocol):
    """The front-end's end: `on_message` for every message, in order, then `on_closed(reason)` exactly once.

    A protocol and not a `StreamReader`, because it costs no task switch between the socket and the streams.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], on_closed: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder = FrameDecoder[FromEngine](FromEngine)
        self._transport: asyncio.Transport | None = None
        self._reason = "end of file"

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Callable[[FromEngine], None], on_closed: Callable[[str], None]
    ) -> ClientChannel:
        """Take over one end of a connected AF_UNIX stream socket."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_message, on_closed), sock=sock)
        return channel

    def send(self, message: ToEngine) -> None:
        """Queue a message; a no-op once the channel is closed. `ProtocolError` when it is too long for a frame."""
        frame = encode_frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        """Drop what is not written yet and close; `on_closed` is called from the event loop."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._on_message(message)
        except Exception as error:
            # A message that decodes and cannot be filed is no better than junk: nothing that follows can be trusted.
            self._reason = str(error) if isinstance(error, ProtocolError) else f"{type(error).__name__}: {error}"
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_closed(str(exc) if exc is not None else self._reason)
