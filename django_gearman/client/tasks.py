"""
What both clients have in common: arguments to requests, tasks and their call-backs, parts of a stream.

No I/O.
"""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from time import monotonic
from typing import Final, Generic, TypeAlias, TypedDict, TypeVar, Unpack

from ..addresses import DEFAULT_PORT
from ..encoding import exception_of
from ..exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    JobFailed,
    NoWorker,
    ResponseTimeout,
    ServerError,
    TooLarge,
)
from ..protocol.packets import PacketType
from ..protocol.reader import MAX_BODY
from .admin_client import FunctionStatus
from .core import ClientProtocol, DataHandler, JobRequest, Priority, Question, StatusHandler
from .servers import CIRCUIT, Route, Servers

V = TypeVar("V")

DEFAULT_SERVERS: Final = (f"127.0.0.1:{DEFAULT_PORT}",)

LATEST: Final = 253_370_764_800
"""The year 9999 in seconds since 1970; gearmand closes the connection on numbers too large for it."""

LONGEST_WAIT: Final = 1_000_000.0
"""Seconds; who allows more waits for ever."""

IN_FLIGHT: Final = 1_000
"""Tasks of one ``run_tasks`` that are with servers at a time."""

BESIDE: Final = 16
"""Bytes of a submission beside its workload and its names: what parts them, and a time in seconds."""

EXPLANATION_TIMEOUT: Final = 0.2
"""Seconds that asking why nobody came may add to a time-out."""

NUDGE_TIMEOUT: Final = 0.2
"""Seconds that telling or asking a server about rows may take: without it they are looked at now and then."""

_UNKNOWN_PACKET: Final = (b"INVALID_COMMAND", b"SERVER_ERROR")
"""Codes, in upper case, of the ERROR for a type that a server does not take: gearmand's and ours, Perl's."""


# What a stream yields.


@dataclass(frozen=True, slots=True)
class Data:
    """A part of the result, as the worker sent it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning of the worker's."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """So many parts of so many are done."""

    numerator: int
    denominator: int


@dataclass(frozen=True, slots=True)
class Value(Generic[V]):
    """What the job returned; the last that a stream yields."""

    value: V


Part: TypeAlias = Data | Warned | Progress


def collect(request: JobRequest) -> deque[Part]:
    """Have what a worker tells of a job gathered, to be taken from the left."""
    parts: deque[Part] = deque()
    request.on_data = lambda data: parts.append(Data(data))
    request.on_warning = lambda data: parts.append(Warned(data))
    request.on_status = lambda numerator, denominator: parts.append(
        Progress(number(numerator), number(denominator))
    )
    return parts


def number(digits: bytes) -> int:
    """A number as workers write it; 0 for what is none."""
    try:
        return int(float(digits[:40]))
    except (ValueError, OverflowError):
        return 0


# What a client is told of a job.


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


def job_status(arguments: Sequence[bytes]) -> JobStatus:
    """What a STATUS_RES says."""
    _, known, running, numerator, denominator = arguments
    return JobStatus(known == b"1", running == b"1", int(numerator), int(denominator))


def unique_status(arguments: Sequence[bytes]) -> UniqueStatus:
    """What a STATUS_RES_UNIQUE says."""
    _, known, running, numerator, denominator, clients = arguments
    return UniqueStatus(known == b"1", running == b"1", int(numerator), int(denominator), int(clients))


# Tasks.


class Task:
    """
    A job among several that ``run_tasks`` submits; what call-backs are called with.

    Attributes:
        function, unique, workload, background: As they were given.
        context: Whatever was given with it, for the call-backs.
        server: ``host:port`` of the server that it was given to last; empty before.
        handle: Empty until a server has acknowledged it.
        data: What came last: a part, a warning, the exception's data, or the result.
        numerator, denominator: The progress told last.
        known, running: What a server said of an ``add_task_status``.
        error: Why there is no result; None while it runs and when it ended well.
        is_done: Whether nothing more will come.
    """

    def __init__(
        self, request: JobRequest | None, handle: str, context: object, callbacks: TaskCallbacks
    ) -> None:
        self.request = request
        self.function = "" if request is None else request.function.decode()
        self.unique = "" if request is None else request.unique.decode()
        self.workload = b"" if request is None else request.workload
        self.background = request is not None and request.background
        self.context = context
        self.server = ""
        self.handle = handle
        self.data = b""
        self.numerator = self.denominator = 0
        self.known = self.running = False
        self.error: GearmanError | None = None
        self.is_done = False
        self.resubmit = False
        """Whether it may go to another server when its connection breaks, though it may run twice then."""
        self._callbacks = callbacks

    def __repr__(self) -> str:
        state = "done" if self.is_done else "not done"
        return f"<Task {self.function or 'status'} {self.handle} {state}>"

    def result(self) -> bytes:
        """
        What the job returned; empty for a background job.

        Raises:
            GearmanError: Why there is nothing: ``JobFailed``, ``ResponseTimeout``, ``ConnectionLost``, ...
        """
        if self.error is not None:
            raise self.error
        if not self.is_done:
            raise ResponseTimeout(f"job {self.function}", 0.0)
        return b"" if self.background else self.data

    def attach(self, defaults: TaskCallbacks) -> None:
        """Have the call-backs called; ``defaults`` are those that were given to ``run_tasks``."""
        self._callbacks = {**defaults, **self._callbacks}
        if self.request is not None:
            self.request.on_change = self._changed
            self.request.on_data = self._told_data
            self.request.on_warning = self._told_warning
            self.request.on_status = self._told_status

    def _changed(self) -> None:
        """It was acknowledged, or has ended."""
        request = self.request
        assert request is not None, "its own call-back"
        if request.outcome is None:
            assert request.handle is not None, "it was acknowledged"
            self.handle = request.handle.decode(errors="replace")
            self.is_done = self.background
            self._call("on_created")
            return
        self.data = request.data
        if request.outcome is PacketType.WORK_COMPLETE:
            self.is_done = True
            self._call("on_complete")
            return
        failure = JobFailed(self.function, data=request.data, **exception_of(request.data))
        if request.outcome is PacketType.WORK_EXCEPTION:
            self.error, self.is_done = failure, True
            # Who knows of one call-back alone is to hear of every failure by that.
            self._call("on_exception" if self._callbacks.get("on_exception") else "on_fail")
            return
        self.fail(failure)

    def told_standing(self, status: JobStatus) -> None:
        """A server said how the job of an ``add_task_status`` stands."""
        self.known, self.running = status.known, status.running
        self.numerator, self.denominator = status.numerator, status.denominator
        self.is_done = True
        self._call("on_status")

    def fail(self, error: GearmanError) -> None:
        """There will be no result."""
        self.error, self.is_done = error, True
        if self.request is not None:
            self.request.leave()
        self._call("on_fail")

    def _told_data(self, data: bytes) -> None:
        self.data = data
        self._call("on_data")

    def _told_warning(self, data: bytes) -> None:
        self.data = data
        self._call("on_warning")

    def _told_status(self, numerator: bytes, denominator: bytes) -> None:
        self.numerator, self.denominator = number(numerator), number(denominator)
        self._call("on_status")

    def _call(self, name: str) -> None:
        callback: TaskHandler | None = self._callbacks.get(name)  # type: ignore[assignment]  # a literal
        if callback is not None:
            callback(self)


TaskHandler: TypeAlias = Callable[[Task], object]


class TaskCallbacks(TypedDict, total=False):
    """
    What is called, with the task, in the thread or the event loop of ``run_tasks``.

    Each task may have its own; those of ``run_tasks`` are for the others. One
    that raises ends ``run_tasks`` with its error.
    """

    on_created: TaskHandler
    """The server has acknowledged it; ``handle`` is there."""
    on_data: TaskHandler
    on_warning: TaskHandler
    on_status: TaskHandler
    on_complete: TaskHandler
    on_fail: TaskHandler
    """
    There is no result: ``error`` says why, be it the job's failure, a time-out or a lost server.

    Of what the function raised only where there is no ``on_exception``.
    """
    on_exception: TaskHandler
    """The function raised: ``data`` is what its worker says of that."""


class DoOptions(TypedDict, total=False):
    """Options of the calls that wait for a job's result."""

    unique: str
    """Submitters of an equal one share one run; ``-`` stands for the workload."""
    timeout: float | None
    """
    Seconds to wait for the end; None to wait for ever.

    The job is abandoned when the time is up: it is dropped unless a worker has it.
    """
    on_data: DataHandler | None
    on_warning: DataHandler | None
    """Called with each part as the worker sends it."""
    on_status: StatusHandler | None
    """Called with numerator and denominator, as the worker wrote them."""
    resubmit: bool
    """Submit it to another server when the connection breaks, though it may run twice then."""


class Submitter:
    """
    What a client is told once, and what it makes of the arguments of its calls.

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
        servers: Sequence[str],
        *,
        spread: bool = False,
        connect_timeout: float = 1.0,
        timeout: float = 30.0,
        max_packet: int = MAX_BODY,
        circuit: float = CIRCUIT,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        for name, seconds in (("connect_timeout", connect_timeout), ("timeout", timeout)):
            given: object = seconds
            if not isinstance(given, int | float) or not seconds > 0:
                raise ValueError(f"{name} must be a number of seconds above 0, not {given!r:.200}")
        self._servers = Servers(servers, spread=spread, circuit=circuit)
        self._connect_timeout = min(connect_timeout, LONGEST_WAIT)
        self._timeout = min(timeout, LONGEST_WAIT)
        self._max_packet = max_packet
        self._tls = tls
        self._deaf: set[str] = set()
        """Servers that do not know how to let one listen."""

    def _added(self) -> list[Task]:
        """Where the caller's tasks gather."""
        raise NotImplementedError

    # Tasks. PHP's and Perl's words.

    def add_task(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """
        Add a job for ``run_tasks``, which waits for its result.

        Args:
            context: Anything, for the call-backs: ``task.context``.
            callbacks: See ``TaskCallbacks``.
        """
        return self._add(self._request(function, workload, unique), context, callbacks)

    def add_task_high(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """As ``add_task``, before jobs of normal priority."""
        return self._add(self._request(function, workload, unique, "high"), context, callbacks)

    def add_task_low(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """As ``add_task``, after jobs of normal priority."""
        return self._add(self._request(function, workload, unique, "low"), context, callbacks)

    def add_task_background(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """Add a job to be run later; it is done for ``run_tasks`` once a server keeps it."""
        return self._add(self._request(function, workload, unique, background=True), context, callbacks)

    def add_task_high_background(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """As ``add_task_background``, before jobs of normal priority."""
        request = self._request(function, workload, unique, "high", background=True)
        return self._add(request, context, callbacks)

    def add_task_low_background(
        self,
        function: str,
        workload: bytes = b"",
        *,
        unique: str = "",
        context: object = None,
        **callbacks: Unpack[TaskCallbacks],
    ) -> Task:
        """As ``add_task_background``, after jobs of normal priority."""
        request = self._request(function, workload, unique, "low", background=True)
        return self._add(request, context, callbacks)

    def add_task_status(
        self, handle: str, *, context: object = None, **callbacks: Unpack[TaskCallbacks]
    ) -> Task:
        """Add the question how a job stands; ``on_status`` gets the answer."""
        argument("handle", handle)
        _refuse_callbacks(callbacks, "add_task_status()")
        task = Task(None, handle, context, callbacks)
        self._added().append(task)
        return task

    def _add(self, request: JobRequest, context: object, callbacks: TaskCallbacks) -> Task:
        _refuse_callbacks(callbacks, "add_task()")
        task = Task(request, "", context, callbacks)
        self._added().append(task)
        return task

    def _take_added(self, callbacks: TaskCallbacks, limit: int = IN_FLIGHT) -> list[Task]:
        _refuse_callbacks(callbacks, "run_tasks()")
        if type(limit) is not int or limit < 1:
            raise ValueError(f"limit is how many tasks are with servers at a time, at least 1, not {limit!r}")
        added = self._added()
        tasks = list(added)
        added.clear()
        for task in tasks:
            task.attach(callbacks)
        return tasks

    # Requests.

    def _request(
        self,
        function: str,
        workload: bytes,
        unique: str,
        priority: Priority = "normal",
        *,
        background: bool = False,
        reducer: str | None = None,
    ) -> JobRequest:
        name, key = argument("function", function), argument("unique", unique)
        if not name:
            raise ValueError("a job needs the name of a function, such as 'reverse'")
        other = None if reducer is None else argument("reducer", reducer)
        refuse_no_bytes(f"the workload of {function}", workload)
        refuse_too_large(function, workload, len(name) + len(key) + len(other or b""), self._max_packet)
        return JobRequest(
            function=name,
            workload=workload,
            unique=key,
            priority=priority,
            background=background,
            reducer=other,
        )

    def _waited_for(
        self,
        function: str,
        workload: bytes,
        priority: Priority,
        options: DoOptions,
        reducer: str | None = None,
    ) -> JobRequest:
        refuse_unknown(options, DoOptions.__optional_keys__, "do()")
        for name in ("on_data", "on_warning", "on_status"):
            refuse_no_callback(name, options.get(name))
        unique = options.get("unique", "")
        request = self._request(function, workload, unique, priority, reducer=reducer)
        request.on_data = options.get("on_data")
        request.on_warning = options.get("on_warning")
        request.on_status = options.get("on_status")
        return request

    def _later(self, function: str, workload: bytes, unique: str, epoch: float) -> JobRequest:
        given: object = epoch
        if not isinstance(given, int | float) or not 0 <= epoch <= LATEST:
            raise ValueError(f"epoch is a time in seconds since 1970, up to the year 9999, not {epoch!r}")
        request = self._request(function, workload, unique, background=True)
        request.epoch = math.ceil(epoch)
        return request

    def _listening(self, handle: str) -> JobRequest:
        return JobRequest(function=b"", listens=argument("handle", handle))


def refuse_too_large(
    function: str, workload: bytes, names: int, limit: int, *, setting: str = "max_packet"
) -> None:
    """
    Raise ``TooLarge`` for a workload that no packet takes with what stands beside it.

    Args:
        names: Bytes of the function, the unique and the reducer.
        limit: Bytes of the largest packet's body, which ``setting`` sets.
    """
    if len(workload) + names + BESIDE > limit:
        raise TooLarge(f"the workload of {function}", len(workload), limit, setting=setting)


def result_of(request: JobRequest) -> bytes:
    """
    What a foreground job that ended returned.

    Raises:
        JobFailed: It failed.
    """
    if request.outcome is PacketType.WORK_COMPLETE:
        return request.data
    raise JobFailed(request.function.decode(), data=request.data, **exception_of(request.data))


def nobody_came(
    rows: Iterable[FunctionStatus], server: str, function: str, error: ResponseTimeout
) -> NoWorker | None:
    """What to raise for a time-out if the server's ``status`` says that no worker offers the function."""
    for row in rows:
        if row.name == function and not row.workers:
            waiting = max(row.total - row.running, 1)
            return NoWorker(error.what, error.timeout, function=function, waiting=waiting, server=server)
    return None


def server_error(server: str, asked: PacketType, code: bytes, text: bytes) -> ServerError:
    """What to raise for an ERROR; the version of ``CommandNotSupported`` is still to be found out."""
    told = server, code.decode(errors="replace"), text.decode(errors="replace")
    if code.upper() in _UNKNOWN_PACKET:
        return CommandNotSupported(*told, command=asked.name, version="")
    return ServerError(*told)


def _refuse_callbacks(callbacks: TaskCallbacks, of: str) -> None:
    refuse_unknown(callbacks, TaskCallbacks.__optional_keys__, of)
    for name, callback in callbacks.items():
        refuse_no_callback(name, callback)


def refuse_no_callback(name: str, callback: object) -> None:
    """Raise for what cannot be called back; None is for nothing."""
    if callback is not None and not callable(callback):
        raise TypeError(f"{name} must be a function, not {callback!r:.200}")
    if iscoroutinefunction(callback):
        raise TypeError(f"{name} must be a plain function: nobody would await {callback!r:.200}")


class TaskRun:
    """
    Tasks with the servers that have them: what ``run_tasks`` has to keep in mind.

    Args:
        limit: How many are with servers at a time.
    """

    def __init__(self, tasks: Sequence[Task], *, limit: int, resubmit: bool) -> None:
        self._waiting = deque(tasks)
        self._limit = max(limit, 1)
        self._resubmit = resubmit
        self._in_flight: dict[str, dict[JobRequest | Question, Task]] = {}
        self._count = 0
        self._routes: dict[Task, Route] = {}
        """Of tasks whose connection broke; before that, each goes to the best server."""

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self._count

    def next_deadline(self, end: float | None) -> float | None:
        """The monotonic time at which to give up, where ``end`` is that of all of it; None for never."""
        return end

    def next(self) -> Task | None:
        """The task to submit next; None when there is none, or enough are in flight."""
        if self._waiting and self._count < self._limit:
            return self._waiting.popleft()
        return None

    def candidates(self, task: Task, servers: Servers) -> list[str]:
        """
        Servers to try for a task, the best first.

        Raises:
            ConnectionFailed, ConnectionLost: None is left; see ``unreachable``.
        """
        route = self._routes.get(task)
        if route is not None:
            return route.candidates()
        candidates = servers.order(b"" if task.request is None else task.request.key)
        if not candidates:
            raise servers.unreachable()
        return candidates

    def submit(self, task: Task, server: str, protocol: ClientProtocol) -> bytes:
        """Bytes to send to the server."""
        task.server = server
        if task.request is None:
            question, data = protocol.ask(
                PacketType.GET_STATUS, task.handle.encode(), answers=PacketType.STATUS_RES
            )
            self._in_flight.setdefault(server, {})[question] = task
        else:
            data = protocol.submit(task.request)
            self._in_flight.setdefault(server, {})[task.request] = task
        self._count += 1
        return data

    def told(self, server: str, told: JobRequest | Question | None) -> None:
        """A server answered, or a job ended."""
        there = self._in_flight.get(server, {})
        if told is None or (task := there.get(told)) is None:
            return
        if isinstance(told, Question):
            assert told.answer is not None, "it was told"
            self._land(there, told)
            kind, arguments = told.answer
            if kind == PacketType.ERROR:
                task.fail(server_error(server, PacketType.GET_STATUS, *arguments[:2]))
            else:
                task.told_standing(job_status(arguments))
            return
        if told.raised is not None:
            raise told.raised
        if told.is_settled:
            self._land(there, told)
        if told.too_large is not None:
            task.fail(told.too_large)
        elif told.error is not None:
            task.fail(server_error(server, told.kind, *told.error))

    def _land(self, there: dict[JobRequest | Question, Task], landed: JobRequest | Question) -> None:
        del there[landed]
        self._count -= 1

    def has_jobs_at(self, server: str) -> bool:
        return bool(self._in_flight.get(server))

    def lost(self, servers: Servers, server: str, error: GearmanError) -> None:
        """What was in flight there goes to another server if it may, and fails if not."""
        there = self._in_flight.pop(server, {})
        self._count -= len(there)
        for task in there.values():
            if isinstance(error, ConnectionLost) and self._may_move(task, servers, server, error):
                if task.request is not None:
                    task.handle = ""
                self._waiting.append(task)
            else:
                task.fail(error)

    def _may_move(self, task: Task, servers: Servers, server: str, error: ConnectionLost) -> bool:
        route = self._routes.get(task)
        if route is None:
            route = Route(servers, task.request, resubmit=self._resubmit or task.resubmit)
        try:
            route.lost(server, error)
        except ConnectionLost:
            return False
        self._routes[task] = route
        return True

    def unreachable(self, task: Task, error: ConnectionFailed | ConnectionLost) -> None:
        """None of its candidates takes it: it tries those again that broke with it, or fails."""
        route = self._routes.get(task)
        if route is None or isinstance(error, ConnectionLost):
            task.fail(error)
        elif route.may_return():
            self._waiting.appendleft(task)
        else:
            task.fail(route.unreachable(error))

    def give_up(self, error: Callable[[Task], ResponseTimeout]) -> None:
        """The time is up for what has not ended."""
        late = [task for there in self._in_flight.values() for task in there.values()]
        late += self._waiting
        self._in_flight.clear()
        self._waiting.clear()
        self._count = 0
        for task in late:
            task.fail(error(task))


def argument(name: str, text: str) -> bytes:
    """A text as an argument of a packet."""
    given: object = text
    if not isinstance(given, str):
        raise TypeError(f"{name} must be a str, not {given!r:.200}")
    if "\0" in text:
        raise ValueError(f"{name} {text!r} has a NUL, which ends an argument on the wire")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {text!r} cannot be UTF-8: {error.reason}") from None


def refuse_no_bytes(what: str, data: bytes) -> None:
    """Raise for what is no bytes."""
    given: object = data
    if not isinstance(given, bytes):
        raise TypeError(f"{what} must be bytes, not {type(given).__name__}; encode it first")


def deadline_in(timeout: float | None) -> float | None:
    """
    The monotonic time at which a time-out is over; None for never.

    Raises:
        TypeError, ValueError: It is no number of seconds.
    """
    given: object = timeout
    if timeout is None:
        return None
    if not isinstance(given, int | float):
        raise TypeError(f"a time-out is a number of seconds, or None to wait for ever, not {given!r:.200}")
    if math.isnan(timeout):
        raise ValueError("a time-out is a number of seconds, or None to wait for ever, not nan")
    # Sockets take no more.
    return None if timeout > LONGEST_WAIT else monotonic() + timeout


def refuse_unknown(options: Iterable[str], known: Collection[str], of: str) -> None:
    """Raise for options that a call does not have: nothing else looks at their names."""
    for name in options:
        if name not in known:
            raise TypeError(f"{of} has no option {name!r}; it has {', '.join(sorted(known))}")
