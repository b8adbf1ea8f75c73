"""
What workers say of the jobs that they run: parts, progress, log, and the end.

Listeners are told at once. Progress and log are recorded now and then, and
before the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..protocol.packets import MAX_LOG, PacketType, encode_response
from .entries import JobLogged, JobProgress, Outcome
from .jobs import Job

if TYPE_CHECKING:
    from .core import JobServer
    from .peers import Handler, Peer

MAX_HANDLE: Final = 63
"""Bytes in a handle that is not ours; gearmand has no longer ones."""

_HANDLE_TOO_LARGE = b"Error occurred due to GEARMAND_JOB_HANDLE_SIZE being too small from snprintf"


class Log:
    """The last lines that a running job has logged."""

    __slots__ = ("recorded_at", "text", "unsaved")

    def __init__(self) -> None:
        self.text = b""
        self.recorded_at = 0.0
        """When they were last recorded."""
        self.unsaved = False
        """Whether there were more since."""


class Results:
    """WORK_STATUS to WORK_EXCEPTION, and the option ``log``."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self.logs: dict[Job, Log] = {}
        """{running job: what it logged}, of those that did."""
        self.unsaved: dict[Job, None] = {}
        """Jobs whose progress or log is newer than what is recorded."""

    def handlers(self) -> dict[PacketType, Handler]:
        """What to do with each of the packets."""
        return {
            PacketType.WORK_STATUS: self._work_status,
            PacketType.WORK_DATA: self._work_data,
            PacketType.WORK_WARNING: self._work_warning,
            PacketType.WORK_COMPLETE: self._work_complete,
            PacketType.WORK_FAIL: self._work_fail,
            PacketType.WORK_EXCEPTION: self._work_exception,
        }

    def _work_status(self, peer: Peer, arguments: list[bytes]) -> None:
        handle, numerator, denominator = arguments
        job = peer.running.get(handle)
        if job is None:
            self._refuse(peer, handle, b"Job given in work result not found", has_ended=False)
            return
        job.numerator = numerator
        job.denominator = denominator
        self._server.tell(job, PacketType.WORK_STATUS, arguments)
        job.progress_unsaved = True
        self.unsaved[job] = None
        self._save_if_due(job)

    def _work_data(self, peer: Peer, arguments: list[bytes]) -> None:
        self._pass_on(peer, PacketType.WORK_DATA, arguments)

    def _work_warning(self, peer: Peer, arguments: list[bytes]) -> None:
        self._pass_on(peer, PacketType.WORK_WARNING, arguments)

    def _pass_on(self, peer: Peer, kind: PacketType, arguments: list[bytes]) -> None:
        job = peer.running.get(arguments[0])
        if job is None:
            self._refuse(peer, arguments[0], b"Job does not exist on server", has_ended=False)
            return
        self._server.tell(job, kind, arguments)

    def _work_complete(self, peer: Peer, arguments: list[bytes]) -> None:
        server = self._server
        job = peer.running.get(arguments[0])
        if job is None:
            self._refuse(peer, arguments[0], b"Job given in work result not found")
            return
        server.tell(job, PacketType.WORK_COMPLETE, arguments)
        server.finish(job, Outcome.SUCCESSFUL, arguments[1])

    def _work_fail(self, peer: Peer, arguments: list[bytes]) -> None:
        handle = until_nul(arguments[0])
        job = peer.running.get(handle)
        if job is None:
            if handle == peer.excused:
                return
            if len(handle) > MAX_HANDLE and handle not in peer.cancelled:
                # gearmand says so here alone.
                self._server.refuse(peer, b"ARGUMENT_TOO_LARGE", _HANDLE_TOO_LARGE)
                return
            self._refuse(peer, handle, b"Job given in work result not found")
            return
        self._server.fail(job, Outcome.FAILED, "The worker reported that the job failed")

    def _work_exception(self, peer: Peer, arguments: list[bytes]) -> None:
        """WORK_EXCEPTION is final, as in gearmand; a WORK_FAIL of the same worker after it is passed over."""
        server = self._server
        handle, data = arguments
        job = peer.running.get(handle)
        if job is None:
            self._refuse(peer, handle, b"An exception was received for a job that does not exist")
            return
        peer.excused = handle
        retry, peer.retry = peer.retry, None
        if retry is not None and retry[0] == handle and server.may_try_again(job):
            server.requeue(job, "", data, server.now + retry[1])
            return
        failed = encode_response(PacketType.WORK_FAIL, handle)
        exception = encode_response(PacketType.WORK_EXCEPTION, handle, data)
        for listener in job.listeners or ():
            server.send(listener, exception if listener.exceptions else failed)
        server.finish(job, Outcome.FAILED, data)

    def _refuse(self, peer: Peer, handle: bytes, text: bytes, *, has_ended: bool = True) -> None:
        # Perl's workers end on an ERROR; that the job was cancelled is not their fault.
        if handle in peer.cancelled:
            return
        if has_ended and peer.crew:
            self._server.crews.came_in_vain(peer, handle)
        self._server.refuse(peer, b"JOB_NOT_FOUND", text)

    def log(self, peer: Peer, handle: bytes, text: bytes) -> None:
        """What is said of a job that is not kept, or not the worker's any more, is passed over."""
        job = peer.running.get(handle)
        if job is None or not job.recorded:
            return
        log = self.logs.get(job)
        if log is None:
            log = self.logs[job] = Log()
        log.text = text[-MAX_LOG:]
        log.unsaved = True
        self.unsaved[job] = None
        self._save_if_due(job)

    def _save_if_due(self, job: Job) -> None:
        """Record progress and log, each no more often than once in ``progress_interval``; the rest waits."""
        server = self._server
        interval = server.options.progress_interval
        if job.progress_unsaved and server.now - job.progress_at >= interval:
            self._save_progress(job)
        log = self.logs.get(job)
        if log is not None and log.unsaved and server.now - log.recorded_at >= interval:
            self._save_log(job, log)
        if not job.progress_unsaved and (log is None or not log.unsaved):
            self.unsaved.pop(job, None)

    def _save_log(self, job: Job, log: Log) -> None:
        log.recorded_at = self._server.now
        log.unsaved = False
        self._server.entries.append(JobLogged(job.handle, log.text))

    def _save_progress(self, job: Job) -> None:
        job.progress_at = self._server.now
        job.progress_unsaved = False
        if job.recorded:
            self._server.entries.append(JobProgress(job.handle, job.numerator, job.denominator))

    def tick(self) -> None:
        """Time passed: record what is due."""
        for job in list(self.unsaved):
            self._save_if_due(job)

    def save_last(self, job: Job) -> None:
        """The job ends: record what is not recorded yet, and forget it."""
        if job.progress_unsaved:
            self._save_progress(job)
        log = self.logs.pop(job, None)
        if log is not None and log.unsaved:
            self._save_log(job, log)
        self.unsaved.pop(job, None)

    def forget(self, job: Job) -> bytes:
        """An attempt came to nothing; what it had logged."""
        log = self.logs.pop(job, None)
        self.unsaved.pop(job, None)
        return b"" if log is None else log.text


def until_nul(argument: bytes) -> bytes:
    """The only argument of a packet, which may have NULs: where the first one stands, gearmand ends it."""
    return argument.partition(b"\0")[0]
