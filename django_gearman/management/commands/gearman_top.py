"""`manage.py gearman_top`: functions, workers and their current jobs, live."""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from ... import conf
from ...client.admin_client import AdminClient, FunctionCounters, FunctionStatus, RunningJob, WorkerStatus
from ...exceptions import CommandNotSupported, GearmanError
from ..console import log_to_terminal
from ..terminal import add_servers, end_of_reader, printable, sentence

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

AT_ONCE: Final = 16
"""Servers asked at a time."""

PATIENCE: Final = 3.0
"""Seconds to wait for a server's answer: what is live cannot wait for long."""

WIDTH: Final = 160
"""Columns, at least, of what goes to a file or a pipe."""

ROWS_ONCE: Final = 50
"""Rows of each table with ``--once``."""


@dataclass
class Snapshot:
    """One server at a moment; what is None it cannot tell."""

    server: str
    at: float
    """Monotonic time."""
    error: str = ""
    """Why it could not be asked; empty when it is up."""
    version: str = ""
    functions: list[FunctionStatus] = field(default_factory=list)
    workers: list[WorkerStatus] = field(default_factory=list)
    running: list[RunningJob] | None = None
    counters: dict[str, FunctionCounters] | None = None


@dataclass(frozen=True)
class Rates:
    """Jobs a second between two looks; None where it is not known."""

    submitted: float | None = None
    finished: float | None = None
    failed: float | None = None
    retried: float | None = None


def rates(function: str, now: Snapshot, before: Snapshot | None) -> Rates:
    """How fast a function's jobs come and go; of a server that was started anew, nothing is known."""
    if before is None or now.counters is None or before.counters is None or now.at <= before.at:
        return Rates()
    last = now.counters.get(function)
    if last is None:
        return Rates()
    first = before.counters.get(function) or FunctionCounters(function, 0, 0, 0, 0, 0, 0, 0)
    seconds = now.at - before.at

    def rate(count: Callable[[FunctionCounters], int]) -> float | None:
        more = count(last) - count(first)
        return more / seconds if more >= 0 else None

    def failures(counters: FunctionCounters) -> int:
        return counters.failed + counters.dead

    return Rates(
        rate(lambda counters: counters.submitted),
        rate(lambda counters: counters.successful + failures(counters) + counters.cancelled),
        rate(failures),
        rate(lambda counters: counters.retried),
    )


class Watch:
    """Asks one server again and again, over one connection."""

    def __init__(self, server: str, connect: Callable[[str], AdminClient]) -> None:
        self._server = server
        self._admin = connect(server)
        self._version = ""
        self.last: Snapshot | None = None
        self.before: Snapshot | None = None

    def look(self) -> None:
        """Take a snapshot; the last one is the one before then."""
        shot = Snapshot(self._server, time.monotonic())
        try:
            self._ask(shot)
        except GearmanError as error:
            self._admin.close()
            self._version = ""
            shot.error = sentence(error)
        self.before, self.last = self.last, shot

    def _ask(self, shot: Snapshot) -> None:
        admin = self._admin
        shot.version = self._version = self._version or admin.version()
        shot.functions = admin.status()
        try:
            shot.counters = {row.name: row for row in admin.counters()}
            shot.at = time.monotonic()
            shot.running = admin.running()
        except CommandNotSupported:
            pass  # gearmand's
        shot.workers = admin.workers()

    def close(self) -> None:
        self._admin.close()


class Command(BaseCommand):
    help = "Show functions, workers and their current jobs, live, until Ctrl-C; of our servers and gearmand."
    # What servers hold does not depend on this project's models and views.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_servers(parser, "Job servers to watch")
        parser.add_argument(
            "--interval",
            type=_seconds,
            default=2.0,
            metavar="SECONDS",
            help="Time between two looks (default: %(default)g).",
        )
        parser.add_argument(
            "--once", action="store_true", help="Look twice, an interval apart, show the second, and end."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            from rich.console import Console
        except ImportError as error:
            raise CommandError(
                "gearman_top draws with rich, which is not installed: pip install rich (our extra [top])."
            ) from error
        log_to_terminal(0)
        try:
            settings = conf.settings_for()
            connect = partial(
                AdminClient,
                connect_timeout=settings.connect_timeout,
                timeout=min(settings.timeout, PATIENCE),
                tls=conf.client_tls(settings),
            )
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        # Django's own wrapper would put line ends where rich wants none.
        out: Any = self.stdout
        console = Console(file=out._out, no_color=options["no_color"] or None)
        if not console.is_terminal:
            console.width = max(console.width, WIDTH)
        if not options["once"] and not console.is_terminal:
            raise CommandError("Standard output is no terminal to draw on: use --once.", returncode=2)
        watches = [Watch(server, connect) for server in options["servers"] or settings.servers]
        try:
            with ThreadPoolExecutor(min(len(watches), AT_ONCE)) as pool:

                def look() -> None:
                    list(pool.map(Watch.look, watches))

                if options["once"]:
                    _show_once(console, watches, look, options["interval"])
                else:
                    _show_live(console, watches, look, options["interval"])
        except KeyboardInterrupt:
            pass  # its end
        except BrokenPipeError:
            end_of_reader()
        finally:
            for watch in watches:
                watch.close()


def _show_once(console: Console, watches: list[Watch], look: Callable[[], None], interval: float) -> None:
    look()
    if any(watch.last and watch.last.counters is not None for watch in watches):
        time.sleep(interval)
        look()
    console.print(_screen(watches, ROWS_ONCE))
    errors = [watch.last.error for watch in watches if watch.last and watch.last.error]
    if errors:
        raise CommandError(" ".join(errors))


def _show_live(console: Console, watches: list[Watch], look: Callable[[], None], interval: float) -> None:
    from rich.live import Live

    look()
    with Live(_screen(watches, _room(console)), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            look()
            live.update(_screen(watches, _room(console)), refresh=True)


def _room(console: Console) -> int:
    """Rows for each of the two long tables, with their heads and the servers above."""
    return max((console.height - 12) // 2, 3)


# What is shown.


def _screen(watches: Sequence[Watch], rows: int) -> Group:
    from rich.console import Group

    found = [(watch.last, watch.before) for watch in watches if watch.last is not None]
    up = [(last, before) for last, before in found if not last.error]
    several = len(found) > 1
    parts: list[Any] = [_servers([last for last, _ in found])]
    parts += [_text(last.error, "red") for last, _ in found if last.error]
    parts += [
        "",
        _functions(up, rows, several=several),
        "",
        _workers([last for last, _ in up], rows, several=several),
    ]
    return Group(*parts)


def _servers(shots: Iterable[Snapshot]) -> Table:
    table = _table(
        "server", "version", right=("functions", "waiting", "running", "workers", "busy", "clients")
    )
    for shot in shots:
        if shot.error:
            table.add_row(_text(shot.server), _text("down", "red"))
            continue
        workers = [worker for worker in shot.workers if worker.functions]
        running = sum(function.running for function in shot.functions)
        busy = None if shot.running is None else len({job.fd for job in shot.running})
        table.add_row(
            *map(_text, (shot.server, shot.version)),
            *map(
                _count,
                (
                    len(shot.functions),
                    sum(function.total for function in shot.functions) - running,
                    running,
                    len(workers),
                    busy,
                    # This command is one of them, and not worth a word.
                    len(shot.workers) - len(workers) - 1,
                ),
            ),
        )
    return table


def _functions(
    shots: Sequence[tuple[Snapshot, Snapshot | None]], rows: int, *, several: bool
) -> Table | Text:
    named = ("server", "function") if several else ("function",)
    numbers = ("waiting", "running", "workers", "in/s", "done/s", "failed/s", "retried/s")
    table = _table(*named, right=numbers)
    found = [
        (shot, function, rates(function.name, shot, before))
        for shot, before in shots
        for function in shot.functions
    ]
    if not found:
        return _text("No functions.", "dim")
    # What has most to do first; then by name, so that nothing jumps about.
    found.sort(key=lambda row: (-row[1].total, not row[1].workers, row[1].name))
    for shot, function, rate in found[:rows]:
        waiting = function.total - function.running
        unserved = "red" if waiting and not function.workers else ""
        table.add_row(
            *([_text(shot.server)] if several else []),
            _text(function.name, unserved),
            _count(waiting, unserved),
            _count(function.running),
            _count(function.workers, unserved),
            _rate(rate.submitted),
            _rate(rate.finished),
            _rate(rate.failed, "red"),
            _rate(rate.retried, "yellow"),
        )
    _tell_rest(table, len(found), rows, at=len(named) - 1)
    return table


def _workers(shots: Sequence[Snapshot], rows: int, *, several: bool) -> Table | Text:
    named = ("server", "worker", "address") if several else ("worker", "address")
    table = _table(*named, "job", "handle", right=("attempt", "for", "progress"))
    found: list[tuple[Snapshot, WorkerStatus, RunningJob | None]] = []
    for shot in shots:
        jobs: dict[int, list[RunningJob]] = {}
        for job in shot.running or ():
            jobs.setdefault(job.fd, []).append(job)
        for worker in shot.workers:
            if worker.functions:
                found += [(shot, worker, job) for job in jobs.get(worker.fd) or (None,)]
    if not found:
        return _text("No workers.", "dim")
    # Who is at it longest first.
    found.sort(key=lambda row: (-(row[2].seconds if row[2] else -1), row[1].client_id, row[1].fd))
    for shot, worker, running in found[:rows]:
        cells = [_text(shot.server)] if several else []
        cells += [_text(worker.client_id), _text(worker.address)]
        if running is not None:
            cells += [_text(running.function), _text(running.handle, "dim")]
            cells += [_count(running.attempt), _text(_span(running.seconds)), _progress(running)]
        elif shot.running is None:
            cells.append(_text("?", "dim"))
        else:
            cells.append(_text("idle", "dim"))
        table.add_row(*cells)
    _tell_rest(table, len(found), rows, at=len(named) - 2)
    return table


def _tell_rest(table: Table, count: int, rows: int, *, at: int) -> None:
    if count > rows:
        table.add_row(*[""] * at, _text(f"... and {count - rows} more", "dim"))


def _table(*left: str, right: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name.upper(), overflow="ellipsis", no_wrap=True)
    for name in right:
        table.add_column(name.upper(), justify="right", no_wrap=True, min_width=len(name))
    return table


def _text(value: str, style: str = "") -> Text:
    """A text of somebody else: nothing in it is rich's markup, nor steers the terminal."""
    from rich.text import Text

    return Text(printable(value).replace("\t", "\\t").replace("\n", "\\n"), style=style)


def _count(value: int | None, style: str = "") -> Text:
    return _text("-" if value is None else str(value), style)


def _rate(value: float | None, style: str = "") -> Text:
    if value is None:
        return _text("-", "dim")
    return _text(f"{value:.1f}" if value < 100 else f"{value:.0f}", style if value else "dim")


def _progress(job: RunningJob) -> Text:
    if job.denominator <= 0:
        return _text("-", "dim")
    return _text(f"{100 * job.numerator // job.denominator}%")


def _span(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds < 1e6:
        raise ArgumentTypeError(f"{text!r} is not an interval: use a number of seconds from 0.1")
    return seconds
