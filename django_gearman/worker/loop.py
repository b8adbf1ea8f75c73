"""
Grab, run, report: one worker, one job at a time.

Speaks to every job server it was given and asks them in turn; it sleeps when
all of them have nothing. What a function does, and how its workload is
encoded, is the caller's affair.
"""

from __future__ import annotations

import logging
import random
import select
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Final

from ..client.connection import Connection
from ..exceptions import ConnectionFailed, ConnectionLost, ResponseTimeout
from ..protocol.packets import ATTEMPTS, LOG, LOGS, RETRY, PacketType, encode_request
from ..protocol.reader import MAX_BODY, Packet

logger = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between two attempts to reach a server; they double from the first to the longest."""

ANSWER_LIMIT: Final = 10.0
"""Seconds in which a server answers GRAB_JOB, or is given up as hung."""

RECHECK: Final = 30.0
"""Seconds after which a sleeping worker asks for a job all the same, in case a NOOP was lost."""

_HEADROOM: Final = 1024
"""Bytes that a server may put beside the largest workload: its handle, the function and the unique."""

_LONGEST: Final = 1000
"""Characters of an exception in the log; all of it goes to the server."""

_GRAB: Final = encode_request(PacketType.GRAB_JOB_UNIQ)
_PRE_SLEEP: Final = encode_request(PacketType.PRE_SLEEP)


class AssignedJob:
    """A job as the function that runs it sees it."""

    __slots__ = ("_link", "attempt", "decision", "function", "handle", "max_attempts", "unique", "workload")

    def __init__(
        self,
        link: _Link,
        handle: bytes,
        function: bytes,
        unique: bytes,
        workload: bytes,
        attempt: int = 1,
        max_attempts: int | None = None,
    ) -> None:
        self._link = link
        self.handle = handle
        self.function = function
        self.unique = unique
        self.workload = workload
        self.attempt = attempt
        """Which hand-out of the job this is, from 1; always 1 where the server does not tell."""
        self.max_attempts = max_attempts
        """How many it may have; None where the job has no number of its own."""
        self.decision: tuple[float | None] | None = None
        """What was decided of another attempt already, for the ``RetryPolicy``; None for nothing."""

    @property
    def may_return(self) -> bool:
        """Whether its server hands a job out again that raised."""
        return self._link.tells_attempts

    @property
    def takes_log(self) -> bool:
        """Whether its server keeps what it logs."""
        return self._link.takes_logs

    def send_log(self, text: bytes) -> None:
        """Say what is to be kept of all that it logged so far; only to a server that ``takes_log``."""
        self._link.report(PacketType.OPTION_REQ, LOG + self.handle + b" " + text)

    def send_status(self, numerator: int, denominator: int) -> None:
        """Tell waiting clients how far it is. PROTOCOL: WORK_STATUS."""
        self._link.report(PacketType.WORK_STATUS, self.handle, b"%d" % numerator, b"%d" % denominator)

    def send_data(self, data: bytes) -> None:
        """Send a part of the result. PROTOCOL: WORK_DATA."""
        self._link.report(PacketType.WORK_DATA, self.handle, data)

    def send_warning(self, data: bytes) -> None:
        """Send a warning. PROTOCOL: WORK_WARNING."""
        self._link.report(PacketType.WORK_WARNING, self.handle, data)


class JobRefused(Exception):
    """Raised by a function to report plain WORK_FAIL, without a word on why."""


WorkerFunction = Callable[[AssignedJob], bytes]
RetryPolicy = Callable[[AssignedJob, BaseException], float | None]
"""Seconds until a job that raised is tried again; None when it has failed."""


class _Link:
    """One job server: the connection while there is one, and when to try again while there is none."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.connection: Connection | None = None
        self.asleep_since: float | None = None
        """When it last had no job for us; None when it is worth asking."""
        self.retry_at = 0.0
        self._reporting = threading.Lock()
        self.tells_attempts = False
        """Whether the server is ours, and speaks of attempts."""
        self.takes_logs = False
        """Whether it keeps what jobs log."""
        self._pause = FIRST_PAUSE

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def connected(self, connection: Connection) -> None:
        self.connection = connection
        self.asleep_since = None
        self.tells_attempts = False
        self.takes_logs = False

    def answered(self) -> None:
        """It works; one that takes connections and drops them does not, and is tried ever more rarely."""
        self._pause = FIRST_PAUSE

    def lost(self, error: Exception) -> None:
        """Try again later; the pauses grow, and differ so that workers do not return all at once."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
            logger.warning("%s; connecting again", error)
        elif self._pause == FIRST_PAUSE:
            logger.warning("%s Trying until one does.", error)
        self.retry_at = monotonic() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def report(self, kind: PacketType, *arguments: bytes) -> None:
        """Tell the server something of the job in hand, from any thread; a broken connection is no error."""
        with self._reporting:
            if self.connection is not None:
                try:
                    self.connection.send(encode_request(kind, *arguments))
                except ConnectionLost as error:
                    self.lost(error)


class Worker:
    """
    Runs jobs of some functions for some job servers, until it is told to stop.

    Args:
        functions: {name on the wire: what runs it}.
        servers: Host and port of each job server.
        client_id: What the servers' ``workers`` listing calls this worker.
        describe: An exception as the data of WORK_EXCEPTION.
        retry: What becomes of a job that raised, at servers that take it back; None when all have failed.
        logs: Whether the functions send what they log, to servers that keep it.
        connect_timeout: Seconds to wait for a connection.
        max_packet: Bytes of the largest packet body taken.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
    """

    def __init__(
        self,
        functions: Mapping[str, WorkerFunction],
        servers: Sequence[tuple[str, int]],
        *,
        client_id: str,
        describe: Callable[[BaseException], bytes],
        retry: RetryPolicy | None = None,
        logs: bool = False,
        connect_timeout: float = 1.0,
        max_packet: int = MAX_BODY,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._functions = {name.encode(): function for name, function in functions.items()}
        self._links = [_Link(host, port) for host, port in servers]
        self._client_id = client_id.encode()
        self._describe = describe
        self._retry = retry
        self._logs = logs
        self._connect_timeout = connect_timeout
        self._max_packet = max_packet
        self._tls = tls
        self._stopping = False
        self._control: int | None = None
        self.jobs_done = 0

    def stop(self) -> None:
        """Take no further job; from within a function, or with a readable ``control``."""
        self._stopping = True

    def run(self, control: int | None = None) -> None:
        """
        Work until ``stop``, or until the descriptor ``control`` can be read; the job in hand is finished.

        Returns with every connection closed.
        """
        self._control = control
        try:
            while not self._is_stopping():
                self._connect()
                link = self._next_link()
                if link is None:
                    self._wait()
                else:
                    self._grab_from(link)
        finally:
            for link in self._links:
                if link.connection is not None:
                    link.connection.close()
                    link.connection = None

    def _is_stopping(self) -> bool:
        if not self._stopping and self._control is not None:
            self._stopping = bool(select.select([self._control], [], [], 0)[0])
        return self._stopping

    def _connect(self) -> None:
        now = monotonic()
        for link in self._links:
            if link.connection is None and now >= link.retry_at:
                try:
                    connection = Connection(
                        link.host,
                        link.port,
                        connect_timeout=self._connect_timeout,
                        max_packet=self._max_packet + _HEADROOM,
                        tls=self._tls,
                    )
                    link.connected(connection)
                    connection.send(self._introduction())
                except (ConnectionFailed, ConnectionLost) as error:
                    link.lost(error)
                    continue
                logger.info("Connected to the job server at %s", link)

    def _introduction(self) -> bytes:
        """What a server must know of a worker, again after each reconnect."""
        packets = [encode_request(PacketType.SET_CLIENT_ID, self._client_id)]
        if self._retry is not None:
            # Answered before any job; other servers answer ERROR and go on.
            packets.append(encode_request(PacketType.OPTION_REQ, ATTEMPTS))
        if self._logs:
            packets.append(encode_request(PacketType.OPTION_REQ, LOGS))
        packets += [encode_request(PacketType.CAN_DO, name) for name in self._functions]
        return b"".join(packets)

    def _next_link(self) -> _Link | None:
        """The next server to ask: each in turn, those not that said they would wake us."""
        for index, link in enumerate(self._links):
            if link.connection is not None and link.asleep_since is None:
                self._links.append(self._links.pop(index))
                return link
        return None

    def _grab_from(self, link: _Link) -> None:
        connection = link.connection
        assert connection is not None, "only connected links are asked"
        try:
            connection.send(_GRAB)
            while (job := self._assignment(link, connection)) is not None:
                report = self._perform(job)
                if link.connection is None:
                    logger.warning(
                        "Job %s is done but its server is gone; it will run again", job.handle.decode()
                    )
                    return
                # With one server the next grab travels with the report.
                again = len(self._links) == 1 and not self._is_stopping()
                connection.send(report + _GRAB if again else report)
                if not again:
                    return
        except (ConnectionLost, ResponseTimeout) as error:
            link.lost(error)

    def _assignment(self, link: _Link, connection: Connection) -> AssignedJob | None:
        """The job that the server gives; None when it has none, after telling it that we sleep."""
        deadline = monotonic() + ANSWER_LIMIT
        attempt, max_attempts = 1, 0
        while True:
            kind, arguments = connection.receive(deadline)
            link.answered()
            if kind == PacketType.JOB_ASSIGN_UNIQ:
                handle, function, unique, workload = arguments
                return AssignedJob(link, handle, function, unique, workload, attempt, max_attempts or None)
            if kind == PacketType.OPTION_RES:
                if arguments[0] == ATTEMPTS:
                    link.tells_attempts = True
                elif arguments[0] == LOGS:
                    link.takes_logs = True
                else:
                    attempt, max_attempts = _attempt(arguments[0])
                continue
            if kind == PacketType.NO_JOB:
                connection.send(_PRE_SLEEP)
                link.asleep_since = monotonic()
                return None
            self._note((kind, arguments))

    def _note(self, packet: Packet) -> None:
        kind, arguments = packet
        if kind == PacketType.ERROR and arguments[0].upper() != b"UNKNOWN_OPTION":
            logger.warning("The job server answered %s", b": ".join(arguments).decode(errors="replace"))

    def _wait(self) -> None:
        """Sleep until a server has something, one can be tried again, or we are to stop."""
        now = monotonic()
        until = min(
            link.asleep_since + RECHECK
            if link.asleep_since is not None and link.connection
            else link.retry_at
            for link in self._links
        )
        watched: list[Connection | int] = [link.connection for link in self._links if link.connection]
        if any(link.connection and link.connection.has_decrypted for link in self._links):
            until = now
        if self._control is not None:
            watched.append(self._control)
        select.select(watched, [], [], max(0.0, until - now))
        now = monotonic()
        for link in self._links:
            if link.connection is None:
                continue
            try:
                link.connection.fill()
                while (packet := link.connection.take()) is not None:
                    if packet[0] == PacketType.NOOP:
                        link.asleep_since = None
                    else:
                        self._note(packet)
            except ConnectionLost as error:
                link.lost(error)
                continue
            if link.asleep_since is not None and now - link.asleep_since >= RECHECK:
                link.asleep_since = None

    def _perform(self, job: AssignedJob) -> bytes:
        """Run the function; the packet that reports its end."""
        function = self._functions.get(job.function)
        name = job.function.decode(errors="replace")
        handle = job.handle.decode(errors="replace")
        started = monotonic()
        try:
            if function is None:
                raise LookupError(f"this worker does not offer {name}")
            result = function(job)
            if not isinstance(result, bytes):
                raise TypeError(f"{name} must return bytes, not {type(result).__name__}")
        except JobRefused:
            report = encode_request(PacketType.WORK_FAIL, job.handle)
            logger.error("Job %s (%s) failed after %.2f s", handle, name, monotonic() - started)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a job raises ends the job, not the worker
            report = encode_request(PacketType.WORK_EXCEPTION, job.handle, self._describe(error))
            delay = self._retry(job, error) if self._retry is not None and job.may_return else None
            if delay is None:
                logger.error(
                    "Job %s (%s) failed after %.2f s: %s", handle, name, monotonic() - started, _told(error)
                )
            else:
                report = (
                    encode_request(PacketType.OPTION_REQ, RETRY + b"%d %s" % (delay * 1000, job.handle))
                    + report
                )
                logger.warning(
                    "Job %s (%s) failed after %.2f s at attempt %d and is tried again in %.1f s: %s",
                    handle,
                    name,
                    monotonic() - started,
                    job.attempt,
                    delay,
                    _told(error),
                )
        else:
            if len(result) + len(job.handle) + 1 > self._max_packet:
                problem = ValueError(
                    f"the result of {name} has {len(result)} bytes, more than max_packet={self._max_packet}; "
                    "store it, and return a reference"
                )
                report = encode_request(PacketType.WORK_EXCEPTION, job.handle, self._describe(problem))
                logger.error("Job %s (%s) failed: %s", handle, name, problem)
            else:
                report = encode_request(PacketType.WORK_COMPLETE, job.handle, result)
                logger.info("Job %s (%s) succeeded in %.2f s", handle, name, monotonic() - started)
        self.jobs_done += 1
        return report


def _attempt(told: bytes) -> tuple[int, int]:
    """``attempt N M`` as numbers; of anything else, the first of no number."""
    words = told.split(b" ")
    if len(words) == 3 and words[0] == b"attempt" and words[1].isdigit() and words[2].isdigit():
        return int(words[1]), int(words[2])
    return 1, 0


def _told(error: BaseException) -> str:
    try:
        told = f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__  # one that cannot tell more
    # Its words may be a client's own: they must not forge lines of the log, nor speak to a terminal.
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in told[:_LONGEST]
    )
