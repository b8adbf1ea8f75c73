"""
The blocking client, in the words that PHP and Perl users of Gearman know.

Workloads and results are bytes; names are str. Connections are opened when
they are first needed and kept for the next call of any thread of the process.
"""

from __future__ import annotations

import logging
import os
import selectors
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Final, TypeVar, Unpack

from ..addresses import split_address
from ..exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    JobFailed,
    NoWorker,
    ProtocolError,
    ResponseTimeout,
    ResultTooLarge,
    ServerError,
)
from ..protocol.packets import CLAIM, CLAIMED, GROUP, ROW, PacketType
from ..protocol.reader import MAX_BODY
from .admin_client import AdminClient, FunctionStatus
from .connection import Connection
from .core import ClientProtocol, JobRequest, Priority, Question
from .servers import CIRCUIT, Route, allowance, took_time
from .tasks import (
    DEFAULT_SERVERS,
    EXPLANATION_TIMEOUT,
    IN_FLIGHT,
    LATEST,
    NUDGE_TIMEOUT,
    DoOptions,
    JobStatus,
    Part,
    Submitter,
    Task,
    TaskCallbacks,
    TaskRun,
    UniqueStatus,
    Value,
    argument,
    collect,
    deadline_in,
    job_status,
    nobody_came,
    refuse_no_bytes,
    result_of,
    server_error,
    unique_status,
)

__all__ = ["LATEST", "Client", "JobStatus", "UniqueStatus"]

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=JobStatus)

MAX_IDLE: Final = 32
"""Connections to one server that are kept while nobody uses them."""


class _Session:
    """A connection with its protocol; used by one caller at a time, of one process."""

    def __init__(self, connection: Connection, server: str) -> None:
        self.connection = connection
        self.server = server
        self.protocol = ClientProtocol()
        self.pid = os.getpid()
        self.claim: Question | None = None
        """The last time that the server was told of rows."""
        self.unsent = bytearray()
        """What ``run_tasks`` could not send without waiting."""
        self.heard_at = 0.0
        """When ``run_tasks`` last heard of the server, or began to wait for an answer."""
        _sessions.add(self)

    @property
    def is_usable(self) -> bool:
        """Whether it is this process's, not closed by the server in the meantime, and comes to an end."""
        if self.pid != os.getpid():
            return False
        try:
            if self.connection.is_readable():
                if not self.connection.fill():
                    return False
                # Answers that nobody waited for.
                while (packet := self.connection.take()) is not None:
                    self.protocol.receive(packet)
        except (ConnectionLost, ProtocolError, ValueError):
            return False
        return True

    def close(self) -> None:
        self.connection.close()

    def __del__(self) -> None:
        self.close()


_sessions: weakref.WeakSet[_Session] = weakref.WeakSet()
"""Every one of the process."""


def _close_inherited() -> None:
    """In a forked child: what belongs to the parent must not stay open here when the parent closes it."""
    for session in list(_sessions):
        session.close()
    _sessions.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class Watch:
    """
    Waits for what a server says of a row or a group; made by ``Client.watch``, and closed by who made it.

    Args:
        what: ``row NUMBER`` or ``group NUMBER``.
        servers: Of which the first that answers is asked.
    """

    def __init__(self, client: Client, what: str, servers: list[str]) -> None:
        self._client = client
        self._request = client._listening(what)
        self._session: _Session | None = None
        try:
            self._session = client._take(servers, nudge=True)
            self._session.connection.send(self._session.protocol.submit(self._request), NUDGE_TIMEOUT)
        except (ConnectionFailed, ConnectionLost):
            self.close()

    @property
    def is_open(self) -> bool:
        """Whether a server may tell something; if not, ``wait`` does not."""
        return self._session is not None

    def wait(self, seconds: float) -> bool:
        """Wait until the server says that it has its end, for so long at the most; whether it did."""
        deadline = monotonic() + seconds
        while self._session is not None and self._request.outcome is None:
            try:
                self._session.protocol.receive(self._session.connection.receive(deadline))
            except ResponseTimeout:
                return False
            except (ConnectionLost, ProtocolError):
                self.close()
            if self._request.error is not None and self._session is not None:
                if self._request.error[0] != b"JOB_NOT_FOUND":
                    self._client._deaf.add(self._session.server)
                self.close()
        return self._request.outcome is not None

    @property
    def told(self) -> bytes:
        """What the server said of the row; empty when it is to be looked at."""
        return self._request.data

    def close(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        if session.protocol.has_jobs or session.protocol.awaits_answer:
            # The server forgets who leaves; nothing else can be taken back.
            session.close()
        else:
            self._client._give_back(session)


class Watches:
    """Waits for what one of several servers says; made by ``Client.watch_group``, closed by who made it."""

    def __init__(self, watches: list[Watch]) -> None:
        self._watches = watches

    @property
    def is_open(self) -> bool:
        """Whether a server may tell something; if not, ``wait`` does not."""
        return any(watch.is_open for watch in self._watches)

    def wait(self, seconds: float) -> bool:
        """Wait until one of the servers says that it has its end, for so long at the most; whether it did."""
        deadline = monotonic() + seconds
        while waiting := [watch for watch in self._watches if watch.is_open]:
            if len(waiting) == 1:
                return waiting[0].wait(max(deadline - monotonic(), 0.0))
            with selectors.DefaultSelector() as selector:
                wait = deadline - monotonic()
                for session in [watch._session for watch in waiting if watch._session is not None]:
                    if session.connection.has_decrypted:
                        wait = 0.0
                    selector.register(session.connection, selectors.EVENT_READ)
                selector.select(max(wait, 0.0))
            # What came may be a part of a packet: that is not waited for.
            if any(watch.wait(_AT_ONCE) for watch in waiting):
                return True
            if monotonic() >= deadline:
                break
        return False

    def close(self) -> None:
        for watch in self._watches:
            watch.close()


class Client(Submitter):
    """
    Submits jobs to the first server that answers, or to those that their uniques choose.

    Safe to share between threads and over a fork: each call has a connection of
    its own while it lasts. A background job that was not acknowledged goes to
    another server when its connection breaks; a foreground job does when it is
    told to (``resubmit=True``).

    Args:
        servers: ``host:port`` of each job server, in order of preference.
        spread: Choose the server by a hash of the unique, so that equal jobs meet; else the first
            that answers gets all.
        connect_timeout: Seconds to wait for a connection; half of it where other servers are left to try.
        timeout: Seconds to wait for a server's answer; the end of a job is another matter.
        max_packet: Bytes of the largest packet body sent or taken.
        circuit: Seconds for which a server that did not answer is left alone; longer when it stays away.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
    """

    def __init__(
        self,
        servers: Sequence[str] = DEFAULT_SERVERS,
        *,
        spread: bool = False,
        connect_timeout: float = 1.0,
        timeout: float = 30.0,
        max_packet: int = MAX_BODY,
        circuit: float = CIRCUIT,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(
            servers,
            spread=spread,
            connect_timeout=connect_timeout,
            timeout=timeout,
            max_packet=max_packet,
            circuit=circuit,
            tls=tls,
        )
        self._idle: dict[str, deque[_Session]] = {name: deque() for name in self._servers.names}
        """Taken from and put back at the right end without a lock, which a fork could leave locked."""
        self._local = threading.local()
        self._foreign: set[str] = set()
        """Servers that were found to be none of ours."""

    # Foreground jobs.

    def do(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """
        Run a job and wait for its result.

        Args:
            options: See ``DoOptions``.
        Raises:
            JobFailed: The worker reported a failure; ``data`` has the exception's if it sent one.
            ResponseTimeout: The time was up; ``NoWorker`` when no worker offers the function.
            ConnectionFailed: No server answers; nothing was submitted.
            ConnectionLost: The connection broke; the job may have run or not.
        PROTOCOL: SUBMIT_JOB.
        """
        return self._do(self._waited_for(function, workload, "normal", options), options)

    def do_high(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """As ``do``, before jobs of normal priority. PROTOCOL: SUBMIT_JOB_HIGH."""
        return self._do(self._waited_for(function, workload, "high", options), options)

    def do_low(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """As ``do``, after jobs of normal priority. PROTOCOL: SUBMIT_JOB_LOW."""
        return self._do(self._waited_for(function, workload, "low", options), options)

    def stream(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        priority: Priority = "normal",
        timeout: float | None = None,
    ) -> Generator[Part | Value[bytes], None, None]:
        """
        As ``do``, yielding what the worker tells as it comes: parts, and last the ``Value``.

        Who stops early, or closes the generator, abandons the job.
        """
        request = self._request(function, workload, unique, priority)
        return self._stream(request, collect(request), timeout)

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
        return self._submit(self._request(function, workload, unique, background=True))

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
        return self._submit(self._later(function, workload, unique, epoch))

    def submit_background(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        priority: Priority = "normal",
        epoch: float | None = None,
    ) -> tuple[str, str]:
        """
        As ``do_background`` and its like; return the server that has the job, and its handle there.

        Args:
            epoch: As of ``do_epoch``; such a job has normal priority.
        """
        if epoch is not None:
            return self._submitted(self._later(function, workload, unique, epoch))
        return self._submitted(self._request(function, workload, unique, priority, background=True))

    # Reduce jobs.

    def do_reduce(
        self, function: str, workload: bytes = b"", *, reducer: str, **options: Unpack[DoOptions]
    ) -> bytes:
        """
        As ``do``; a worker that asks for it also gets the name of a function to put the parts together.

        Raises:
            CommandNotSupported: The server knows no such jobs; ``version`` says what it is.
        PROTOCOL: SUBMIT_REDUCE_JOB, which has normal priority.
        """
        request = self._waited_for(function, workload, "normal", options, reducer)
        return self._do(request, options)

    def do_reduce_background(
        self, function: str, workload: bytes = b"", *, reducer: str, unique: str = ""
    ) -> str:
        """As ``do_background``, with a reducer. PROTOCOL: SUBMIT_REDUCE_JOB_BACKGROUND."""
        request = self._request(function, workload, unique, background=True, reducer=reducer)
        return self._submit(request)

    # Many at once.

    def run_tasks(
        self,
        *,
        timeout: float | None = None,
        limit: int = IN_FLIGHT,
        resubmit: bool = False,
        **callbacks: Unpack[TaskCallbacks],
    ) -> list[Task]:
        """
        Submit the tasks that this thread has added and wait until each is done.

        They run side by side, over one connection per server. What becomes of
        each is told by its ``result()`` and ``error``, and by call-backs; none
        that fails keeps the others from going on.

        Args:
            timeout: Seconds to wait for all of them; those that are not done then fail with
                ``ResponseTimeout``, and are dropped unless a worker has them.
            limit: How many are with servers at a time.
            resubmit: Submit foreground jobs to another server when a connection breaks, though they
                may run twice then. Background jobs that were not acknowledged always are.
            callbacks: For tasks without their own; see ``TaskCallbacks``.
        Returns:
            The tasks, in the order they were added.
        """
        tasks = self._take_added(callbacks, limit)
        self.run_fed(TaskRun(tasks, limit=limit, resubmit=resubmit), timeout=timeout)
        return tasks

    def run_fed(self, run: TaskRun, *, timeout: float | None = None) -> None:
        """Submit the tasks of a run until it is over; see ``run_tasks``. They have their call-backs."""
        end = deadline_in(timeout)
        sessions: dict[str, _Session] = {}
        is_over = False
        try:
            while not run.is_over:
                self._submit_tasks(run, sessions)
                if not run.is_over:
                    self._tend_tasks(run, sessions, run.next_deadline(end))
                # Another one, maybe, when what was due has ended.
                deadline = run.next_deadline(end)
                if deadline is not None and monotonic() >= deadline:
                    self._give_up(run, sessions, timeout or 0.0)
            # Not asked for again: a run that is fed would take more.
            is_over = True
        finally:
            for session in sessions.values():
                # A connection with jobs of nobody is closed, so that the server drops them.
                is_free = not session.unsent and not session.protocol.has_jobs
                if is_over and is_free and not session.connection.is_passing:
                    self._give_back(session)
                else:
                    session.close()

    # Questions.

    def job_status(self, handle: str) -> JobStatus:
        """What the first server that knows the job says of it. PROTOCOL: GET_STATUS."""
        name = argument("handle", handle)
        return self._first_known(PacketType.GET_STATUS, name, PacketType.STATUS_RES, b"", job_status)

    def job_status_unique(self, unique: str) -> UniqueStatus:
        """
        What a server knows of the job of a unique, whichever its function.

        A job without one, or with ``-``, is not found. gearmand takes uniques
        of 63 bytes at the most here, and closes the connection on longer ones.

        Raises:
            CommandNotSupported: The server cannot tell; ``version`` says what it is.
        PROTOCOL: GET_STATUS_UNIQUE.
        """
        name = argument("unique", unique)
        return self._first_known(
            PacketType.GET_STATUS_UNIQUE, name, PacketType.STATUS_RES_UNIQUE, name, unique_status
        )

    def wait_for(self, handle: str, timeout: float | None = None) -> bool:
        """
        Wait until a job that a server of ours holds has ended.

        Args:
            timeout: Seconds to wait; None to wait for ever.
        Returns:
            Whether it ended meanwhile; False when no server can say: it ended
            before, or is gearmand's.
        Raises:
            ResponseTimeout: The time was up; the job goes on.
            ConnectionFailed, ConnectionLost: No server answers, or not any more.
        Our own server's extension, see ``protocol.packets.LISTEN``.
        """
        deadline = deadline_in(timeout)
        for server in [name for name in self._servers.order() if name not in self._deaf]:
            request = self._listening(handle)
            try:
                with self._session([server]) as session:
                    self._acknowledged(session, request, deadline)
                    self._outlast(session, request, timeout, deadline, f"job {handle}")
            except ConnectionFailed:
                continue
            except ServerError as error:
                if error.code.upper() != "JOB_NOT_FOUND":
                    self._deaf.add(server)
                continue
            return True
        return False

    def watch(self, row: str) -> Watch:
        """
        Have a server that keeps its jobs in a database tell when a row of it says how its job ended.

        Never raises and never takes long, as ``claim``. Our own server's
        extension, see ``protocol.packets.ROW``.

        Args:
            row: The row's number.
        """
        servers = [name for name in self._servers.order() if name not in self._deaf]
        return Watch(self, f"{ROW.decode()}{row}", servers)

    def watch_group(self, group: str) -> Watches:
        """
        As ``watch``, for the end of a group's last member, which any of the servers may write.

        Args:
            group: The group's number.
        """
        name = f"{GROUP.decode()}{group}"
        servers = [server for server in self._servers.order() if server not in self._deaf]
        return Watches([Watch(self, name, [server]) for server in servers])

    def echo(self, data: bytes) -> bytes:
        """The same bytes, from the server: whether it is there, and how far away. PROTOCOL: ECHO_REQ."""
        refuse_no_bytes("what is to be echoed", data)
        _, arguments = self._ask(
            self._servers.order(), PacketType.ECHO_REQ, data, answers=PacketType.ECHO_RES
        )
        return arguments[0]

    def claim(self) -> bool:
        """
        Tell a server that rows wait in its database; do not wait for an answer.

        Never raises and never takes long: a server that cannot be told finds
        them by itself. Our own server's extension, see ``protocol.packets.CLAIM``;
        another's answer shows, by the second call, that it takes it for a job.
        """
        try:
            with self._session(self._servers.order(), nudge=True) as session:
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

    def server_version(self, server: str) -> str:
        """What a server says that it is; empty when it does not."""
        try:
            with self._admin(server, min(self._timeout, self._connect_timeout)) as admin:
                return admin.version()
        except GearmanError:
            return ""

    def close(self) -> None:
        """Close the connections that nobody uses. The client can be used again."""
        for idle in self._idle.values():
            while idle:
                idle.pop().close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # How it is done.

    def _added(self) -> list[Task]:
        tasks: list[Task] | None = getattr(self._local, "tasks", None)
        if tasks is None:
            tasks = self._local.tasks = []
        return tasks

    def _do(self, request: JobRequest, options: DoOptions) -> bytes:
        timeout = options.get("timeout")
        deadline = deadline_in(timeout)
        route = Route(self._servers, request, resubmit=options.get("resubmit", False))
        while True:
            session = self._take_on(route)
            try:
                with self._using(session):
                    self._acknowledged(session, request, deadline)
                    self._outlast(session, request, timeout, deadline, f"job {request.function.decode()}")
                return result_of(request)
            except ConnectionLost as error:
                route.lost(session.server, error)

    def _submit(self, request: JobRequest) -> str:
        return self._submitted(request)[1]

    def _submitted(self, request: JobRequest) -> tuple[str, str]:
        """The server that has acknowledged a background job, and its handle."""
        route = Route(self._servers, request)
        while True:
            session = self._take_on(route)
            try:
                with self._using(session):
                    return session.server, self._acknowledged(session, request, None).decode(errors="replace")
            except ConnectionLost as error:
                route.lost(session.server, error)

    def _stream(
        self, request: JobRequest, parts: deque[Part], timeout: float | None
    ) -> Generator[Part | Value[bytes], None, None]:
        deadline = deadline_in(timeout)
        what = f"job {request.function.decode()}"
        with self._session(self._servers.order(request.key)) as session:
            self._acknowledged(session, request, deadline)
            while request.outcome is None:
                while parts:
                    yield parts.popleft()
                self._hear(session, request, timeout, deadline, what)
        yield from parts
        yield Value(result_of(request))

    def _acknowledged(self, session: _Session, request: JobRequest, deadline: float | None) -> bytes:
        session.connection.send(session.protocol.submit(request))
        answer_by = monotonic() + self._timeout
        until = answer_by if deadline is None else min(deadline, answer_by)
        while request.handle is None:
            if request.error is not None:
                raise self._server_error(session.server, request.kind, *request.error)
            try:
                session.protocol.receive(session.connection.receive(until))
            except ResponseTimeout:
                self._note_silence(session.server, answer_by)
                raise
        return request.handle

    def _outlast(
        self, session: _Session, request: JobRequest, timeout: float | None, deadline: float | None, what: str
    ) -> None:
        """Receive until the job has ended."""
        while request.outcome is None:
            self._hear(session, request, timeout, deadline, what)
        if request.raised is not None:
            raise request.raised

    def _hear(
        self, session: _Session, request: JobRequest, timeout: float | None, deadline: float | None, what: str
    ) -> None:
        try:
            session.protocol.receive(session.connection.receive(deadline, what))
        except ResponseTimeout as error:
            # What the caller allowed, and not what was left of it when the server last said something.
            error.timeout = timeout or 0.0
            # Before the connection is closed, and the job dropped with it.
            if request.function and (better := self._nobody_came(session.server, request, error)):
                raise better from None
            raise
        if request.raised is not None:
            raise request.raised

    def _note_silence(self, server: str, answer_by: float) -> None:
        if monotonic() >= answer_by:
            self._servers.failed(server, waited=True)
        else:
            self._servers.suspect(server)

    def _nobody_came(self, server: str, request: JobRequest, error: ResponseTimeout) -> NoWorker | None:
        try:
            with self._admin(server, EXPLANATION_TIMEOUT) as admin:
                return nobody_came(admin.status(), server, request.function.decode(), error)
        except GearmanError:
            return None  # the time-out itself is to be told

    def _first_known(
        self,
        kind: PacketType,
        argument: bytes,
        answers: PacketType,
        key: bytes,
        read: Callable[[Sequence[bytes]], S],
    ) -> S:
        status: S | None = None
        failure: GearmanError | None = None
        for server in self._servers.order(key):
            try:
                _, arguments = self._ask([server], kind, argument, answers=answers)
            except (ConnectionFailed, ConnectionLost) as error:
                failure = failure or error
                continue
            status = read(arguments)
            if status.known:
                return status
        if status is None:
            raise failure or self._servers.unreachable()
        return status

    def _ask(
        self, servers: list[str], kind: PacketType, *arguments: bytes, answers: PacketType
    ) -> tuple[int, list[bytes]]:
        with self._session(servers) as session:
            question, data = session.protocol.ask(kind, *arguments, answers=answers)
            session.connection.send(data)
            deadline = monotonic() + self._timeout
            while question.answer is None:
                try:
                    session.protocol.receive(session.connection.receive(deadline))
                except ResponseTimeout:
                    self._note_silence(session.server, deadline)
                    raise
            told, values = question.answer
            if told == PacketType.ERROR:
                raise self._server_error(session.server, kind, *values[:2])
            return told, values

    def _server_error(self, server: str, asked: PacketType, code: bytes, text: bytes) -> ServerError:
        error = server_error(server, asked, code, text)
        if isinstance(error, CommandNotSupported):
            error.version = self.server_version(server)
        return error

    def _admin(self, server: str, timeout: float | None = None) -> AdminClient:
        return AdminClient(
            server,
            connect_timeout=self._connect_timeout if timeout is None else timeout,
            timeout=self._timeout if timeout is None else timeout,
            tls=self._tls,
        )

    # Tasks.

    def _submit_tasks(self, run: TaskRun, sessions: dict[str, _Session]) -> None:
        while (task := run.next()) is not None:
            try:
                candidates = run.candidates(task, self._servers)
                session = sessions.get(candidates[0]) or self._take(candidates)
            except (ConnectionFailed, ConnectionLost) as error:
                run.unreachable(task, error)
                continue
            known = sessions.setdefault(session.server, session)
            if known is not session:
                self._give_back(session)
            if not known.protocol.awaits_answer or not run.has_jobs_at(known.server):
                known.heard_at = monotonic()
            known.unsent += run.submit(task, known.server, known.protocol)
            if len(known.unsent) > _BUFFER:
                return  # what comes back is read meanwhile

    def _tend_tasks(self, run: TaskRun, sessions: dict[str, _Session], deadline: float | None) -> None:
        """Send and receive what can be, once for each server."""
        wait = self._timeout
        if deadline is not None:
            wait = min(wait, max(deadline - monotonic(), 0.0))
        with selectors.DefaultSelector() as selector:
            for session in sessions.values():
                if session.connection.has_decrypted:
                    wait = 0.0
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if session.unsent else 0)
                selector.register(session.connection, events, session)
            selector.select(wait)
        now = monotonic()
        for session in list(sessions.values()):
            error = self._tend_session(run, session, now)
            if error is not None:
                del sessions[session.server]
                session.close()
                if isinstance(error, ProtocolError):
                    error = ConnectionLost(session.server, str(error))
                if isinstance(error, ResponseTimeout):
                    self._servers.failed(session.server, waited=True)
                run.lost(self._servers, session.server, error)

    def _give_up(self, run: TaskRun, sessions: Mapping[str, _Session], timeout: float) -> None:
        for server, session in sessions.items():
            if session.protocol.awaits_answer:
                self._servers.suspect(server)
        rows = self._rows_of(sessions)

        def late(task: Task) -> ResponseTimeout:
            error = ResponseTimeout(f"job {task.function}", timeout)
            return nobody_came(rows.get(task.server, ()), task.server, task.function, error) or error

        run.give_up(late)

    def _rows_of(self, servers: Iterable[str]) -> dict[str, list[FunctionStatus]]:
        """What servers say of their functions, to tell why nobody came."""
        rows: dict[str, list[FunctionStatus]] = {}
        for server in servers:
            with suppress(GearmanError), self._admin(server, EXPLANATION_TIMEOUT) as admin:
                rows[server] = admin.status()
        return rows

    def _tend_session(self, run: TaskRun, session: _Session, now: float) -> GearmanError | None:
        """Send and receive what can be; why nothing more can be, if so."""
        protocol, connection = session.protocol, session.connection
        try:
            self._exchange(session, now)
        except (ConnectionLost, ResponseTimeout) as error:
            return error
        while True:
            try:
                packet = connection.take()
                if packet is None:
                    return None
                told = protocol.receive(packet)
            except ResultTooLarge as error:
                if error.end is None:
                    return error
                told = protocol.end_without(*error.end, error)
            except (ConnectionLost, ProtocolError) as error:
                return error
            # What a call-back raises is none of the connection's errors, whatever its class.
            run.told(session.server, told)

    def _exchange(self, session: _Session, now: float) -> None:
        connection = session.connection
        if session.unsent:
            # A copy: the buffer must not change while a view of it is out.
            sent = connection.send_some(bytes(session.unsent[:_PIECE]))
            del session.unsent[:sent]
        if not connection.is_readable():
            if session.protocol.awaits_answer and now - session.heard_at >= self._timeout:
                raise ResponseTimeout("the answer of the job server", self._timeout)
            return
        session.heard_at = now
        connection.fill_ready()

    # Connections.

    @contextmanager
    def _session(self, servers: list[str], *, nudge: bool = False) -> Iterator[_Session]:
        session = self._take(servers, nudge=nudge)
        with self._using(session):
            yield session

    @contextmanager
    def _using(self, session: _Session) -> Iterator[None]:
        """Give a session back afterwards, or close it when it was left in an unknown state."""
        try:
            yield
        except ProtocolError as error:
            session.close()
            raise ConnectionLost(session.server, str(error)) from error
        except (ServerError, JobFailed):
            if session.protocol.has_jobs:
                # A call-back raised it, of another job: this one runs on, and would go on calling back.
                session.close()
            else:
                self._give_back(session)
            raise
        except BaseException:
            # An answer may still come, and would be taken for that of the next question.
            session.close()
            raise
        self._give_back(session)

    def _give_back(self, session: _Session) -> None:
        idle = self._idle[session.server]
        if len(idle) < MAX_IDLE:
            idle.append(session)
        else:
            session.close()

    def _take_on(self, route: Route) -> _Session:
        """A session with the next server of a route."""
        try:
            return self._take(route.candidates())
        except ConnectionFailed as failure:
            if route.may_return():
                return self._take_on(route)
            raise route.unreachable(failure) from None

    def _take(self, servers: list[str], *, nudge: bool = False) -> _Session:
        """A session with the first of the servers that answers."""
        failure: ConnectionFailed | None = None
        for number, server in enumerate(servers):
            idle = self._idle[server]
            while idle:
                try:
                    session = idle.pop()
                except IndexError:
                    break  # another thread was quicker
                if session.is_usable and not self._servers.may_hang(server):
                    return session
                session.close()
            if nudge and self._servers.is_shut(server):
                continue
            try:
                return self._open(server, servers[number:], nudge=nudge)
            except ConnectionFailed as error:
                failure = failure or error
        raise failure or self._servers.unreachable()

    def _open(self, server: str, left: list[str], *, nudge: bool) -> _Session:
        host, port = split_address(server)
        timeout = allowance(left, self._connect_timeout)
        self._servers.trying(server)
        began = monotonic()
        try:
            connection = Connection(
                host,
                port,
                connect_timeout=min(timeout, NUDGE_TIMEOUT) if nudge else timeout,
                send_timeout=self._timeout,
                max_packet=self._max_packet,
                tls=self._tls,
                prove=len(self._servers.names) > 1 or self._servers.may_hang(server),
            )
        except ConnectionFailed as error:
            waited = took_time(error, monotonic() - began, timeout)
            # A nudge is in a hurry: that it was not answered says nothing to who can wait.
            self._servers.failed(server, waited=None if nudge and waited else waited)
            raise
        self._servers.answered(server)
        session = _Session(connection, server)
        # Nobody waits for the answer: it is taken when it comes, before that of the next question.
        _, data = session.protocol.ask(PacketType.OPTION_REQ, b"exceptions", answers=PacketType.OPTION_RES)
        connection.send(data)
        return session


_AT_ONCE: Final = 0.001
"""Seconds to wait for what may be there already."""

_PIECE: Final = 256 * 1024
_BUFFER: Final = 4 * 1024 * 1024
"""Bytes that ``run_tasks`` prepares ahead of what a server takes."""
