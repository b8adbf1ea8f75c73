"""`manage.py gearman_submit`: a job from the command line, as `gearman` sends one."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from datetime import datetime
from typing import Any, Final, NoReturn

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from ... import conf
from ...client.sync import LATEST, Client
from ...encoding import dumps, exception_of
from ...exceptions import GearmanError, JobFailed
from ..terminal import INTERRUPTED, add_servers, end_of_reader, printable, sentence

FAILED: Final = 1
"""Exit status: a worker reported that the job failed. 2, as of every command, is a wrong command line."""

NOT_KNOWN: Final = 3
"""Exit status: no server took the job, or what became of it was not heard."""

_DURATION: Final = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)


class Command(BaseCommand):
    help = (
        "Submit a job and stream what it returns to standard output, as bytes; "
        "progress and warnings go to standard error."
    )
    # A call in a script should be quick, and the checks are those of servers and workers.
    requires_system_checks: list[str] = []

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        parser = super().create_parser(prog_name, subcommand, **kwargs)
        # Else the workload could not stand behind an option: FUNCTION --background WORKLOAD.
        parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]  # of this one parser
        return parser

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("function", metavar="FUNCTION", help="The function to run.")
        parser.add_argument(
            "workload",
            nargs="?",
            metavar="WORKLOAD",
            help="What it gets (default: standard input to its end).",
        )
        parser.add_argument(
            "--file", metavar="PATH", help="Take the workload from a file; - is standard input."
        )
        parser.add_argument(
            "--args",
            # Django takes "args" itself.
            dest="positional",
            type=_json_list,
            metavar="JSON",
            help="Positional arguments for a function under @job, such as '[1, \"two\"]'.",
        )
        parser.add_argument(
            "--kwargs",
            dest="keywords",
            type=_json_dict,
            metavar="JSON",
            help="Keyword arguments for a function under @job, such as '{\"size\": 3}'.",
        )
        parser.add_argument(
            "--background",
            "-b",
            action="store_true",
            help="Do not wait for the end; print the job's handle.",
        )
        parser.add_argument(
            "--priority", choices=["high", "normal", "low"], default="normal", help="Default: %(default)s."
        )
        parser.add_argument(
            "--unique",
            "-u",
            default="",
            metavar="KEY",
            help="Share one run with whoever submits the same; - stands for the workload.",
        )
        parser.add_argument(
            "--run-after",
            type=_moment,
            metavar="WHEN",
            help="Not before this moment, in the background: in ISO format, or in so many seconds, "
            "or in 10m, 2h, 1d12h.",
        )
        parser.add_argument(
            "--count",
            type=_count,
            default=1,
            metavar="N",
            help="Submit it so many times, one after the other (default: %(default)s).",
        )
        parser.add_argument(
            "--timeout",
            type=_seconds,
            metavar="SECONDS",
            help="How long to wait for the end of a job (default: for ever).",
        )
        add_servers(parser, "Job servers, the first that answers is taken")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["run_after"] is not None and options["priority"] != "normal":
            self._refuse("Jobs for later have normal priority: leave out --priority or --run-after.")
        try:
            settings = conf.settings_for()
            workload = self._workload(options, settings.max_packet)
            with Client(
                options["servers"] or settings.servers,
                connect_timeout=settings.connect_timeout,
                timeout=settings.timeout,
                max_packet=settings.max_packet,
                tls=conf.client_tls(settings),
            ) as client:
                self._submit(client, workload, options)
        except ImproperlyConfigured as error:
            self._refuse(str(error))
        except ValueError as error:
            # The client's: a name, a unique or a workload that no packet can carry.
            self._refuse(sentence(error))
        except GearmanError as error:
            raise CommandError(sentence(error), returncode=NOT_KNOWN) from error
        except BrokenPipeError:
            end_of_reader()
        except KeyboardInterrupt:
            self.stderr.write("Interrupted.")
            sys.exit(INTERRUPTED)

    def _submit(self, client: Client, workload: bytes, options: dict[str, Any]) -> None:
        count: int = options["count"]
        if options["background"] or options["run_after"] is not None:
            for _ in range(count):
                self.stdout.write(self._submit_background(client, workload, options))
                self.stdout.flush()
            return
        failures = 0
        for _ in range(count):
            try:
                self._run(client, workload, options)
            except JobFailed as error:
                failures += 1
                reason = self._reason(error, options["verbosity"])
                if count == 1:
                    raise CommandError(reason, returncode=FAILED) from error
                self.stderr.write(reason)
        if failures:
            raise CommandError(f"{failures} of {count} jobs failed.", returncode=FAILED)

    def _submit_background(self, client: Client, workload: bytes, options: dict[str, Any]) -> str:
        function, unique = options["function"], options["unique"]
        if options["run_after"] is not None:
            return client.do_epoch(function, workload, epoch=options["run_after"], unique=unique)
        submit = {
            "high": client.do_high_background,
            "normal": client.do_background,
            "low": client.do_low_background,
        }[options["priority"]]
        return submit(function, workload, unique=unique)

    def _run(self, client: Client, workload: bytes, options: dict[str, Any]) -> None:
        do = {"high": client.do_high, "normal": client.do, "low": client.do_low}[options["priority"]]
        result = do(
            options["function"],
            workload,
            unique=options["unique"],
            timeout=options["timeout"],
            on_data=self._put_out,
            on_warning=self._warn,
            on_status=self._show_progress,
        )
        self._put_out(result)

    # What is heard.

    def _put_out(self, data: bytes) -> None:
        """Bytes as they are, at once: a pipe may have a reader who waits for them."""
        stream: Any = getattr(self.stdout, "buffer", None)
        if stream is None:
            # Somebody called the command and gathers text.
            self.stdout.write(data.decode(errors="backslashreplace"), ending="")
        else:
            stream.write(data)
            stream.flush()

    def _warn(self, data: bytes) -> None:
        self.stderr.write(printable(data.decode(errors="backslashreplace")), str)

    def _show_progress(self, numerator: bytes, denominator: bytes) -> None:
        part, whole = (
            printable(number.decode(errors="backslashreplace")) for number in (numerator, denominator)
        )
        try:
            percent = f"{100 * float(part) / float(whole):.0f}% "
        except (ValueError, ArithmeticError):
            percent = ""  # a worker may count as it likes
        self.stderr.write(f"{percent}({part}/{whole})", str)

    def _reason(self, error: JobFailed, verbosity: int) -> str:
        told = exception_of(error.data)
        reason = sentence(JobFailed(error.job, exception=told["exception"], message=told["message"]))
        if verbosity > 1 and told["traceback"]:
            reason += f"\n{printable(told['traceback'].rstrip())}"
        return reason

    # What is sent.

    def _workload(self, options: dict[str, Any], limit: int) -> bytes:
        sources = {
            "WORKLOAD": options["workload"],
            "--file": options["file"],
            "--args or --kwargs": options["positional"]
            if options["keywords"] is None
            else options["keywords"],
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            self._refuse(f"The workload comes from {' and '.join(given)}: choose one.")
        if given == ["--args or --kwargs"]:
            return dumps({"args": options["positional"] or [], "kwargs": options["keywords"] or {}})
        if options["workload"] is not None:
            # The bytes of the command line, whatever they are.
            return os.fsencode(options["workload"])
        path = options["file"]
        try:
            # No more than what the client then refuses: some files have no end.
            if path is None or path == "-":
                return sys.stdin.buffer.read(limit + 1)
            with open(path, "rb") as file:
                return file.read(limit + 1)
        except OSError as error:
            self._refuse(f"Cannot read {path or 'standard input'}: {error.strerror or error}.")

    def _refuse(self, reason: str) -> NoReturn:
        raise CommandError(reason, returncode=2)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of jobs from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _moment(text: str) -> float:
    """Seconds since 1970 of a moment or of a time from now."""
    duration = _DURATION.fullmatch(text)
    if duration is not None and text:
        days, hours, minutes, seconds = (int(part or 0) for part in duration.groups())
        moment = time.time() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        try:
            moment = time.time() + float(text)
        except ValueError:
            moment = _timestamp(text)
    if not 0 <= moment <= LATEST:
        raise ArgumentTypeError(
            f"{text!r} is not a time: use a moment such as 2027-01-31T08:00, seconds, or 10m, 2h, 1d12h"
        )
    return moment


def _timestamp(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.get_current_timezone())
        return moment.timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _json_list(text: str) -> list[Any]:
    value = _json(text)
    if not isinstance(value, list):
        raise ArgumentTypeError(f"{text!r} is not a list in JSON, such as '[1, \"two\"]'")
    return value


def _json_dict(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not an object in JSON, such as '{{\"size\": 3}}'")
    return value


def _json(text: str) -> object:
    def refuse(constant: str) -> NoReturn:
        raise ArgumentTypeError(f"{constant} is no JSON; use null or a string")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
