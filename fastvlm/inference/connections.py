"""Timeouts for the server's connections: idle clients, and clients that do not read their reply, are disconnected."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SLOWEST = 1024  # bytes per second that a client must read of a pending reply


class AskingProtocol(H11Protocol):
    """Closes connections that are idle or read too slowly.

    Idle means that no request was being answered for `timeout_keep_alive` seconds: the client sent nothing, never
    finished its headers, or sent no further request. Too slow means that over as many seconds the client read less
    than `SLOWEST` bytes per second of a pending reply. uvicorn itself only times out the third kind of idle
    connection, and not if the client sends a single byte.
    """

    _silence: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()  # continues with a pipelined request, if there is one

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def _wait(self) -> None:
        self._stop_waiting()
        self._silence = self.loop.call_later(self.timeout_keep_alive, self._close)

    def _stop_waiting(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _close(self) -> None:
        self.transport.close()  # closes after flushing the write buffer
        if self._unread is None:
            self._watch()

    def _watch(self) -> None:
        """Check after `timeout_keep_alive` seconds whether enough of the write buffer was read."""
        self._stop_watching()
        most = self.transport.get_write_buffer_size() - SLOWEST * self.timeout_keep_alive
        self._unread = self.loop.call_later(self.timeout_keep_alive, self._look, max(0, most))

    def _look(self, most: float) -> None:
        if self.transport.get_write_buffer_size() > most:
            self.transport.abort()
        else:
            self._watch()

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def run(app: Any, *, idle_seconds: float = 30.0, **options: Any) -> None:
    """Serve an application until the process is stopped; other options are passed to `uvicorn.run`."""
    uvicorn.run(app, http=AskingProtocol, timeout_keep_alive=idle_seconds, **options)
