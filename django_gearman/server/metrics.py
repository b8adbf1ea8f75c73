"""
What has happened, counted, and the page that tells Prometheus.

Counting costs an addition where it happens; nothing is formatted before
somebody asks. The page is Prometheus's text format, version 0.0.4: no client
library is needed to write it. No sockets here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Final

from .. import __version__
from .entries import Outcome

if TYPE_CHECKING:
    from .core import JobServer
    from .jobs import Function
    from .journal import Journal

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LISTED: Final = 500
"""Functions on the page, those that came first: strangers may make up names without end."""

SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0)
COMMIT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0)
BATCH_ENTRIES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)


class Histogram:
    """How often a number was at most each of the bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bound those above the one before; the last is of all that is above the last bound."""
        self.total = 0.0

    def note(self, number: float) -> None:
        self.counts[bisect_left(self.bounds, number)] += 1
        self.total += number


class Counts:
    """What has become of one function's jobs since the server started."""

    __slots__ = ("otherwise", "ran", "retried", "started", "submitted", "successful", "waited")

    def __init__(self) -> None:
        self.submitted = 0
        """Jobs that clients submitted, or that came from the database."""
        self.started = 0
        """Jobs handed to workers, each time anew."""
        self.retried = 0
        """Attempts that came to nothing and were not the last."""
        self.successful = 0
        """Jobs that ended so; apart, since to look an enum up costs more than to count."""
        self.otherwise = dict.fromkeys(Outcome, 0)
        """How many ended otherwise, by how."""
        self.waited: Histogram | None = None
        """Seconds from when a job could be run until a worker had it; None until the first."""
        self.ran: Histogram | None = None
        """Seconds that a worker had a job, until its end."""

    @property
    def finished(self) -> dict[Outcome, int]:
        """How many jobs ended, by how."""
        return self.otherwise | {Outcome.SUCCESSFUL: self.successful}


class StoreCounts:
    """How the journal's trips to the store went."""

    __slots__ = ("commit_seconds", "entries", "failures")

    def __init__(self) -> None:
        self.commit_seconds = Histogram(COMMIT_SECONDS)
        self.entries = Histogram(BATCH_ENTRIES)
        self.failures = 0
        """Trips in vain: the store was out of reach."""


class Page:
    """The metrics of one server, told from its core and its journal."""

    def __init__(self, core: JobServer, journal: Journal | None, started_at: float) -> None:
        self._core = core
        self._journal = journal
        self._started_at = started_at

    def text(self) -> bytes:
        """All of it as it is now; ``core.now`` and ``core.clock`` are the present."""
        return "".join(self._lines()).encode()

    def _lines(self) -> Iterator[str]:
        core = self._core
        yield from _family(
            "info", "gauge", "What this is.", [({"version": __version__, "server": core.options.name}, 1)]
        )
        yield from _family(
            "start_time_seconds", "gauge", "When it started, in seconds since 1970.", [({}, self._started_at)]
        )
        yield from _family(
            "connections", "gauge", "Connections of clients and workers.", [({}, len(core.peers))]
        )
        workers = [peer for peer in core.peers if peer.abilities]
        yield from _family("workers", "gauge", "Connections that offer a function.", [({}, len(workers))])
        busy = sum(bool(peer.running) for peer in workers)
        yield from _family("workers_busy", "gauge", "Workers that have a job.", [({}, busy)])
        yield from self._functions()
        yield from self._limits()
        if self._journal is not None:
            yield from self._store(self._journal)

    def _functions(self) -> Iterator[str]:
        core = self._core
        listed = list(core.functions.values())[:LISTED]
        rows = [({"function": function.name.decode()}, function) for function in listed]
        known = len(core.functions)
        yield from _family("functions", "gauge", "Functions that the server knows.", [({}, known)])
        yield from _family(
            "functions_unlisted", "gauge", "Functions left out below.", [({}, known - len(rows))]
        )
        yield from _family(
            "function_workers",
            "gauge",
            "Workers that offer the function.",
            [(label, len(function.workers)) for label, function in rows],
        )
        yield from _family(
            "jobs",
            "gauge",
            "Jobs to be written, for later, waiting, running; those that only the database has too.",
            [
                (label | {"state": state}, count)
                for label, function in rows
                for state, count in _states(function).items()
            ],
        )
        counters = {
            "submitted": "Jobs that came, from clients and from the database.",
            "started": "Jobs handed to workers, each attempt.",
            "retried": "Attempts that came to nothing and were not the last.",
        }
        for name, meaning in counters.items():
            yield from _family(
                f"jobs_{name}_total",
                "counter",
                meaning,
                [(label, getattr(function.tally, name)) for label, function in rows],
            )
        yield from _family(
            "jobs_finished_total",
            "counter",
            "Jobs that ended, by how.",
            [
                (label | {"outcome": outcome.lower()}, count)
                for label, function in rows
                for outcome, count in function.tally.finished.items()
            ],
        )
        yield from _histograms(
            "job_wait_seconds",
            "From when a job could be run until a worker had it.",
            [(label, function.tally.waited) for label, function in rows],
        )
        yield from _histograms(
            "job_run_seconds",
            "From when a worker had a job to its end.",
            [(label, function.tally.ran) for label, function in rows],
        )

    def _limits(self) -> Iterator[str]:
        rows = [
            ({"function": limiter.name.decode()}, held, blocked)
            for limiter, held, blocked in islice(self._core.limits.standing(), LISTED)
        ]
        yield from _family(
            "limit_permits",
            "gauge",
            "Permits of limited functions that this server has: their jobs run, or are about to.",
            [(label, held) for label, held, _ in rows],
        )
        yield from _family(
            "limit_waiting",
            "gauge",
            "Jobs of limited functions that wait for a permit here.",
            [(label, blocked) for label, _, blocked in rows],
        )

    def _store(self, journal: Journal) -> Iterator[str]:
        counts = journal.counts
        yield from _histograms(
            "store_commit_seconds", "Seconds to write a batch.", [({}, counts.commit_seconds)]
        )
        yield from _histograms("store_batch_entries", "Entries in a batch.", [({}, counts.entries)])
        yield from _family(
            "store_failures_total",
            "counter",
            "Trips to a database that was out of reach.",
            [({}, counts.failures)],
        )
        yield from _family(
            "store_lag_seconds",
            "gauge",
            "For how long the oldest change has not been written, or the database has not answered.",
            [({}, journal.lag(self._core.now, self._core.clock))],
        )
        yield from _family(
            "store_backlog_bytes", "gauge", "About how many bytes wait to be written.", [({}, journal.held)]
        )


def _states(function: Function) -> dict[str, int]:
    return {
        "pending": function.held - function.waiting - function.blocked - function.delayed - function.running,
        "delayed": function.delayed + function.later,
        "waiting": function.waiting + function.blocked + sum(function.left.values()),
        "running": function.running,
    }


Sample = tuple[Mapping[str, str], float]


def _family(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield _head(name, kind, meaning)
    for labels, value in samples:
        yield f"gearman_{name}{_labelled(labels)} {_number(value)}\n"


def _histograms(
    name: str, meaning: str, histograms: Iterable[tuple[Mapping[str, str], Histogram | None]]
) -> Iterator[str]:
    yield _head(name, "histogram", meaning)
    for labels, histogram in histograms:
        if histogram is None:
            continue
        count = 0
        for bound, more in zip((*map(_number, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            count += more
            yield f"gearman_{name}_bucket{_labelled({**labels, 'le': bound})} {count}\n"
        yield f"gearman_{name}_sum{_labelled(labels)} {_number(histogram.total)}\n"
        yield f"gearman_{name}_count{_labelled(labels)} {count}\n"


def _head(name: str, kind: str, meaning: str) -> str:
    return f"# HELP gearman_{name} {meaning}\n# TYPE gearman_{name} {kind}\n"


def _labelled(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(round(value, 6))
