"""
One connection of asyncio, over which any number of calls go side by side; and those of an event loop.

What packets mean is in ``core``; which server is asked, and for what, is the client's to say.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import AsyncGenerator
from typing import Final, cast
from weakref import WeakKeyDictionary

from ..exceptions import ConnectionLost, ProtocolError, ResultTooLarge
from ..protocol.packets import RESPONSE, PacketType
from ..protocol.reader import PacketReader
from .admin_client import FunctionStatus
from .connection import KEEPALIVE_IDLE, SPEAKS_TLS, TLS_ALERT, why_lost
from .core import ClientProtocol, JobRequest, Question
from .large import LargeEnds
from .tasks import Task

MAX_RETIRED: Final = 8
"""Connections to one server that are kept open only for jobs that run on them."""


class Link(asyncio.Protocol):
    """One connection, and who waits for what on it."""

    def __init__(self, server: str, max_packet: int, home: Links) -> None:
        self.server = server
        self.home = home
        self.protocol = ClientProtocol()
        self.lost: ConnectionLost | None = None
        """Why it is of no use any more."""
        self.users = 0
        """Calls that are under way on it."""
        self.is_spent = False
        """Whether a job on it has nobody waiting: it is closed as soon as nobody else needs it."""
        self.asking: asyncio.Task[list[FunctionStatus]] | None = None
        """What the server says of its functions, for calls whose time is up."""
        self._reader: PacketReader | LargeEnds = PacketReader(RESPONSE, max_body=max_packet)
        self._max_packet = max_packet
        self._received = False
        """Whether anything ever came."""
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[JobRequest | Question, asyncio.Future[None]] = {}
        self._writable: asyncio.Future[None] | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the server has not closed it; asyncio may not have had the time to say so."""
        if self.lost is not None or not hasattr(select, "POLLRDHUP"):
            return self.lost is None
        assert self._transport is not None, "it is connected"
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return not poll.poll(0)

    # What asyncio says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        if not self._received and data.startswith(TLS_ALERT):
            self._lose(ConnectionLost(self.server, SPEAKS_TLS))
            return
        self._received = True
        self._reader.feed(data)
        goes_on = True
        while goes_on:
            goes_on = False
            try:
                while (packet := self._reader.take()) is not None:
                    told = self.protocol.receive(packet)
                    if told is not None and (waiter := self._waiting.pop(told, None)) is not None:
                        _wake(waiter)
            except (ProtocolError, ConnectionLost) as error:
                goes_on = self._goes_on_after(error)

    def _goes_on_after(self, error: ProtocolError | ConnectionLost) -> bool:
        """Break the connection, unless it is one job's end alone that could not be read."""
        try:
            if isinstance(error, ProtocolError):
                self._reader = LargeEnds(self._reader, error, self.server, self._max_packet)
                return True
        except ConnectionLost as lost:
            error = lost
        if not isinstance(error, ResultTooLarge) or error.end is None:
            self._lose(error)
            return False
        told = self.protocol.end_without(*error.end, error)
        if told is not None and (waiter := self._waiting.pop(told, None)) is not None:
            _wake(waiter)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        in_plain = self._transport is not None and self._transport.get_extra_info("ssl_object") is None
        lost = ConnectionLost(self.server, why_lost(error, was_silent=in_plain and not self._received))
        lost.__cause__ = error
        self._lose(lost)

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None:
            _wake(self._writable)
            self._writable = None

    # What callers do.

    async def greet(self, *, prove: bool) -> None:
        """
        What is said first.

        Args:
            prove: Wait for an answer: with TLS 1.3 only one says that our certificate was taken, and a
                server that hangs is connected to all the same.
        Raises:
            ConnectionLost: It broke.
        """
        assert self._transport is not None, "it is connected"
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        # Nobody waits for the answer to the option: it is taken when it comes.
        _, data = self.protocol.ask(PacketType.OPTION_REQ, b"exceptions", answers=PacketType.OPTION_RES)
        await self.send(data)
        if prove:
            question, data = self.protocol.ask(PacketType.ECHO_REQ, b"", answers=PacketType.ECHO_RES)
            await self.send(data)
            while question.answer is None:
                await self.wait(question)

    async def send(self, data: bytes) -> None:
        """
        Send a packet, once the server takes it.

        Raises:
            ConnectionLost: It broke.
        """
        if self.lost is not None:
            raise self._as_told()
        assert self._transport is not None, "it is connected"
        self._transport.write(data)
        if self._writable is not None:
            # Shared by all that write.
            await asyncio.shield(self._writable)
            if self.lost is not None:
                raise self._as_told()

    async def wait(self, what: JobRequest | Question) -> None:
        """
        Wait until something is told of a request or a question, or the connection breaks.

        Raises:
            ConnectionLost: It broke before.
        """
        if self.lost is not None:
            raise self._as_told()
        try:
            await self.waiter(what)
        finally:
            self.left(what)

    def waiter(self, what: JobRequest | Question) -> asyncio.Future[None]:
        """What is done when something is told from now on, or the connection breaks; call ``left`` then."""
        waiter = self._waiting[what] = asyncio.get_running_loop().create_future()
        return waiter

    def left(self, what: JobRequest | Question) -> None:
        """Nobody waits for it any more."""
        self._waiting.pop(what, None)

    def release(self) -> None:
        """One who used it does no more."""
        self.users -= 1
        if self.is_spent and not self.users:
            self.close()
            self.home.forget(self)

    def spend(self) -> None:
        """Close it as soon as nobody needs it; calls to come get a new one, unless there are too many."""
        self.is_spent = True
        self.home.retire(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._lose(ConnectionLost(self.server, "the client closed it"))

    def _lose(self, error: ConnectionLost) -> None:
        if self.lost is not None:
            return
        self.lost = error
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            _wake(waiter)
        self.resume_writing()
        if self._transport is not None:
            self._transport.abort()

    def _as_told(self) -> ConnectionLost:
        # A new one for each caller: they are raised in many places.
        assert self.lost is not None, "asked for because it is"
        error = self.lost
        if type(error) is not ConnectionLost:
            return error
        told = ConnectionLost(error.server, error.reason)
        told.__cause__ = error.__cause__
        return told


class Links:
    """The connections of one event loop."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.open: dict[str, Link] = {}
        self.opening: dict[str, asyncio.Task[Link]] = {}
        self.retired: set[Link] = set()
        self.keeper: AsyncGenerator[None, None] | None = None
        self.tasks: WeakKeyDictionary[asyncio.Task[object], list[Task]] = WeakKeyDictionary()

    def opened(self, server: str, opening: asyncio.Task[Link]) -> None:
        """An attempt to connect has ended."""
        if self.opening.get(server) is opening:
            del self.opening[server]
        if not opening.cancelled():
            opening.exception()  # nobody may be left to look at it

    def retire(self, link: Link) -> None:
        """Keep it for the jobs that run on it, and not for others."""
        retired = sum(each.server == link.server for each in self.retired)
        if self.open.get(link.server) is link and retired < MAX_RETIRED:
            del self.open[link.server]
            self.retired.add(link)

    def forget(self, link: Link) -> None:
        """It was closed."""
        self.retired.discard(link)
        if self.open.get(link.server) is link:
            del self.open[link.server]

    def close(self) -> None:
        for link in [*self.open.values(), *self.retired]:
            link.close()
        self.open.clear()
        self.retired.clear()
        for opening in self.opening.values():
            opening.cancel()
        self.opening.clear()
        # It refers to the loop, by which these are found.
        self.keeper = None

    async def keep(self) -> AsyncGenerator[None, None]:
        """Closes them when the event loop ends, which ends its asynchronous generators."""
        try:
            yield
        finally:
            self.close()
            # For the transports to hear of it.
            await asyncio.sleep(0)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
