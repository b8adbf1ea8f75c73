"""
The lease: who may write, and what becomes of the jobs of those that may not any more.

What a lease is stands in ``models.ServerLease``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import localtime, monotonic, time
from typing import Any, Final

from django.conf import settings
from django.db.models import BigIntegerField, F, Q
from django.db.models.expressions import RawSQL
from django.utils import timezone

from ..exceptions import LeaseLost
from ..limiting import LeaseNow
from ..models import ServerLease
from .columns import seconds_of
from .database import Database
from .statements import DatabaseNow

logger = logging.getLogger(__name__)

LEASE: Final = 15.0
"""Seconds after which the jobs of a server that was not heard of are taken over."""

RENEWALS: Final = 30
"""How often a lease is written in its time at the most, where a look proves as much: a page less to sync."""

LONGEST_REST: Final = 3.0
"""Seconds between two proofs that are ordinary however short leases are: idle servers look once a second."""

CLOCKS_APART: Final = 10.0
"""Seconds between this machine's clock and the database's that are worth a warning."""

ADOPTED_AT_ONCE: Final = 10_000
"""Rows of a dead server that are freed in one transaction."""


class Lease:
    """
    The lease of one server, and its looks at the others'.

    Args:
        name: The server's name, unique among the servers of the database.
        seconds: For how long a server may be silent before others take its jobs over; of all the same.
    """

    def __init__(self, db: Database, name: str, seconds: float) -> None:
        self._db = db
        self._name = name
        self._seconds = seconds
        self.id = 0
        self.epoch = 0
        self.renewed = 0.0
        """Monotonic time at which others were last shown that it is ours."""
        self.has_earlier = False
        """Whether there are more rows of an earlier run to lay at the door."""
        self._looked_for_dead = 0.0
        self._out_of_reach = max(seconds * 2 / 3, LONGEST_REST)
        """Seconds without a proof after which nobody may have been able to renew."""
        self._offset = localtime().tm_gmtoff
        """Seconds by which local time is ahead, in which leases are written while ``USE_TZ`` is off."""
        self._judges_from = 0.0
        """Monotonic time from which others may be told to be silent."""
        self._ahead: float | None = None
        """Seconds by which the database's clock was ahead of the monotonic one when it was read last."""
        self._watches_since = 0.0
        """Monotonic time from which we have looked at that clock."""

    def take(self, address: str) -> int:
        """As ``DatabaseStore.take_lease``; the epoch."""
        began, wall = monotonic(), time()
        with self._db.transaction():
            leases = ServerLease.objects.using(self._db.using)
            lease, _ = leases.get_or_create(name=self._name)
            leases.filter(pk=lease.pk).update(
                epoch=F("epoch") + 1, address=address, started_at=DatabaseNow(), renewed_at=DatabaseNow()
            )
            lease.refresh_from_db(using=self._db.using)
            _, now = self.those_of([lease.pk])
        if settings.USE_TZ:
            _compare_clocks(wall, now)
        self.id = lease.pk
        self.epoch = lease.epoch
        self.renewed = self._looked_for_dead = self._watches_since = began
        return lease.epoch

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[None]:
        """
        A transaction in which the lease is proved to be ours.

        Raises:
            LeaseLost: Somebody else has it; nothing was changed.
            StoreError: The database said so.
        """
        with self._db.transaction(synced=synced):
            self._prove()
            yield

    @property
    def wants_proof(self) -> bool:
        """Whether it was not proved for so long that this has to be done for its own sake."""
        return monotonic() - self.renewed >= self._seconds / 3

    def _prove(self) -> None:
        """In every transaction, so that a server that was replaced commits nothing."""
        began = monotonic()
        if not settings.USE_TZ and localtime().tm_gmtoff != self._offset:
            # Clocks went forward or back: of the others it is not known until they have renewed since.
            self._offset = localtime().tm_gmtoff
            self._judges_from = began + self._seconds
            self._db.forget_statements()
        if self._db.is_alone_at_work and began - self.renewed < self._seconds / RENEWALS:
            if not self._db.execute(self._db.sql.holds, [self.id, self.epoch]):
                raise LeaseLost(self._name)
            return
        renew = self._db.sql.renew_hurried if self._db.is_hurried else self._db.sql.renew
        if not self._db.change(renew, [self.id, self.epoch]):
            raise LeaseLost(self._name)
        if began - self.renewed > self._out_of_reach:
            # The database may have been away: the others have a whole lease to come back.
            self._judges_from = began + self._seconds
        self.renewed = began

    def those_of(self, ids: Iterable[int]) -> tuple[dict[int, LeaseNow], float]:
        """
        {id: the lease} of servers, and the database's time in seconds since 1970; in a transaction.

        Of those that are wanted, and its own: a lease stays when its server is gone for ever.
        """
        began = monotonic()
        wanted = sorted({self.id, *ids})
        rows = self._db.execute(self._db.sql.leases(len(wanted)), wanted)
        now = 0.0
        if rows:
            now = seconds_of(rows[0][-1])
            self._note_clock(now, began)
        judges = monotonic() >= self._judges_from
        leases: dict[int, LeaseNow] = {}
        for id, epoch, started_at, renewed_at, _ in rows:
            age = now - seconds_of(renewed_at)
            silent = judges and (age > self._seconds or (self._knows_the_clock and age < -self._seconds))
            leases[id] = LeaseNow(epoch, seconds_of(started_at), silent)
        return leases, now

    def _look_at_clock(self) -> None:
        began = monotonic()
        ((at,),) = self._db.execute(self._db.sql.now, [])
        self._note_clock(seconds_of(at), began)

    def _note_clock(self, now: float, began: float) -> None:
        """
        Judge nobody for a while when the database's clock was set, by which leases are dated.

        It goes forward, too, where a machine slept that has both the database and the servers.

        Args:
            now: What it shows, in seconds since 1970.
            began: Monotonic time at which it was asked.
        """
        least, most = now - monotonic(), now - began
        before = most if self._ahead is None else self._ahead
        self._ahead = min(max(before, least), most)
        step = self._ahead - before
        if abs(step) > self._seconds / 3:
            logger.warning(
                "The database's clock was set by %+.0f s: for %g s no job server counts as silent",
                step,
                self._seconds,
            )
            self._judges_from = began + self._seconds

    @property
    def _knows_the_clock(self) -> bool:
        """Whether who is alive has renewed since that clock was set last; so none is from later than now."""
        return monotonic() - self._watches_since > self._seconds

    def free_earlier(self) -> None:
        """Lay a part of what an earlier run of this server had at the door; in a transaction."""
        self.has_earlier = self._free(self.id, self.epoch) == ADOPTED_AT_ONCE

    @property
    def wants_a_look_at_others(self) -> bool:
        """Whether it is time for ``free_jobs_of_the_dead``, and we are one to judge."""
        now = monotonic()
        if now - self._looked_for_dead < self._seconds / 3 or now < self._judges_from:
            return False
        # Who could not renew cannot judge: perhaps nobody could.
        return now - self.renewed <= self._out_of_reach

    def free_jobs_of_the_dead(self) -> None:
        """
        Lay the jobs of servers whose leases ran out at the door, for every server to claim.

        The compare-and-set raises the dead server's epoch: should it only have
        been asleep, it can write nothing any more.
        """
        leases = ServerLease.objects.using(self._db.using)
        long = timedelta(seconds=self._seconds)
        ran_out = Q(renewed_at__lt=DatabaseNow() - long)
        if self._knows_the_clock:
            ran_out |= Q(renewed_at__gt=DatabaseNow() + long)
        silent = leases.filter(ran_out)
        # By an index, which PostgreSQL has to be told in a transaction.
        with self.transaction(synced=False):
            self._look_at_clock()
            if monotonic() < self._judges_from:
                return
            # In one statement: of servers that are gone for good there may be thousands.
            held = RawSQL(self._db.sql.first_held, (), BigIntegerField())  # noqa: S611  # of names alone
            dead = list(silent.exclude(pk=self.id).alias(held=held).filter(held__isnull=False))
        more = False
        for lease in dead:
            with self.transaction():
                self._look_at_clock()
                if monotonic() < self._judges_from:
                    # The database was away during this look, or its clock was set: they are silent for that.
                    return
                found = silent.filter(pk=lease.pk, epoch=lease.epoch)
                # It may hang inside of a transaction, which has its lease locked.
                free = found.select_for_update(skip_locked=self._db.skips_locked)
                if free.values_list("pk").first() and found.update(epoch=F("epoch") + 1):
                    more |= self._free_jobs_of(lease)
        if not more:
            self._looked_for_dead = monotonic()

    def _free_jobs_of(self, lease: ServerLease) -> bool:
        """Free a part of its jobs; whether there may be more."""
        self.end_attempts(lease.pk)
        freed = self._free(lease.pk)
        if freed:
            logger.warning(
                "The job server %s was not heard of for %g s: %d of its jobs were freed",
                lease.name,
                self._seconds,
                freed,
            )
        return freed == ADOPTED_AT_ONCE

    def _free(self, lease_id: int, but_of_epoch: int | None = None) -> int:
        """Lay a part of a server's jobs at the door; how many."""
        some = self._held(lease_id, ADOPTED_AT_ONCE, but_of_epoch)
        for start in range(0, len(some), 500):
            self._db.records().filter(pk__in=some[start : start + 500]).update(server=None, server_epoch=None)
        return len(some)

    def _held(self, lease_id: int, limit: int, but_of_epoch: int | None = None) -> list[int]:
        """Ids of so many live jobs of a server, the oldest first."""
        but = -1 if but_of_epoch is None else but_of_epoch
        return [id for (id,) in self._db.execute(self._db.sql.held, [lease_id, but, limit])]

    def end_attempts(self, lease_id: int) -> None:
        """The server ended: foreground jobs ended with it, background ones that ran wait again."""
        sql, now = self._db.sql, self._now()
        # The clients of foreground jobs left with it.
        self._db.execute(sql.end_running, [now, lease_id])
        self._db.execute(sql.end_waiting, [now, lease_id])
        self._db.execute(sql.keep_interrupted, [now, lease_id])
        self._db.execute(sql.interrupt, [lease_id])

    def _now(self) -> Any:
        """This machine's time, as the driver takes it."""
        return self._db.fields["run_after"].get_db_prep_value(timezone.now(), self._db.connection)


def _compare_clocks(began: float, now: float) -> None:
    """
    Warn of a clock that is wrong, ours or the database's.

    Args:
        began: Our time before the database was asked.
        now: Its time then, which may be a while ago.
    """
    ahead = began - now
    behind = now - time()
    if max(ahead, behind) > CLOCKS_APART:
        logger.warning(
            "The clock of this machine is %.0f s %s that of the database: schedules and jobs for later begin "
            "when it is time by the clock of the job server that looks, so keep all clocks right",
            max(ahead, behind),
            "ahead of" if ahead > behind else "behind",
        )
