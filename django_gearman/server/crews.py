"""
Crews: the workers of one command, and the one of its processes that speaks for them.

A worker that dies cannot say of what; a server sees a lost connection. The
process that started it knows, and tells on a connection of its own, the lead's:
both name the same token, which nobody else can guess. The words are those of
``packets.CREW`` and after it. No other server knows them; all answer
UNKNOWN_OPTION, and treat a lost connection as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..protocol.packets import (
    CANCEL,
    CREW,
    HOLD,
    LEAD,
    LEAVING,
    LOST,
    RESUME,
    RETURN,
    PacketType,
    encode_response,
)

if TYPE_CHECKING:
    from .core import JobServer
    from .jobs import Job
    from .peers import Peer

PATIENCE: Final = 2.0
"""Seconds that the jobs of a lost worker wait for its lead's word on it."""

MAX_TOKEN: Final = 64
MAX_REASON: Final = 300
"""Bytes."""


class Crews:
    """Who leads, and which lost workers' jobs wait for a word."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self._leads: dict[bytes, Peer] = {}
        self._lost: dict[Peer, float] = {}
        """{worker that is gone: the clock's time until which its jobs wait}; they count as running."""
        self._held: dict[Job, Peer] = {}
        """{job that ran when the server ended: the lead of whom has it in hand still}"""
        self._leaving: set[bytes] = set()
        """Tokens of crews that finish what they have."""
        self._words: tuple[tuple[bytes, Callable[[Peer, bytes], None]], ...] = (
            (CREW, self._join),
            (LEAD, self._lead),
            (HOLD, self._hold),
            (LOST, self._worker_was_lost),
            (LEAVING, self._leave),
            (RETURN, self._give_back),
            (RESUME, self._resume),
        )

    def hear(self, peer: Peer, option: bytes) -> bool:
        """Act on a word of a peer that speaks of attempts; False when it is none of ours."""
        for word, act in self._words:
            if option.startswith(word):
                act(peer, option[len(word) :])
                return True
        return False

    def waits_for_word(self, worker: Peer) -> bool:
        """Whether the jobs of a worker that has just gone wait for what its lead says."""
        if not worker.running or worker.crew not in self._leads:
            return False
        self._lost[worker] = self._server.clock + PATIENCE
        return True

    def peer_left(self, peer: Peer) -> None:
        """A lead that is gone says nothing more."""
        if self._leads.get(peer.crew) is peer:
            del self._leads[peer.crew]
            self._leaving.discard(peer.crew)
            self._give_up([worker for worker in self._lost if worker.crew == peer.crew])
            self._hold_for_a_moment(peer)

    def are_finishing(self) -> bool:
        """Whether workers that are about to leave have jobs in hand."""
        return any(peer.running and peer.crew in self._leaving for peer in (*self._server.peers, *self._lost))

    def tick(self) -> None:
        """Time passed."""
        self._give_up([worker for worker, until in self._lost.items() if until <= self._server.clock])

    def tell_cancelled(self, worker: Peer, handle: bytes) -> None:
        """The job that a worker runs was cancelled: who can end it hears of it."""
        listener = self._leads.get(worker.crew, worker)
        if worker.crew and listener in self._server.peers:
            self._server.send(listener, encode_response(PacketType.OPTION_RES, CANCEL + handle))

    def _give_up(self, workers: list[Peer]) -> None:
        for worker in workers:
            del self._lost[worker]
            self._server.lose_jobs_of(worker)

    def _join(self, peer: Peer, token: bytes) -> None:
        token = token[:MAX_TOKEN]
        if peer.crew != token:
            # Of the one that it led it is the lead no more.
            self.peer_left(peer)
            peer.crew = token

    def _lead(self, peer: Peer, token: bytes) -> None:
        if not token:
            # Of none are all workers without a crew: nobody speaks for those.
            self._server.refuse(peer, b"UNKNOWN_OPTION", b"Server does not recognize given option")
            return
        self._join(peer, token)
        former = self._leads.get(peer.crew)
        self._leads[peer.crew] = peer
        if former is not None and former is not peer:
            # It has connected again, and nobody has seen its connection end: it says again what is in hand.
            self._hold_for_a_moment(former)
        self._server.send(peer, encode_response(PacketType.OPTION_RES, LEAD.rstrip()))

    def _leave(self, peer: Peer, nothing: bytes) -> None:
        if self._leads.get(peer.crew) is peer:
            self._leaving.add(peer.crew)

    def _hold(self, peer: Peer, handle: bytes) -> None:
        job = self._server.jobs.get(handle)
        if (
            job is not None
            and self._leads.get(peer.crew) is peer
            and self._server.returning.hold(job, for_ever=True)
        ):
            self._held[job] = peer

    def _hold_for_a_moment(self, lead: Peer) -> None:
        """Nobody says any more whether those are at their jobs of whom a lead did."""
        for job in [job for job, its_lead in self._held.items() if its_lead is lead]:
            del self._held[job]
            self._server.returning.hold(job, for_ever=False)

    def came_in_vain(self, peer: Peer, handle: bytes) -> None:
        """
        A worker says how a job ended that is not its own.

        It may have come back with it before the job was here. If its lead has said since that it is at the
        job, nobody comes back with it any more: another gets it.
        """
        job = self._server.jobs.get(handle)
        lead = self._held.get(job) if job is not None else None
        if job is not None and lead is not None and lead.crew == peer.crew:
            del self._held[job]
            self._server.returning.give_up(job)

    def _hold_no_more(self, peer: Peer, handle: bytes) -> None:
        """The process that had it is gone, before it could come back: another gets the job."""
        job = self._server.jobs.get(handle)
        if job is not None and self._held.get(job) is peer:
            del self._held[job]
            self._server.returning.give_up(job)

    def _worker_was_lost(self, peer: Peer, text: bytes) -> None:
        handle, _, reason = text.partition(b" ")
        self._hold_no_more(peer, handle)
        job = self._job_of_crew(peer, handle)
        if job is not None:
            told = reason[:MAX_REASON].decode(errors="replace").replace("\0", "")
            self._server.lose_worker(job, told or "The worker was lost")
            self._forget_idle()

    def _give_back(self, peer: Peer, handle: bytes) -> None:
        """A job is put back on purpose: no attempt was lost. Without a handle, all that the peer has."""
        if handle:
            self._hold_no_more(peer, handle)
            job = self._job_of_crew(peer, handle)
            jobs = [] if job is None else [job]
        else:
            self._server.wait_no_more(peer)
            jobs = list(peer.running.values())
        for job in reversed(jobs):
            self._server.give_back(job)
        self._forget_idle()

    def _resume(self, peer: Peer, text: bytes) -> None:
        """
        A worker is back that had the job in hand when its connection broke.

        It gets the job if it could grab it, and nobody did meanwhile.
        """
        number, _, handle = text.partition(b" ")
        job = self._server.jobs.get(handle)
        if job is None:
            return
        was_held = self._held.pop(job, None) is not None
        # After a crash the store may not know of the last hand-out.
        same = number.isdigit() and int(number[:6]) - job.attempts in (0, 1)
        if same and (job.worker is None or job.worker in self._lost):
            self._server.returning.resume(job, peer, int(number[:6]))
            self._forget_idle()
        if was_held:
            # If it may not have it after all.
            self._server.returning.give_up(job)

    def _job_of_crew(self, peer: Peer, handle: bytes) -> Job | None:
        """The job, if a worker of the peer's crew has it, or the peer itself."""
        job = self._server.jobs.get(handle)
        if job is None or job.worker is None:
            return None
        leads = self._leads.get(peer.crew) is peer and job.worker.crew == peer.crew
        return job if leads or job.worker is peer else None

    def _forget_idle(self) -> None:
        for worker in [worker for worker in self._lost if not worker.running]:
            del self._lost[worker]
