"""The server's connections: those that ask nothing are closed, so that nobody is shut out by silence."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


class AskingProtocol(H11Protocol):
    """Closes a connection on which no request is being answered for `timeout_keep_alive` seconds: one that is silent
    from its start, one whose headers do not come to their end, and one that was answered and asks nothing further.
    uvicorn itself waits without end for the first, and for any that sends a byte."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()  # goes on with a request that has come meanwhile

    def _wait(self) -> None:
        self._stop_waiting()
        self._silence = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None


def run(app: Any, *, idle_seconds: float = 30.0, **options: Any) -> None:
    """Serve an application until the process is told to end; further options are those of `uvicorn.run`."""
    uvicorn.run(app, http=AskingProtocol, timeout_keep_alive=idle_seconds, **options)
