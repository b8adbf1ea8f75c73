"""
When a schedule is due: cron expressions and intervals, and what follows when times were missed.

Pure: no rows, no settings, no clock. Moments are whole seconds since 1970, so
that neither time zones nor drivers can bend them. Cron expressions are read by
the cronsim library (the ``schedules`` extra), which is imported when one is
looked at and not before. Rows are in ``models.py``, what fires them in
``scheduler.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any, Final, Literal, NamedTuple, Protocol, cast
from zoneinfo import ZoneInfo

from .exceptions import InvalidSchedule, MissingCronsim

CatchUp = Literal["none", "one", "all"]
CATCH_UPS: Final = ("none", "one", "all")

LATE: Final = 60
"""Seconds after which a time that nobody saw counts as missed."""

MAX_AT_ONCE: Final = 100
"""Missed times of one schedule that are made up for at once; the next follow at the next look."""

MAX_NAME: Final = 60
"""Characters of the name that tells schedules of one function apart."""

MIN_INTERVAL: Final = timedelta(seconds=1)

MAX_INTERVAL: Final = timedelta(days=36_500)
"""So that the next times are in years that a date can have."""

_WINDOWS: Final = (3600, 6 * 3600, 86_400, 7 * 86_400, 32 * 86_400, 366 * 86_400)
"""Seconds before now in which the last time is looked for, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A schedule as ``@job(schedule=...)`` declares it; made by ``cron`` and ``every``."""

    cron: str = ""
    """Five fields; empty for an interval."""

    interval: timedelta | None = None

    tz: str = ""
    """IANA name of the zone that the cron means; empty for the site's ``TIME_ZONE``."""

    catch_up: CatchUp = "one"
    """What becomes of times at which no server was up: see ``due_times``."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the function is called with."""

    name: str = ""
    """Tells the schedules of one function apart; empty for the only one."""

    def row_name(self, function: str) -> str:
        """The name of its row."""
        return f"{function}:{self.name}" if self.name else function


def cron(
    expression: str,
    /,
    *,
    tz: str = "",
    catch_up: CatchUp = "one",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str = "",
) -> Declaration:
    """
    A schedule by the five fields of cron: minute, hour, day of month, month, day of week.

    What is wrong with it, ``manage.py check`` tells. Needs the ``schedules`` extra.

    Args:
        tz: Time zone whose clock is meant, such as "Europe/Paris"; the site's ``TIME_ZONE`` by default.
        catch_up: After times at which no server was up: "none" goes on with the next, "one" makes up
            for them with one job, "all" with one each.
        args: What the function is called with, as JSON can carry it.
        kwargs: The same, by name.
        name: Tells several schedules of one function apart.
    """
    return Declaration(
        cron=expression, tz=tz, catch_up=catch_up, args=tuple(args), kwargs=dict(kwargs or {}), name=name
    )


def every(
    interval: timedelta,
    /,
    *,
    catch_up: CatchUp = "one",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str = "",
) -> Declaration:
    """
    A schedule by an interval, of whole seconds; the first time is one interval after it becomes known.

    Clocks that are put forward or back in summer and autumn make no difference. The arguments are
    those of ``cron``.
    """
    return Declaration(
        interval=interval, catch_up=catch_up, args=tuple(args), kwargs=dict(kwargs or {}), name=name
    )


def declarations(declared: object) -> tuple[Declaration, ...]:
    """
    What ``@job(schedule=...)`` was given, as a tuple.

    Raises:
        InvalidSchedule: It is no schedule, or two have the same name.
    """
    if declared is None:
        return ()
    several = tuple(declared) if isinstance(declared, list | tuple) else (declared,)
    for each in several:
        if not isinstance(each, Declaration):
            raise InvalidSchedule(
                f"schedule must be cron(...) or every(...), or a list of these, not {each!r}"
            )
        name: object = each.name
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
            raise InvalidSchedule(f"a schedule's name is up to {MAX_NAME} printable characters, not {name!r}")
        if each.catch_up not in CATCH_UPS:
            raise InvalidSchedule(f"catch_up is 'none', 'one' or 'all', not {each.catch_up!r}")
    names = [each.name for each in several]
    if len(set(names)) < len(names):
        raise InvalidSchedule(
            "schedules of one function must have different names: cron(..., name='nightly')"
        )
    return several


class Timing(Protocol):
    """Which moments a schedule names."""

    def next_after(self, moment: int, planned: int | None) -> int:
        """
        The first time after ``moment``.

        Args:
            planned: A time that it had before; None for none.
        Raises:
            InvalidSchedule: There is none.
        """

    def last_until(self, moment: int, planned: int) -> int:
        """The last time that is not after ``moment``; ``planned`` is one."""


@dataclass(frozen=True)
class IntervalTiming:
    """Times at equal distances, whatever the clocks on the walls show."""

    seconds: int

    def next_after(self, moment: int, planned: int | None) -> int:
        if planned is None:
            return moment + self.seconds
        return planned + ((moment - planned) // self.seconds + 1) * self.seconds

    def last_until(self, moment: int, planned: int) -> int:
        return planned + (moment - planned) // self.seconds * self.seconds


@dataclass(frozen=True)
class CronTiming:
    """
    The times that a cron expression names on the clocks of a time zone.

    As Debian's cron does: where clocks are put forward, a fixed time that is
    left out counts as the moment of the change; where they are put back, the
    first of two counts. Expressions whose minute or hour begins with ``*``
    follow the time that passes, so that ``*/5 * * * *`` is five minutes always.
    """

    expression: str
    zone: tzinfo

    def next_after(self, moment: int, planned: int | None = None) -> int:
        for found in self._after(moment):
            return found
        raise InvalidSchedule(f"the cron {self.expression!r} names no time that will come")

    def last_until(self, moment: int, planned: int) -> int:
        for window in _WINDOWS:
            if moment - window <= planned:
                break
            last = self._last(moment - window, moment)
            if last is not None:
                return last
        return self._last(planned, moment) or planned

    def _last(self, after: int, until: int) -> int | None:
        last = None
        for found in self._after(after):
            if found > until:
                break
            last = found
        return last

    def _after(self, moment: int) -> Iterator[int]:
        """All times after a moment, in order."""
        try:
            yield from self._as_time_passes(moment) if self._passes else self._on_the_clock(moment)
        except (OverflowError, ValueError):
            return  # the year 9999

    @property
    def _passes(self) -> bool:
        """Whether it follows the time that passes."""
        return any(field.startswith("*") for field in self.expression.split()[:2])

    def _on_the_clock(self, moment: int) -> Iterator[int]:
        last = moment
        for found in cronsim().CronSim(self.expression, datetime.fromtimestamp(moment, self.zone)):
            at = int(found.timestamp())
            # Of an hour that comes twice, cronsim may name the first while it is the second.
            if at > last:
                last = at
                yield at

    def _as_time_passes(self, moment: int) -> Iterator[int]:
        # Told the zone, cronsim skips the day where a midnight is left out, and half an hour where that
        # comes twice. So it is not told, and asked anew where clocks change, from what they show then.
        change: int | None = moment
        while change is not None:
            last = change
            offset = self._offset(last)
            # Of a change itself, too.
            start = last if last == moment else last - 1
            shown = datetime.fromtimestamp(start + offset, UTC).replace(tzinfo=None)
            for found in cronsim().CronSim(self.expression, shown):
                at = int(found.replace(tzinfo=UTC).timestamp()) - offset
                change = self._change(last, at)
                if change is not None:
                    break
                last = at
                yield at
            else:
                return

    def _change(self, after: int, until: int) -> int | None:
        """The first moment of the two that clocks are put forward or back, which may be the last; or None."""
        offset = self._offset(after)
        while after < until:
            before, after = after, min(after + 86_400, until)
            if self._offset(after) != offset:
                while after - before > 1:
                    middle = (before + after) // 2
                    if self._offset(middle) == offset:
                        before = middle
                    else:
                        after = middle
                return after
        return None

    def _offset(self, moment: int) -> int:
        """Seconds by which clocks are ahead of UTC."""
        offset = datetime.fromtimestamp(moment, self.zone).utcoffset()
        assert offset is not None, "a zone has one"
        return int(offset.total_seconds())


def timing(expression: str, interval: timedelta | None, zone: str) -> Timing:
    """
    What a schedule's three columns mean.

    Args:
        zone: IANA name; not used by intervals.
    Raises:
        InvalidSchedule: They mean nothing; the sentence says which, and why.
    """
    if bool(expression) == (interval is not None):
        raise InvalidSchedule("a schedule has either a cron or an interval")
    if interval is not None:
        if not isinstance(interval, timedelta):
            raise InvalidSchedule(f"an interval is a timedelta, not {interval!r}")
        if interval < MIN_INTERVAL or interval.microseconds:
            raise InvalidSchedule(f"an interval is one second or more, and whole seconds, not {interval}")
        if interval > MAX_INTERVAL:
            raise InvalidSchedule(f"an interval is {MAX_INTERVAL.days} days or less, not {interval}")
        return IntervalTiming(int(interval.total_seconds()))
    made = CronTiming(expression, time_zone(zone))
    check_cron(expression)
    return made


def check_cron(expression: object) -> None:
    """
    Refuse what is no cron expression, or names no time.

    Raises:
        InvalidSchedule: The sentence says why.
        MissingCronsim: The library that reads them is not installed.
    """
    if not isinstance(expression, str) or len(expression.split()) != 5:
        raise InvalidSchedule(
            f"a cron has five fields (minute, hour, day of month, month, day of week), not {expression!r}"
        )
    library = cronsim()
    try:
        next(library.CronSim(expression, datetime(2024, 1, 1, tzinfo=UTC)))
    except (library.CronSimError, RecursionError, ValueError) as error:
        raise InvalidSchedule(f"the cron {expression!r} cannot be read: {error}") from None
    except StopIteration:
        raise InvalidSchedule(f"the cron {expression!r} names no time that will come") from None


def time_zone(name: object) -> ZoneInfo:
    """
    A zone by its IANA name.

    Raises:
        InvalidSchedule: There is none of that name on this machine.
    """
    try:
        return ZoneInfo(cast(str, name))
    except (KeyError, TypeError, ValueError, OSError):
        raise InvalidSchedule(
            f"{name!r} is no time zone that this machine knows; use an IANA name such as 'Europe/Paris'"
        ) from None


def cronsim() -> Any:
    """
    The library that reads cron expressions.

    Raises:
        MissingCronsim: It is not installed.
    """
    if not has_cronsim():
        raise MissingCronsim
    return import_module("cronsim")


def has_cronsim() -> bool:
    return find_spec("cronsim") is not None


class Due(NamedTuple):
    """What follows from a look at a schedule whose time has come."""

    times: list[int]
    """Times to make jobs for, oldest first."""

    next_at: int
    """When to look again; not after now when there was more than fits."""


def due_times(timing: Timing, next_at: int, now: int, catch_up: str) -> Due:
    """
    The times to fire for now, and the next.

    A time is missed when it is more than ``LATE`` seconds ago, or when the next
    has come too. Then "none" leaves it, "one" makes one job for the last of all
    that have come, and "all" makes a job for each.

    Args:
        next_at: The time that was planned; not after ``now``.
    """
    if catch_up == "all":
        times: list[int] = []
        following = next_at
        for following in _times(timing, next_at):
            if following > now or len(times) == MAX_AT_ONCE:
                break
            times.append(following)
        return Due(times, following)
    following = timing.next_after(next_at, next_at)
    if following <= now:
        next_at = timing.last_until(now, next_at)
        following = timing.next_after(now, next_at)
    fires = catch_up == "one" or now - next_at <= LATE
    return Due([next_at] if fires else [], following)


def next_times(timing: Timing, next_at: int, count: int) -> list[int]:
    """A planned time and those that follow it."""
    return list(islice(_times(timing, next_at), count))


def _times(timing: Timing, planned: int) -> Iterator[int]:
    while True:
        yield planned
        planned = timing.next_after(planned, planned)
