"""Connections that ask nothing: how many there may be, and how long they are waited for."""

import asyncio
import contextlib
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol


# Connections that one turn of the event loop accepts, before any of them can be refused.
BACKLOG = 512
# Seconds for a client to send the head of a request.
_PATIENCE = 10.0
_MOST = 4096
# Files that the process needs for all else.
_OTHER_FILES = 128
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)  # fmt: skip


class Connection(H11Protocol):
    """
    uvicorn's HTTP/1.1 protocol, which of itself waits for ever for a head, and takes any number of connections.

    Parameters:
        most (`int`):
            Connections that may be open; beyond, a client gets 503 at once.
        patience (`float`):
            Seconds for the head of a request.
    """

    most = _MOST
    patience = _PATIENCE
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """
        Take a connection, or refuse it.

        Args:
            transport (`asyncio.Transport`):
                The connection.
        """
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """
        Read what the client sends.

        Args:
            data (`bytes`):
                Part of a request.
        """
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """
        Learn that the connection has ended.

        Args:
            exc (`Exception`, *optional*):
                Why, if it is not the end that was meant.
        """
        self._forget()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        # Not put off by each byte that comes.
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.patience, self._give_up)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self.transport.close()


def room_for_connections() -> int:
    """
    Have the system allow as many open files as it may, and return how many connections that leaves room for.

    Returns:
        `int`: connections, at least one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(1, min(_MOST, soft - BACKLOG - _OTHER_FILES))
