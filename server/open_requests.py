"""Which generations are open, by the names a client knows them by, so that it can cancel them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import Cancelled
from server.record import RequestRecord

Name = tuple[bytes, str]
"""Digest of the API key and an id: nobody can name what another key has started."""


class OpenRequests:
    """Everything happens in the event loop, so an entry is there exactly while its generation can be stopped."""

    def __init__(self) -> None:
        self._open: dict[Name, list[tuple[RequestRecord, Callable[[], None]]]] = {}

    @contextmanager
    def track(self, record: RequestRecord, abort: Callable[[], None]) -> Iterator[None]:
        """Make one generation of `record` known while the block runs. `abort` must end it soon; it may be called more
        than once, and also before there is anything to end: check `record.cancelled` after each wait then.
        """
        if record.cancelled:  # while another generation of the same request was being prepared
            raise Cancelled
        entry = (record, abort)
        names = {(record.key_digest, name) for name in (record.request_id, record.response_id) if name}
        for name in names:
            self._open.setdefault(name, []).append(entry)
        try:
            yield
        finally:
            for name in names:
                entries = self._open[name]
                entries.remove(entry)
                if not entries:
                    del self._open[name]

    def cancel(self, key_digest: bytes, request_id: str) -> bool:
        """End everything that is open under this id; False when nothing is."""
        entries = list(self._open.get((key_digest, request_id), ()))
        for record, abort in entries:
            record.cancelled = True
            abort()
        return bool(entries)
