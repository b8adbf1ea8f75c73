"""`manage.py gearman_prune`: delete the records of finished jobs by hand."""

from __future__ import annotations

import re
import time
from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError
from django.utils import timezone

from ... import conf
from ...history import FINISHED, History, Lane, configured, lanes_of
from ..console import require_tables

PROGRESS_INTERVAL: Final = 2.0
"""Seconds between two lines of progress."""


class Command(BaseCommand):
    help = (
        "Delete the records of jobs that ended long ago, as job servers do by themselves: without options, "
        "what the settings KEEP_SUCCESSFUL_DAYS, KEEP_FAILED_DAYS and KEEP_FUNCTION_DAYS let go."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--older-than",
            type=_age,
            metavar="AGE",
            help="In place of the settings: what ended longer ago, such as 90s, 15m, 12h, 7d or 4w.",
        )
        parser.add_argument(
            "--status",
            action="append",
            choices=[str(status) for status in FINISHED],
            metavar="STATUS",
            help=f"Only of jobs that ended so: {', '.join(map(str, FINISHED))}; may be given more than once.",
        )
        parser.add_argument(
            "--function",
            action="append",
            metavar="NAME",
            help="Only of this function; may be given more than once.",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Say how many records would be deleted, and delete none."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        settings = conf.settings_for()
        require_tables(settings.database)
        history = History(settings.database, _lanes(settings, options))
        try:
            if options["dry_run"]:
                count = history.count(timezone.now())
                self.stdout.write(f"{count} records would be deleted.")
            else:
                self._prune(history)
        except DatabaseError as error:
            reason = " ".join(str(error).split())
            raise CommandError(f"The database {settings.database!r} does not work: {reason}") from error

    def _prune(self, history: History) -> None:
        total, began = 0, time.monotonic()
        told = began
        now = timezone.now()
        while True:
            at = time.monotonic()
            batch = history.prune(now)
            seconds = time.monotonic() - at
            if not batch.more:
                break
            total += batch.deleted
            history.pause_after(batch, seconds)
            if time.monotonic() - told > PROGRESS_INTERVAL:
                told = time.monotonic()
                self.stdout.write(f"{total} records deleted, going on.")
                self.stdout.flush()
            # Those who write beside us get their turn.
            time.sleep(seconds)
        self.stdout.write(f"{total} records deleted in {time.monotonic() - began:.1f} s.")


def _lanes(settings: conf.GearmanSettings, options: dict[str, Any]) -> list[Lane]:
    statuses = options["status"] or FINISHED
    functions = frozenset(options["function"] or ())
    age: timedelta | None = options["older_than"]
    if age is None:
        lanes = lanes_of(configured(settings), statuses)
        return [narrowed for lane in lanes if (narrowed := lane.only(functions))] if functions else lanes
    return [Lane(status, age, functions or None) for status in statuses]


_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not an age: use a number and s, m, h, d or w, such as 7d")
    age = timedelta(**{_UNITS[found[2]]: int(found[1])})
    if age.days > conf.MAX_DAYS:
        raise ArgumentTypeError(f"{text!r} is too long: at most {conf.MAX_DAYS}d")
    return age
