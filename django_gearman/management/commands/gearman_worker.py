"""`manage.py gearman_worker`: processes that run the jobs of the installed apps."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import ssl
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from ... import conf
from ...addresses import split_address
from ...encoding import describe_exception
from ...exceptions import JobTimedOut
from ...jobs import Job, pause_before_retry, perform_assigned, registry
from ...worker.loop import AssignedJob, Worker, WorkerFunction
from ...worker.supervisor import Supervisor
from ..console import log_to_terminal

KILL_AFTER: Final = 5
"""Seconds after its time limit in which a job may clean up; then its process ends."""


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
            type=_processes,
            default=_cores(),
            metavar="N",
            help="Processes, each running one job at a time (default: %(default)s, one per core).",
        )
        parser.add_argument(
            "--queues", metavar="A,B", help="Serve only jobs of these queues (default: every queue)."
        )
        parser.add_argument(
            "--servers",
            type=_servers,
            default=servers,
            metavar="HOST:PORT,...",
            help="Job servers to take jobs from (default: %(default)s).",
        )
        parser.add_argument(
            "--grace",
            type=_seconds,
            default=30.0,
            metavar="SECONDS",
            help="How long a job may go on after TERM or Ctrl-C (default: %(default)g).",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        log_to_terminal(options["verbosity"])
        functions = self._functions(options["functions"], options["queues"])
        servers: list[tuple[str, int]] = options["servers"]
        processes: int = options["processes"]
        settings = conf.settings_for()
        try:
            tls = conf.client_tls(settings)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"gearman_worker: {processes} {'process serves' if processes == 1 else 'processes serve'} "
            f"{', '.join(sorted(functions))} for {', '.join(f'{host}:{port}' for host, port in servers)}."
        )
        self.stdout.flush()
        # A connection must not be shared with a child.
        connections.close_all()
        work = partial(_work, functions, servers, settings, tls)
        killed = Supervisor(work, processes, grace=options["grace"]).run()
        if killed:
            self.stdout.write(f"gearman_worker stopped; {killed} jobs went back to the queue.")
        else:
            self.stdout.write("gearman_worker stopped.")

    def _functions(self, names: list[str], queues: str | None) -> dict[str, WorkerFunction]:
        unknown = [name for name in names if name not in registry]
        if unknown:
            known = ", ".join(sorted(registry)) or "none"
            raise CommandError(f"No job is named {', '.join(map(repr, unknown))}. Known are: {known}.")
        jobs: list[Job[Any, Any]] = [registry[name] for name in names] if names else list(registry.values())
        if not jobs:
            raise CommandError(
                "No functions found: no installed app has a jobs.py with a function under @job. "
                "Write one, or see whether its app is in INSTALLED_APPS."
            )
        if queues is not None:
            chosen = {queue.strip() for queue in queues.split(",")}
            known = ", ".join(sorted({job.queue_name for job in jobs}))
            jobs = [job for job in jobs if job.queue_name in chosen]
            if not jobs:
                raise CommandError(f"No function is in the queues {queues!r}. Known queues are: {known}.")
        return {job.name: partial(_perform, job) for job in jobs}


def _perform(job: Job[Any, Any], assigned: AssignedJob) -> bytes:
    if job.timeout is None:
        return perform_assigned(job, assigned)
    try:
        with _time_limit(job.timeout):
            return perform_assigned(job, assigned)
    except JobTimedOut:
        # It may have been in the middle of a query.
        connections.close_all()
        raise


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """
    Raise ``JobTimedOut`` in the block when it takes too long, and end the process when it goes on.

    Python hears of the alarm between two of its instructions only; the watchdog
    of ``faulthandler`` is a thread of C, which ends a process whatever it hangs in,
    and tells where that was.
    """
    running = True

    def interrupt(*args: object) -> None:
        if running:
            raise JobTimedOut(seconds)

    previous = signal.signal(signal.SIGALRM, interrupt)
    faulthandler.dump_traceback_later(seconds + KILL_AFTER, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)


def _work(
    functions: dict[str, WorkerFunction],
    servers: list[tuple[str, int]],
    settings: conf.GearmanSettings,
    tls: ssl.SSLContext | None,
    slot: int,
    control: int,
) -> None:
    """What each process does."""
    worker = Worker(
        functions,
        servers,
        client_id=f"{socket.gethostname()}:{os.getpid()}",
        describe=describe_exception,
        retry=_pause_before_retry,
        logs=True,
        connect_timeout=settings.connect_timeout,
        max_packet=settings.max_packet,
        tls=tls,
    )
    try:
        worker.run(control)
    finally:
        connections.close_all()


def _pause_before_retry(assigned: AssignedJob, error: BaseException) -> float | None:
    job = registry.get(assigned.function.decode(errors="replace"))
    return None if job is None else pause_before_retry(job, assigned, error)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1000:
        raise ArgumentTypeError(f"{text!r} is not a number of processes: use 1 to 1000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _servers(text: str) -> list[tuple[str, int]]:
    try:
        return [split_address(server.strip()) for server in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
