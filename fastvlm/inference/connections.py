"""The server's connections: those that ask nothing or do not read what they asked for are closed, so that nobody is
shut out by silence."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SLOWEST = 1024  # bytes a second, of a reply that waits to be read


class AskingProtocol(H11Protocol):
    """Closes a connection on which no request is being answered for `timeout_keep_alive` seconds: one that is silent
    from its start, one whose headers do not come to their end, and one that was answered and asks nothing further;
    and one whose reply waits to be read, while in so many seconds less than `SLOWEST` a second of it is. uvicorn itself
    waits without end for all of them but the third, and for any that sends a byte."""

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
        super().on_response_complete()  # goes on with a request that has come meanwhile

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
        self.transport.close()  # once all is sent
        if self._unread is None:
            self._watch()

    def _watch(self) -> None:
        """See in a while whether the bytes that wait have become fewer."""
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
    """Serve an application until the process is told to end; further options are those of `uvicorn.run`."""
    uvicorn.run(app, http=AskingProtocol, timeout_keep_alive=idle_seconds, **options)
