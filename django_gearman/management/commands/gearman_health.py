"""`manage.py gearman_health`: whether job servers answer, and whether workers serve what they should."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from ... import conf
from ...registry import registry
from ..health import Unhealthy, add_arguments, look
from ..terminal import add_servers


class Command(BaseCommand):
    help = (
        "Say whether job servers answer, and whether workers serve functions. Exit status 0: all is well; "
        "1: it is not. `python -m django_gearman.health` does the same without Django."
    )
    # What servers say does not depend on this project's models and views.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_arguments(parser)
        add_servers(parser, "Job servers to ask")
        parser.add_argument(
            "--queues", metavar="A,B", help="Every function of these queues must be served, too."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            settings = conf.settings_for()
            tls = conf.client_tls(settings)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        functions = [*options["functions"], *_of_queues(options["queues"])]
        try:
            told = look(options["servers"] or settings.servers, functions, options, tls)
        except Unhealthy as error:
            raise CommandError(str(error)) from error
        if not options["quiet"]:
            self.stdout.write(told)


def _of_queues(queues: str | None) -> list[str]:
    """Names of the jobs in these queues."""
    if queues is None:
        return []
    wanted = {queue.strip() for queue in queues.split(",")}
    known = {job.queue_name for job in registry.values()}
    if unknown := sorted(wanted - known):
        raise CommandError(
            f"No function is in the queue {', '.join(unknown)}. Known queues are: "
            f"{', '.join(sorted(known)) or 'none'}.",
            returncode=2,
        )
    return sorted(job.name for job in registry.values() if job.queue_name in wanted)
