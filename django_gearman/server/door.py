"""
Who is not let in, and the door of a port that speaks TLS: who comes in there is known.

It takes connections, shakes hands, and passes on those that succeed. asyncio's
own servers would do so too, but count nobody who has not shaken hands, and
leave no word of who failed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger(__name__)

SILENCE: Final = 60.0
"""Seconds between two warnings of connections that failed; each is told at DEBUG."""

TOO_MANY: Final = (
    "too many are open already; --file-descriptors allows more, within the system's limit "
    "(LimitNOFILE of systemd, ulimit -Hn)"
)
"""Why a connection is refused that is all right in itself."""

_NO_DESCRIPTORS_PAUSE: Final = 1.0
"""Seconds to wait for connections to close when the system has no more to give."""


class Refusals:
    """What the log says of connections that are refused: a crowd of them must not fill it."""

    def __init__(self) -> None:
        self._silent_until = 0.0
        self._unsaid = 0

    def tell(self, address: str, reason: str, now: float) -> None:
        """Warn of it at the monotonic time ``now``, unless that was just done of another."""
        logger.debug("Connection from %s refused: %s", address, reason)
        if now < self._silent_until:
            self._unsaid += 1
            return
        others = f" ({self._unsaid} others since the last such line)" if self._unsaid else ""
        logger.warning("Connection from %s refused: %s%s", address, reason, others)
        self._silent_until = now + SILENCE
        self._unsaid = 0


class TLSDoor:
    """
    Listens on bound sockets and makes protocols of who can show what is asked.

    Args:
        factory: Makes the protocol of a connection.
        refusals: Told of those that are not let in.
        has_room: Whether one more may come in, told how many shake hands already.
        limit: Seconds that a handshake may take.
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        tls: ssl.SSLContext,
        factory: Callable[[], asyncio.Protocol],
        refusals: Refusals,
        *,
        has_room: Callable[[int], bool],
        limit: float,
        backlog: int,
    ) -> None:
        self._tls = tls
        self._factory = factory
        self._refusals = refusals
        self._has_room = has_room
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        for sock in sockets:
            sock.listen(backlog)
        self._accepting = [self._loop.create_task(self._accept(sock)) for sock in sockets]

    def close(self) -> None:
        """Take no more connections, and drop those that have not shaken hands."""
        for task in [*self._accepting, *self._handshakes]:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                try:
                    sock, address = await self._loop.sock_accept(listener)
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    logger.error("No connection can be taken: %s", error)
                    await asyncio.sleep(_NO_DESCRIPTORS_PAUSE)
                    continue
                if self._has_room(len(self._handshakes)):
                    task = self._loop.create_task(self._shake_hands(sock, address[0]))
                    self._handshakes.add(task)
                    task.add_done_callback(self._handshakes.discard)
                else:
                    sock.close()
                    self._refusals.tell(address[0], TOO_MANY, self._loop.time())
                # sock_accept does not wait when somebody is there, and others want their turn.
                await asyncio.sleep(0)
        finally:
            listener.close()

    async def _shake_hands(self, sock: socket.socket, address: str) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory, sock, ssl=self._tls, ssl_handshake_timeout=self._limit
            )
        except ConnectionResetError:
            # Left without a word, as those do that look whether the port is open.
            logger.debug("Connection from %s closed by itself during the TLS handshake", address)
        except OSError as error:
            self._refusals.tell(address, _reason(error, self._limit), self._loop.time())


def _reason(error: OSError, limit: float) -> str:
    reason: Any = getattr(error, "reason", None)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it shows no certificate"
    if isinstance(error, ssl.SSLError):
        if "ALERT" in str(reason):
            return f"it does not take this server's certificate ({reason})"
        return f"it speaks no TLS ({reason})"
    if isinstance(error, ConnectionAbortedError):
        return f"no TLS handshake within {limit:g} s"
    return str(error)
