"""
What the wire says, as columns hold it, and back: names, uniques, moments, numbers, errors.

No rows and no statements. Pure functions, called for each entry of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from typing import Any, Final

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver

from ..encoding import exception_of
from ..models import JobRecord
from ..server.entries import JobFinished, JobRequeued, Standing

Status = JobRecord.Status
Row = dict[str, Any]
"""{field: value}"""

READY: Final = Status.READY.value
SCHEDULED: Final = Status.SCHEDULED.value
RUNNING: Final = Status.RUNNING.value
RETRYING: Final = Status.RETRYING.value
AT_DOOR: Final = (Status.READY, Status.SCHEDULED, Status.RETRYING)
"""Of a job that no server has, and that is to do."""

_MAX_PROGRESS: Final = 2**63 - 1


def standing_of(status: str, numerator: int | None, denominator: int | None) -> Standing:
    return Standing(status == RUNNING, b"%d" % (numerator or 0), b"%d" % (denominator or 0))


def text_of(data: bytes) -> str:
    """Bytes from the wire as a text column takes them: what is no UTF-8 and NULs are shown, not kept."""
    return data.decode(errors="backslashreplace").replace("\0", "\\0")


@lru_cache(maxsize=1_000)
def name_of(peer: bytes) -> str:
    """A client or worker as its column takes it; many entries are of the same."""
    return text_of(peer)[:128]


def text_of_unique(unique: bytes) -> str:
    """
    A unique as its column keeps it: UTF-8 text, and any other bytes so that they come back whole.

    The others are written as Latin-1 behind U+0001, NUL as U+0100: PostgreSQL's texts have none.
    """
    if not unique.startswith(b"\x01") and b"\0" not in unique:
        try:
            return unique.decode()
        except UnicodeDecodeError:
            pass
    return "\x01" + unique.decode("latin-1").replace("\0", "\u0100")


def bytes_of_unique(text: str) -> bytes:
    """What ``text_of_unique`` was given."""
    if text.startswith("\x01"):
        return text[1:].replace("\u0100", "\0").encode("latin-1")
    return text.encode()


@lru_cache(maxsize=1_000)
def moment_of(seconds: float) -> datetime:
    """As Django has it. A turn of the loop gives the same moment to many entries."""
    return datetime.fromtimestamp(seconds, UTC if settings.USE_TZ else None)


@receiver(setting_changed)
def _forget_moments(*, setting: str, **kwargs: Any) -> None:
    if setting in ("USE_TZ", "TIME_ZONE"):
        moment_of.cache_clear()


def seconds_of(moment: datetime | str | None, zone: tzinfo = UTC) -> float:
    """
    A moment as a driver gives it, in seconds since 1970; 0 for none. ``moment_of`` turned around.

    Args:
        zone: Of a database that keeps none with its moments, while ``USE_TZ`` is on.
    """
    if moment is None:
        return 0.0
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    if moment.tzinfo is None and settings.USE_TZ:
        moment = moment.replace(tzinfo=zone)
    try:
        return moment.timestamp()
    except (OverflowError, ValueError):
        # Of the first day that a naive one can have, or the last, local time may be of a year that none has.
        return moment.replace(tzinfo=UTC).timestamp()


def progress_of(number: bytes) -> int | None:
    """A worker's number as a column can hold it; None when it is no number."""
    try:
        return max(-_MAX_PROGRESS, min(_MAX_PROGRESS, int(float(number[:40]))))
    except (ValueError, OverflowError):
        return None


def storable(text: str) -> str:
    """Text as a column takes it; JSON can write NULs, and halves of characters, which are shown, not kept."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def failure_columns(entry: JobFinished | JobRequeued) -> Row:
    """The three columns that say why an attempt failed, from what the worker or the server told."""
    if not entry.data:
        return {"exception": "", "message": entry.reason, "traceback": ""}
    told = exception_of(entry.data)
    return {
        "exception": storable(told["exception"])[:512],
        "message": storable(told["message"]),
        "traceback": storable(told["traceback"]),
    }


def in_parts(keys: list[str]) -> Iterator[list[str]]:
    """As many as every database takes as parameters of one statement."""
    for start in range(0, len(keys), 500):
        yield keys[start : start + 500]
