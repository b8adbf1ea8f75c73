"""
The operator's client: the administrative protocol's lines as data.

Speaks text and no packets, to our server as to gearmand. What a listing holds
came from anybody who can reach the server: names are shown with what is no
UTF-8 escaped, and a row that is none is logged and left out.
PROTOCOL: "Administrative Protocol".
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final, NoReturn, TypeVar

from ..addresses import DEFAULT_PORT, split_address
from ..exceptions import CommandNotSupported, ConnectionLost, GearmanError, ResponseTimeout, ServerError
from .connection import Connection

logger = logging.getLogger(__name__)

Row = TypeVar("Row")

MAX_REPLY: Final = 256 * 1024 * 1024
"""Bytes of the longest listing taken: some millions of jobs."""


@dataclass(frozen=True)
class FunctionStatus:
    """One function, as ``status`` lists it."""

    name: str
    total: int
    """Jobs that wait or run."""
    running: int
    workers: int
    """Connections that offer it."""


@dataclass(frozen=True)
class PriorityStatus:
    """One function, as ``prioritystatus`` lists it: how many jobs of each priority wait."""

    name: str
    high: int
    normal: int
    low: int
    workers: int
    """Connections that offer the function."""


@dataclass(frozen=True)
class WorkerStatus:
    """One connection, a client's too, as ``workers`` lists it."""

    fd: int
    """The server's descriptor of it."""
    address: str
    client_id: str
    functions: tuple[str, ...]
    """What it offers, the last registered first; empty for a client. One with a space counts as two."""


@dataclass(frozen=True)
class HeldJob:
    """One job that the server holds, as ``show jobs`` lists it."""

    handle: str
    retries: int
    """How many workers it has lost."""
    ignored: bool
    """Whether nobody waits for it any more."""
    stored: bool
    """Whether it is a background job."""


@dataclass(frozen=True)
class RunningJob:
    """One job that a worker has, as our server's ``running`` lists it."""

    handle: str
    function: str
    fd: int
    """The server's descriptor of the worker, as of ``WorkerStatus``."""
    attempt: int
    seconds: int
    """How long the worker has had it."""
    numerator: int
    denominator: int
    """How far it is; 0 of 0 until it tells."""


@dataclass(frozen=True)
class FunctionCounters:
    """What has become of a function's jobs since our server started, as its ``counters`` lists it."""

    name: str
    submitted: int
    started: int
    """Attempts handed to workers."""
    retried: int
    """Attempts that came to nothing and were not the last."""
    successful: int
    failed: int
    dead: int
    cancelled: int


@dataclass(frozen=True)
class LimitStanding:
    """A limited function, as our server's ``limits`` lists it."""

    name: str
    rate: int
    """Jobs that may begin in any ``period``; 0 for any number."""
    period: int
    """Seconds."""
    concurrency: int
    """Jobs that may run at once; 0 for any number."""
    by_key: bool
    """Whether both hold for each key by itself."""
    held: int
    """Permits that the server has: their jobs run, or are about to."""
    waiting: int
    """Jobs that wait for one."""


class AdminClient:
    """
    Asks and tells one job server, over one connection that is opened when it is needed.

    For one thread at a time. Each method sends one command and raises, beside
    what is said there:
        ConnectionFailed: Nobody answers there.
        ConnectionLost, ResponseTimeout: The answer did not come; the command may have been obeyed.
        ServerError: The server refused; ``code`` and ``text`` say why.
        CommandNotSupported: It has no such command; ``version`` says what it is.

    Args:
        server: ``host:port``.
        connect_timeout: Seconds to wait for the connection.
        timeout: Seconds to wait for the whole answer to a command.
        tls: Speak TLS, and nothing else, with this context; None for plain text.
    """

    def __init__(
        self,
        server: str = f"127.0.0.1:{DEFAULT_PORT}",
        *,
        connect_timeout: float = 1.0,
        timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._host, self._port = split_address(server)
        self._server = server
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._tls = tls
        self._connection: Connection | None = None
        self._received = bytearray()

    # What is there.

    def status(self) -> list[FunctionStatus]:
        """Every function, with its jobs and workers."""
        return self._list("status", function_status)

    def priority_status(self) -> list[PriorityStatus]:
        """Every function, with the jobs of each priority that wait."""
        return self._list("prioritystatus", _priority_status)

    def workers(self) -> list[WorkerStatus]:
        """Every connection, this one too."""
        return self._list("workers", _worker_status)

    def jobs(self) -> list[HeldJob]:
        """
        Every job that waits or runs, as far as it is in the server's memory.

        Of what our server keeps in a database that is a window of each function:
        jobs for later, and what waits beyond 10,000 of a function and priority, are not in it.
        """
        return self._list("show jobs", _held_job)

    def running(self) -> list[RunningJob]:
        """
        Every job that a worker has, those handed out first first.

        Raises:
            CommandNotSupported: By any server but ours.
        """
        return self._list("running", _running_job)

    def counters(self) -> list[FunctionCounters]:
        """
        What has become of each function's jobs since the server started.

        Raises:
            CommandNotSupported: By any server but ours.
        """
        return self._list("counters", _function_counters)

    def limits(self) -> list[LimitStanding]:
        """
        Which functions are limited, and how it stands at the server.

        Raises:
            CommandNotSupported: By any server but ours.
        """
        return self._list("limits", _limit_standing)

    def uniques(self) -> list[str]:
        """The unique of every job that waits or runs, empty where it has none; as far as ``jobs`` tells."""
        return self._list("show unique jobs", _shown)

    def version(self) -> str:
        """The server's version."""
        return self._ask("version")

    def pid(self) -> int:
        """The server's process id."""
        answer = self._ask("getpid")
        if not answer.isascii() or not answer.isdigit():
            self._give_up(f"it speaks no Gearman: {answer[:80]!r} is no process id")
        return int(answer[:20])

    def verbosity(self) -> str:
        """From which level on the server logs, such as ``ERROR``."""
        return self._ask("verbose")

    # What is to be.

    def cancel(self, handle: str) -> None:
        """
        End a job that waits or runs; its clients are told that it failed.

        A worker that runs it is told by our server, if it is ours. gearmand keeps such a job until it ends.

        Raises:
            ServerError: There is no such job: ``code`` is ``UNKNOWN_JOB``.
        """
        self._ask("cancel job", handle)

    def create_function(self, name: str) -> None:
        """Have a function listed before a worker or a client names it."""
        self._ask("create function", name)

    def drop_function(self, name: str) -> None:
        """
        Have a function listed no more.

        Raises:
            ServerError: There is none, or it has workers or jobs.
        """
        self._ask("drop function", name)

    def set_queue_limit(
        self, function: str, limit: int = 0, *, high: int = 0, normal: int = 0, low: int = 0
    ) -> None:
        """
        Let a function hold so many jobs before the server refuses more of them.

        Args:
            limit: Jobs of all priorities together; 0 for no limit.
            high, normal, low: Instead, for a submission of each priority; still
                compared with all of the function's jobs.

        Servers take a limit for a function that they do not list, and forget it.
        """
        if limit and (high or normal or low):
            raise ValueError("set_queue_limit() takes one limit or those of the priorities, not both")
        limits = (high, normal, low) if high or normal or low else (limit,)
        if min(limits) < 0:
            raise ValueError("a queue limit is a number of jobs, or 0 for no limit")
        self._ask("maxqueue", function, *map(str, limits))

    def shutdown(self, *, graceful: bool = False) -> None:
        """
        End the server; it may be on its way when this returns.

        Args:
            graceful: Let it take no more connections and end when it has no job left.
        Raises:
            CommandNotSupported: As by gearmand 1.1, and by ours without ``--allow-shutdown``.
        """
        self._ask("shutdown graceful" if graceful else "shutdown")

    def close(self) -> None:
        """Close the connection. The client can be used again."""
        connection, self._connection = self._connection, None
        self._received.clear()
        if connection is not None:
            connection.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # How it is done.

    def _ask(self, command: str, *names: str) -> str:
        """Send a command; its answer of one line, without OK."""
        for name in names:
            if not name or any(character <= " " or character == "\x7f" for character in name):
                raise ValueError(f"{name!r} cannot be said in a line of words: it is empty, or has a space")
        deadline = self._send(" ".join([command, *names]))
        answer = self._line(deadline, command)
        self._refuse_error(answer, command)
        word, _, rest = answer.rstrip(b"\r").partition(b" ")
        # Perl's server leaves OK away before its version.
        return _shown(rest if word == b"OK" else answer.rstrip(b"\r"))

    def _list(self, command: str, parse: Callable[[bytes], Row]) -> list[Row]:
        deadline = self._send(command)
        rows: list[Row] = []
        line = self._line(deadline, command)
        self._refuse_error(line, command)
        size = 0
        while line != b".":
            size += len(line) + 1
            if size > MAX_REPLY:
                self._give_up(f"its answer to {command!r} is longer than {MAX_REPLY} bytes")
            try:
                rows.append(parse(line))
            except ValueError:
                logger.warning(
                    "%s: a row of %r cannot be read and is left out: %r", self._server, command, line[:200]
                )
            line = self._line(deadline, command)
        return rows

    def _send(self, line: str) -> float:
        """Send a command over a connection where nothing else is under way; when to have the answer."""
        connection = self._connection
        if connection is not None and (self._received or connection.is_readable()):
            # The server closed it, or said more than was asked: a name in a listing held the listing's end.
            self.close()
            connection = None
        if connection is None:
            connection = self._connection = Connection(
                self._host,
                self._port,
                connect_timeout=self._connect_timeout,
                send_timeout=self._timeout,
                tls=self._tls,
            )
        try:
            # gearmand cuts the last letter of a function's name where CR is missing.
            connection.send(line.encode() + b"\r\n")
        except ConnectionLost:
            self.close()
            raise
        return monotonic() + self._timeout

    def _line(self, deadline: float, command: str) -> bytes:
        """The next line, without its LF."""
        assert self._connection is not None, "a command was sent"
        received = self._received
        seen = 0
        while (end := received.find(b"\n", seen)) < 0:
            seen = len(received)
            left = deadline - monotonic()
            try:
                if left <= 0:
                    raise ResponseTimeout(f"the answer of {self._server} to {command!r}", self._timeout)
                received += self._connection.receive_bytes(left)
            except GearmanError:
                # What comes later would be taken for the answer to the next command.
                self.close()
                raise
            if len(received) > MAX_REPLY:
                self._give_up(f"its answer to {command!r} is longer than {MAX_REPLY} bytes")
        line = bytes(received[:end])
        del received[: end + 1]
        return line

    def _refuse_error(self, line: bytes, command: str) -> None:
        # A row of a listing ends without CR, even one of a function that is named so.
        if not line.startswith(b"ERR ") or not line.endswith(b"\r"):
            return
        words = line.removesuffix(b"\r").removeprefix(b"ERR ")
        code, _, text = words.partition(b" ")
        if not code.isupper() and code.lower() != b"unknown_command":
            # gearmand's plain sentences, such as "function not found".
            code, text = b"ERR", words
        shown = _shown(text.replace(b"+", b" "))
        if code.upper() == b"UNKNOWN_COMMAND":
            try:
                version = self.version() if command != "version" else ""
            except GearmanError:
                version = ""
            raise CommandNotSupported(self._server, _shown(code), shown, command=command, version=version)
        raise ServerError(self._server, _shown(code), shown)

    def _give_up(self, reason: str) -> NoReturn:
        self.close()
        raise ConnectionLost(self._server, reason)


def function_status(line: bytes) -> FunctionStatus:
    """A row of ``status``; ``ValueError`` when it is none."""
    # From the right: the name itself may have tabs.
    name, total, running, workers = line.rsplit(b"\t", 3)
    return FunctionStatus(_shown(name), _number(total), _number(running), _number(workers))


def _priority_status(line: bytes) -> PriorityStatus:
    name, high, normal, low, workers = line.rsplit(b"\t", 4)
    return PriorityStatus(_shown(name), _number(high), _number(normal), _number(low), _number(workers))


def _worker_status(line: bytes) -> WorkerStatus:
    fd, address, rest = line.split(b" ", 2)
    client_id, separator, functions = rest.partition(b" :")
    if not separator:
        raise ValueError("no colon before the functions")
    return WorkerStatus(
        _number(fd), _shown(address), _shown(client_id), tuple(_shown(name) for name in functions.split())
    )


def _held_job(line: bytes) -> HeldJob:
    handle, retries, ignored, stored = line.rsplit(b"\t", 3)
    return HeldJob(_shown(handle), _number(retries), _number(ignored) > 0, _number(stored) > 0)


def _running_job(line: bytes) -> RunningJob:
    handle, function, *numbers = line.split(b"\t")
    fd, attempt, seconds = map(_number, numbers[:3])
    # A worker may say that it is minus one of ten.
    numerator, denominator = map(int, numbers[3:])
    return RunningJob(_shown(handle), _shown(function), fd, attempt, seconds, numerator, denominator)


def _function_counters(line: bytes) -> FunctionCounters:
    name, *numbers = line.rsplit(b"\t", 7)
    submitted, started, retried, successful, failed, dead, cancelled = map(_number, numbers)
    return FunctionCounters(_shown(name), submitted, started, retried, successful, failed, dead, cancelled)


def _limit_standing(line: bytes) -> LimitStanding:
    name, *numbers = line.rsplit(b"\t", 6)
    rate, period, concurrency, by_key, held, waiting = map(_number, numbers)
    return LimitStanding(_shown(name), rate, period, concurrency, bool(by_key), held, waiting)


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError("no number")
    return int(digits)


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
