"""`manage.py gearman_worker`: processes that run the jobs of the installed apps."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import connections
from django.utils.autoreload import StatReloader, autoreload_started

from ... import conf
from ...addresses import split_address
from ...attempts import aperform_assigned, pause_before_retry, perform_assigned
from ...encoding import describe_exception
from ...exceptions import WorkerCannotStart
from ...jobs import Job
from ...registry import registry
from ...worker.foreman import Foreman
from ...worker.loop import AssignedJob, Worker
from ...worker.memory import MIB, Allowance
from ...worker.notify import VARIABLES, Notifier
from ...worker.pool import Alarm
from ..console import close_connections, log_to_terminal, open_standard_files, say

if TYPE_CHECKING:
    from ...worker.board import Row

logger = logging.getLogger(__name__)

TRIAL: Final = "GEARMAN_WORKER_TRIAL"
"""Environment variable of a command that is only to show that it would start."""

HANDOVER: Final = "GEARMAN_WORKER_HANDOVER"
"""Environment variable by which a supervisor leaves its children to the one that takes its place."""

CREW: Final = "GEARMAN_WORKER_CREW"
"""Environment variable by which the token goes to the program that takes this one's place."""

RELOAD_INTERVAL: Final = 1.0
"""Seconds between two looks at the files of the code."""

POOLS: Final = ("prefork", "solo")


class Command(BaseCommand):
    help = "Run the jobs found in the jobs.py of every installed app."
    requires_system_checks = "__all__"

    def add_arguments(self, parser: ArgumentParser) -> None:
        servers = ",".join(conf.settings_for().servers)
        parser.add_argument(
            "functions",
            nargs="*",
            metavar="FUNCTION",
            help="Names of the functions to serve (default: all that are found).",
        )
        parser.add_argument(
            "--processes",
            type=_typed(conf.process_range),
            metavar="N|MIN..MAX",
            help="How many processes; a range grows while all are busy "
            f"(default: {_cores()}, one per core that it may use).",
        )
        parser.add_argument(
            "--threads",
            type=_typed(_count),
            metavar="N",
            help="Jobs that each process runs at a time, for those that mostly wait (default: 1).",
        )
        parser.add_argument(
            "--concurrency",
            type=_typed(_count),
            metavar="N",
            help="Jobs under `async def` that each process runs at a time, on one event loop (default: 1).",
        )
        parser.add_argument(
            "--pool",
            choices=POOLS,
            default="prefork" if hasattr(os, "fork") else "solo",
            help="solo: one job at a time in this very process, for debugging (default: %(default)s).",
        )
        parser.add_argument(
            "--queues",
            type=_typed(_names),
            metavar="A,B",
            help="Serve only jobs of these queues (default: every queue).",
        )
        parser.add_argument(
            "--exclude", type=_typed(_names), metavar="A,B", help="Functions that are not served."
        )
        parser.add_argument(
            "--group",
            action="append",
            metavar="NAME",
            help="Run only this group of the setting WORKERS; may be given several times.",
        )
        parser.add_argument(
            "--servers",
            type=_typed(_servers),
            default=servers,
            metavar="HOST:PORT,...",
            help="Job servers to take jobs from (default: %(default)s).",
        )
        parser.add_argument(
            "--grace",
            type=_typed(_seconds),
            default=30.0,
            metavar="SECONDS",
            help="How long a job may go on after TERM or Ctrl-C (default: %(default)g).",
        )
        parser.add_argument(
            "--max-jobs", type=_typed(_count), metavar="N", help="Replace a process after so many jobs."
        )
        parser.add_argument(
            "--max-memory",
            type=_typed(conf.memory_limits),
            metavar="MIB|+MIB",
            help="Replace a process between two jobs when it has, or has grown by, more: 500, +200 or both.",
        )
        parser.add_argument(
            "--reload",
            action=BooleanOptionalAction,
            default=None,
            help="Replace the processes when code has changed (default: if DEBUG is on).",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        open_standard_files()
        handed_over, token = os.environ.pop(HANDOVER, ""), os.environ.pop(CREW, "")
        is_trial = bool(os.environ.pop(TRIAL, ""))
        environment = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
        log_to_terminal(options["verbosity"])
        settings = conf.settings_for()
        try:
            tls = conf.client_tls(settings)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        servers: list[tuple[str, int]] = options["servers"]
        # One for all groups: one process speaks for them.
        crew = (token or secrets.token_hex(16)).encode()
        plans = [
            _Plan(group, jobs, servers, settings, tls, crew)
            for group, jobs in self._groups(options, settings)
        ]
        if is_trial:
            return

        def greet() -> None:
            if handed_over:
                say(self.stdout, "gearman_worker: the new code has taken over.")
            for plan in plans:
                say(self.stdout, plan.sentence)
            if plans[0].group.name and not options["group"]:
                _warn_of_unserved(plans)

        close_connections()
        if options["pool"] == "solo":
            greet()
            self._run_alone(plans, options["grace"])
        else:
            self._supervise(plans, options, environment, handed_over, greet)

    def _supervise(
        self,
        plans: list[_Plan],
        options: dict[str, Any],
        environment: dict[str, str],
        handed_over: str,
        greet: Callable[[], None],
    ) -> None:
        if not hasattr(os, "fork"):
            raise CommandError("This platform cannot fork processes; use --pool solo.")
        from ...worker.supervisor import Group, Supervisor, flush_output

        first = plans[0]
        reload = django_settings.DEBUG if options["reload"] is None else options["reload"]
        command = [sys.executable, *sys.orig_argv[1:]]

        def take_over(handover: str) -> None:
            flush_output()
            own = {HANDOVER: handover, CREW: first.token.decode()}
            os.execve(command[0], command, os.environ | environment | own)  # noqa: S606  # our own command line

        show = _titles()
        show("supervisor")
        supervisor = Supervisor(
            [Group(partial(_work, plan), *plan.group.processes, name=plan.group.name) for plan in plans],
            grace=options["grace"],
            places=max(plan.group.threads + plan.group.concurrency for plan in plans),
            spokesman=Foreman(
                first.servers,
                first.token,
                client_id=f"{socket.gethostname()}:{os.getpid()}:supervisor",
                connect_timeout=first.settings.connect_timeout,
                tls=first.tls,
            ),
            notifier=Notifier(environment),
            trial=command,
            trial_environment={TRIAL: "1"},
            replace=take_over,
            handover=handed_over,
            code_changed=_CodeWatch() if reload else None,
        )
        try:
            end = supervisor.run(begun=greet)
        except WorkerCannotStart as error:
            raise CommandError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        self._say_goodbye(end.put_back)

    def _run_alone(self, plans: list[_Plan], grace: float) -> None:
        if len(plans) > 1:
            raise CommandError(
                f"--pool solo is for one group: choose one of {', '.join(plan.group.name for plan in plans)} "
                "with --group."
            )
        (plan,) = plans
        group = replace(plan.group, threads=1, concurrency=1)
        is_main = threading.current_thread() is threading.main_thread()
        has_alarm = is_main and hasattr(signal, "setitimer")
        worker = replace(plan, group=group).worker(alarm=Alarm() if has_alarm else None)
        put_back = 0
        timer = threading.Timer(grace, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        stopping = False

        def stop(number: int, frame: object) -> None:
            nonlocal stopping
            if stopping:
                raise KeyboardInterrupt
            stopping = True
            worker.stop()
            timer.start()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            worker.run()
        except KeyboardInterrupt:
            put_back = 1
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)
        self._say_goodbye(put_back)

    def _say_goodbye(self, put_back: int) -> None:
        if put_back:
            say(self.stdout, f"gearman_worker stopped; {put_back} jobs went back to the queue.")
        else:
            say(self.stdout, "gearman_worker stopped.")

    # Which group serves which functions.

    def _groups(
        self, options: dict[str, Any], settings: conf.GearmanSettings
    ) -> list[tuple[conf.WorkerGroup, list[Job[Any, Any]]]]:
        if not registry:
            raise CommandError(
                "No functions found: no installed app has a jobs.py with a function under @job, or a "
                "tasks.py with one under @task whose backend in TASKS is ours. "
                "Write one, or see whether its app is in INSTALLED_APPS."
            )
        given = {
            name: value for name in _GROUP_OPTIONS if (value := options[name]) is not None and value != []
        }
        if options["group"]:
            unknown = [name for name in options["group"] if name not in settings.workers]
            if unknown:
                known = ", ".join(settings.workers) or "none"
                raise CommandError(
                    f"WORKERS has no group {', '.join(map(repr, unknown))}. Known are: {known}."
                )
        # When a process is replaced is not whom it serves.
        if settings.workers and (options["group"] or not given.keys() - {"max_jobs", "max_memory"}):
            chosen = options["group"] or list(settings.workers)
            shared = {
                name: value
                for name, value in given.items()
                if name in ("max_jobs", "max_memory", "processes")
            }
            if set(given) - set(shared):
                raise CommandError(
                    "--group takes what it serves from the setting WORKERS: leave the rest out."
                )
            return [
                (replace(group, **shared), self._jobs_of(group, settings))
                for name, group in settings.workers.items()
                if name in chosen
            ]
        defaults: dict[str, Any] = {"processes": (_cores(), _cores())}
        values = defaults | given
        for name in ("functions", "queues", "exclude"):
            values[name] = tuple(values.get(name, ()))
        group = conf.WorkerGroup(**values)
        return [(group, self._jobs_of(group, replace(settings, workers={})))]

    def _jobs_of(self, group: conf.WorkerGroup, settings: conf.GearmanSettings) -> list[Job[Any, Any]]:
        where = f", as WORKERS[{group.name!r}] says" if group.name else ""
        for names, known in (
            (group.functions + group.exclude, set(registry)),
            (group.queues, {job.queue_name for job in registry.values()}),
        ):
            unknown = [name for name in names if name not in known]
            if unknown and names is group.queues and set(unknown) != set(names):
                continue  # a queue without functions is served with those that have some
            if unknown and names is group.queues:
                raise CommandError(
                    f"No function is in the queues {','.join(names)!r}{where}. "
                    f"Known queues are: {', '.join(sorted(known))}."
                )
            if unknown:
                raise CommandError(
                    f"No job is named {', '.join(map(repr, unknown))}{where}. "
                    f"Known are: {', '.join(sorted(known))}."
                )
        jobs = list(registry.values())
        if group.functions or group.queues:
            jobs = [
                job
                for job in jobs
                if (not group.functions or job.name in group.functions)
                and (not group.queues or job.queue_name in group.queues)
            ]
        else:
            others = [other for other in settings.workers.values() if other.name != group.name]
            functions = {name for other in others for name in other.functions}
            queues = {name for other in others if not other.functions for name in other.queues}
            jobs = [job for job in jobs if job.name not in functions and job.queue_name not in queues]
        jobs = [job for job in jobs if job.name not in group.exclude]
        if not jobs:
            name = f"the group {group.name!r}" if group.name else "this worker"
            raise CommandError(f"Nothing is left for {name} to serve: name other functions or queues.")
        return jobs


_GROUP_OPTIONS: Final = (
    "processes",
    "threads",
    "concurrency",
    "functions",
    "queues",
    "exclude",
    "max_jobs",
    "max_memory",
)


@dataclass(frozen=True)
class _Plan:
    """What each process of a group does."""

    group: conf.WorkerGroup
    jobs: list[Job[Any, Any]]
    servers: list[tuple[str, int]]
    settings: conf.GearmanSettings
    tls: ssl.SSLContext | None
    token: bytes

    @property
    def sentence(self) -> str:
        low, high = self.group.processes
        number = f"{low} to {high}" if high > low else str(low)
        each = []
        if self.group.threads > 1:
            each.append(f"{self.group.threads} threads")
        if self.group.concurrency > 1:
            each.append(f"{self.group.concurrency} tasks")
        return (
            f"gearman_worker: {f'{self.group.name}: ' if self.group.name else ''}"
            f"{number} {'process serves' if high == 1 else 'processes serve'} "
            f"{', '.join(sorted(job.name for job in self.jobs))} "
            f"for {', '.join(f'{host}:{port}' for host, port in self.servers)}"
            f"{', each with ' + ' and '.join(each) if each else ''}."
        )

    @property
    def runs_here(self) -> bool:
        """Whether jobs run in the main thread, one at a time."""
        return self.group.threads == 1 and (
            self.group.concurrency == 1 or not any(job.is_async for job in self.jobs)
        )

    def worker(self, **options: Any) -> Worker:
        group = self.group
        tasks = [job for job in self.jobs if job.is_async and group.concurrency > 1]
        functions = [job for job in self.jobs if job not in tasks]
        limits = {job.name: job.timeout or self.settings.job_timeout for job in self.jobs}
        resident, growth = group.max_memory
        allowance = Allowance(
            max_jobs=group.max_jobs,
            max_resident=None if resident is None else resident * MIB,
            max_growth=None if growth is None else growth * MIB,
        )
        return Worker(
            {job.name: partial(perform_assigned, job) for job in functions},
            self.servers,
            tasks={job.name: partial(aperform_assigned, job) for job in tasks},
            threads=group.threads,
            concurrency=group.concurrency,
            limits={name: limit for name, limit in limits.items() if limit is not None},
            client_id=f"{socket.gethostname()}:{os.getpid()}",
            describe=describe_exception,
            retry=_pause_before_retry,
            logs=True,
            connect_timeout=self.settings.connect_timeout,
            max_packet=self.settings.max_packet,
            tls=self.tls,
            crew=self.token,
            is_spent=allowance.is_spent,
            **options,
        )


def _warn_of_unserved(plans: Sequence[_Plan]) -> None:
    """Their jobs would wait for ever. Who excludes a function leaves it to others."""
    known = {job.name for plan in plans for job in plan.jobs} | {
        name for plan in plans for name in plan.group.exclude
    }
    unserved = registry.keys() - known
    if unserved:
        logger.warning("No group of WORKERS serves %s", ", ".join(sorted(unserved)))


def _work(plan: _Plan, slot: int, control: int, row: Row) -> None:
    """What each process does."""
    show = _titles()
    name = f"{plan.group.name} " if plan.group.name else ""
    show(f"{name}idle")
    alarm = Alarm() if plan.runs_here else None
    worker = plan.worker(row=row, alarm=alarm, show=lambda function: show(f"{name}{function or 'idle'}"))
    if alarm is None:
        # The parent says so that a job was cancelled.
        signal.signal(signal.SIGALRM, lambda *args: worker.wake())
    try:
        worker.run(control)
    finally:
        connections.close_all()


def _pause_before_retry(assigned: AssignedJob, error: BaseException) -> float | None:
    job = registry.get(assigned.function.decode(errors="replace"))
    return None if job is None else pause_before_retry(job, assigned, error)


def _titles() -> Callable[[str], None]:
    """What shows in ``ps`` what a process does, where setproctitle is installed."""
    try:
        from setproctitle import setproctitle  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ImportError:
        return lambda text: None
    return lambda text: setproctitle(f"gearman_worker: {text}")


class _CodeWatch:
    """Whether the code has changed since it was last asked; Django's own reloader knows its files."""

    def __init__(self) -> None:
        self._reloader = StatReloader()
        autoreload_started.send(sender=self._reloader)
        self._began_at = time()
        self._times = dict(self._reloader.snapshot_files())
        self._next_at = monotonic() + RELOAD_INTERVAL

    def __call__(self) -> bool:
        if monotonic() < self._next_at:
            return False
        self._next_at = monotonic() + RELOAD_INTERVAL
        times = dict(self._reloader.snapshot_files())
        changed = any(self._times.get(file, math.inf) < at for file, at in times.items())
        # A module that is new to us was made since, or only imported: that one is no change.
        changed = changed or any(
            file not in self._times and file.suffix == ".py" and at >= self._began_at
            for file, at in times.items()
        )
        self._times = times
        return changed


def _cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores there are for this process; of a container's quota the part of one counts as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
    except OSError:
        return cores
    # A limit of any group around ours holds, too. cgroups(7), version 2.
    for group in (groups / own, *(groups / own).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            cores = min(cores, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            pass  # "max", or there is no such file
    return cores


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows only its own errors' sentences."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return parsed


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) <= 1_000_000:
        raise ValueError(f"{text!r} is not a whole number from 1")
    return int(text)


def _names(text: str) -> Sequence[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds


def _servers(text: str) -> list[tuple[str, int]]:
    return [split_address(server.strip()) for server in text.split(",")]
