"""`manage.py gearman_status`: what job servers hold, side by side, and an operator's commands to one."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from ... import conf
from ...client.admin_client import (
    AdminClient,
    FunctionStatus,
    HeldJob,
    LimitStanding,
    PriorityStatus,
    WorkerStatus,
)
from ...exceptions import CommandNotSupported, GearmanError, ServerError
from ..console import log_to_terminal
from ..terminal import add_servers, end_of_reader, printable, sentence

T = TypeVar("T")
Cell = str | int | None

SECTIONS: Final = ("functions", "workers", "jobs", "uniques", "limits")
SHOWN: Final = ("functions", "workers", "jobs")
"""What is shown when nothing is chosen."""

ROWS: Final = 100
"""Rows of a table unless told otherwise: a queue may have millions of jobs."""

AT_ONCE: Final = 16
"""Servers asked at a time."""


@dataclass
class ServerView:
    """One server at a moment; what is None was not asked, or it cannot tell."""

    server: str
    error: str = ""
    """Why it could not be asked; empty when it is up."""
    version: str = ""
    pid: int | None = None
    functions: list[FunctionStatus] | None = None
    priorities: dict[str, PriorityStatus] | None = None
    workers: list[WorkerStatus] | None = None
    jobs: list[HeldJob] | None = None
    uniques: list[str] | None = None
    limits: list[LimitStanding] | None = None
    unsupported: list[str] = field(default_factory=list)
    """A sentence for each listing that it does not know."""

    def as_dict(self, sections: Sequence[str]) -> dict[str, Any]:
        if self.error:
            return {"server": self.server, "up": False, "error": self.error}
        shown: dict[str, Any] = {"server": self.server, "up": True, "version": self.version, "pid": self.pid}
        for section in sections:
            rows = getattr(self, section)
            if section == "functions":
                rows = [self._function(function) for function in self.functions or ()]
            elif rows is not None and section != "uniques":
                rows = [asdict(row) for row in rows]
            shown[section] = rows
        if self.unsupported:
            shown["unsupported"] = self.unsupported
        return shown

    def _function(self, function: FunctionStatus) -> dict[str, Any]:
        waiting = self.waiting(function.name)
        return asdict(function) | dict(zip(("high", "normal", "low"), waiting, strict=True))

    def waiting(self, name: str) -> tuple[int | None, int | None, int | None]:
        """How many jobs of each priority wait for a function; None where it cannot tell."""
        if self.priorities is None:
            return None, None, None
        found = self.priorities.get(name)
        # One that came after the first of the two listings has no job in it.
        return (found.high, found.normal, found.low) if found is not None else (0, 0, 0)


@dataclass(frozen=True)
class Action:
    """What an operator tells a server."""

    done: str
    """What to say after it."""
    do: Callable[[AdminClient], None]


class Command(BaseCommand):
    help = "Show the functions, workers and jobs of job servers, ours or gearmand, or tell one what to do."
    # What servers hold does not depend on this project's models and views.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "sections",
            nargs="*",
            type=_section,
            metavar="SECTION",
            help=f"What to show: {', '.join(SECTIONS)} (default: {', '.join(SHOWN)}).",
        )
        add_servers(parser, "Job servers to ask")
        parser.add_argument(
            "--format", choices=["table", "json"], default="table", help="Default: %(default)s."
        )
        parser.add_argument(
            "--limit",
            type=_number,
            default=ROWS,
            metavar="N",
            help="Rows of each table, 0 for all (default: %(default)s).",
        )
        actions = parser.add_argument_group("instead, for one server").add_mutually_exclusive_group()
        actions.add_argument(
            "--cancel", metavar="HANDLE", help="End a job; its clients are told that it failed."
        )
        actions.add_argument("--create-function", metavar="NAME", help="List a function before it is used.")
        actions.add_argument(
            "--drop-function", metavar="NAME", help="List a function no more, if it has no workers and jobs."
        )
        actions.add_argument(
            "--set-queue-limit",
            nargs=2,
            metavar=("NAME", "LIMIT"),
            help="Refuse jobs of a function that has so many; 0 for no limit, or HIGH,NORMAL,LOW.",
        )
        actions.add_argument(
            "--shutdown",
            nargs="?",
            const="immediate",
            choices=["immediate", "graceful"],
            help="End the server, if it allows that: at once, or when no job is left.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        log_to_terminal(options["verbosity"])
        try:
            settings = conf.settings_for()
            client = partial(
                AdminClient,
                connect_timeout=settings.connect_timeout,
                timeout=settings.timeout,
                tls=conf.client_tls(settings),
            )
        except ImproperlyConfigured as error:
            _refuse(str(error))
        servers = options["servers"] or settings.servers
        action = _action(options)
        try:
            if action is None:
                self._show(client, servers, options)
            else:
                self._act(client, servers, action, options["sections"])
        except BrokenPipeError:
            end_of_reader()

    # An action.

    def _act(
        self,
        connect: Callable[[str], AdminClient],
        servers: Sequence[str],
        action: Action,
        sections: Sequence[str],
    ) -> None:
        if sections:
            _refuse(f"Show {', '.join(sections)}, or tell the server what to do; not both at once.")
        if len(servers) != 1:
            # A handle or a name may be known to more than one, and mean something else there.
            _refuse(f"This is for one server, and there are {len(servers)}: name it with --servers.")
        try:
            with connect(servers[0]) as admin:
                action.do(admin)
        except ValueError as error:
            _refuse(sentence(error))
        except ServerError as error:
            if error.code == "UNKNOWN_JOB":
                # The server says no more than that.
                raise CommandError(
                    f"The job server at {servers[0]} has no such job: it ended, or never was there."
                ) from error
            raise CommandError(sentence(error)) from error
        except GearmanError as error:
            raise CommandError(sentence(error)) from error
        self.stdout.write(f"{servers[0]}: {action.done}.")

    # Looking.

    def _show(
        self, connect: Callable[[str], AdminClient], servers: Sequence[str], options: dict[str, Any]
    ) -> None:
        # In the order of the choices, each once.
        sections = [section for section in SECTIONS if section in (options["sections"] or SHOWN)]
        with ThreadPoolExecutor(min(len(servers), AT_ONCE)) as pool:
            views = list(pool.map(lambda server: _look(connect, server, sections), servers))
        if options["format"] == "json":
            self.stdout.write(json.dumps({"servers": [view.as_dict(sections) for view in views]}, indent=2))
        else:
            self._show_tables(views, sections, options["limit"])
            for view in views:
                for line in view.unsupported:
                    self.stderr.write(line)
        self.stdout.flush()
        down = [view.server for view in views if view.error]
        if down:
            raise CommandError(
                f"{len(down)} of {len(views)} job servers cannot be asked: {', '.join(down)}."
                if len(views) > 1
                else views[0].error
            )

    def _show_tables(self, views: list[ServerView], sections: Sequence[str], limit: int) -> None:
        self._write_table(SERVERS, [_server_row(view) for view in views], 0)
        for view in views:
            if view.error and len(views) > 1:
                self.stdout.write(view.error)
        for section in sections:
            able = [view for view in views if not view.error and getattr(view, section) is not None]
            if not able:
                continue
            columns, rows_of = TABLES[section]
            rows = [[view.server, *row] for view in able for row in rows_of(view)]
            columns = ["server", *columns]
            if len(views) == 1:
                columns, rows = columns[1:], [row[1:] for row in rows]
            self.stdout.write("")
            if rows:
                self._write_table(columns, rows, limit)
            else:
                self.stdout.write(f"No {section}.")

    def _write_table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], limit: int) -> None:
        shown = rows[:limit] if limit else rows
        cells = [[_cell(value) for value in row] for row in shown]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        # Numbers stand to the right.
        numeric = [any(isinstance(row[index], int) for row in shown) for index in range(len(columns))]
        for line in ([column.upper() for column in columns], *cells):
            padded = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, numeric, strict=True)
            )
            self.stdout.write("  ".join(padded).rstrip())
        if len(rows) > len(shown):
            self.stdout.write(f"... and {len(rows) - len(shown)} more; --limit 0 shows all.")


def _look(connect: Callable[[str], AdminClient], server: str, sections: Sequence[str]) -> ServerView:
    """Ask one server; what goes wrong is part of the view."""
    view = ServerView(server)

    def ask(question: Callable[[], T]) -> T | None:
        try:
            return question()
        except CommandNotSupported as error:
            view.unsupported.append(sentence(error))
            return None

    try:
        with connect(server) as admin:
            view.version = admin.version()
            view.pid = ask(admin.pid)
            # The summary of a server counts its functions' jobs and its workers.
            view.functions = admin.status()
            view.workers = admin.workers()
            if "functions" in sections and (waiting := ask(admin.priority_status)) is not None:
                view.priorities = {status.name: status for status in waiting}
            if "jobs" in sections:
                view.jobs = ask(admin.jobs)
            if "uniques" in sections:
                view.uniques = ask(admin.uniques)
            if "limits" in sections:
                view.limits = ask(admin.limits)
    except GearmanError as error:
        view.error = sentence(error)
    return view


# The tables.

SERVERS: Final = ("server", "version", "pid", "functions", "jobs", "running", "workers", "connections")


def _server_row(view: ServerView) -> list[Cell]:
    if view.error:
        return [view.server, "down", *[None] * (len(SERVERS) - 2)]
    functions, workers = view.functions or [], view.workers or []
    return [
        view.server,
        view.version,
        view.pid,
        len(functions),
        sum(function.total for function in functions),
        sum(function.running for function in functions),
        sum(bool(worker.functions) for worker in workers),
        len(workers),
    ]


def _function_rows(view: ServerView) -> Iterable[list[Cell]]:
    for function in view.functions or ():
        waiting = view.waiting(function.name)
        yield [function.name, function.total, function.running, *waiting, function.workers]


def _worker_rows(view: ServerView) -> Iterable[list[Cell]]:
    """Connections that offer something; clients only count."""
    for worker in view.workers or ():
        if worker.functions:
            yield [worker.fd, worker.address, worker.client_id, ", ".join(worker.functions)]


def _job_rows(view: ServerView) -> Iterable[list[Cell]]:
    for job in view.jobs or ():
        kind = "ignored" if job.ignored else "background" if job.stored else "foreground"
        yield [job.handle, kind, job.retries]


def _unique_rows(view: ServerView) -> Iterable[list[Cell]]:
    """Those that are none are left out; JSON has them, one for each job."""
    for unique in view.uniques or ():
        if unique:
            yield [unique]


def _limit_rows(view: ServerView) -> Iterable[list[Cell]]:
    for limit in view.limits or ():
        rate = f"{limit.rate}/{limit.period}s" if limit.rate else None
        allowed = limit.concurrency or None
        yield [limit.name, rate, allowed, "yes" if limit.by_key else "no", limit.held, limit.waiting]


TABLES: Final[dict[str, tuple[list[str], Callable[[ServerView], Iterable[list[Cell]]]]]] = {
    "functions": (["function", "jobs", "running", "high", "normal", "low", "workers"], _function_rows),
    "workers": (["fd", "address", "client id", "functions"], _worker_rows),
    "jobs": (["job", "kind", "retries"], _job_rows),
    "uniques": (["unique"], _unique_rows),
    "limits": (["limit of", "rate", "at once", "by key", "permits", "waiting"], _limit_rows),
}
"""{section: its columns, but for the server, and its rows}"""


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    # Names may have tabs; a line end would forge a row.
    return printable(str(value)).replace("\t", "\\t").replace("\n", "\\n")


# What is typed.


def _action(options: dict[str, Any]) -> Action | None:
    """What to do to a server; None for looking only."""
    if (handle := options["cancel"]) is not None:
        return Action(f"job {handle} is cancelled", lambda admin: admin.cancel(handle))
    if (name := options["create_function"]) is not None:
        return Action(f"function {name} is listed", lambda admin: admin.create_function(name))
    if (dropped := options["drop_function"]) is not None:
        return Action(f"function {dropped} is dropped", lambda admin: admin.drop_function(dropped))
    if (limit := options["set_queue_limit"]) is not None:
        return _queue_limit(*limit)
    if (how := options["shutdown"]) is not None:
        return Action("it shuts down", lambda admin: admin.shutdown(graceful=how == "graceful"))
    return None


def _queue_limit(function: str, text: str) -> Action:
    limits = text.split(",")
    if len(limits) not in (1, 3) or not all(limit.isascii() and limit.isdecimal() for limit in limits):
        _refuse(f"{text!r} is not a limit: use a number of jobs, or HIGH,NORMAL,LOW such as 5,4,3.")

    def limit(admin: AdminClient) -> None:
        if len(limits) == 1:
            admin.set_queue_limit(function, int(text))
        else:
            high, normal, low = map(int, limits)
            admin.set_queue_limit(function, high=high, normal=normal, low=low)
        # Servers say OK also for a function that they do not know, and forget the limit.
        if not any(status.name == function for status in admin.status()):
            raise CommandError(
                f"There is no function {function!r} to limit; "
                f"list it first, with --create-function {function}."
            )

    return Action(f"function {function} has the queue limit {text}", limit)


def _section(text: str) -> str:
    if text not in SECTIONS:
        raise ArgumentTypeError(f"{text!r} is no section: choose from {', '.join(SECTIONS)}")
    return text


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a number of rows")
    return int(text)


def _refuse(reason: str) -> NoReturn:
    raise CommandError(reason, returncode=2)
