"""Members of groups: which of them the core holds, and their ends as the groups' counts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from time import monotonic
from typing import Final

from django.db import DatabaseError, transaction

from .. import continuations
from ..models import JobRecord
from .columns import Row, Status, in_parts, text_of
from .database import Database, is_of_lock
from .lease import Lease

RECOUNT_INTERVAL: Final = 0.5
"""Seconds between two tries to count in groups that somebody else has locked."""

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
        self.over: list[int] = []
        """Groups all of whose members have ended, since this was last emptied."""
        self._uncounted: set[int] = set()
        """Groups that somebody had locked when members of theirs ended; their counts are to be made anew."""
        self._recount_at = 0.0
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
        """
        Count what ended, and go on with groups that have their end, in the transaction that ends it.

        A group that somebody keeps locked, such as a view that cancels some of it and then takes its
        time, is counted anew later: what else has ended does not wait for it.
        """
        now = {group: of for group, of in ended.items() if group not in self._uncounted}
        if not now:
            return
        is_alone = self._db.is_alone_at_work
        try:
            with nullcontext() if is_alone else transaction.atomic(using=self._db.using):
                self._follow(continuations.count(now, self._db.using, self._workload_limit))
        except DatabaseError as error:
            if not is_of_lock(error):
                raise
            self._uncounted.update(now)

    def recount(self) -> None:
        """Count in the groups that were locked when members of theirs ended."""
        if not self._uncounted or monotonic() < self._recount_at:
            return
        self._recount_at = monotonic() + RECOUNT_INTERVAL
        for group in sorted(self._uncounted):
            with self._db.hurried(), self._lease.transaction():
                try:
                    with transaction.atomic(using=self._db.using):
                        self._follow(self._watch.settle([group], self._workload_limit))
                except DatabaseError as error:
                    if not is_of_lock(error):
                        raise
                    continue
            self._uncounted.discard(group)

    def _follow(self, following: continuations.Following) -> None:
        self.laid |= following.laid
        self.over += following.groups

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
                self._follow(self._watch.settle(stuck, self._workload_limit))
        self.watch_at = monotonic() + WATCH_INTERVAL
