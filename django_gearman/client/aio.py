"""
The client for asyncio: the same names as the blocking one, each with ``await``.

One connection per server and event loop, over which any number of calls go side
by side. What packets mean is in ``core``, what clients have in common in
``tasks``.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from typing import Any, Final, TypeVar, Unpack
from weakref import WeakKeyDictionary

from .. import tls as tls_reasons
from ..addresses import split_address
from ..exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    NoWorker,
    ResponseTimeout,
    ServerError,
)
from ..protocol.packets import GROUP, ROW, PacketType
from ..protocol.reader import MAX_BODY
from .admin_client import FunctionStatus, function_status
from .connection import not_proven, reason_of
from .core import JobRequest, Priority
from .links import Link, Links
from .servers import CIRCUIT, Route, allowance, took_time
from .tasks import (
    DEFAULT_SERVERS,
    EXPLANATION_TIMEOUT,
    IN_FLIGHT,
    NUDGE_TIMEOUT,
    DoOptions,
    JobStatus,
    Part,
    Submitter,
    Task,
    TaskCallbacks,
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

S = TypeVar("S", bound=JobStatus)

_PARTS: Final = 16
"""Into how many parts ``_patience`` takes its time apart; to connect takes about eight turns of the loop."""

_NO_LINE: Final = (OSError, ValueError, EOFError, asyncio.LimitOverrunError)
"""What comes of asking a server in words, when it does not answer as it should."""


class AsyncWatch:
    """
    Waits for what servers say of a row or a group; made by ``AsyncClient.watch``, closed by who made it.

    Args:
        what: ``row NUMBER`` or ``group NUMBER``.
    """

    def __init__(self, client: AsyncClient, what: str) -> None:
        self._client = client
        self._what = what
        self._asked: list[tuple[Link, JobRequest]] = []
        self._is_told = False
        self.told = b""
        """What a server said of the row; empty when it is to be looked at."""

    async def ask(self, servers: list[str]) -> None:
        """Ask the first of the servers that answers; never raises and never takes long."""
        request = self._client._listening(self._what)
        try:
            async with asyncio.timeout(NUDGE_TIMEOUT):
                link = await self._client._take(servers)
                link.users += 1
                self._asked.append((link, request))
                await link.send(link.protocol.submit(request))
        except (TimeoutError, ConnectionFailed, ConnectionLost):
            self._drop_lost()

    @property
    def is_open(self) -> bool:
        """Whether a server may tell something; if not, ``wait`` does not."""
        return bool(self._asked)

    async def wait(self, seconds: float) -> bool:
        """Wait until a server says that it has its end, for so long at the most; whether one did."""
        deadline = monotonic() + seconds
        # What came since the last time woke nobody.
        self._drop_lost()
        while self._asked and not self._is_told and (left := deadline - monotonic()) > 0:
            asked = self._asked.copy()
            # No tasks, which begin in a later turn of the loop: too late for what comes in this one.
            waiting = [link.waiter(request) for link, request in asked]
            try:
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for link, request in asked:
                    link.left(request)
            # That a connection broke shows in the link.
            self._drop_lost()
        return self._is_told

    def close(self) -> None:
        for link, request in self._asked:
            self._let_go(link, request)
        self._asked.clear()

    def _drop_lost(self) -> None:
        """Forget servers that will not tell anything any more."""
        for link, request in self._asked.copy():
            if request.error is not None and request.error[0] != b"JOB_NOT_FOUND":
                self._client._deaf.add(link.server)
            if request.outcome is not None:
                self._is_told, self.told = True, request.data
            if request.is_settled or link.lost is not None:
                self._asked.remove((link, request))
                self._let_go(link, request)

    def _let_go(self, link: Link, request: JobRequest) -> None:
        if not request.is_settled:
            link.protocol.forget(request)
        link.release()


class AsyncClient(Submitter):
    """
    ``Client`` for asyncio: the same names and arguments, each call to be awaited.

    All calls of an event loop share one connection per server. One that is
    cancelled or runs out of time leaves it usable for the others; its job is
    dropped, unless a worker has it, when nobody else needs that connection.
    Connections are closed by ``close()`` or when their event loop ends.

    Call-backs are plain functions, called in the event loop.

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
        self._links_of: WeakKeyDictionary[asyncio.AbstractEventLoop, Links] = WeakKeyDictionary()

    # Foreground jobs.

    async def do(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """Run a job and wait for its result. See ``Client.do``, which raises the same errors."""
        return await self._do(self._waited_for(function, workload, "normal", options), options)

    async def do_high(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """As ``do``, before jobs of normal priority. PROTOCOL: SUBMIT_JOB_HIGH."""
        return await self._do(self._waited_for(function, workload, "high", options), options)

    async def do_low(self, function: str, workload: bytes = b"", **options: Unpack[DoOptions]) -> bytes:
        """As ``do``, after jobs of normal priority. PROTOCOL: SUBMIT_JOB_LOW."""
        return await self._do(self._waited_for(function, workload, "low", options), options)

    def stream(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        priority: Priority = "normal",
        timeout: float | None = None,
    ) -> AsyncGenerator[Part | Value[bytes], None]:
        """
        As ``do``, yielding what the worker tells as it comes: parts, and last the ``Value``.

        Who stops early abandons the job; close the generator then (``contextlib.aclosing``).
        """
        return self._stream(self._request(function, workload, unique, priority), timeout)

    # Background jobs.

    async def do_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """Submit a job to be run later; its handle once a server keeps it. See ``Client.do_background``."""
        return await self._submit(self._request(function, workload, unique, background=True))

    async def do_high_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """As ``do_background``, before jobs of normal priority. PROTOCOL: SUBMIT_JOB_HIGH_BG."""
        return await self._submit(self._request(function, workload, unique, "high", background=True))

    async def do_low_background(self, function: str, workload: bytes = b"", *, unique: str = "") -> str:
        """As ``do_background``, after jobs of normal priority. PROTOCOL: SUBMIT_JOB_LOW_BG."""
        return await self._submit(self._request(function, workload, unique, "low", background=True))

    async def do_epoch(self, function: str, workload: bytes = b"", *, epoch: float, unique: str = "") -> str:
        """As ``do_background``, not before a time in seconds since 1970. See ``Client.do_epoch``."""
        return await self._submit(self._later(function, workload, unique, epoch))

    # Reduce jobs.

    async def do_reduce(
        self, function: str, workload: bytes = b"", *, reducer: str, **options: Unpack[DoOptions]
    ) -> bytes:
        """As ``do``, with the name of a function to put the parts together. See ``Client.do_reduce``."""
        request = self._waited_for(function, workload, "normal", options, reducer)
        return await self._do(request, options)

    async def do_reduce_background(
        self, function: str, workload: bytes = b"", *, reducer: str, unique: str = ""
    ) -> str:
        """As ``do_background``, with a reducer. PROTOCOL: SUBMIT_REDUCE_JOB_BACKGROUND."""
        request = self._request(function, workload, unique, background=True, reducer=reducer)
        return await self._submit(request)

    # Many at once.

    async def run_tasks(
        self,
        *,
        timeout: float | None = None,
        limit: int = IN_FLIGHT,
        resubmit: bool = False,
        **callbacks: Unpack[TaskCallbacks],
    ) -> list[Task]:
        """Submit the tasks that this asyncio task has added, and wait for each. See ``Client.run_tasks``."""
        tasks = self._take_added(callbacks, limit)
        deadline = deadline_in(timeout)
        free = asyncio.Semaphore(limit)

        async def run(task: Task) -> None:
            try:
                await self._run_task(task, timeout, deadline, resubmit=resubmit or task.resubmit)
            finally:
                free.release()

        try:
            async with asyncio.TaskGroup() as group:
                for task in tasks:
                    await free.acquire()
                    group.create_task(run(task))
        except ExceptionGroup as errors:
            # Of a call-back: all else stands in the tasks.
            raise errors.exceptions[0] from None
        return tasks

    # Questions.

    async def job_status(self, handle: str) -> JobStatus:
        """What the first server that knows the job says of it. PROTOCOL: GET_STATUS."""
        name = argument("handle", handle)
        return await self._first_known(PacketType.GET_STATUS, name, PacketType.STATUS_RES, b"", job_status)

    async def job_status_unique(self, unique: str) -> UniqueStatus:
        """What a server knows of the job of a unique. See ``Client.job_status_unique``."""
        name = argument("unique", unique)
        return await self._first_known(
            PacketType.GET_STATUS_UNIQUE, name, PacketType.STATUS_RES_UNIQUE, name, unique_status
        )

    async def wait_for(self, handle: str, timeout: float | None = None) -> bool:
        """Wait until a job that a server of ours holds has ended. See ``Client.wait_for``."""
        deadline = deadline_in(timeout)
        for server in [name for name in self._servers.order() if name not in self._deaf]:
            request = self._listening(handle)
            try:
                link = await self._take([server])
                with self._using(link, request):
                    await self._acknowledged(link, request, deadline)
                    await self._ended(link, request, timeout, deadline, f"job {handle}")
            except ConnectionFailed:
                continue
            except ServerError as error:
                if error.code.upper() != "JOB_NOT_FOUND":
                    self._deaf.add(server)
                continue
            return True
        return False

    async def watch(self, row: str) -> AsyncWatch:
        """Have a server tell when a row says how its job ended. See ``Client.watch``."""
        return await self._watching(f"{ROW.decode()}{row}", [self._to_ask()])

    async def watch_group(self, group: str) -> AsyncWatch:
        """As ``watch``, for the end of a group's last member. See ``Client.watch_group``."""
        return await self._watching(f"{GROUP.decode()}{group}", [[server] for server in self._to_ask()])

    async def _watching(self, what: str, askings: list[list[str]]) -> AsyncWatch:
        watch = AsyncWatch(self, what)
        try:
            if len(askings) == 1:
                await watch.ask(*askings)
            else:
                await asyncio.gather(*(watch.ask(servers) for servers in askings))
        except BaseException:
            # Cancelled, and some may have been asked: nobody else could close it.
            watch.close()
            raise
        return watch

    def _to_ask(self) -> list[str]:
        """Servers that may know how to let one listen, and that did not fail a moment ago."""
        order = self._servers.order()
        return [name for name in order if name not in self._deaf and not self._servers.is_shut(name)]

    async def echo(self, data: bytes) -> bytes:
        """The same bytes, from the server: whether it is there, and how far away. PROTOCOL: ECHO_REQ."""
        refuse_no_bytes("what is to be echoed", data)
        _, arguments = await self._ask(
            self._servers.order(), PacketType.ECHO_REQ, data, answers=PacketType.ECHO_RES
        )
        return arguments[0]

    async def server_version(self, server: str) -> str:
        """What a server says that it is; empty when it does not."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                (line,) = await self._lines(server, b"version")
        except _NO_LINE:
            return ""
        return line.removeprefix(b"OK ").decode(errors="backslashreplace")

    async def close(self) -> None:
        """Close the connections of this event loop. The client can be used again."""
        links = self._links_of.pop(asyncio.get_running_loop(), None)
        if links is None:
            return
        keeper = links.keeper
        links.close()
        if keeper is not None:
            await keeper.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # How it is done.

    def _added(self) -> list[Task]:
        current = asyncio.current_task()
        assert current is not None, "tasks are added in a coroutine"
        return self._links().tasks.setdefault(current, [])

    async def _do(self, request: JobRequest, options: DoOptions) -> bytes:
        timeout = options.get("timeout")
        deadline = deadline_in(timeout)
        route = Route(self._servers, request, resubmit=options.get("resubmit", False))
        what = f"job {request.function.decode()}"
        while True:
            link = await self._take_on(route)
            try:
                with self._using(link, request):
                    await self._acknowledged(link, request, deadline)
                    await self._ended(link, request, timeout, deadline, what)
                return result_of(request)
            except ConnectionLost as error:
                route.lost(link.server, error)

    async def _submit(self, request: JobRequest) -> str:
        route = Route(self._servers, request)
        while True:
            link = await self._take_on(route)
            try:
                with self._using(link, request):
                    await self._acknowledged(link, request, None)
                assert request.handle is not None, "it was acknowledged"
                return request.handle.decode(errors="replace")
            except ConnectionLost as error:
                route.lost(link.server, error)

    async def _stream(
        self, request: JobRequest, timeout: float | None
    ) -> AsyncGenerator[Part | Value[bytes], None]:
        deadline = deadline_in(timeout)
        parts = collect(request)
        what = f"job {request.function.decode()}"
        link = await self._take(self._servers.order(request.key))
        with self._using(link, request):
            await self._acknowledged(link, request, deadline)
            while request.outcome is None:
                await self._ended(link, request, timeout, deadline, what, parts)
                while parts:
                    yield parts.popleft()
        while parts:
            yield parts.popleft()
        yield Value(result_of(request))

    async def _acknowledged(self, link: Link, request: JobRequest, deadline: float | None) -> None:
        began = monotonic()
        answer_by = began + self._timeout
        until = answer_by if deadline is None else min(deadline, answer_by)
        try:
            async with asyncio.timeout(until - began):
                await link.send(link.protocol.submit(request))
                while request.handle is None and request.error is None:
                    await link.wait(request)
        except TimeoutError:
            self._note_silence(link, answer_by)
            raise ResponseTimeout("the answer of the job server", monotonic() - began) from None
        if request.error is not None:
            raise await self._server_error(link.server, request.kind, *request.error)
        if request.raised is not None:
            raise request.raised

    async def _ended(
        self,
        link: Link,
        request: JobRequest,
        timeout: float | None,
        deadline: float | None,
        what: str,
        parts: Collection[Part] = (),
    ) -> None:
        """Wait until the job has ended, or there is a part to yield."""
        try:
            async with asyncio.timeout(None if deadline is None else deadline - monotonic()):
                while request.outcome is None and request.raised is None and not parts:
                    await link.wait(request)
        except TimeoutError:
            late = ResponseTimeout(what, timeout or 0.0)
            if not request.function:
                raise late from None
            # Before the connection may be closed, and the job dropped with it.
            raise (await self._nobody_came(link, request, late) or late) from None
        if request.raised is not None:
            raise request.raised
        if request.too_large is not None:
            raise request.too_large

    def _note_silence(self, link: Link, answer_by: float) -> None:
        if monotonic() >= answer_by:
            self._servers.failed(link.server, waited=True)
        else:
            self._servers.suspect(link.server)
        link.spend()

    async def _nobody_came(self, link: Link, request: JobRequest, error: ResponseTimeout) -> NoWorker | None:
        """Why nobody came; asked once for all whose time is up together."""
        asking = link.asking
        if asking is None:
            asking = link.asking = asyncio.create_task(self._rows(link))
        rows = await asyncio.shield(asking)
        return nobody_came(rows, link.server, request.function.decode(), error)

    async def _rows(self, link: Link) -> list[FunctionStatus]:
        try:
            async with asyncio.timeout(EXPLANATION_TIMEOUT):
                lines = await self._lines(link.server, b"status")
            return [function_status(line) for line in lines]
        except _NO_LINE:
            return []  # the time-out itself is to be told
        finally:
            link.asking = None

    async def _first_known(
        self,
        kind: PacketType,
        name: bytes,
        answers: PacketType,
        key: bytes,
        read: Callable[[Sequence[bytes]], S],
    ) -> S:
        status: S | None = None
        failure: GearmanError | None = None
        for server in self._servers.order(key):
            try:
                _, arguments = await self._ask([server], kind, name, answers=answers)
            except (ConnectionFailed, ConnectionLost) as error:
                failure = failure or error
                continue
            status = read(arguments)
            if status.known:
                return status
        if status is None:
            raise failure or self._servers.unreachable()
        return status

    async def _ask(
        self, servers: list[str], kind: PacketType, *arguments: bytes, answers: PacketType
    ) -> tuple[str, list[bytes]]:
        """Who answered, and what."""
        link = await self._take(servers)
        with self._using(link):
            answer_by = monotonic() + self._timeout
            question, data = link.protocol.ask(kind, *arguments, answers=answers)
            try:
                async with asyncio.timeout(self._timeout):
                    await link.send(data)
                    while question.answer is None:
                        await link.wait(question)
            except TimeoutError:
                self._note_silence(link, answer_by)
                raise ResponseTimeout("the answer of the job server", self._timeout) from None
        told, values = question.answer
        if told == PacketType.ERROR:
            raise await self._server_error(link.server, kind, *values[:2])
        return link.server, values

    async def _server_error(self, server: str, asked: PacketType, code: bytes, text: bytes) -> ServerError:
        error = server_error(server, asked, code, text)
        if isinstance(error, CommandNotSupported):
            error.version = await self.server_version(server)
        return error

    async def _lines(self, server: str, command: bytes) -> list[bytes]:
        """The answer to a text command; a connection of its own, as the reader of packets takes none."""
        host, port = split_address(server)
        name = None if self._tls is None else host
        reader, writer = await asyncio.open_connection(host, port, ssl=self._tls, server_hostname=name)
        try:
            writer.write(command + b"\r\n")
            lines = []
            while (line := (await reader.readuntil()).rstrip(b"\r\n")) != b".":
                lines.append(line)
                if command != b"status" or line.startswith(b"ERR "):
                    break
            return lines
        finally:
            writer.transport.abort()

    # Tasks.

    async def _run_task(
        self, task: Task, timeout: float | None, deadline: float | None, *, resubmit: bool
    ) -> None:
        try:
            if task.request is None:
                await self._ask_standing(task, timeout, deadline)
                return
            await self._run_submission(task, task.request, timeout, deadline, resubmit=resubmit)
        except GearmanError as error:
            if task.is_done or (task.request is not None and error is task.request.raised):
                raise  # of a call-back
            task.fail(error)

    async def _ask_standing(self, task: Task, timeout: float | None, deadline: float | None) -> None:
        try:
            async with asyncio.timeout(None if deadline is None else deadline - monotonic()):
                server, arguments = await self._ask(
                    self._servers.order(),
                    PacketType.GET_STATUS,
                    task.handle.encode(),
                    answers=PacketType.STATUS_RES,
                )
        except TimeoutError:
            raise ResponseTimeout("the answer of the job server", timeout or 0.0) from None
        task.server = server
        task.told_standing(job_status(arguments))

    async def _run_submission(
        self,
        task: Task,
        request: JobRequest,
        timeout: float | None,
        deadline: float | None,
        *,
        resubmit: bool,
    ) -> None:
        route = Route(self._servers, request, resubmit=resubmit)
        while True:
            if deadline is not None and monotonic() >= deadline:
                # It may be a background job, which nobody would take back.
                raise ResponseTimeout(f"job {task.function}", timeout or 0.0)
            link = await self._take_on(route)
            try:
                with self._using(link, request):
                    task.server = link.server
                    await self._acknowledged(link, request, deadline)
                    if not request.background:
                        await self._ended(link, request, timeout, deadline, f"job {task.function}")
                return
            except ConnectionLost as error:
                route.lost(link.server, error)
                task.handle = ""

    # Connections.

    @contextmanager
    def _using(self, link: Link, request: JobRequest | None = None) -> Iterator[None]:
        """Count as a user of a connection, and leave it to the others when that ends early."""
        link.users += 1
        try:
            yield
        except BaseException as error:
            if isinstance(error, ConnectionLost) and (request is None or error is not request.raised):
                # Nothing comes of it here; its call-backs go along where it is submitted again.
                raise
            if request is not None and not request.is_settled and not request.background:
                if request.listens:
                    # Its job is somebody else's, and not dropped with the connection.
                    link.protocol.forget(request)
                else:
                    request.leave()
                    link.spend()
            raise
        finally:
            link.release()

    async def _take_on(self, route: Route) -> Link:
        """A connection to the next server of a route."""
        try:
            return await self._take(route.candidates())
        except ConnectionFailed as failure:
            if route.may_return():
                return await self._take_on(route)
            raise route.unreachable(failure) from None

    async def _take(self, servers: list[str]) -> Link:
        """A connection to the first of the servers that answers."""
        links = self._links()
        if links.keeper is None:
            links.keeper = links.keep()
            await anext(links.keeper)
        failure: ConnectionFailed | None = None
        for number, server in enumerate(servers):
            link = links.open.get(server)
            if link is not None and link.is_usable and not self._servers.may_hang(server):
                return link
            try:
                if link is not None and link.is_usable and self._servers.is_suspected(server):
                    # Slow, perhaps: another connection would say no more than this one.
                    await self._prove(link, servers[number:])
                    return link
            except ConnectionFailed as error:
                failure = failure or error
                continue
            except ConnectionLost:
                pass
            try:
                return await self._opened(links, server, servers[number:])
            except ConnectionFailed as error:
                failure = failure or error
        raise failure or self._servers.unreachable()

    async def _prove(self, link: Link, left: list[str]) -> None:
        """
        See whether a server that is suspected answers on the connection that there is.

        Raises:
            ConnectionFailed: Not in time.
            ConnectionLost: It broke.
        """
        question, data = link.protocol.ask(PacketType.ECHO_REQ, b"", answers=PacketType.ECHO_RES)
        with self._using(link):
            try:
                async with _patience(allowance(left, self._connect_timeout)):
                    await link.send(data)
                    while question.answer is None:
                        await link.wait(question)
            except TimeoutError as error:
                self._servers.failed(link.server, waited=True)
                link.spend()
                raise ConnectionFailed(link.server, "no answer in time") from error
        self._servers.answered(link.server)

    def _links(self) -> Links:
        loop = asyncio.get_running_loop()
        links = self._links_of.get(loop)
        if links is None or links.pid != os.getpid():
            self._drop_closed()
            links = self._links_of[loop] = Links()
        return links

    def _drop_closed(self) -> None:
        """Forget loops that were closed without their asynchronous generators being ended."""
        for reference in self._links_of.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                left = self._links_of.pop(loop, None)
                if left is not None:
                    # It refers to the loop.
                    left.keeper = None

    async def _opened(self, links: Links, server: str, left: list[str]) -> Link:
        """Open a connection, once for all that wait for it."""
        opening = links.opening.get(server)
        if opening is None:
            opening = links.opening[server] = asyncio.create_task(self._open(links, server, left))
            opening.add_done_callback(partial(links.opened, server))
        try:
            return await asyncio.shield(opening)
        except ConnectionFailed as error:
            # A new one for each that waited.
            raise ConnectionFailed(error.server, error.reason, error.hint) from error.__cause__
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if opening.cancelled() and current is not None and not current.cancelling():
                raise ConnectionFailed(server, "the client was closed meanwhile") from None
            raise

    async def _open(self, links: Links, server: str, left: list[str]) -> Link:
        host, port = split_address(server)
        timeout = allowance(left, self._connect_timeout)
        several = len(self._servers.names) > 1
        prove = self._tls is not None or several or self._servers.may_hang(server)
        link = Link(server, self._max_packet, links)
        self._servers.trying(server)
        began = monotonic()
        try:
            try:
                async with _patience(timeout):
                    await self._connect(link, host, port, timeout)
                    await link.greet(prove=prove)
            except TimeoutError as error:
                raise ConnectionFailed(server, "no answer in time") from error
            except ConnectionLost as error:
                raise not_proven(error, host, tls=self._tls is not None) from error
        except BaseException as error:
            link.close()
            if isinstance(error, ConnectionFailed):
                self._servers.failed(server, waited=took_time(error, monotonic() - began, timeout))
            raise
        self._servers.answered(server)
        links.open[server] = link
        return link

    async def _connect(self, link: Link, host: str, port: int, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        tls: dict[str, Any] = {}
        if self._tls is not None:
            tls = {"ssl": self._tls, "server_hostname": host, "ssl_handshake_timeout": timeout * 2}
        try:
            addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # Each may take its share of the time that is left: one that is silent leaves some for the others.
            for left in range(len(addresses), 0, -1):
                numbers: tuple[Any, ...] = addresses[-left][4]
                name = str(numbers[0])
                if len(numbers) == 4 and numbers[3]:
                    # The link that an address of IPv6 is on stands apart.
                    name += f"%{numbers[3]}"
                share = None if left == 1 else (until - loop.time()) / left
                try:
                    async with asyncio.timeout(share):
                        await loop.create_connection(lambda: link, name, port, **tls)
                    return
                except ssl.SSLError:
                    raise
                except OSError:
                    if left == 1:
                        raise
        except OSError as error:
            in_handshake = isinstance(error, ssl.SSLError | ConnectionResetError | ConnectionAbortedError)
            if self._tls is not None and in_handshake:
                raise ConnectionFailed(link.server, *tls_reasons.explain(error, host)) from error
            raise ConnectionFailed(link.server, reason_of(error)) from error


@asynccontextmanager
async def _patience(seconds: float) -> AsyncIterator[None]:
    """
    As ``asyncio.timeout``, for what says that a server does not answer.

    Where other callbacks hold the event loop for long, its answer may be there and not be read: each
    time that happens counts for a part of the seconds and no more.
    """
    loop = asyncio.get_running_loop()
    pause = seconds / _PARTS
    timer: asyncio.TimerHandle

    def count(left: int, at: float) -> None:
        nonlocal timer
        now = loop.time()
        if left:
            # To be a little late is ordinary, and must not add up.
            at = (at if now - at <= pause else now) + pause
            timer = loop.call_at(at, count, left - 1, at)
        else:
            limit.reschedule(now)

    async with asyncio.timeout(None) as limit:
        at = loop.time() + pause
        timer = loop.call_at(at, count, _PARTS - 1, at)
        try:
            yield
        finally:
            timer.cancel()
