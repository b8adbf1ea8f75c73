"""
Which answer belongs to which request.

No I/O: requests go out as bytes from here, packets come back in. A server
answers in the order it was asked (PROTOCOL: "Client Responses"), and tells of
a job by its handle from then on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from ..exceptions import ProtocolError, ResultTooLarge
from ..protocol.packets import LISTEN, PacketType, encode_request
from ..protocol.reader import Packet

DataHandler = Callable[[bytes], None]
StatusHandler = Callable[[bytes, bytes], None]
Priority = Literal["high", "normal", "low"]

_SUBMISSIONS: Final = {
    ("high", False): PacketType.SUBMIT_JOB_HIGH,
    ("normal", False): PacketType.SUBMIT_JOB,
    ("low", False): PacketType.SUBMIT_JOB_LOW,
    ("high", True): PacketType.SUBMIT_JOB_HIGH_BG,
    ("normal", True): PacketType.SUBMIT_JOB_BG,
    ("low", True): PacketType.SUBMIT_JOB_LOW_BG,
}
FINAL: Final = (PacketType.WORK_COMPLETE, PacketType.WORK_FAIL, PacketType.WORK_EXCEPTION)

_LONGEST_NUMBER: Final = 20
"""Digits of 64 bits."""


@dataclass(eq=False, slots=True)
class Question:
    """Something asked of the server, and its one answer once it is there."""

    answers: tuple[PacketType, ...]
    """What may answer it, beside ERROR."""

    answer: Packet | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class JobRequest:
    """A job that was submitted, and what came back of it."""

    function: bytes
    workload: bytes = b""
    unique: bytes = b""
    priority: Priority = "normal"
    background: bool = False
    epoch: int | None = None
    """Seconds since 1970 before which it must not run; such jobs are background ones of normal priority."""

    reducer: bytes | None = None
    """Function that puts together what this one makes; such jobs are of normal priority."""

    listens: bytes = b""
    """Handle of a job of our server's to hear the end of, in place of submitting one; empty for none."""

    on_data: DataHandler | None = None
    on_warning: DataHandler | None = None
    on_status: StatusHandler | None = None

    on_change: Callable[[], None] | None = None
    """Called when it was acknowledged or has ended."""

    handle: bytes | None = None
    """None until the server has acknowledged the job."""

    error: tuple[bytes, bytes] | None = None
    """Code and text of the ERROR that refused the job."""

    outcome: PacketType | None = None
    """WORK_COMPLETE, WORK_FAIL or WORK_EXCEPTION; None until the job ended."""

    data: bytes = b""
    """The result, or the exception's data."""

    too_large: ResultTooLarge | None = None
    """Why there is no ``data`` though the job ended; who waits for it is to raise it."""

    raised: Exception | None = None
    """What a call-back raised; who waits for the job is to raise it."""

    is_forgotten: bool = False
    """Whether what still comes of it is for nobody."""

    @property
    def key(self) -> bytes:
        """What equal jobs have in common; empty for nothing. PROTOCOL 5.1: "-" stands for the workload."""
        return self.workload if self.unique == b"-" else self.unique

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to come."""
        if self.error is not None or self.outcome is not None:
            return True
        return self.background and self.handle is not None

    def may_move(self, *, resubmit: bool) -> bool:
        """
        Whether another server may get it, now that its connection broke.

        Args:
            resubmit: Whether a foreground job may run twice.
        """
        if self.listens:
            return False
        return self.handle is None if self.background else resubmit

    def start_over(self) -> None:
        """Forget what a server said of it."""
        self.handle = self.error = self.outcome = None
        self.data = b""

    def leave(self) -> None:
        """Nobody wants to hear of it any more."""
        self.on_data = self.on_warning = self.on_status = self.on_change = None

    def call(self, handler: Callable[..., None] | None, *arguments: bytes) -> None:
        """Call a call-back, in the midst of others' packets: what it raises is kept for who waits."""
        if handler is not None:
            try:
                handler(*arguments)
            except Exception as error:
                self.raised = self.raised or error

    @property
    def kind(self) -> PacketType:
        """The type of its packet."""
        if self.listens:
            return PacketType.OPTION_REQ
        if self.epoch is not None:
            return PacketType.SUBMIT_JOB_EPOCH
        if self.reducer is not None:
            return (
                PacketType.SUBMIT_REDUCE_JOB_BACKGROUND if self.background else PacketType.SUBMIT_REDUCE_JOB
            )
        return _SUBMISSIONS[self.priority, self.background]

    @property
    def packet(self) -> bytes:
        if self.listens:
            return encode_request(self.kind, LISTEN + self.listens)
        if self.epoch is not None:
            options = [b"%d" % self.epoch]
        elif self.reducer is not None:
            # The aggregator is read by gearmand and dropped; its document leaves it out.
            options = [self.reducer, b""]
        else:
            options = []
        return encode_request(self.kind, self.function, self.unique, *options, self.workload)


class ClientProtocol:
    """The client's end of one connection."""

    def __init__(self) -> None:
        self._unanswered: deque[Question | JobRequest] = deque()
        self._jobs: dict[bytes, deque[JobRequest]] = {}
        """{handle: the foreground requests that it stands for}; equal uniques share a handle."""

    @property
    def awaits_answer(self) -> bool:
        """Whether the server owes an answer; what becomes of jobs is another matter."""
        return bool(self._unanswered)

    @property
    def has_jobs(self) -> bool:
        """Whether foreground jobs have not ended."""
        return bool(self._jobs)

    def submit(self, request: JobRequest) -> bytes:
        """Bytes to send; the request fills as packets come back."""
        self._unanswered.append(request)
        return request.packet

    def ask(self, kind: PacketType, *arguments: bytes, answers: PacketType) -> tuple[Question, bytes]:
        """A question to wait for, or to leave alone, and the bytes to send."""
        question = Question((answers,))
        self._unanswered.append(question)
        return question, encode_request(kind, *arguments)

    def forget(self, request: JobRequest) -> None:
        """Take what still comes of something that was listened to for nobody's; the connection stays good."""
        request.leave()
        request.is_forgotten = True
        requests = self._jobs.get(request.handle or b"")
        if requests is not None and request in requests:
            requests.remove(request)
            if not requests:
                del self._jobs[request.handle or b""]

    def receive(self, packet: Packet) -> JobRequest | Question | None:
        """
        A packet came: it is told to whom it is for.

        Returns:
            Whom it was told to; None when it was for nobody.
        Raises:
            ProtocolError: Nobody asked for it; close the connection.
        """
        kind, arguments = packet
        if kind in FINAL or kind in (PacketType.WORK_DATA, PacketType.WORK_WARNING, PacketType.WORK_STATUS):
            return self._work(PacketType(kind), arguments)
        if kind == PacketType.NOOP:
            return None
        if self._unanswered:
            return self._answer(kind, arguments)
        raise ProtocolError(b"UNEXPECTED_PACKET", b"The server answered what was not asked")

    def end_without(self, kind: int, handle: bytes, error: ResultTooLarge) -> JobRequest | None:
        """
        A job has ended, and what came of it could not be taken: who waits for it is to raise why.

        Returns:
            Whom it was told to; None when it was for nobody.
        """
        requests = self._jobs.get(handle)
        if requests is None:
            return None
        request = requests.popleft()
        if not requests:
            del self._jobs[handle]
        request.outcome = PacketType(kind)
        request.too_large = error
        return request

    def _answer(self, kind: int, arguments: list[bytes]) -> JobRequest | Question:
        waiting = self._unanswered.popleft()
        if isinstance(waiting, Question):
            if kind != PacketType.ERROR and kind not in waiting.answers:
                raise ProtocolError(
                    b"UNEXPECTED_PACKET", b"The server gave another answer than was asked for"
                )
            if kind in (PacketType.STATUS_RES, PacketType.STATUS_RES_UNIQUE) and not all(
                # After the name, known and running.
                number.isdigit() and len(number) <= _LONGEST_NUMBER
                for number in arguments[3:]
            ):
                raise ProtocolError(b"UNEXPECTED_PACKET", b"The server told a progress that is no numbers")
            waiting.answer = kind, arguments
        elif kind == (PacketType.OPTION_RES if waiting.listens else PacketType.JOB_CREATED):
            waiting.handle = waiting.listens or arguments[0]
            if not waiting.background and not waiting.is_forgotten:
                self._jobs.setdefault(waiting.handle, deque()).append(waiting)
            waiting.call(waiting.on_change)
        elif kind == PacketType.ERROR:
            waiting.error = arguments[0], arguments[1]
        else:
            raise ProtocolError(b"UNEXPECTED_PACKET", b"The server gave another answer than JOB_CREATED")
        return waiting

    def _work(self, kind: PacketType, arguments: list[bytes]) -> JobRequest | None:
        # gearmand sends the WORK_FAIL that stands for an exception with a NUL.
        handle = arguments[0].rstrip(b"\0")
        requests = self._jobs.get(handle)
        if requests is None:
            return None  # of a job that ended: a worker may have told more than once
        # The server sends every packet once per submission: each request gets its own.
        request = requests[0]
        if kind in FINAL:
            request.outcome = kind
            request.data = arguments[1] if len(arguments) > 1 else b""
            requests.popleft()
            if not requests:
                del self._jobs[handle]
            request.call(request.on_change)
            return request
        requests.rotate(-1)
        if kind == PacketType.WORK_DATA:
            request.call(request.on_data, arguments[1])
        elif kind == PacketType.WORK_WARNING:
            request.call(request.on_warning, arguments[1])
        else:
            request.call(request.on_status, arguments[1], arguments[2])
        return request
