"""Members of groups: which of them the core holds, and their ends as the groups' counts."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Final

from .. import continuations
from ..models import JobRecord
from .columns import Row, Status, in_parts, text_of
from .database import Database
from .lease import Lease

WATCH_INTERVAL: Final = 60.0
"""Seconds between two looks for groups that wait for nobody."""


class Members:
    """
    The members of groups among the jobs of one server.

    Args:
        max_workload: Bytes of a workload that a result is put into.
    """

    def __init__(self, db: Database, lease: Lease, max_workload: float) -> None:
        self._db = db
        self._lease = lease
        self._max_workload = max_workload
        self.group_of: dict[bytes, int] = {}
        """{handle: group} of the jobs that the core holds and that are members of one."""
        self.laid = False
        """Whether jobs were laid at the door, since this was last set back."""
        self._watch = continuations.Watch(db.using)
        self.watch_at = 0.0
        """Monotonic time of the next look for groups that wait for nobody."""

    def that_end(self, changed: dict[bytes, Row]) -> dict[int, continuations.Ended]:
        """Of each group, how many of its members this batch ends, which did not end before."""
        here = [handle for handle in changed if handle in self.group_of and "finished_at" in changed[handle]]
        ended: dict[int, continuations.Ended] = {}
        for part in in_parts([text_of(handle) for handle in here]):
            live = self._db.records().filter(
                handle__in=part, server=self._lease.id, status__in=JobRecord.SERVED, group_index__isnull=False
            )
            for text, group in live.values_list("handle", "group"):
                of = ended.setdefault(group, continuations.Ended())
                if changed[str(text).encode()]["status"] == Status.SUCCESSFUL:
                    of.successful += 1
                else:
                    of.failed += 1
        return ended

    def count(self, ended: Mapping[int, continuations.Ended]) -> None:
        """Count what ended, and go on with groups that have their end, in the transaction that ends it."""
        self.laid |= continuations.count(ended, self._db.using, self._workload_limit).laid

    @property
    def _workload_limit(self) -> float:
        """Bytes that a workload may have which a result is put into."""
        # Escapes may double it in a statement.
        return min(self._max_workload, self._db.packet_limit / 2 - 1000)

    def watch(self) -> None:
        """Go on with groups whose rows somebody deleted by hand."""
        if monotonic() < self.watch_at:
            return
        with self._db.errors():
            stuck = self._watch.stuck()
        if stuck:
            with self._lease.transaction():
                self.laid |= self._watch.settle(stuck, self._workload_limit).laid
        self.watch_at = monotonic() + WATCH_INTERVAL
