"""
A batch of journal entries, folded to what becomes of each row.

Knows no database: the journal's meaning is in ``server/entries.py``, the
rows' in ``models.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..models import unique_key_of
from ..server.entries import (
    Entry,
    JobDue,
    JobFinished,
    JobKept,
    JobLogged,
    JobProgress,
    JobQueued,
    JobRequeued,
    JobStarted,
    JobUnclaimed,
    Joined,
    Outcome,
)
from .columns import (
    AT_DOOR,
    READY,
    RETRYING,
    RUNNING,
    SCHEDULED,
    Row,
    failure_columns,
    moment_of,
    name_of,
    progress_of,
    storable,
    text_of,
    text_of_unique,
)


class Folded:
    """
    A batch as one final state per job, so that each row is written once.

    ``queued`` are rows to insert, ``changed`` the columns to set in rows that
    are there: {handle: {column: value}}. ``attempts`` are those that came to nothing.
    """

    def __init__(self, entries: Sequence[Entry], queue_of: Callable[[str], str]) -> None:
        self.queued: dict[bytes, Row] = {}
        self.changed: dict[bytes, Row] = {}
        self.attempts: list[JobRequeued] = []
        self._queue_of = queue_of
        for entry in entries:
            if type(entry) is JobQueued:
                self.queued[entry.handle] = self._new_row(entry)
            else:
                row = self.queued.get(entry.handle)
                if row is None:
                    row = self.changed.setdefault(entry.handle, {})
                _change(row, entry)
            if type(entry) is JobRequeued and entry.counts:
                self.attempts.append(entry)

    def is_there(self, handle: bytes) -> None:
        """The row was inserted by an earlier attempt; only what happened since is to be written."""
        row = self.queued.pop(handle, None)
        if row is not None and "server" in row:
            # At the door it may have been claimed since, and gone on from there: only its end is news.
            if row["status"] in AT_DOOR:
                return
            row = {name: value for name, value in row.items() if name not in ("server", "server_epoch")}
        if row is not None:
            self.changed.setdefault(handle, {}).update(row)

    def changes_by_columns(self) -> Iterator[tuple[tuple[str, ...], list[tuple[bytes, Row]]]]:
        """The changes, grouped by which columns they set: one statement each."""
        groups: dict[tuple[str, ...], list[tuple[bytes, Row]]] = {}
        for handle, change in self.changed.items():
            groups.setdefault(tuple(sorted(change)), []).append((handle, change))
        yield from groups.items()

    def _new_row(self, entry: JobQueued) -> Row:
        function = entry.function.decode()
        unique = text_of_unique(entry.unique)
        where: Row = {"server": None, "server_epoch": None} if entry.unclaimed else {}
        if entry.limit_key is not None:
            where["limit_key"] = text_of(entry.limit_key)[:64]
        return where | {
            "handle": text_of(entry.handle),
            "function": function,
            "queue_name": self._queue_of(function),
            "unique": unique,
            "unique_key": unique_key_of(function, unique, entry.workload) if entry.background else None,
            "workload": entry.workload,
            "priority": entry.priority,
            "background": entry.background,
            "client": name_of(entry.client),
            "reducer": text_of(entry.reducer) if entry.reducer else "",
            "run_after": moment_of(entry.run_after) if entry.run_after else None,
            "status": SCHEDULED if entry.run_after > entry.at else READY,
            "enqueued_at": moment_of(entry.at),
            "attempts": entry.attempts,
        }


def _change(row: Row, entry: Entry) -> None:
    """What one entry does to its job's row."""
    match entry:
        case JobStarted():
            at = moment_of(entry.at)
            row.update(
                status=RUNNING,
                worker=name_of(entry.worker),
                attempts=entry.attempts,
                last_attempted_at=at,
            )
            if entry.attempts == 1:
                row["started_at"] = at
        case JobProgress():
            row.update(numerator=progress_of(entry.numerator), denominator=progress_of(entry.denominator))
        case JobLogged():
            row["log"] = storable(entry.log.decode(errors="backslashreplace"))
        case JobRequeued():
            # What it logged stays with the attempt.
            row.update(status=READY, numerator=None, denominator=None, log="")
            if not entry.counts:
                row["attempts"] = entry.attempt - 1
            if entry.run_after > entry.at:
                row.update(status=RETRYING, run_after=moment_of(entry.run_after))
            if entry.unclaimed:
                row.update(server=None, server_epoch=None)
        case JobDue():
            row["status"] = READY
        case JobUnclaimed():
            row.update(server=None, server_epoch=None)
        case JobKept():
            row["background"] = True
            row["unique_key"] = _key_of(entry)
        case JobFinished():
            row.update(status=entry.outcome.value, finished_at=moment_of(entry.at), unique_key=None)
            if entry.outcome is Outcome.SUCCESSFUL:
                row["result"] = entry.data
            else:
                row.update(failure_columns(entry))


def _key_of(entry: JobKept) -> str | None:
    return unique_key_of(entry.function.decode(), text_of_unique(entry.unique), entry.workload)


def without_data(entry: Entry, reason: str) -> JobFinished | None:
    """The end of a job whose data the database refuses; None when it is not about that."""
    if not isinstance(entry, JobFinished) or not entry.data:
        return None
    outcome = Outcome.FAILED if entry.outcome is Outcome.SUCCESSFUL else entry.outcome
    told = storable(f"What the worker sent could not be stored: {reason}")
    return entry._replace(outcome=outcome, data=b"", reason=told)


def indexed(joined: dict[bytes, Joined], entries: Sequence[Entry]) -> dict[int, str | Joined]:
    """Which of the entries are the submissions that joined another job."""
    if not joined:
        return {}
    return {
        index: joined[entry.handle]
        for index, entry in enumerate(entries)
        if type(entry) is JobQueued and entry.handle in joined
    }
