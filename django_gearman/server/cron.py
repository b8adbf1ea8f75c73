"""
The five fields of SUBMIT_JOB_SCHED: which moment they name next.

A packet names one moment, so all five must match: the protocol says "run job at
given time", and what no packet can take back does not repeat. Empty and ``*``
mean every; a field may be a number, a range ``1-5``, a step ``*/15`` and a list
of these, as in cron. Days of the week count from Monday, as the protocol's do
and cron's do not. PROTOCOL: SUBMIT_JOB_SCHED.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import MAXYEAR, date, datetime, tzinfo
from typing import Final

FIELDS: Final = (
    ("Minute", 0, 59),
    ("Hour", 0, 23),
    ("Day of month", 1, 31),
    ("Month", 1, 12),
    ("Day of week", 0, 6),
)
"""Name, lowest and highest number of each, in the packet's order."""

_YEARS: Final = 41
"""How far to look: 29 February falls on each day of the week within these, also over a year 2100."""

_MAX_FIELD: Final = 200
"""Bytes of the longest field: more than every number of it."""


def next_match(fields: Sequence[bytes], after: float, zone: tzinfo | None = None) -> float:
    """
    The first moment after ``after`` that all fields match.

    Where clocks are put forward, a time that is left out counts as the one
    shown then; where they are put back, the first of two counts, if it is yet to come.

    Args:
        fields: Minute, hour, day of month, month and day of week.
        after: Seconds since 1970.
        zone: Whose clock the fields mean; None for this machine's.
    Returns:
        Seconds since 1970.
    Raises:
        ValueError: A field is none, or no day has them all; the sentence names it.
    """
    minutes, hours, days, months, weekdays = (
        _numbers(field, *limits) for field, limits in zip(fields, FIELDS, strict=True)
    )
    start = datetime.fromtimestamp(after, zone)
    for year in range(start.year, min(start.year + _YEARS, MAXYEAR + 1)):
        for month in months:
            for day in days:
                if (year, month, day) < (start.year, start.month, start.day):
                    continue
                try:
                    weekday = date(year, month, day).weekday()
                except ValueError:
                    continue  # the month is shorter
                if weekday not in weekdays:
                    continue
                # Of today the hour before may come a second time.
                first = start.hour - 1 if date(year, month, day) == start.date() else 0
                for hour in hours:
                    if hour < first:
                        continue
                    for fold in (0, 1):
                        for minute in minutes:
                            wall = datetime(year, month, day, hour, minute, tzinfo=zone, fold=fold)
                            if wall.timestamp() > after:
                                return wall.timestamp()
    raise ValueError("No day has that day of month, month and day of week")


def _numbers(field: bytes, name: str, lowest: int, highest: int) -> list[int]:
    """The numbers that a field names, in order."""
    if not field or field == b"*":
        return list(range(lowest, highest + 1))
    wrong = ValueError(f"{name} is *, numbers from {lowest} to {highest}, ranges and steps of these")
    if len(field) > _MAX_FIELD:
        raise wrong
    found: set[int] = set()
    for part in field.split(b","):
        span, slash, step = part.partition(b"/")
        low, dash, high = (b"%d" % lowest, b"-", b"%d" % highest) if span == b"*" else span.partition(b"-")
        if slash and not dash:
            high = b"%d" % highest
        elif not dash:
            high = low
        numbers = [low, high, step if slash else b"1"]
        if not all(number.isdigit() and len(number) <= 4 for number in numbers):
            raise wrong
        begin, end, stride = map(int, numbers)
        if not lowest <= begin <= end <= highest or not stride:
            raise wrong
        found.update(range(begin, end + 1, stride))
    return sorted(found)
