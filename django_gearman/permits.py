"""
How many jobs of a limited function may run, and begin, over all servers.

A ``Use`` is the book of one function and key: which server has how many
permits, and when jobs were begun. A store keeps it, one row for each, and
changes it by ``decide`` alone while nobody else can: so limits are exact
whatever the number of servers. Nothing is added up: a server tells each time
how many permits it has, and what it says again is not counted twice, so that
a transaction with an unknown outcome does no harm.

Never more starts than N in any period: a permit that was given and not yet
used counts as a start that happens now, and a start counts from when it
happened. Whoever is given a permit sees all starts of the last period, so the
last one of any N + 1 could not have been given.

Pure: no clock, no rows. Times are seconds of one clock, the store's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

EXACT: Final = 1_000
"""Starts that are kept one by one; of more, neighbours count from the last of them, so never more."""

TURN: Final = 1.0
"""Seconds for which a server may take permits again and again while another has none."""

RESOLUTION: Final = 0.002
"""Seconds by which a start counts as later: SQLite's clock tells whole milliseconds."""

STILL_WAITS: Final = 3.0
"""Seconds after its last request in which a server counts as waiting."""

ASK_AGAIN: Final = 0.25
"""Seconds after which a server asks again that others were in the way of; they do not tell when they end."""


GRACE: Final = 10.0
"""Seconds for which the permits of a server that was started again stay in use: its workers may be at it."""

MOST: Final = 1_000_000
"""The largest numbers that a limit may have."""

LONGEST: Final = 366 * 86_400
"""Seconds of the longest period."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_RATE: Final = re.compile(r"([0-9]{1,9})/([0-9]{0,6})([smhd])")


def parse_rate(rate: str) -> tuple[int, int]:
    """
    How many, and in how many seconds: ``10/m``, ``5/30s``.

    Raises:
        ValueError: It says something else.
    """
    match = _RATE.fullmatch(rate.strip())
    if match is not None:
        count, period = int(match[1]), int(match[2] or "1") * _UNITS[match[3]]
        if 1 <= count <= MOST and 1 <= period <= LONGEST:
            return count, period
    raise ValueError(
        f"{rate!r} is no rate: a whole number from 1 to {MOST:,}, a slash, and s, m, h or d, with a number "
        'before it for several of them, such as "10/m" or "5/30s"'
    )


class Limit(NamedTuple):
    """What is allowed of one function, or of each of its keys."""

    rate: int | None = None
    """How many may begin in any ``period``; None for no such limit."""

    period: float = 60.0
    """Seconds."""

    concurrency: int | None = None
    """How many may run at once; None for no such limit."""

    keyed: bool = False
    """Whether it holds for each key by itself."""


class Request(NamedTuple):
    """What a server says of its permits of one key, and how many more it could use at once."""

    key: bytes
    held: int
    """Permits that it has."""

    unused: int
    """Those of them whose jobs have not begun."""

    wanted: int
    started: tuple[tuple[int, float], ...] = ()
    """(number, the server's monotonic time) of each job that began since it was last heard; numbers rise."""


class Granted(NamedTuple):
    """The answer to a request."""

    permits: int
    """How many more it has now."""

    again_in: float = math.inf
    """Seconds after which to ask again for the rest; infinite where only its own jobs are in the way."""


class Holder:
    """What one run of one server has of a key."""

    __slots__ = ("asked_at", "held", "told", "turn_at", "unused", "waits_since")

    def __init__(self) -> None:
        self.held = 0
        self.unused = 0
        self.told = 0
        """Number of the last start that it told."""
        self.asked_at = 0.0
        self.waits_since: float | None = None
        """Since when it wants a permit and has none."""
        self.turn_at: float | None = None
        """Since when it takes permits."""


class Use:
    """The book of one function and key."""

    __slots__ = ("holders", "starts")

    def __init__(self) -> None:
        self.holders: dict[str, Holder] = {}
        """{name of a run of a server: what it has}"""
        self.starts: list[tuple[float, int]] = []
        """(when, how many) of the last period, the oldest first."""

    def is_over(self, limit: Limit, now: float) -> bool:
        """Whether nothing would be lost with it."""
        self._forget_starts(limit, now)
        return not self.starts and not any(h.held or h.waits_since is not None for h in self.holders.values())

    def drop_dead(self, is_alive: Callable[[str], bool], now: float) -> None:
        """Take their permits from runs of servers that are no more."""
        for name in [name for name in self.holders if not is_alive(name)]:
            # Perhaps it used them in its last moment.
            unused = self.holders.pop(name).unused
            if unused:
                self.starts.append((now, unused))

    def count(self, limit: Limit, now: float) -> tuple[int, int]:
        """Permits that are in use, and starts of the last period."""
        self._forget_starts(limit, now)
        return sum(holder.held for holder in self.holders.values()), sum(n for _, n in self.starts)

    def decide(
        self,
        limit: Limit,
        me: str,
        request: Request,
        now: float,
        clock: float,
        is_alive: Callable[[str], bool],
    ) -> Granted:
        """
        Write down what a server says, and give it what there is.

        Args:
            me: Name of the server's run.
            clock: The server's monotonic time, as of ``Request.started``.
            is_alive: Whether jobs of a run may still run under its permits.
        """
        self.drop_dead(lambda name: name == me or is_alive(name), now)
        mine = self.holders.setdefault(me, Holder())
        self._mend_clock(now)
        self._note_starts(mine, request, now, clock)
        self._forget_starts(limit, now)
        others = [holder for holder in self.holders.values() if holder is not mine]
        wanted = request.wanted
        again_in = math.inf
        mine.asked_at = now
        if wanted and self._must_yield(mine, others, now):
            wanted, again_in = 0, ASK_AGAIN
        given = wanted
        if limit.concurrency is not None:
            taken = sum(holder.held for holder in others)
            given = min(given, limit.concurrency - taken - request.held)
            if given < wanted and taken:
                again_in = ASK_AGAIN
        if limit.rate is not None:
            begun = sum(count for _, count in self.starts)
            unused = sum(holder.unused for holder in others)
            given = min(given, limit.rate - begun - unused - request.unused)
            if given < wanted:
                again_in = min(again_in, self._rate_allows_in(limit, now))
        given = max(given, 0)
        mine.held = request.held + given
        mine.unused = request.unused + given
        self._note_turn(mine, request, given, now)
        if not (mine.held or mine.unused or request.wanted):
            mine.waits_since = mine.turn_at = None
        return Granted(given, again_in if given < request.wanted else math.inf)

    def _mend_clock(self, now: float) -> None:
        """What lies in the future, because the clock was set back, counts from now: turns would not end."""
        for holder in self.holders.values():
            if holder.waits_since is not None:
                holder.waits_since = min(holder.waits_since, now)
            if holder.turn_at is not None:
                holder.turn_at = min(holder.turn_at, now)
            holder.asked_at = min(holder.asked_at, now)

    def _note_starts(self, mine: Holder, request: Request, now: float, clock: float) -> None:
        new = []
        for number, at in request.started:
            if number > mine.told:
                mine.told = number
                new.append((now - max(clock - at, 0.0) + RESOLUTION, 1))
        if new:
            self.starts = sorted([*self.starts, *new])

    def _forget_starts(self, limit: Limit, now: float) -> None:
        if limit.rate is None:
            self.starts = []
            return
        # What a clock that was set back makes late counts from now.
        starts = [(min(at, now + RESOLUTION), count) for at, count in self.starts if at > now - limit.period]
        if len(starts) > EXACT:
            slots: dict[float, tuple[float, int]] = {}
            for at, count in starts:
                slot = at * EXACT // limit.period
                last, before = slots.get(slot, (at, 0))
                slots[slot] = max(last, at), before + count
            starts = list(slots.values())
        self.starts = starts

    def _rate_allows_in(self, limit: Limit, now: float) -> float:
        """Seconds until a start is a period ago; those that are not yet used may be given back sooner."""
        if not self.starts:
            return ASK_AGAIN
        return max(self.starts[0][0] + limit.period - now, 0.0) + 0.001

    def _must_yield(self, mine: Holder, others: list[Holder], now: float) -> bool:
        """Whether another server has had nothing for so long that it is its turn."""
        waits = [
            holder.waits_since
            for holder in others
            if holder.waits_since is not None and now - holder.asked_at < STILL_WAITS
        ]
        if not waits:
            return False
        first = min(waits)
        if mine.waits_since is not None and mine.waits_since <= first:
            return False
        began = mine.turn_at
        return now - first > TURN and (began is None or now - began > TURN)

    def _note_turn(self, mine: Holder, request: Request, given: int, now: float) -> None:
        if given:
            if mine.waits_since is not None or mine.turn_at is None:
                mine.turn_at = now
            mine.waits_since = None
        elif request.wanted and not mine.held:
            if mine.waits_since is None:
                mine.waits_since = now
            mine.turn_at = None
        elif not request.wanted:
            mine.waits_since = None

    # As text, for a column.

    def dump(self) -> str:
        holders = {
            name: [it.held, it.unused, it.told, it.asked_at, it.waits_since, it.turn_at]
            for name, it in self.holders.items()
        }
        return json.dumps({"holders": holders, "starts": self.starts}, separators=(",", ":"))

    @classmethod
    def load(cls, text: str) -> Use:
        use = cls()
        if text:
            told: dict[str, Any] = json.loads(text)
            use.starts = [(at, count) for at, count in told["starts"]]
            for name, columns in told["holders"].items():
                holder = use.holders[name] = Holder()
                (
                    holder.held,
                    holder.unused,
                    holder.told,
                    holder.asked_at,
                    holder.waits_since,
                    holder.turn_at,
                ) = columns
        return use


class Book:
    """The uses of all functions and keys, in memory: for servers without a store, and stores without rows."""

    def __init__(self) -> None:
        self.limits: dict[bytes, Limit] = {}
        self.uses: dict[tuple[bytes, bytes], Use] = {}
        self._sweep_at = 1_000

    def decide(
        self,
        function: bytes,
        request: Request,
        me: str,
        now: float,
        clock: float,
        is_alive: Callable[[str], bool] = lambda name: True,
    ) -> Granted:
        limit = self.limits.get(function, Limit())
        use = self.uses.get((function, request.key))
        if use is None:
            if len(self.uses) >= self._sweep_at:
                self._sweep(now)
            use = self.uses[function, request.key] = Use()
        granted = use.decide(limit, me, request, now, clock, is_alive)
        if use.is_over(limit, now):
            del self.uses[function, request.key]
        return granted

    def _sweep(self, now: float) -> None:
        """Forget those whose starts are long ago."""
        for key, use in list(self.uses.items()):
            if use.is_over(self.limits.get(key[0], Limit()), now):
                del self.uses[key]
        self._sweep_at = max(1_000, 2 * len(self.uses))
