"""
Grab, run, report: one worker, with places for so many jobs at a time.

Speaks to every job server that it was given, on a connection of its own for
each kind of function: plain ones and coroutine functions have their own places,
and a server is asked for a job only while one is free. Nothing here waits for
one server alone. What a function does, and how its workload is encoded, is the
caller's affair; how it is run, and interrupted, is ``pool``'s.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import socket
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from time import monotonic, sleep
from typing import Any, Final

from ..client.connection import Connection
from ..exceptions import ConnectionFailed, ConnectionLost, ResponseTimeout, TooLarge
from ..protocol.packets import (
    ATTEMPTS,
    CANCEL,
    CREW,
    LOGS,
    RETRY,
    RETURN,
    WAITS,
    PacketType,
    encode_request,
)
from ..protocol.reader import MAX_BODY, Packet
from .assigned_job import AssignedJob, JobRefused, RetryPolicy, TaskFunction, WorkerFunction
from .board import Row
from .link import GATHER, Lane, Link
from .pool import Alarm, Tasks, Threads

__all__ = ["AssignedJob", "JobRefused", "RetryPolicy", "TaskFunction", "Worker", "WorkerFunction"]

logger = logging.getLogger(__name__)

ANSWER_LIMIT: Final = 10.0
"""Seconds in which a server answers GRAB_JOB, or is given up as hung."""

PATIENCE: Final = 1.0
"""Seconds in which it answers while another server could be asked instead."""

RECHECK: Final = 30.0
"""Seconds after which a sleeping worker asks for a job all the same, in case a NOOP was lost."""

DELIVERY_LIMIT: Final = 5.0
"""Seconds after the last job in which a worker that is to stop makes sure that its results arrived."""

KILL_AFTER: Final = 5.0
"""Seconds after its time limit in which a job may clean up; then its process is killed."""

_HEADROOM: Final = 1024
"""Bytes that a server may put beside the largest workload: its handle, the function and the unique."""

_LONGEST: Final = 1000
"""Characters of an exception in the log; all of it goes to the server."""

ENOUGH: Final = 64 * 1024
"""Bytes that wait for no more."""

MOST_UNSENT: Final = 1024 * 1024
"""Bytes that wait to be sent from which on the function that says more waits, too."""

_PUMP_LINGER: Final = 0.5
"""Seconds for which the thread stays that sends what a job has said, once there is nothing."""

_LONGEST_ATTEMPT: Final = 32
"""Bytes of ``attempt N M``."""

_PRE_SLEEP: Final = encode_request(PacketType.PRE_SLEEP)
_RETURN_ALL: Final = encode_request(PacketType.OPTION_REQ, RETURN)


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
        tasks: {name on the wire: coroutine function that runs it}.
        threads: How many jobs of ``functions`` at a time; one runs in the caller's thread.
        concurrency: How many of ``tasks``, on one event loop.
        limits: {name on the wire: seconds that a job may take}.
        alarm: Interrupts the caller's thread, which then is the main thread.
        crew: The token that this worker shares with whoever speaks for it.
        row: Where to show what is in hand.
        is_spent: Asked after each job until it says so, with their number: whether to take no further one.
        show: Told the function that begins, and nothing when none is left.
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
        tasks: Mapping[str, TaskFunction] | None = None,
        threads: int = 1,
        concurrency: int = 1,
        limits: Mapping[str, float] | None = None,
        alarm: Alarm | None = None,
        crew: bytes = b"",
        row: Row | None = None,
        is_spent: Callable[[int], bool] | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._client_id = client_id.encode()
        self._describe = describe
        self._retry = retry
        self._logs = logs
        self._connect_timeout = connect_timeout
        self._max_packet = max_packet
        self._tls = tls
        self._limits = {name.encode(): limit for name, limit in (limits or {}).items()}
        self._alarm = alarm
        self._crew = crew
        self._row = row
        self._is_spent = is_spent
        self._show = show
        self._lanes: list[Lane] = []
        places = [None if row is None else row.place(number) for number in range(threads + concurrency)]
        if functions:
            pool = Threads(threads) if threads > 1 or tasks else None
            self._lanes.append(Lane(self, functions, places[:threads], pool))
        if tasks:
            self._lanes.append(Lane(self, tasks, places[threads:], Tasks(concurrency)))
        for lane in self._lanes:
            lane.links = [Link(self, lane, host, port) for host, port in servers]
        self._links = [link for lane in self._lanes for link in lane.links]
        self._stopping = False
        self._stop_by = math.inf
        self._control: int | None = None
        self._thread = threading.get_ident()
        self.sending = threading.RLock()
        """Held by who sends, and by who receives while a job runs in the worker's own thread."""
        self._pump = _Pump(self)
        self._runs_here = False
        """Whether one does."""
        self._events: deque[Callable[[], None]] = deque()
        """What other threads want done in this one."""
        self._wake: tuple[socket.socket, socket.socket] | None = None
        """The ends of a pair: to be readable when there are events."""
        self.jobs_done = 0

    def stop(self) -> None:
        """Take no further job; from within a function, a signal handler, or with a readable ``control``."""
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """Have the worker look around; from any thread, or from a signal handler."""
        if self._wake is not None:
            try:
                self._wake[1].send(b"x")
            except OSError:
                pass  # it has enough of them to wake, or has ended

    def run(self, control: int | None = None) -> None:
        """
        Work until ``stop``, or until the descriptor ``control`` can be read; jobs in hand are finished.

        Returns with every connection closed.
        """
        self._control = control
        self._thread = threading.get_ident()
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        _workers.add(self)
        if self._row is not None:
            self._row.say_ready()
        try:
            self._is_stopping()
            while not self._is_done():
                self._connect()
                self._ask()
                self._turn()
        finally:
            self._close()

    def become_copy(self) -> None:
        """In a process that a job forked: the parent alone speaks; what is said goes nowhere."""
        self.sending = threading.RLock()
        for link in self._links:
            link.leave()
        wake, self._wake = self._wake, None
        for end in wake or ():
            end.close()

    def say(self, link: Link, data: bytes) -> None:
        """
        Send packets of a job, from any thread: at once, or gathered for a moment.

        Waits while too much waits to be sent.
        """
        alarm = self._alarm
        if alarm is None or threading.get_ident() != self._thread:
            self._say(link, data)
        else:
            alarm.hold()
            try:
                self._say(link, data)
            finally:
                alarm.release()
        if link.unsent > MOST_UNSENT:
            self._wait_for_room(link)

    def _say(self, link: Link, data: bytes) -> None:
        with self.sending:
            before = link.unsent
            is_first = link.put(data)
            if self._runs_here:
                # The worker's thread is in the job, and leaves the connection alone meanwhile.
                is_time = link.unsent >= ENOUGH or monotonic() - link.flushed_at >= GATHER
                if is_time and not link.is_stuck:
                    link.flush()
                if is_first and link.unsent:
                    self._pump.start()
                return
            is_enough = before < ENOUGH <= link.unsent
        if is_first or is_enough:
            self.wake()

    def _wait_for_room(self, link: Link) -> None:
        """The server, or the way to it, is slower than the function that speaks."""
        connection = link.connection
        pause = 0.0005
        # Whoever sends gives up a server that takes nothing for long.
        while link.unsent > MOST_UNSENT and link.connection is connection:
            sleep(pause)
            pause = min(pause * 2, 0.01)

    def flush_aside(self) -> bool:
        """Send what waits while a job runs in this worker's own thread; whether something does still."""
        with self.sending:
            if not self._runs_here:
                return False
            for link in self._links:
                if link.unsent:
                    link.flush()
            return any(link.unsent for link in self._links)

    def listen(self, link: Link) -> None:
        """Hear what a server says while a job of it runs in this thread."""
        if threading.get_ident() == self._thread:
            alarm = self._alarm
            if alarm is not None:
                alarm.hold()
            try:
                with self.sending:
                    self._receive(link)
            finally:
                if alarm is not None:
                    alarm.release()

    # The turn of the loop.

    def _is_stopping(self) -> bool:
        if not self._stopping and self._control is not None:
            self._stopping = bool(_wait([self._control], [], 0.0)[0])
        return self._stopping

    def _is_done(self) -> bool:
        """Whether it is to stop, and nothing is left to do or to tell."""
        if not self._stopping:
            return False
        if any(lane.jobs for lane in self._lanes):
            return False
        for link in self._links:
            is_asleep = link.waits and link.asleep_since is not None
            if is_asleep or (link.asked_at is not None and link.tells_attempts):
                # Whatever it hands out on that question goes back.
                link.asked_at = link.asleep_since = None
                link.send(_RETURN_ALL)
        if not any(link.unconfirmed or link.unsent or link.asked_at is not None for link in self._links):
            return True
        results = any(link.unconfirmed for link in self._links)
        self._stop_by = min(self._stop_by, monotonic() + (DELIVERY_LIMIT if results else PATIENCE))
        for link in self._links:
            if link.unconfirmed and link.connection and link.asked_at is None and link.echo_at is None:
                link.echo()
        return monotonic() >= self._stop_by

    def _connect(self) -> None:
        now = monotonic()
        for link in self._links:
            if link.connection is not None or link.connecting is not None or now < link.retry_at:
                continue
            if self._stopping and not link.unconfirmed and not link.lane.in_hand(link):
                continue
            if any(lane.jobs for lane in self._lanes) or any(other.connection for other in self._links):
                # The others, and what runs, need not wait for this one.
                link.connecting = threading.Thread(target=self._connect_aside, args=(link,), daemon=True)
                link.connecting.start()
            else:
                try:
                    connection = self._open(link)
                except ConnectionFailed as error:
                    link.lost(error)
                else:
                    self._connected(link, connection)

    def _connect_aside(self, link: Link) -> None:
        """In a thread of its own."""
        try:
            connection = self._open(link)
        except ConnectionFailed as error:
            failure = error
            self._events.append(lambda: self._not_connected(link, failure))
        else:
            self._events.append(lambda: self._connected(link, connection))
        self.wake()

    def _open(self, link: Link) -> Connection:
        return Connection(
            link.host,
            link.port,
            connect_timeout=self._connect_timeout,
            max_packet=self._max_packet + _HEADROOM,
            tls=self._tls,
        )

    def _not_connected(self, link: Link, error: ConnectionFailed) -> None:
        link.connecting = None
        link.lost(error)

    def _connected(self, link: Link, connection: Connection) -> None:
        link.connecting = None
        link.connected(connection, self._introduction(link.lane))
        if link.connection is not None:
            logger.info("Connected to the job server at %s", link)
            if self._stopping and link.unconfirmed:
                link.echo()

    def _introduction(self, lane: Lane) -> bytes:
        """What a server must know of a worker, again after each reconnect."""
        packets = [encode_request(PacketType.SET_CLIENT_ID, self._client_id)]
        if self._retry is not None:
            # Answered before any job; other servers answer ERROR and go on.
            packets.append(encode_request(PacketType.OPTION_REQ, ATTEMPTS))
            if self._crew:
                packets.append(encode_request(PacketType.OPTION_REQ, CREW + self._crew))
            if len(lane.links) == 1:
                # A place that one server may fill is no other's.
                packets.append(encode_request(PacketType.OPTION_REQ, WAITS))
        if self._logs:
            packets.append(encode_request(PacketType.OPTION_REQ, LOGS))
        packets += [encode_request(PacketType.CAN_DO, name) for name in lane.functions]
        return b"".join(packets)

    def _ask(self) -> None:
        """Ask for as many jobs as there are free places."""
        if self._stopping:
            return
        for lane in self._lanes:
            while len(lane.free) > lane.asked:
                link = lane.next_link()
                if link is None:
                    break
                link.ask()

    def _turn(self) -> None:
        """Wait until something happens, and do what it asks for."""
        until = self._next_moment()
        assert self._wake is not None, "made by run"
        watched: list[Connection | socket.socket | int] = [
            link.connection for link in self._links if link.connection
        ]
        if any(link.connection and link.connection.has_decrypted for link in self._links):
            until = 0.0
        watched.append(self._wake[0])
        if self._control is not None and not self._stopping:
            watched.append(self._control)
        if self._row is not None and self._is_idle():
            self._row.fall_asleep()
        now = monotonic()
        try:
            stuck = [link.connection for link in self._links if link.is_stuck and link.connection]
            ready, takes = _wait(watched, stuck, max(0.0, min(until - now, RECHECK)))
        except OSError as error:
            # A job has closed a descriptor that was not its own.
            for link in self._links:
                if link.connection:
                    link.lost(ConnectionLost(str(link), str(error)))
            return
        if self._wake[0] in ready:
            self._hear_threads(self._wake[0])
        if self._control in ready:
            self._stopping = True
        self._flush(takes)
        for link in self._links:
            connection = link.connection
            if connection is not None and (connection in ready or connection.has_decrypted):
                self._receive(link, is_ready=True)
        self._look_at_jobs()
        self._look_at_links()

    def _flush(self, takes: Collection[Connection]) -> None:
        """Send what waits, where it is time or the kernel takes more."""
        for link in self._links:
            if link.unsent and (link.connection in takes or monotonic() >= link.flush_at):
                with self.sending:
                    link.flush()

    def _is_idle(self) -> bool:
        return not any(lane.jobs for lane in self._lanes) and all(
            link.connection is None or link.asleep_since is not None for link in self._links
        )

    def _hear_threads(self, wake: socket.socket) -> None:
        try:
            while wake.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._events:
            self._events.popleft()()

    def _next_moment(self) -> float:
        """The monotonic time at which there is something to do though nothing came."""
        moments = [self._stop_by]
        for link in self._links:
            if link.unsent:
                moments.append(link.flush_at)
            if link.connection is None:
                if link.connecting is None:
                    moments.append(link.retry_at)
            elif link.asked_at is not None:
                patience = PATIENCE if self._has_another(link) else ANSWER_LIMIT
                moments.append(link.asked_at + patience)
            elif link.asleep_since is not None and not link.waits:
                moments.append(link.asleep_since + RECHECK)
            else:
                moments.append((link.echo_at or link.heard_at) + (ANSWER_LIMIT if link.echo_at else RECHECK))
        for lane in self._lanes:
            moments.extend(job.running.until for job in lane.jobs if job.running is not None)
        return min(moments)

    def _has_another(self, link: Link) -> bool:
        """Whether the place that is kept for a server's answer could be another's."""
        lane = link.lane
        return len(lane.free) <= lane.asked and any(other.is_worth_asking for other in lane.links)

    def _look_at_jobs(self) -> None:
        for lane in self._lanes:
            if lane.pool is not None:
                now = monotonic()
                for job in lane.jobs:
                    if job.running is not None:
                        job.running.look(now)

    def _look_at_links(self) -> None:
        """Give up servers that do not answer, and see whether those are there that say nothing."""
        now = monotonic()
        for link in self._links:
            if link.connection is None:
                continue
            if link.asked_at is not None:
                waited = now - link.asked_at
                if waited >= ANSWER_LIMIT or (waited >= PATIENCE and self._has_another(link)):
                    # Should it hand out a job all the same, that is no attempt.
                    link.send(_RETURN_ALL if link.tells_attempts and not link.lane.in_hand(link) else b"")
                    if link.connection is not None:
                        link.lost(ResponseTimeout(f"the answer of the job server at {link}", waited))
            elif link.asleep_since is not None and not link.waits:
                if now - link.asleep_since >= RECHECK:
                    link.asleep_since = None
            elif link.echo_at is not None:
                if now - link.echo_at >= ANSWER_LIMIT:
                    link.lost(ResponseTimeout(f"the answer of the job server at {link}", now - link.echo_at))
            elif now - link.heard_at >= RECHECK:
                link.echo()

    def _receive(self, link: Link, *, is_ready: bool = False) -> None:
        connection = link.connection
        try:
            if connection is not None:
                if is_ready:
                    connection.fill_ready()
                else:
                    connection.fill()
                while link.connection is connection and (packet := connection.take()) is not None:
                    self._hear(link, packet)
        except ConnectionLost as error:
            if link.connection is connection:
                link.lost(error)

    def _hear(self, link: Link, packet: Packet) -> None:
        kind, arguments = packet
        link.answered()
        link.heard_at = monotonic()
        if kind == PacketType.JOB_ASSIGN_UNIQ:
            if link.asked_at is not None:
                link.asked_at = None
                link.confirm()
            link.asleep_since = None
            self._assigned(link, *arguments)
        elif kind == PacketType.NO_JOB:
            link.asked_at = None
            link.confirm()
            link.asleep_since = link.heard_at
            if not link.waits:
                link.send(_PRE_SLEEP)
        elif kind == PacketType.NOOP:
            link.asleep_since = None
        elif kind == PacketType.ECHO_RES:
            link.echo_at = None
            link.confirm()
        elif kind == PacketType.OPTION_RES:
            self._hear_option(link, arguments[0])
        elif kind == PacketType.ERROR and arguments[0].upper() != b"UNKNOWN_OPTION":
            logger.warning(
                "The job server at %s answered %s", link, b": ".join(arguments).decode(errors="replace")
            )

    def _hear_option(self, link: Link, option: bytes) -> None:
        if option == ATTEMPTS:
            link.tells_attempts = link.was_ours = True
        elif option == WAITS:
            link.waits = True
        elif option == LOGS:
            link.takes_logs = True
        elif option.startswith(CANCEL):
            handle = option.removeprefix(CANCEL)
            for job in link.lane.jobs:
                if job.handle == handle:
                    job.cancel()
        else:
            link.attempt = _attempt(option)

    # The life of a job.

    def _assigned(self, link: Link, handle: bytes, name: bytes, unique: bytes, workload: bytes) -> None:
        lane = link.lane
        attempt, max_attempts = link.attempt
        link.attempt = (1, 0)
        if self._stopping and link.tells_attempts:
            # The question was on its way when we were told to stop.
            link.send(encode_request(PacketType.OPTION_REQ, RETURN + handle))
            return
        if not lane.free:
            link.lost(ConnectionLost(str(link), "it hands out more jobs than it was asked for"))
            return
        place = lane.free.pop()
        limit = self._limits.get(name)
        job = AssignedJob(link, handle, name, unique, workload, attempt, max_attempts or None, place, limit)
        lane.jobs[job] = link
        job.started = monotonic()
        if place is not None:
            kill_at = math.inf if limit is None else job.started + limit + KILL_AFTER
            place.begin(handle, name, job.started, limit or 0.0, kill_at)
        if self._row is not None:
            self._row.wake_up()
        if self._show is not None:
            self._show(name.decode(errors="replace"))
        if logger.isEnabledFor(logging.INFO):
            logger.info("Job %s (%s) started", _text(handle), _text(name))
        if lane.pool is None:
            self._run_here(lane, job)
        else:
            function = self._function(lane, job)
            job.running = lane.pool.start(
                job, lambda: function(job), lambda result, error: self._done(job, result, error)
            )

    def _function(self, lane: Lane, job: AssignedJob) -> Callable[[AssignedJob], Any]:
        function = lane.functions.get(job.function)
        if function is not None:
            return function  # type: ignore[no-any-return]  # lanes hold nothing else
        name = job.function.decode(errors="replace")

        def refuse(job: AssignedJob) -> bytes:
            raise LookupError(f"this worker does not offer {name}")

        return refuse

    def _run_here(self, lane: Lane, job: AssignedJob) -> None:
        result = None
        failure: BaseException | None = None
        self._runs_here = True
        if any(each.unsent for each in self._links):
            # A server may be slow to take the result of the job before.
            self._pump.start()
        try:
            with nullcontext() if self._alarm is None else self._alarm.begin(job):
                result = self._function(lane, job)(job)
        except BaseException as error:  # whatever a job raises ends the job, not the worker
            if isinstance(error, KeyboardInterrupt) and job.hears_interrupts:
                # Whoever debugs wants to leave at once; the job is not to blame.
                if job.may_return:
                    job.link.send(encode_request(PacketType.OPTION_REQ, RETURN + job.handle))
                raise
            failure = error
        job.end_copy(failure)
        with self.sending:
            self._runs_here = False
        self._finish(job, result, failure)

    def _done(self, job: AssignedJob, result: Any, failure: BaseException | None) -> None:
        """A job has ended, in another thread."""
        job.end_copy(failure)
        self._events.append(lambda: self._finish(job, result, failure))
        self.wake()

    def _finish(self, job: AssignedJob, result: Any, failure: BaseException | None) -> None:
        """Report how a job ended, and grab the next in the same breath where that is right."""
        link, lane, place = job.link, job.link.lane, job.place
        if place is not None:
            place.spare()
        if job.is_cancelled:
            logger.warning("Job %s (%s) was cancelled", _text(job.handle), _text(job.function))
            report = b""
        elif failure is None:
            report = self._report_result(job, result)
        else:
            report = self._report_failure(job, failure)
        self.jobs_done += 1
        if self._is_spent is not None and not self._stopping and self._is_spent(self.jobs_done):
            self._stopping = True
        job.report = report
        del lane.jobs[job]
        lane.free.append(place)
        if report:
            link.unconfirmed.append(job)
            if link.connection is not None:
                # With one server the next grab travels with the report.
                if link.is_worth_asking and len(lane.links) == 1 and not self._is_stopping():
                    link.ask(report)
                else:
                    link.send(report)
        if place is not None:
            place.end()
        if self._show is not None and not lane.jobs:
            self._show("")

    def _report_result(self, job: AssignedJob, result: Any) -> bytes:
        name = _text(job.function)
        if not isinstance(result, bytes):
            problem: Exception = TypeError(f"{name} must return bytes, not {type(result).__name__}")
            return self._report_failure(job, problem)
        if len(result) + len(job.handle) + 1 > self._max_packet:
            remedy = "store it, and return a reference"
            problem = TooLarge(f"the result of {name}", len(result), self._max_packet, remedy=remedy)
            logger.error("Job %s (%s) failed: %s", _text(job.handle), name, problem)
            return encode_request(PacketType.WORK_EXCEPTION, job.handle, self._describe(problem))
        if logger.isEnabledFor(logging.INFO):
            took = monotonic() - job.started
            logger.info("Job %s (%s) succeeded in %.2f s", _text(job.handle), name, took)
        return encode_request(PacketType.WORK_COMPLETE, job.handle, result)

    def _report_failure(self, job: AssignedJob, error: BaseException) -> bytes:
        handle, name, took = _text(job.handle), _text(job.function), monotonic() - job.started
        if isinstance(error, JobRefused):
            logger.error("Job %s (%s) failed after %.2f s", handle, name, took)
            return encode_request(PacketType.WORK_FAIL, job.handle)
        report = encode_request(PacketType.WORK_EXCEPTION, job.handle, self._describe(error))
        delay = self._retry(job, error) if self._retry is not None and job.may_return else None
        if delay is None:
            logger.error("Job %s (%s) failed after %.2f s: %s", handle, name, took, _told(error))
            return report
        logger.warning(
            "Job %s (%s) failed after %.2f s at attempt %d and is tried again in %.1f s: %s",
            handle,
            name,
            took,
            job.attempt,
            delay,
            _told(error),
        )
        retry = encode_request(PacketType.OPTION_REQ, RETRY + b"%d %s" % (delay * 1000, job.handle))
        return retry + report

    def _close(self) -> None:
        for link in self._links:
            if link.connecting is not None:
                link.connecting.join()
        self._stopping = True
        while self._events:
            self._events.popleft()()
        for link in self._links:
            if link.connection is not None:
                link.connection.close()
                link.connection = None
        for lane in self._lanes:
            if lane.pool is not None:
                lane.pool.close()
        for end in self._wake or ():
            end.close()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
"""Those that run, or have run."""


def _become_copies() -> None:
    """In a forked child: two that send on one connection would break it, and the jobs of both."""
    for worker in list(_workers):
        worker.become_copy()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_become_copies)


class _Pump:
    """Sends what a job has said, and has stopped saying, while it keeps the worker's own thread busy."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()

    def start(self) -> None:
        """Begin, if it has not; for who has ``Worker.sending``."""
        self._wanted.set()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="gearman-pump", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return  # the system has none left: it leaves with what is said next, or at the job's end
            self._thread = thread

    def _run(self) -> None:
        while True:
            if not self._wanted.wait(_PUMP_LINGER):
                with self._worker.sending:
                    if not self._wanted.is_set():
                        self._thread = None
                        return
            self._wanted.clear()
            sleep(GATHER)
            if self._worker.flush_aside():
                self._wanted.set()


def _wait(
    watched: list[Connection | socket.socket | int], stuck: list[Connection], seconds: float
) -> tuple[list[Any], list[Any]]:
    """Those of which something can be read, and those that take something, as soon as there are any."""
    try:
        return select.select(watched, stuck, [], seconds)[:2]
    except ValueError:
        # It takes no descriptor above 1,023, of which the jobs may have opened many.
        if not hasattr(select, "poll"):
            raise
    poll = select.poll()
    wanted: dict[int, int] = {}
    for things, event in ((watched, select.POLLIN), (stuck, select.POLLOUT)):
        for thing in things:
            number = thing if isinstance(thing, int) else thing.fileno()
            wanted[number] = wanted.get(number, 0) | event
    for number, events in wanted.items():
        poll.register(number, events)
    found = dict(poll.poll(seconds * 1000))
    if any(events & select.POLLNVAL for events in found.values()):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def ready(things: Iterable[Any], event: int) -> list[Any]:
        event |= select.POLLHUP | select.POLLERR
        numbers = ((thing, thing if isinstance(thing, int) else thing.fileno()) for thing in things)
        return [thing for thing, number in numbers if found.get(number, 0) & event]

    return ready(watched, select.POLLIN), ready(stuck, select.POLLOUT)


def _attempt(told: bytes) -> tuple[int, int]:
    """``attempt N M`` as numbers; of anything else, the first of no number."""
    words = told.split(b" ") if len(told) <= _LONGEST_ATTEMPT else []
    if len(words) == 3 and words[0] == b"attempt" and words[1].isdigit() and words[2].isdigit():
        return int(words[1]), int(words[2])
    return 1, 0


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


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
