"""
A worker's ends of its connections: one job server each, for one kind of function.

What is said to a server, and what it has not confirmed, is kept here; what it
says is the worker's affair, in ``loop``.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ..client.connection import Connection
from ..exceptions import ConnectionLost
from ..protocol.packets import RESUME, PacketType, encode_request
from .board import Place
from .pool import Tasks, Threads

if TYPE_CHECKING:
    from .assigned_job import AssignedJob
    from .loop import Worker

logger = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds between two attempts to reach a server; they double from the first to the longest."""

GATHER: Final = 0.005
"""Seconds for which what jobs say waits for more, once something has just been sent."""

SEND_LIMIT: Final = 30.0
"""Seconds in which a server takes something of what it is sent, or is given up."""

_GRAB: Final = encode_request(PacketType.GRAB_JOB_UNIQ)
_ECHO: Final = encode_request(PacketType.ECHO_REQ, b"")


class Link:
    """One job server for one lane: the connection while there is one, and when to try again while not."""

    def __init__(self, worker: Worker, lane: Lane, host: str, port: int) -> None:
        self.worker = worker
        self.lane = lane
        self.host = host
        self.port = port
        self.connection: Connection | None = None
        self.connecting: threading.Thread | None = None
        self.asked_at: float | None = None
        """When it was asked for a job and has not answered yet."""
        self.asleep_since: float | None = None
        """When it last had no job for us; None when it is worth asking."""
        self.waits = False
        """Whether it sends a job, once it has one, to who it said had none."""
        self.heard_at = 0.0
        self.echo_at: float | None = None
        """When it was sent ECHO_REQ and has not answered yet."""
        self.retry_at = 0.0
        self.is_copy = False
        """Whether this is what a process has of it that a job forked."""
        self.tells_attempts = False
        """Whether the server is ours, and speaks of attempts."""
        self.takes_logs = False
        """Whether it keeps what jobs log."""
        self.was_ours = False
        """Whether it ever was; a server that is out of reach cannot tell."""
        self.attempt = (1, 0)
        """What it said of the job that it hands out next."""
        self.unconfirmed: list[AssignedJob] = []
        """Jobs whose reports were sent, and may not have arrived."""
        self.unsent = 0
        """Bytes that wait to be sent. With what follows, for who has ``Worker.sending`` alone."""
        self.is_stuck = False
        """Whether the kernel takes no more for now."""
        self.flushed_at = 0.0
        """When something was last sent, or tried to be."""
        self._taken_at = 0.0
        """When the kernel last took something, or there was nothing to take."""
        self._said: list[bytes] = []
        self._rest = memoryview(b"")
        """What is left of a part of it that was begun to be sent."""
        self._marks: deque[int] = deque()
        """For each question that has not been answered: how many reports were sent before it."""
        self._confirmed = 0
        self._pause = FIRST_PAUSE
        self._told = ""
        """What was last said of a server that cannot be reached, since it last was."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_worth_asking(self) -> bool:
        return self.connection is not None and self.asked_at is None and self.asleep_since is None

    def connected(self, connection: Connection, introduction: bytes) -> None:
        """Introduce ourselves; with jobs in hand, or done since, that it may take back."""
        self.connection = connection
        self.asked_at = self.asleep_since = self.echo_at = None
        self.heard_at = monotonic()
        self._marks.clear()
        self._confirmed = 0
        self.tells_attempts = self.takes_logs = self.waits = False
        packets = [introduction]
        if self.was_ours:
            for job in (*self.unconfirmed, *self.lane.in_hand(self)):
                resume = RESUME + b"%d %s" % (job.attempt, job.handle)
                packets += [encode_request(PacketType.OPTION_REQ, resume), job.report]
                if job.report:
                    logger.info("Telling %s of job %s once more", self, job.handle.decode(errors="replace"))
        elif self.unconfirmed:
            for job in self.unconfirmed:
                logger.warning(
                    "Job %s is done but %s may not know; it will run again",
                    job.handle.decode(errors="replace"),
                    self,
                )
            self.unconfirmed = []
        self.send(b"".join(packets))

    def answered(self) -> None:
        """It works; one that takes connections and drops them does not, and is tried ever more rarely."""
        self._pause = FIRST_PAUSE

    def lost(self, error: Exception) -> None:
        """Try again later; the pauses grow, and differ so that workers do not return all at once."""
        self.asked_at = self.asleep_since = self.echo_at = None
        if self.connection is not None:
            with self.worker.sending:
                self.connection.close()
                self.connection = None
                self._forget_unsent()
            logger.warning("%s; connecting again", error)
            self._told = ""
        elif str(error) != self._told:
            self._told = str(error)
            logger.warning("%s Trying until one does.", error)
        self.retry_at = monotonic() + self._pause * random.uniform(0.5, 1.0)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)

    def leave(self) -> None:
        """In a forked process: close this copy of the connection; the parent's stays open."""
        self.is_copy = True
        if self.connection is not None:
            self.connection.close()
            self.connection = None
            self._forget_unsent()

    def send(self, data: bytes) -> None:
        """Send packets, behind what waits; as far as is possible without waiting."""
        with self.worker.sending:
            self.put(data)
            self.flush()

    def put(self, data: bytes) -> bool:
        """Let packets wait to be sent; whether they are the first."""
        if self.connection is None:
            return False
        is_first = not self.unsent
        self._said.append(data)
        self.unsent += len(data)
        return is_first

    def flush(self) -> None:
        """Send what waits, as far as is possible without waiting; a connection that breaks is noted."""
        connection = self.connection
        if connection is None:
            return
        now = self.flushed_at = monotonic()
        if not self.is_stuck:
            self._taken_at = now
        try:
            while self._said or self._rest:
                if not self._rest:
                    said, self._said = self._said, []
                    self._rest = memoryview(said[0] if len(said) == 1 else b"".join(said))
                taken = connection.send_some(self._rest)
                self._rest = self._rest[taken:]
                if taken:
                    self._taken_at = now
                if self._rest:
                    break
            self.is_stuck = bool(self._rest)
            self.unsent = len(self._rest) + sum(map(len, self._said))
            if self.is_stuck and now - self._taken_at >= SEND_LIMIT:
                raise ConnectionLost(str(self), "it does not take what it is sent")
        except ConnectionLost as error:
            self.lost(error)

    def _forget_unsent(self) -> None:
        self._said = []
        self._rest = memoryview(b"")
        self.unsent = 0
        self.is_stuck = False

    @property
    def flush_at(self) -> float:
        """The monotonic time at which to ``flush``, if the kernel does not call for it before."""
        if not self.unsent:
            return math.inf
        return self._taken_at + SEND_LIMIT if self.is_stuck else self.flushed_at + GATHER

    def ask(self, before: bytes = b"") -> None:
        """Ask for a job, in one breath with what is said before."""
        self.asked_at = monotonic()
        self._marks.append(self._confirmed + len(self.unconfirmed))
        self.send(before + _GRAB)

    def echo(self) -> None:
        """Ask whether it is there."""
        self.echo_at = monotonic()
        self._marks.append(self._confirmed + len(self.unconfirmed))
        self.send(_ECHO)

    def confirm(self) -> None:
        """It has answered a question: reports that were sent before have arrived."""
        if self._marks:
            arrived = self._marks.popleft() - self._confirmed
            self._confirmed += arrived
            del self.unconfirmed[:arrived]

    def report(self, kind: PacketType, *arguments: bytes) -> None:
        """Tell the server something of a job in hand; from whatever thread."""
        self.worker.say(self, encode_request(kind, *arguments))

    def listen(self) -> None:
        """Hear what the server says while a function runs, in the worker's own thread."""
        self.worker.listen(self)


class Lane:
    """Functions of one kind, and the places for their jobs."""

    def __init__(
        self, worker: Worker, functions: Mapping[str, Any], places: list[Place | None], pool: Any
    ) -> None:
        self.worker = worker
        self.functions = {name.encode(): function for name, function in functions.items()}
        self.pool: Threads | Tasks | None = pool
        """None: in the worker's own thread."""
        self.free = places
        self.links: list[Link] = []
        self.jobs: dict[AssignedJob, Link] = {}
        """Those in hand, or that ended and were not reported yet."""

    def in_hand(self, link: Link) -> list[AssignedJob]:
        return [job for job, its_link in self.jobs.items() if its_link is link and not job.report]

    def next_link(self) -> Link | None:
        """The next server to ask: each in turn, those not that said they would wake us."""
        for index, link in enumerate(self.links):
            if link.is_worth_asking:
                self.links.append(self.links.pop(index))
                return link
        return None

    @property
    def asked(self) -> int:
        """How many places are kept for answers."""
        return len([link for link in self.links if link.asked_at is not None])
