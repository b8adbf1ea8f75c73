"""
Limits as rows: what the code and operators allow, and who has which permits.

How permits are given is in ``permits.py``; here is what locks a row, what it
says, and which servers still have theirs. What a row is, is in ``models.py``.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from django.db.models import F, QuerySet

from .declarations import DeclaredRows
from .models import FunctionLimit, LimitUse, ServerLease
from .permits import GRACE, Granted, Limit, Request, Use

logger = logging.getLogger(__name__)

SWEEP_INTERVAL: Final = 60.0
"""Seconds between two looks for uses that are over."""

SWEPT_AT_ONCE: Final = 200


class Asked(NamedTuple):
    """A server's request about one function."""

    number: int
    function: str
    request: Request


class LeaseNow(NamedTuple):
    """A lease as it stands, by the database's clock."""

    epoch: int
    started_at: float
    is_silent: bool
    """Whether it has run out."""


class Permits:
    """
    The permits of one server's run, in the database's rows; in the caller's transactions.

    Args:
        using: Alias of the database.
        leases: The leases of some servers, and the database's clock in seconds since 1970.
    """

    def __init__(
        self, using: str, leases: Callable[[Iterable[int]], tuple[dict[int, LeaseNow], float]]
    ) -> None:
        self._using = using
        self._leases = leases
        self.limits: dict[str, Limit] = {}

    def look(self) -> dict[bytes, Limit]:
        """Every limit that is in force now."""
        limits = {}
        for row in FunctionLimit.objects.using(self._using).filter(enabled=True, withdrawn=False):
            try:
                limits[row.function] = row.limit
            except ValueError as error:
                # Not by the admin, which would have refused it.
                logger.error("The limit of %s is not kept until it is mended: %s", row.function, error)
        self.limits = limits
        return {name.encode(): limit for name, limit in limits.items()}

    def decide(self, lease: int, epoch: int, asked: Sequence[Asked], clock: float) -> dict[int, Granted]:
        """
        Answer requests, in a transaction that ends soon.

        Args:
            lease: Id of the server's.
            clock: The server's monotonic time.
        Returns:
            {number of a request: the answer}.
        """
        digests = {each.number: _digest(each.function, each.request.key) for each in asked}
        rows = self._locked(list(digests.values()))
        missing = {digests[each.number]: each for each in asked if digests[each.number] not in rows}
        if missing:
            LimitUse.objects.using(self._using).bulk_create(
                [
                    LimitUse(digest=digest, function=it.function, key=_text(it.request.key), touched=0.0)
                    for digest, it in sorted(missing.items())
                ],
                ignore_conflicts=True,
            )
            rows |= self._locked(list(missing))
        uses = {digest: Use.load(row.book) for digest, row in rows.items()}
        # Only now: what others have written before they let go of the rows is older.
        leases, now = self._leases(_holders(uses.values()))
        is_alive = self._is_alive(lease, leases, now)
        me = f"{lease}.{epoch}"
        answers: dict[int, Granted] = {}
        for each in asked:
            row = rows[digests[each.number]]
            use = uses[digests[each.number]]
            limit = self.limits.get(each.function, Limit())
            answers[each.number] = use.decide(limit, me, each.request, now, clock, is_alive)
            row.book, row.touched = use.dump(), now
            self._uses().filter(pk=row.pk).update(book=row.book, touched=now)
        return answers

    def sweep(self, lease: int) -> None:
        """Delete uses that are over, in a transaction that ends soon."""
        _, now = self._leases([])
        longest = max((limit.period for limit in self.limits.values()), default=0.0)
        old = self._uses().filter(touched__lt=now - max(longest, SWEEP_INTERVAL)).order_by("touched")
        digests = list(old.values_list("digest", flat=True)[:SWEPT_AT_ONCE])
        over: list[int] = []
        others: list[int] = []
        rows = self._locked(digests)
        uses = {digest: Use.load(row.book) for digest, row in rows.items()}
        leases, now = self._leases(_holders(uses.values()))
        is_alive = self._is_alive(lease, leases, now)
        for digest, row in rows.items():
            use = uses[digest]
            use.drop_dead(is_alive, now)
            limit = self.limits.get(row.function, Limit())
            (over if use.is_over(limit, now) else others).append(row.pk)
        self._uses().filter(pk__in=over).delete()
        # Their turn comes again.
        self._uses().filter(pk__in=others).update(touched=now)

    def _is_alive(self, mine: int, leases: Mapping[int, LeaseNow], now: float) -> Callable[[str], bool]:
        def is_alive(name: str) -> bool:
            lease, _, epoch = name.partition(".")
            known = leases.get(int(lease))
            if known is None:
                return False
            if int(epoch) != known.epoch:
                # It was started again, or it was silent and others have its jobs.
                return int(epoch) == known.epoch - 1 and 0 <= now - known.started_at < GRACE
            if not known.is_silent or int(lease) == mine:
                return True
            # Should it only have been asleep, it can write nothing any more.
            rows = ServerLease.objects.using(self._using).filter(pk=int(lease), epoch=known.epoch)
            return not rows.update(epoch=F("epoch") + 1)

        return is_alive

    def _locked(self, digests: list[str]) -> dict[str, LimitUse]:
        rows = self._uses().select_for_update().filter(digest__in=digests).order_by("digest")
        return {row.digest: row for row in rows}

    def _uses(self) -> QuerySet[LimitUse]:
        return LimitUse.objects.using(self._using)


def _holders(uses: Iterable[Use]) -> set[int]:
    """Ids of the leases of servers that have permits."""
    return {int(name.partition(".")[0]) for use in uses for name in use.holders}


def _digest(function: str, key: bytes) -> str:
    return hashlib.sha256(function.encode() + b"\0" + key).hexdigest()


def _text(key: bytes) -> str:
    return key.decode(errors="replace").replace("\0", "\ufffd")[:64]


class Standing(NamedTuple):
    """What is in use of one key; of all jobs together where there are none."""

    key: str
    held: int
    """Permits."""

    begun: int
    """Jobs that began in the last period."""


def standings(rows: Sequence[FunctionLimit], now: float) -> dict[str, list[Standing]]:
    """
    What is in use of some limits of one database, as far as the servers have told it.

    Args:
        now: Seconds since 1970.
    Returns:
        {function: what is in use of each key}.
    """
    found: dict[str, list[Standing]] = {row.function: [] for row in rows}
    limits: dict[str, Limit] = {}
    for row in rows:
        try:
            limits[row.function] = row.limit
        except ValueError:
            limits[row.function] = Limit()
    if rows:
        for use in LimitUse.objects.using(rows[0]._state.db).filter(function__in=list(found)):
            if use.function in found:
                counts = Use.load(use.book).count(limits[use.function], now)
                found[use.function].append(Standing(use.key, *counts))
    return found


# What the code says.


class _Limits(DeclaredRows[FunctionLimit]):
    model = FunctionLimit
    key = "function"
    title = "The limit of %s"
    merged = (("rate",), ("concurrency",), ("by_key",))

    def mend(self, row: FunctionLimit) -> None:
        if not row.rate and row.concurrency is None:
            # Together they would allow everything, which is no limit.
            self.reset(row)


_LIMITS: Final = _Limits()
synchronise = _LIMITS.synchronise
reset = _LIMITS.reset
is_edited = _LIMITS.is_edited
