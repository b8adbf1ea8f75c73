"""
Every error of django_gearman, as one tree.

    GearmanError
    ├── ProtocolError              a peer sent what the protocol does not allow
    │   └── UnreadableStream       ... and nothing after it can be read
    ├── ConnectionFailed           no server could be reached; nothing was sent
    ├── ConnectionLost             the connection broke; what was sent may have been done
    ├── ServerError                the server answered ERROR
    │   └── CommandNotSupported    ... because it has no such text command
    ├── ResponseTimeout            no answer within the time allowed
    │   ├── NoWorker               ... because no worker offers the function
    │   └── GroupTimedOut          ... of members of a group
    ├── JobFailed                  the worker reported that the job failed
    ├── GroupFailed                a member of a group failed
    ├── GroupNotFinished           a group's value was asked for too early
    ├── GroupDoesNotExist          no group with that id, or no results of it any more
    ├── InvalidGroup               a group or chain that cannot be
    ├── NotJSON                    an argument or a return value that JSON cannot carry
    ├── TooLarge                   a workload larger than a packet may be
    │   └── ResultTooLarge         ... or what came back; a ConnectionLost too
    ├── WaitInTransaction          get() would wait for what its own transaction hides
    ├── JobNotFinished             a return value was asked for too early
    ├── JobResultDoesNotExist      no record with that id
    ├── JobResultMismatch          the record is of another function
    ├── ResultNotKept              the job went to a server that keeps no results
    ├── Retry                      raised by a job that wants another attempt
    ├── Discard                    raised by a job that wants none
    ├── InvalidJob                 a @job that cannot be what it was declared to be
    ├── InvalidCall                a call that cannot be made with the options of using()
    ├── WorkerCannotStart          a worker's process ended before it could take a job
    ├── InvalidSchedule            a schedule that names no times
    │   └── MissingCronsim         ... or that this installation cannot read
    └── StoreError                 the durable store cannot do its work
        └── LeaseLost              another server took this server's place

    JobTimedOut                    raised inside a job that takes too long; a BaseException
    JobCancelled                   raised inside a job that was cancelled; so too

Imports nothing of ours. Each error carries its data as attributes and says in its
sentence what can be done.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar


class GearmanError(Exception):
    """Everything below; never raised itself. Can be pickled, with its notes."""

    def __reduce__(self) -> Any:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[GearmanError], args: tuple[object, ...], attributes: dict[str, object]) -> GearmanError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ProtocolError(GearmanError):
    """
    A peer sent a packet that the protocol does not allow.

    The stream stays readable: answer with ERROR ``code`` and ``text``, and go on.
    """

    def __init__(self, code: bytes, text: bytes) -> None:
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code.decode()}: {self.text.decode()}"


class UnreadableStream(ProtocolError):
    """The peer speaks something else than Gearman, or too much of it: close the connection."""


class ConnectionFailed(GearmanError):
    """No server could be reached; no job was sent. ``hint`` is the question to ask next."""

    HINTS: ClassVar[dict[str, str]] = {}
    """Other questions, for some addresses."""

    def __init__(self, server: str, reason: str, hint: str = "") -> None:
        self.server = server
        self.reason = reason
        self.hint = hint or self.HINTS.get(server, "is `manage.py gearman_server` running?")

    def __str__(self) -> str:
        return f"no job server answers at {self.server} ({self.reason}); {self.hint}"


class ConnectionLost(GearmanError):
    """The connection broke before the answer; the server may have done what was asked."""

    def __init__(self, server: str, reason: str) -> None:
        self.server = server
        self.reason = reason

    def __str__(self) -> str:
        return f"the connection to the job server at {self.server} broke ({self.reason})"


class ServerError(GearmanError):
    """The server answered ERROR."""

    def __init__(self, server: str, code: str, text: str) -> None:
        self.server = server
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"the job server at {self.server} answered {self.code}: {self.text}"


class CommandNotSupported(ServerError):
    """The server has no such command of the administrative protocol, or does not allow it."""

    def __init__(self, server: str, code: str, text: str, *, command: str, version: str) -> None:
        super().__init__(server, code, text)
        self.command = command
        self.version = version

    def __str__(self) -> str:
        return (
            f"the job server at {self.server}, of version {self.version or 'unknown'}, does not know the "
            f"command {self.command!r}, or was not started to allow it"
        )


class ResponseTimeout(GearmanError, TimeoutError):
    """No answer came within the time allowed; ``reason`` says why, where that is known."""

    def __init__(self, what: str, timeout: float, reason: str = "") -> None:
        self.what = what
        self.timeout = timeout
        self.reason = reason

    def __str__(self) -> str:
        reason = f"; {self.reason}" if self.reason else ""
        return f"{self.what} took longer than {round(self.timeout, 3):g} s{reason}"


class NoWorker(ResponseTimeout):
    """
    The time was up and no worker offers the function: nobody would have come.

    Attributes:
        function: Its name.
        waiting: How many jobs of it wait, the caller's own among them.
        server: ``host:port`` of who said so; several with commas.
    """

    def __init__(
        self, what: str, timeout: float, *, function: str, waiting: int, server: str, reason: str = ""
    ) -> None:
        super().__init__(what, timeout, reason)
        self.function = function
        self.waiting = waiting
        self.server = server

    def __str__(self) -> str:
        wait = "1 job waits" if self.waiting == 1 else f"{self.waiting} jobs wait"
        return (
            f"{super().__str__()}: {wait} for {self.function} and no worker offers it at {self.server}; "
            "start one that does (`manage.py gearman_worker`), or is the name misspelt?"
        )


class NotJSON(GearmanError, TypeError):
    """
    A value cannot travel as JSON.

    Attributes:
        what: Which value, such as ``argument 'photo' of photos.jobs.make_thumbnail``.
        problem: What is wrong with it.
        remedy: What to pass instead.
    """

    def __init__(self, what: str, problem: str, remedy: str) -> None:
        self.what = what
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} {self.problem}; {self.remedy}"


class TooLarge(GearmanError, ValueError):
    """
    A workload or a result is larger than a packet may be.

    Attributes:
        what: Which, such as ``the workload of resize``.
        size: Its bytes; None when the sender alone knows.
        limit: Bytes that a packet may have, with the names of the function and the unique.
        setting: What sets the limit.
        remedy: What to do instead.
    """

    def __init__(
        self,
        what: str,
        size: int | None,
        limit: int,
        *,
        setting: str = "max_packet",
        remedy: str = "pass a reference, such as a key or a path",
    ) -> None:
        self.what = what
        self.size = size
        self.limit = limit
        self.setting = setting
        self.remedy = remedy

    def __str__(self) -> str:
        if self.size is not None and self.size <= self.limit:
            beside = f"{self.size} bytes, which with the names in its packet are"
            return f"{self.what} has {beside} more than {self.setting}={self.limit}; {self.remedy}"
        size = "more bytes" if self.size is None else f"{self.size} bytes, more"
        return f"{self.what} has {size} than {self.setting}={self.limit}; {self.remedy}"


class ResultTooLarge(TooLarge, ConnectionLost):
    """The server sent more than a packet may have; the connection was closed, or the packet passed over."""

    end: tuple[int, bytes] | None = None
    """Type and handle of what is passed over; None where the connection cannot go on."""

    def __init__(self, server: str, limit: int) -> None:
        self.server = server
        self.reason = "it sent too large a packet"
        remedy = "raise the limit, or have the job store its result and return a reference"
        TooLarge.__init__(self, f"what came from the job server at {server}", None, limit, remedy=remedy)


class JobFailed(GearmanError):
    """
    The job failed; ``exception``, ``message`` and ``traceback`` say how, where the worker told.

    The worker's traceback is shown below our own.
    """

    def __init__(
        self, job: str, *, exception: str = "", message: str = "", traceback: str = "", data: bytes = b""
    ) -> None:
        self.job = job
        self.exception = exception
        self.message = message
        self.traceback = traceback
        self.data = data
        if traceback:
            self.add_note(f"At the worker:\n{traceback.rstrip()}")

    def __str__(self) -> str:
        if not self.exception:
            return f"job {self.job} failed" + (f": {self.message}" if self.message else "")
        kind = self.exception.removeprefix("builtins.")
        return f"job {self.job} failed with {kind}" + (f": {self.message}" if self.message else "")


class GroupFailed(GearmanError):
    """
    A member of a group failed.

    Attributes:
        index: The first that did, from 0.
        job: Its function.
        error: Why.
        outcomes: What became of each member, in order: its value, or its error.
        step: Of a chain, such as ``step 2 of 3 of the chain``; empty for a group.
    """

    def __init__(
        self, index: int, job: str, error: GearmanError, outcomes: Sequence[object], step: str = ""
    ) -> None:
        self.index = index
        self.job = job
        self.error = error
        self.outcomes = outcomes
        self.step = step

    def __str__(self) -> str:
        if self.step:
            # What came after it was not begun, and is no failure of its own.
            return f"{self.step}: {self.error}"
        failed = sum(isinstance(outcome, GearmanError) for outcome in self.outcomes)
        others = f"; {failed} of {len(self.outcomes)} members failed" if failed > 1 else ""
        return f"member {self.index} of the group: {self.error}{others}"


class GroupTimedOut(ResponseTimeout):
    """
    The time was up before all members of a group had ended, and none of the others failed.

    Attributes:
        index: The first that had not ended, from 0.
        job: Its function.
        error: Why; a ``NoWorker`` where no worker offers it.
        outcomes: What became of each member, in order: its value, or its error.
    """

    def __init__(self, index: int, job: str, error: ResponseTimeout, outcomes: Sequence[object]) -> None:
        super().__init__("the group", error.timeout)
        self.index = index
        self.job = job
        self.error = error
        self.outcomes = outcomes

    def __str__(self) -> str:
        late = sum(isinstance(outcome, GearmanError) for outcome in self.outcomes)
        members = (
            "1 member has" if len(self.outcomes) == 1 else f"{late} of {len(self.outcomes)} members have"
        )
        return f"{members} not ended in time; member {self.index} of the group: {self.error}"


class GroupNotFinished(GearmanError, ValueError):
    """The value of a group that is not over was asked for."""

    def __init__(self, id: str, finished: int, total: int) -> None:
        self.id = id
        self.finished = finished
        self.total = total

    def __str__(self) -> str:
        return (
            f"group {self.id} is not over yet ({self.finished} of {self.total} members have ended); "
            "wait for it with get(timeout=...)"
        )


class GroupDoesNotExist(GearmanError, LookupError):
    """There is no group with that id, or its members are gone."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __str__(self) -> str:
        return (
            f"there is no group with the id {self.id!r}, or results of its members are gone: they were "
            "pruned, or the transaction was rolled back"
        )


class InvalidGroup(GearmanError, ValueError):
    """A group, a chain, or what is to follow it, cannot be what it was put together to be."""


class JobNotFinished(GearmanError, ValueError):
    """The return value of a job that has not ended yet was asked for."""

    def __init__(self, job: str, status: str) -> None:
        self.job = job
        self.status = status

    def __str__(self) -> str:
        return f"job {self.job} has not finished yet (it is {self.status}); wait for it with get(timeout=...)"


class WaitInTransaction(GearmanError, RuntimeError):
    """Waiting inside a transaction for a job that nobody else can see before it commits."""

    def __init__(self, job: str) -> None:
        self.job = job

    def __str__(self) -> str:
        what = self.job if self.job.startswith("group ") else f"job {self.job}"
        return (
            f"get() would wait for {what} inside an open transaction, which hides it from the job server "
            "and its end from here; wait after the transaction"
        )


class JobResultDoesNotExist(GearmanError, LookupError):
    """There is no record with that id."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __str__(self) -> str:
        return f"there is no job with the id {self.id!r}: it was pruned, or its transaction was rolled back"


class JobResultMismatch(GearmanError, LookupError):
    """The record with that id is of another function."""

    def __init__(self, id: str, function: str, expected: str) -> None:
        self.id = id
        self.function = function
        self.expected = expected

    def __str__(self) -> str:
        return f"job {self.id} is of {self.function}, not of {self.expected}"


class ResultNotKept(GearmanError, LookupError):
    """A job server that keeps no results was asked for one; ``version`` says what it is."""

    def __init__(self, id: str, server: str, version: str) -> None:
        self.id = id
        self.server = server
        self.version = version

    def __str__(self) -> str:
        return (
            f"nothing is known of job {self.id}: with ENQUEUE = 'wire' it went to the job server at "
            f"{self.server}, of version {self.version or 'unknown'}, which forgets a job at its end; wait "
            "for a value with run(), or use our own server and ENQUEUE = 'database'"
        )


class Retry(GearmanError):
    """
    Raise it in a job to be run again later, as long as it has attempts left.

    Args:
        message: Why; kept with the attempt.
        after: Seconds until the next attempt, or a timedelta; None for the job's ``backoff``.
    Raises:
        ValueError: ``after`` is no such number, or infinite.
    """

    def __init__(self, message: str = "", *, after: float | timedelta | None = None) -> None:
        super().__init__(message)
        self.after = None if after is None else _seconds(after)

    def __str__(self) -> str:
        return str(self.args[0]) or "the job asked for another attempt"


def _seconds(after: float | timedelta) -> float:
    try:
        seconds = after.total_seconds() if isinstance(after, timedelta) else float(after)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"after of Retry must be a number of seconds or a timedelta, not {after!r:.200}")
    return seconds


class Discard(GearmanError):
    """Raise it in a job to fail at once, whatever attempts are left. ``reason`` is kept."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or "the job was discarded"


class JobTimedOut(BaseException):
    """
    The job took longer than its ``timeout``; raised inside its function.

    No ``Exception``, so that a function that passes over all of those ends too.
    """

    def __init__(self, timeout: float = 0) -> None:
        super().__init__(timeout)
        self.timeout = timeout

    def __str__(self) -> str:
        return f"the job took longer than {self.timeout:g} s"


class JobCancelled(BaseException):
    """
    The job was cancelled while it ran; raised inside its function.

    No ``Exception``, as ``JobTimedOut``. What the function returns or raises then is passed over.
    """

    def __str__(self) -> str:
        return "the job was cancelled"


class WorkerCannotStart(GearmanError):
    """A process of a worker ended before it could take a job: another one would too. ``reason`` is why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __str__(self) -> str:
        return f"a worker process cannot start: {self.reason}"


class InvalidJob(GearmanError, TypeError):
    """A function cannot be the job that its ``@job`` declares, or two jobs share a name."""


class InvalidCall(GearmanError, ValueError):
    """
    A call that cannot be made with what ``using`` or the decorator gave the job, or with what is missing.

    Attributes:
        job: The function.
        option: The option's name, such as ``run_after``, or what is missing.
        problem: Why not.
        remedy: What to do instead.
    """

    def __init__(self, job: str, option: str, problem: str, remedy: str) -> None:
        self.job = job
        self.option = option
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.job} has {self.option}, but {self.problem}; {self.remedy}"


class InvalidSchedule(GearmanError, ValueError):
    """A schedule names no times."""


class MissingCronsim(InvalidSchedule):
    """Nothing is wrong with the schedule: the library that reads cron expressions is not installed."""

    def __str__(self) -> str:
        return (
            "cron schedules need the cronsim library: pip install cronsim "
            "(our extra [schedules]; intervals need nothing)"
        )


class StoreError(GearmanError):
    """The durable store cannot do its work."""


class LeaseLost(StoreError):
    """Another server has taken the lease: whatever this one writes would be wrong."""

    def __init__(self, server: str) -> None:
        self.server = server

    def __str__(self) -> str:
        return (
            f"the job server {self.server!r} was replaced: another one runs under its name on this database "
            "(give each its own --name), or nothing was heard of it for too long and its jobs were taken "
            "over (start it again)"
        )
