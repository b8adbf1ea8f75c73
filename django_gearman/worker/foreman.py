"""
The line from the parent of workers to their job servers.

Tells why a process is gone that had a job in hand, and gives back what was
stopped on purpose; hears which running jobs were cancelled. The words are those
of ``packets.CREW`` and after it. A server that does not know them is left alone:
there a lost connection says all.
"""

from __future__ import annotations

import logging
import math
import random
import ssl
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from ..client.connection import Connection
from ..exceptions import ConnectionFailed, ConnectionLost
from ..protocol.packets import (
    ATTEMPTS,
    CANCEL,
    HOLD,
    LEAD,
    LEAVING,
    LOST,
    RETURN,
    PacketType,
    encode_request,
)

logger = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 15.0
"""Seconds between two attempts to reach a server; the parent waits for each, ``connect_timeout`` at most."""

STRANGER_PAUSE: Final = 300.0
"""Seconds after which a server that is not ours is asked again whether it is."""

SEND_LIMIT: Final = 1.0
"""Seconds that a word may take to be sent."""


class _Line:
    """The connection to one server."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.connection: Connection | None = None
        self.retry_at = 0.0
        self.pause = FIRST_PAUSE

    def drop(self, pause: float | None = None) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if pause is None:
            pause = self.pause * random.uniform(0.5, 1.0)
            self.pause = min(self.pause * 2, LONGEST_PAUSE)
        self.retry_at = monotonic() + pause


class Foreman:
    """
    Speaks for the workers that share a token.

    Args:
        servers: Host and port of each job server.
        token: What the workers name as their crew.
        client_id: What the servers' ``workers`` listing calls this connection.
        connect_timeout: Seconds to wait for a connection.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
    """

    def __init__(
        self,
        servers: Sequence[tuple[str, int]],
        token: bytes,
        *,
        client_id: str,
        connect_timeout: float = 1.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._lines = [_Line(host, port) for host, port in servers]
        self._token = token
        self._client_id = client_id.encode()
        self._connect_timeout = connect_timeout
        self._tls = tls
        self.in_hand: Callable[[], list[bytes]] = list
        """Handles of the jobs that the workers are at; for servers that come back, and wait for them."""

    def descriptors(self) -> list[int]:
        """What to wait for before ``turn`` is called."""
        return [line.connection.fileno() for line in self._lines if line.connection]

    def next_moment(self) -> float:
        """The monotonic time at which ``turn`` is to be called though nothing came."""
        return min((line.retry_at for line in self._lines if line.connection is None), default=math.inf)

    def turn(self) -> list[bytes]:
        """Connect where it is time, and hear what came; the handles of jobs that are no more."""
        cancelled = []
        for line in self._lines:
            if line.connection is None and monotonic() >= line.retry_at:
                self._connect(line)
            try:
                cancelled += self._hear(line)
            except ConnectionLost as error:
                logger.debug("%s", error)
                line.drop()
        return cancelled

    def lost(self, handle: bytes, reason: str) -> None:
        """Say that the process that ran a job is gone, and why."""
        self._say(LOST + b"%s %s" % (handle, reason.encode()))

    def give_back(self, handle: bytes) -> None:
        """Put a job back whose process was stopped on purpose: that attempt does not count."""
        self._say(RETURN + handle)

    def leave(self) -> None:
        """Say that the workers finish what they have, and go: a server that ends waits for them."""
        self._say(LEAVING)

    def close(self) -> None:
        for line in self._lines:
            line.drop()

    def _connect(self, line: _Line) -> None:
        try:
            line.connection = Connection(
                line.host, line.port, connect_timeout=self._connect_timeout, tls=self._tls
            )
            line.connection.send(
                encode_request(PacketType.SET_CLIENT_ID, self._client_id)
                + encode_request(PacketType.OPTION_REQ, ATTEMPTS)
                + encode_request(PacketType.OPTION_REQ, LEAD + self._token)
                + b"".join(encode_request(PacketType.OPTION_REQ, HOLD + handle) for handle in self.in_hand()),
                SEND_LIMIT,
            )
        except (ConnectionFailed, ConnectionLost) as error:
            logger.debug("%s", error)
            line.drop()

    def _hear(self, line: _Line) -> list[bytes]:
        cancelled: list[bytes] = []
        if line.connection is None:
            return cancelled
        line.connection.fill()
        while (packet := line.connection.take()) is not None:
            kind, arguments = packet
            if kind == PacketType.ERROR:
                line.drop(STRANGER_PAUSE)
                return cancelled
            line.pause = FIRST_PAUSE
            if kind == PacketType.OPTION_RES and arguments[0].startswith(CANCEL):
                cancelled.append(arguments[0].removeprefix(CANCEL))
        return cancelled

    def _say(self, word: bytes) -> None:
        # To all: which of them has the job, they know.
        for line in self._lines:
            if line.connection is not None:
                try:
                    line.connection.send(encode_request(PacketType.OPTION_REQ, word), SEND_LIMIT)
                except ConnectionLost as error:
                    logger.debug("%s", error)
                    line.drop()
