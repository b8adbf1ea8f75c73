"""
The job server on its event loop: what it listens on, its turns, its timers and its end.

What packets mean is the core's affair. Connections read them; here the core's
output is written: once per peer and turn of the event loop, however many
packets that turn brought.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import select
import socket
import ssl
import time
from collections.abc import Callable, Collection
from typing import Any, Final, cast

from . import journal
from .connection import Connection, TransportLimits
from .core import JobServer
from .door import Refusals, TLSDoor
from .http_connection import HTTPConnection, MetricsConnection
from .job_store import JobStore
from .journal import SUBMIT_LIMIT, Journal
from .journal_thread import JournalThread
from .metrics import Page
from .options import Shutdown
from .peers import Peer

logger = logging.getLogger(__name__)

HEAR_LIMIT: Final = 0.5
"""Seconds in which workers that are stopped with the server say so."""

FINISH_LIMIT: Final = 25.0
"""Seconds that it waits for their last results, before it writes what is left; see docs/gearmand.md."""

TICK: Final = 1.0
"""Seconds between two looks at what no packet announces."""

FIRST_LOOK: Final = 0.5
"""Seconds at the start for which nobody is let in before the store was looked into; it may hang."""

LATE: Final = 0.005
"""
Seconds for which what may wait for company stays in the core: entries, which the journal lets wait longer,
and output that nobody waits for. To send it would cost a system call, and wake a process.
"""

TEND_AFTER: Final = 5.0
"""Seconds from the start to the store's first housekeeping: replayed jobs and clients come first."""


class GearmanServer:
    """
    A job server on an event loop.

    Args:
        core: With the lease's epoch, and with what the store replayed, if there is one.
        store: Keeps the background jobs; None when nothing is kept.
        limits: What a connection may ask for.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
        http_hosts: Names by which HTTP clients may call this server, beside ``localhost`` and IP addresses.
        hold: As of ``Journal``.
        submit_limit: Seconds that a background submission waits for the store before it gets ERROR.
        backlog: Bytes that may wait for the store before background submissions get ERROR at once.
    """

    def __init__(
        self,
        core: JobServer,
        store: JobStore | None = None,
        limits: TransportLimits | None = None,
        tls: ssl.SSLContext | None = None,
        http_hosts: Collection[str] = (),
        *,
        submit_limit: float = SUBMIT_LIMIT,
        backlog: int = journal.BACKLOG,
        hold: float = math.inf,
    ) -> None:
        self.core = core
        core.is_gone = _is_gone
        self.limits = limits or TransportLimits()
        self.http_hosts = http_hosts
        self.connections: set[Connection] = set()
        self.blocked: set[Connection] = set()
        """Those that do not take what they are sent."""
        self.refusals = Refusals()
        self.loop: asyncio.AbstractEventLoop
        self.metrics: Page
        self._store = store
        self._tls = tls
        self._journal = Journal(core, submit_limit=submit_limit, backlog=backlog, hold=hold)
        self._thread: JournalThread | None = None
        self._turn_scheduled = False
        self._late_turn_scheduled = False
        self._permits_timer: asyncio.TimerHandle | None = None
        self._permits_at = math.inf
        """When it fires."""
        self._ended: asyncio.Future[None]
        self._emptied: asyncio.Event | None = None
        self._listening: list[asyncio.Server | TLSDoor] = []
        self._stopped: asyncio.Event

    async def serve(
        self,
        sockets: list[socket.socket],
        stopped: asyncio.Event,
        *,
        http_sockets: Collection[socket.socket] = (),
        metrics_sockets: Collection[socket.socket] = (),
        ready: Callable[[], None] | None = None,
    ) -> None:
        """
        Serve bound sockets until ``stopped`` is set; then write what is left and return.

        The core sets it when an operator told it to ``shut_down``.

        Args:
            http_sockets: Bound sockets that speak HTTP, without TLS.
            metrics_sockets: Bound sockets where Prometheus asks, without TLS.
            ready: Called once connections are taken.
        Raises:
            StoreError: The store is gone for good; nothing more can be promised.
        """
        self.loop = asyncio.get_running_loop()
        self._ended = self.loop.create_future()
        self._stopped = stopped
        self.loop.set_exception_handler(self._handle_error)
        if self._store is not None:
            self._journal.tend_at = self.loop.time() + TEND_AFTER
            self._journal.renewed(self._store.renewed)
            self._thread = JournalThread(
                self._journal, self._store, self.loop, changed=self._turn, failed=self._fail
            )
            await self._thread.start(FIRST_LOOK)
        await self._listen(sockets)
        for sock in http_sockets:
            self._listening.append(
                await self.loop.create_server(
                    lambda: HTTPConnection(self), sock=sock, backlog=self.limits.backlog
                )
            )
        self.metrics = Page(self.core, None if self._store is None else self._journal, time.time())
        for sock in metrics_sockets:
            self._listening.append(
                await self.loop.create_server(
                    lambda: MetricsConnection(self), sock=sock, backlog=self.limits.backlog
                )
            )
        if ready is not None:
            ready()
        ticker = self.loop.create_task(self._tick())
        waiter = self.loop.create_task(stopped.wait())
        try:
            waited: list[asyncio.Future[Any]] = [self._ended, waiter, ticker]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done() and self.core.shutdown_wanted is None:
                await self._let_workers_finish()
        finally:
            ticker.cancel()
            waiter.cancel()
            self._stop_listening()
            await self._stop_journal()
            await self._close_connections()
        if self._ended.done():
            self._ended.result()
        if ticker.done() and not ticker.cancelled():
            ticker.result()

    async def _listen(self, sockets: list[socket.socket]) -> None:
        if self._tls is None:
            self._listening = [
                await self.loop.create_server(
                    lambda: Connection(self), sock=sock, backlog=self.limits.backlog
                )
                for sock in sockets
            ]
            return
        self._listening = [
            TLSDoor(
                sockets,
                self._tls,
                lambda: Connection(self),
                self.refusals,
                has_room=lambda shaking: len(self.connections) + shaking < self.limits.max_connections,
                limit=self.limits.handshake,
                backlog=self.limits.backlog,
            )
        ]

    def _stop_listening(self) -> None:
        for server in self._listening:
            server.close()
        self._listening = []

    def shut_down(self, how: Shutdown) -> None:
        """End the server, as an operator's command does."""
        self.core.shut_down(how)
        self.schedule_turn()

    def _approach_end(self, how: Shutdown) -> None:
        """The end is wanted: now, or when the last job is gone. Called again with every turn."""
        if self._listening:
            logger.info("Shutting down (%s): no more connections are taken", how.value)
        self._stop_listening()
        # Rows that nobody claimed yet stay in the database.
        self._journal.claim_no_more()
        if how is Shutdown.GRACEFUL and (self.core.jobs or self._journal.busy):
            return
        self._stopped.set()

    async def _let_workers_finish(self) -> None:
        """
        Take the results of workers that are told to stop as we are, and hand out nothing more.

        A service manager stops all at once; without this, the jobs that they
        finish meanwhile would run again.
        """
        core = self.core
        core.hands_out = False
        self._journal.claim_no_more()
        begun = self.loop.time()
        while any(peer.running for peer in core.peers):
            waited = self.loop.time() - begun
            if waited >= FINISH_LIMIT or (waited >= HEAR_LIMIT and not core.crews.are_finishing()):
                return
            await asyncio.sleep(0.02)

    async def _stop_journal(self) -> None:
        self._turn()
        if self._thread is not None and not await self._thread.stop(limit=10.0):
            logger.error("The store did not take the last entries; these jobs will run again")
        self._turn()

    async def _close_connections(self) -> None:
        """Send what is left to who takes it within a second, and close."""
        for connection in list(self.connections):
            connection.close()
        if self.connections:
            self._emptied = asyncio.Event()
            try:
                await asyncio.wait_for(self._emptied.wait(), 1.0)
            except TimeoutError:
                for connection in list(self.connections):
                    connection.abort()

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self.blocked.discard(connection)
        if self._emptied is not None and not self.connections:
            self._emptied.set()

    def _handle_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """
        Stop on an error of our own in a callback: the journal would not go on, and nobody would know.

        A transport's errors come here too; its connection is lost, which is no reason.
        """
        loop.default_exception_handler(context)
        error = context.get("exception")
        if "handle" in context and isinstance(error, Exception):
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _tick(self) -> None:
        while True:
            core = self.core
            await asyncio.sleep(min(max(core.next_due() - time.time(), 0.0), TICK))
            now = self.loop.time()
            core.now = time.time()
            core.clock = now
            waiting = 0
            for connection in list(self.connections):
                connection.close_if_stale(now)
                waiting += connection.kept
            if waiting > self.limits.output_total:
                self.bound_output(self.connections)
            core.tick()
            core.serve_woken()
            self._journal.refuse_overdue()
            self._journal.notice_silence(now)
            self.schedule_turn()

    def serve_woken(self) -> None:
        """Hand out jobs to who was woken by other things than packets: now, not when the last one came."""
        core = self.core
        if core.woken:
            core.now = time.time()
            core.clock = self.loop.time()
            core.serve_woken()

    def _settle_limits(self) -> None:
        """Have the core ask for permits, and be back when it is to ask again."""
        limits = self.core.limits
        limits.settle()
        if limits.due < self._permits_at:
            if self._permits_timer is not None:
                self._permits_timer.cancel()
            self._permits_at = limits.due
            self._permits_timer = self.loop.call_at(limits.due, self._ask_for_permits)

    def _ask_for_permits(self) -> None:
        self._permits_timer = None
        self._permits_at = math.inf
        core = self.core
        core.now = time.time()
        core.clock = self.loop.time()
        core.limits.ask_again()
        self.schedule_turn()

    def heard(self, peer: Peer) -> None:
        """
        A peer's input was read: answer at once where one other is concerned at the most, as by a grab.

        A turn for that would cost the loop as much as the answer itself. Who waits for more jobs is not
        that other: what comes of them may be one write. What is left for the journal may wait, too.
        """
        core = self.core
        if (
            self._turn_scheduled
            or core.urgent
            or core.woken
            or core.questions
            or core.shutdown_wanted is not None
            or core.limits.limiters
            or len(core.dirty) > 2
            or any(each.listens for each in core.dirty if each is not peer)
        ):
            self.schedule_turn()
            return
        if core.dirty and core.dirty[0] is peer:
            # Who spoke has time: the other gets a job, or the end of one.
            core.dirty.reverse()
        self._send()
        if core.claim_wanted:
            self._claim()
        if core.entries:
            self._schedule_late_turn()

    def _schedule_late_turn(self) -> None:
        if not self._late_turn_scheduled:
            self._late_turn_scheduled = True
            self.loop.call_later(LATE, self._late_turn)

    def _late_turn(self) -> None:
        self._late_turn_scheduled = False
        core = self.core
        patient, core.patient = core.patient, []
        for peer in patient:
            # Some were sent it since, with other things.
            if peer.is_patient and peer.output:
                core.dirty.append(peer)
            peer.is_patient = False
        self._turn()

    def bound_output(self, among: Collection[Connection]) -> None:
        """While too much waits to be sent to these together, close the connection for which the most does."""
        waiting = {connection: connection.kept for connection in among}
        while sum(waiting.values()) > self.limits.output_total:
            largest = max(waiting, key=waiting.__getitem__)
            size = waiting.pop(largest)
            # Not again before the loop has forgotten it.
            self.blocked.discard(largest)
            is_slow = largest.unsent * 2 >= size
            why = "it takes them too slowly" if is_slow else "the database has not answered what comes before"
            largest.drop(f"{size / 2**20:.0f} MiB wait to be sent to it, and {why}")

    def schedule_turn(self) -> None:
        """Something happened in the core: send and write what it left, once this turn's input is read."""
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self.loop.call_soon(self._turn)

    def _send(self) -> None:
        """Write what the core left for peers."""
        core = self.core
        if core.dirty:
            dirty, core.dirty = core.dirty, []
            for peer in dirty:
                output, peer.output = peer.output, []
                cast(Connection, peer.shell).write(output)
        if core.patient:
            self._schedule_late_turn()

    def _turn(self) -> None:
        self._turn_scheduled = False
        core = self.core
        self.serve_woken()
        if core.limits.limiters:
            self._settle_limits()
            self.serve_woken()
        self._send()
        if core.shutdown_wanted is not None:
            self._approach_end(core.shutdown_wanted)
        if self._thread is None:
            return
        if core.entries:
            self._journal.append(core.entries, self.loop.time(), urgent=core.urgent, many_end=core.many_end)
            core.entries = []
            core.urgent = core.many_end = False
            self._thread.kick()
            if core.dirty:
                # Submissions that it refused.
                self.schedule_turn()
        if core.questions:
            self._journal.ask(core.questions)
            core.questions = []
            self._thread.kick()
        if core.claim_wanted:
            self._claim()

    def _claim(self) -> None:
        """Have the journal look at the database door, which the core wants it to."""
        self.core.claim_wanted = False
        if self._thread is not None:
            self._journal.claim_soon()
            self._thread.kick()


def bind(host: str, port: int) -> list[socket.socket]:
    """
    Sockets bound to every address of a host that this machine has, not yet listening.

    Binding first finds a taken port before the lease and the jobs are touched.

    Raises:
        OSError: No address is ours, or the port is taken at one.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            sockets.append(_bound(family, kind, protocol, address))
        except OSError as error:
            # Many a machine without IPv6 says that localhost is ::1 too.
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error
                continue
            for sock in sockets:
                sock.close()
            raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def _is_gone(peer: Peer) -> bool:
    """Whether the other end of a connection is closed; the event loop may read others before that."""
    poll = select.poll()
    # Linux has an event for it; elsewhere it shows where both directions are closed.
    poll.register(peer.number, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
