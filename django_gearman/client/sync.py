"""
The blocking client, in the words that PHP and Perl users of Gearman know.

Workloads and results are bytes; names are str. Connections are opened when
they are first needed, one per process and thread.
"""

from __future__ import annotations

import logging
import math
import os
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Final

from ..addresses import DEFAULT_PORT, split_address
from ..exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    JobFailed,
    ProtocolError,
    ServerError,
)
from ..protocol.packets import CLAIM, CLAIMED, PacketType
from ..protocol.reader import MAX_BODY
from .admin_client import AdminClient
from .connection import Connection
from .core import ClientProtocol, DataHandler, JobRequest, Question, StatusHandler

logger = logging.getLogger(__name__)

DEFAULT_SERVERS: Final = (f"127.0.0.1:{DEFAULT_PORT}",)

CIRCUIT: Final = 5.0
"""Seconds during which a server that could not be reached is not tried when there is a choice."""

LATEST: Final = 253_370_764_800
"""The year 9999 in seconds since 1970; gearmand closes the connection on numbers too large for it."""

_UNKNOWN_PACKET: Final = (b"INVALID_COMMAND", b"SERVER_ERROR")
"""Codes, in upper case, of the ERROR for a type that a server does not take: gearmand's and ours, Perl's."""

NUDGE_TIMEOUT: Final = 0.2
"""Seconds that telling a server about new rows may take: it finds them by itself soon after."""


@dataclass(frozen=True)
class JobStatus:
    """What a server knows of a job; nothing once it ended. PROTOCOL: STATUS_RES."""

    known: bool
    running: bool
    numerator: int
    denominator: int


@dataclass(frozen=True)
class UniqueStatus(JobStatus):
    """What a server knows of the job of a unique. PROTOCOL: STATUS_RES_UNIQUE."""

    clients: int
    """How many wait for its end; 0 for a background job that nobody joined."""


class _Session:
    """A connection with its protocol; belongs to one thread of one process."""

    def __init__(self, connection: Connection, server: str) -> None:
        self.connection = connection
        self.server = server
        self.protocol = ClientProtocol()
        self.pid = os.getpid()
        self.claim: Question | None = None
        """The last time that the server was told of rows."""

    @property
    def is_usable(self) -> bool:
        """Whether it is this process's, and not closed by the server in the meantime."""
        if self.pid != os.getpid():
            return False
        try:
            self.drain()
        except (ConnectionLost, ProtocolError):
            return False
        return True

    def drain(self) -> None:
        """Take answers that nobody waited for."""
        if self.connection.is_readable():
            self.connection.fill()
            while (packet := self.connection.take()) is not None:
                self.protocol.receive(packet)

    def close(self) -> None:
        self.connection.close()

    def __del__(self) -> None:
        # Its thread ended, and with it the thread's local data.
        self.close()


class Client:
    """
    Submits jobs to the first server that answers.

    Safe to share between threads and over a fork: each thread of each process
    has a connection of its own.

    Args:
        servers: ``host:port`` of each job server, in order of preference.
        connect_timeout: Seconds to wait for a connection.
        timeout: Seconds to wait for a server's answer; the end of a job is another matter.
        max_packet: Bytes of the largest packet body sent or taken.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
    """

    def __init__(
        self,
        servers: Sequence[str] = DEFAULT_SERVERS,
        *,
        connect_timeout: float = 1.0,
        timeout: float = 30.0,
        max_packet: int = MAX_BODY,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if isinstance(servers, str) or not servers:
            raise ValueError(f'servers must be a sequence such as ["127.0.0.1:4730"], not {servers!r}')
        for server in servers:
            split_address(server)  # raises what is wrong with it, now rather than at the first use
        self._servers = tuple(servers)
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._max_packet = max_packet
        self._tls = tls
        self._local = threading.local()
        self._avoid_until: dict[str, float] = {}
        self._foreign: set[str] = set()
        """Servers that were found to be none of ours."""

    # Foreground jobs.

    def do(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        timeout: float | None = None,
        on_data: DataHandler | None = None,
        on_warning: DataHandler | None = None,
        on_status: StatusHandler | None = None,
    ) -> bytes:
        """
        Run a job and wait for its result.

        Args:
            unique: Submitters of an equal one share one run; ``-`` stands for the workload.
            timeout: Seconds to wait for the end; None to wait for ever. The job is
                abandoned when the time is up: it is dropped unless a worker has it.
            on_data, on_warning: Called with each part as the worker sends it.
            on_status: Called with numerator and denominator, as the worker wrote them.
        Raises:
            JobFailed: The worker reported a failure; ``data`` has the exception's if it sent one.
            ResponseTimeout: The time was up.
            ConnectionFailed: No server answers; nothing was submitted.
            ConnectionLost: The connection broke; the job may have run or not.
        PROTOCOL: SUBMIT_JOB.
        """
        request = self._request(function, workload, unique, "normal", background=False)
        return self._run(request, timeout, on_data, on_warning, on_status)

    def do_high(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        timeout: float | None = None,
        on_data: DataHandler | None = None,
        on_warning: DataHandler | None = None,
        on_status: StatusHandler | None = None,
    ) -> bytes:
        """As ``do``, before jobs of normal priority. PROTOCOL: SUBMIT_JOB_HIGH."""
        request = self._request(function, workload, unique, "high", background=False)
        return self._run(request, timeout, on_data, on_warning, on_status)

    def do_low(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        timeout: float | None = None,
        on_data: DataHandler | None = None,
        on_warning: DataHandler | None = None,
        on_status: StatusHandler | None = None,
    ) -> bytes:
        """As ``do``, after jobs of normal priority. PROTOCOL: SUBMIT_JOB_LOW."""
        request = self._request(function, workload, unique, "low", background=False)
        return self._run(request, timeout, on_data, on_warning, on_status)

    # Background jobs.

    def do_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """
        Submit a job to be run later; return its handle once the server keeps it.

        Raises:
            ServerError: The server refused it.
            ConnectionFailed: No server answers; nothing was submitted.
            ConnectionLost, ResponseTimeout: The server may have it or not.
        PROTOCOL: SUBMIT_JOB_BG.
        """
        return self._submit(self._request(function, workload, unique, "normal", background=True))

    def do_high_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """As ``do_background``, before jobs of normal priority. PROTOCOL: SUBMIT_JOB_HIGH_BG."""
        return self._submit(self._request(function, workload, unique, "high", background=True))

    def do_low_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """As ``do_background``, after jobs of normal priority. PROTOCOL: SUBMIT_JOB_LOW_BG."""
        return self._submit(self._request(function, workload, unique, "low", background=True))

    def do_epoch(self, function: str, workload: bytes = b"", *, epoch: float, unique: str = "") -> str:
        """
        As ``do_background``, not before a time.

        Args:
            epoch: That time in seconds since 1970; the wire carries whole ones, so
                a part of a second is one more. What is past means at once.
        Raises:
            CommandNotSupported: The server knows no such jobs; ``version`` says what it is.
            ValueError: ``epoch`` is no such time.
        PROTOCOL: SUBMIT_JOB_EPOCH, which has normal priority.
        """
        if not 0 <= epoch <= LATEST:
            raise ValueError(f"epoch is a time in seconds since 1970, up to the year 9999, not {epoch!r}")
        request = self._request(function, workload, unique, "normal", background=True)
        request.epoch = math.ceil(epoch)
        return self._submit(request)

    # Reduce jobs.

    def do_reduce(
        self,
        function: str,
        workload: bytes = b"",
        *,
        reducer: str,
        unique: str = "",
        timeout: float | None = None,
        on_data: DataHandler | None = None,
        on_warning: DataHandler | None = None,
        on_status: StatusHandler | None = None,
    ) -> bytes:
        """
        As ``do``; a worker that asks for it also gets the name of a function to put the parts together.

        Raises:
            CommandNotSupported: The server knows no such jobs; ``version`` says what it is.
        PROTOCOL: SUBMIT_REDUCE_JOB, which has normal priority.
        """
        request = self._request(function, workload, unique, "normal", background=False)
        request.reducer = _argument("reducer", reducer)
        return self._run(request, timeout, on_data, on_warning, on_status)

    def do_reduce_background(
        self, function: str, workload: bytes = b"", *, reducer: str, unique: str = ""
    ) -> str:
        """As ``do_background``, with a reducer. PROTOCOL: SUBMIT_REDUCE_JOB_BACKGROUND."""
        request = self._request(function, workload, unique, "normal", background=True)
        request.reducer = _argument("reducer", reducer)
        return self._submit(request)

    # Questions.

    def job_status(self, handle: str) -> JobStatus:
        """What the server knows of a job. PROTOCOL: GET_STATUS."""
        _, arguments = self._ask(PacketType.GET_STATUS, handle.encode(), answers=PacketType.STATUS_RES)
        _, known, running, numerator, denominator = arguments
        return JobStatus(known == b"1", running == b"1", int(numerator), int(denominator))

    def job_status_unique(self, unique: str) -> UniqueStatus:
        """
        What the server knows of the job of a unique, whichever its function.

        A job without one, or with ``-``, is not found. gearmand takes uniques
        of 63 bytes at the most here, and closes the connection on longer ones.

        Raises:
            CommandNotSupported: The server cannot tell; ``version`` says what it is.
        PROTOCOL: GET_STATUS_UNIQUE.
        """
        _, arguments = self._ask(
            PacketType.GET_STATUS_UNIQUE,
            _argument("unique", unique),
            answers=PacketType.STATUS_RES_UNIQUE,
        )
        _, known, running, numerator, denominator, clients = arguments
        return UniqueStatus(known == b"1", running == b"1", int(numerator), int(denominator), int(clients))

    def echo(self, data: bytes) -> bytes:
        """The same bytes, from the server: whether it is there, and how far away. PROTOCOL: ECHO_REQ."""
        _, arguments = self._ask(PacketType.ECHO_REQ, data, answers=PacketType.ECHO_RES)
        return arguments[0]

    def claim(self) -> bool:
        """
        Tell a server that rows wait in its database; do not wait for an answer.

        Never raises and never takes long: a server that cannot be told finds
        them by itself. Our own server's extension, see ``protocol.packets.CLAIM``;
        another's answer shows, by the second call, that it takes it for a job.
        """
        try:
            with self._session(nudge=True) as session:
                if session.claim is not None and session.claim.answer is not None:
                    _, arguments = session.claim.answer
                    if not arguments[0].endswith(CLAIMED):
                        self._warn_of_foreign(session.server)
                        return False
                session.claim, data = session.protocol.ask(
                    PacketType.SUBMIT_JOB_BG, CLAIM, b"", b"", answers=PacketType.JOB_CREATED
                )
                session.connection.send(data, NUDGE_TIMEOUT)
        except (ConnectionFailed, ConnectionLost):
            return False
        return True

    def _warn_of_foreign(self, server: str) -> None:
        if server not in self._foreign:
            self._foreign.add(server)
            logger.error(
                "The job server at %s, of version %s, does not look into the database: jobs that are "
                'enqueued wait there for a django_gearman server. Start one, or set ENQUEUE to "wire"',
                server,
                self.server_version(server) or "unknown",
            )

    def close(self) -> None:
        """Close this thread's connection. The client can be used again."""
        session: _Session | None = getattr(self._local, "session", None)
        if session is not None:
            self._local.session = None
            session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # How it is done.

    def _request(
        self, function: str, workload: bytes, unique: str, priority: str, *, background: bool
    ) -> JobRequest:
        if not isinstance(workload, bytes):
            raise TypeError(
                f"the workload of {function} must be bytes, not {type(workload).__name__}; encode it first"
            )
        if len(workload) + len(function) + len(unique) + 8 > self._max_packet:
            raise ValueError(
                f"the workload of {function} has {len(workload)} bytes, more than "
                f"max_packet={self._max_packet}; "
                "pass a reference, such as a key or a path"
            )
        return JobRequest(
            function=_argument("function", function),
            workload=workload,
            unique=_argument("unique", unique),
            priority=priority,
            background=background,
        )

    def _run(
        self,
        request: JobRequest,
        timeout: float | None,
        on_data: DataHandler | None,
        on_warning: DataHandler | None,
        on_status: StatusHandler | None,
    ) -> bytes:
        request.on_data, request.on_warning, request.on_status = on_data, on_warning, on_status
        deadline = None if timeout is None else monotonic() + timeout
        with self._session() as session:
            self._acknowledged(session, request, deadline)
            what = f"job {request.function.decode()}"
            while request.outcome is None:
                session.protocol.receive(session.connection.receive(deadline, what))
        if request.outcome is PacketType.WORK_COMPLETE:
            return request.data
        raise JobFailed(request.function.decode(), data=request.data)

    def _submit(self, request: JobRequest) -> str:
        with self._session() as session:
            return self._acknowledged(session, request, None).decode()

    def _acknowledged(self, session: _Session, request: JobRequest, deadline: float | None) -> bytes:
        session.connection.send(session.protocol.submit(request))
        answer_by = monotonic() + self._timeout
        deadline = answer_by if deadline is None else min(deadline, answer_by)
        while request.handle is None:
            if request.error is not None:
                raise self._server_error(session, request.kind, *request.error)
            session.protocol.receive(session.connection.receive(deadline))
        return request.handle

    def _ask(self, kind: PacketType, *arguments: bytes, answers: PacketType) -> tuple[int, list[bytes]]:
        with self._session() as session:
            question, data = session.protocol.ask(kind, *arguments, answers=answers)
            session.connection.send(data)
            return self._answered(session, kind, question)

    def _answered(self, session: _Session, asked: PacketType, question: Question) -> tuple[int, list[bytes]]:
        deadline = monotonic() + self._timeout
        while question.answer is None:
            session.protocol.receive(session.connection.receive(deadline))
        kind, arguments = question.answer
        if kind == PacketType.ERROR:
            raise self._server_error(session, asked, arguments[0], arguments[1])
        return kind, arguments

    def _server_error(self, session: _Session, asked: PacketType, code: bytes, text: bytes) -> ServerError:
        told = session.connection.server, code.decode(errors="replace"), text.decode(errors="replace")
        if code.upper() in _UNKNOWN_PACKET:
            return CommandNotSupported(*told, command=asked.name, version=self.server_version(session.server))
        return ServerError(*told)

    def server_version(self, server: str) -> str:
        """What a server says that it is; empty when it does not."""
        try:
            with AdminClient(
                server, connect_timeout=self._connect_timeout, timeout=self._timeout, tls=self._tls
            ) as admin:
                return admin.version()
        except GearmanError:
            return ""

    @contextmanager
    def _session(self, *, nudge: bool = False) -> Iterator[_Session]:
        """This thread's session; closed when what is done with it leaves it in an unknown state."""
        session: _Session | None = getattr(self._local, "session", None)
        if session is not None and not session.is_usable:
            self.close()
            session = None
        if session is None:
            session = self._local.session = self._open(nudge=nudge)
        try:
            yield session
        except ProtocolError as error:
            self.close()
            raise ConnectionLost(session.connection.server, str(error)) from error
        except (ServerError, JobFailed):
            raise
        except BaseException:
            # An answer may still come, and would be taken for that of the next question.
            self.close()
            raise

    def _open(self, *, nudge: bool) -> _Session:
        now = monotonic()
        avoid = self._avoid_until
        servers = sorted(self._servers, key=lambda server: avoid.get(server, 0.0) > now)
        failure: ConnectionFailed | None = None
        for server in servers:
            if nudge and avoid.get(server, 0.0) > now:
                continue
            host, port = split_address(server)
            try:
                connection = Connection(
                    host,
                    port,
                    connect_timeout=min(self._connect_timeout, NUDGE_TIMEOUT)
                    if nudge
                    else self._connect_timeout,
                    send_timeout=self._timeout,
                    max_packet=self._max_packet,
                    tls=self._tls,
                )
            except ConnectionFailed as error:
                avoid[server] = monotonic() + CIRCUIT
                failure = failure or error
                continue
            avoid.pop(server, None)
            session = _Session(connection, server)
            self._ask_for_exceptions(session)
            return session
        raise failure or ConnectionFailed(", ".join(servers), "tried a moment ago")

    def _ask_for_exceptions(self, session: _Session) -> None:
        # Nobody waits for the answer: it is taken when it comes, before that of the next question.
        _, data = session.protocol.ask(PacketType.OPTION_REQ, b"exceptions", answers=PacketType.OPTION_RES)
        session.connection.send(data)


def _argument(name: str, text: str) -> bytes:
    """A text as an argument of a packet."""
    if "\0" in text:
        raise ValueError(f"{name} {text!r} has a NUL, which ends an argument on the wire")
    return text.encode()
