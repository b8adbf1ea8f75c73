"""What the journal decides, carried out: one writer thread, and its conversation with the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable

from .job_store import JobStore
from .journal import Batch, Journal

logger = logging.getLogger(__name__)


class JournalThread:
    """
    The one writer thread, and its conversation with the event loop.

    Args:
        changed: Called in the loop after the core was told of anything.
        failed: Called in the loop when the lease is lost or the writer died; the server must stop.
    """

    def __init__(
        self,
        journal: Journal,
        store: JobStore,
        loop: asyncio.AbstractEventLoop,
        *,
        changed: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._journal = journal
        self._store = store
        self._loop = loop
        self._changed = changed
        self._failed = failed
        self._work: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        """When it fires. uvloop's handles of timers that are almost due cannot tell."""
        self._drained: asyncio.Event | None = None
        self._has_looked: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, name="gearman-journal", daemon=True)

    async def start(self, limit: float) -> None:
        """
        Begin, and have what lies at the store's door, if that takes no longer than ``limit`` seconds.

        Among it may be what an earlier run had handed out and not written down: a worker that comes back
        with such a job is to find it here.
        """
        self._thread.start()
        self.kick()
        await asyncio.wait([self._has_looked], timeout=limit)

    def kick(self) -> None:
        """Entries came, a claim is wanted, or time passed: give the writer what there is."""
        batch = self._journal.next_batch(self._loop.time())
        if batch is not None:
            self._work.put(batch)
        elif self._drained is not None and (self._journal.idle or self._journal.lease_lost):
            self._drained.set()
        elif not self._journal.busy:
            self._set_timer()

    async def stop(self, limit: float) -> bool:
        """Write what is left, for at most ``limit`` seconds; say whether everything was written."""
        self._drained = asyncio.Event()
        self._journal.hurry()
        self.kick()
        try:
            await asyncio.wait_for(self._drained.wait(), limit)
        except TimeoutError:
            pass
        if self._timer is not None:
            self._timer.cancel()
        self._work.put(None)
        await asyncio.to_thread(self._thread.join, limit)
        return self._journal.idle

    def _run(self) -> None:
        store = self._store
        try:
            while (batch := self._work.get()) is not None:
                try:
                    batch.perform(store)
                except BaseException as error:
                    self._tell(self._failed, error)
                    raise
                self._tell(self._done, batch)
        finally:
            store.close()

    def _tell(self, callback: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, argument)
        except RuntimeError:
            # The loop was closed while the store took its time; nobody is left to hear.
            logger.warning("The job server stopped before its store answered")

    def _done(self, batch: Batch) -> None:
        journal = self._journal
        journal.done(batch, self._loop.time())
        if batch.claim and not self._has_looked.done():
            self._has_looked.set_result(None)
        if journal.lease_lost is not None:
            self._failed(journal.lease_lost)
        self._changed()
        self.kick()

    def _set_timer(self) -> None:
        """Be back when the journal has something by itself; the timer that is set may do."""
        deadline = self._journal.next_deadline()
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline == math.inf:
            return
        self._timer = self._loop.call_at(deadline, self._timer_fired)
        self._timer_at = deadline

    def _timer_fired(self) -> None:
        # Gone, whatever the time: a loop may call a moment early, and then another must be set.
        self._timer = None
        self.kick()
