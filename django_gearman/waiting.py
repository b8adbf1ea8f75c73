"""How the end of a job or group is waited for: for how long, with what pauses; and why nobody came."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Generator, Iterator
from datetime import datetime
from time import monotonic, sleep
from typing import Final

from asgiref.sync import sync_to_async

from . import conf
from .client.admin_client import AdminClient
from .client.tasks import EXPLANATION_TIMEOUT, deadline_in
from .exceptions import ConnectionFailed, GearmanError, NoWorker, ResponseTimeout
from .models import JobRecord

LONGEST_PAUSE_OF_GET: Final = 0.25
"""Seconds between two looks at a row that ``get`` waits for, where the wire does not tell."""

LISTEN_AFTER: Final = 0.02
"""Pause between two looks from which on ``get`` asks the wire instead; short jobs have ended by then."""

LISTENING_PAUSE: Final = 0.005
"""Seconds after which ``get`` looks by itself though a job server was to tell it."""

NUDGE_AGAIN: Final = 0.2
"""Seconds after which job servers are told once more that somebody waits for a job's end."""

LISTEN_FOR: Final = 30.0
"""Seconds that ``get`` waits by the wire before it looks at the record all the same."""


class Patience:
    """How long ``get`` has waited, and how it goes on."""

    def __init__(self, timeout: float | None) -> None:
        deadline = deadline_in(timeout)
        self._deadline = math.inf if deadline is None else deadline
        self._pause = 0.001

    @property
    def left(self) -> float:
        return self._deadline - monotonic()

    @property
    def is_left(self) -> bool:
        return self.left > 0

    @property
    def listens(self) -> bool:
        """Whether it has been long enough to ask a job server."""
        return self._pause >= LISTEN_AFTER

    def is_told(self) -> None:
        """A job server will say when it is time to look; that another has the job is the exception."""
        self._pause = LISTENING_PAUSE

    def heard(self, told: bool) -> bool:
        """Whether a job server told something: then the record will say so at once."""
        if told:
            self._pause = 0.001
        return told

    def pause(self, longest: float = LONGEST_PAUSE_OF_GET) -> float:
        """
        Seconds until the next look.

        Args:
            longest: What they may grow to.
        """
        pause = min(self._pause, longest, max(self.left, 0.0))
        self._pause = min(self._pause * 1.5, longest)
        return pause


def sleep_between(looks: Iterator[float]) -> None:
    """Take the looks, each followed by the seconds of sleep that it yields."""
    for pause in looks:
        sleep(pause)


async def asleep_between(looks: Iterator[float]) -> None:
    """As ``sleep_between``, for asyncio: Django's thread for queries is free between two looks."""
    look = sync_to_async(lambda: next(looks, None))
    while (pause := await look()) is not None:
        await asyncio.sleep(pause)


def refuse_endless_wait(timeout: float | None) -> None:
    """Raise ``ConnectionFailed`` where a test has no job server, so that the end would never come."""
    if timeout is None and ConnectionFailed.HINTS:
        servers = conf.settings_for().servers
        if all(server in ConnectionFailed.HINTS for server in servers):
            raise ConnectionFailed(servers[0], "nobody would end the wait")


def timed_out(
    what: str, timeout: float, function: str, using: str | None, not_before: datetime | None = None
) -> ResponseTimeout:
    """
    What ``get`` raises: with the reason, when it is that nobody can run the job.

    Args:
        not_before: Of a job for later, the moment before which nobody is to.
    """
    told = []
    if not_before is not None:
        told.append(f"{function} is not to run before {not_before.isoformat(' ', 'seconds')}")
    asked = 0
    for admin in _admins():
        try:
            rows = admin.status()
        except GearmanError:
            continue
        asked += 1
        if any(row.name == function and row.workers for row in rows):
            return ResponseTimeout(what, timeout, "; ".join(told))
    servers = ", ".join(conf.settings_for().servers)
    if not asked:
        told.append(f"no job server answers at {servers}; {ConnectionFailed(servers, '').hint}")
        return ResponseTimeout(what, timeout, "; ".join(told))
    ready = JobRecord.objects.using(using).filter(function=function, status=JobRecord.Status.READY)
    return NoWorker(
        what,
        timeout,
        function=function,
        waiting=max(ready.count(), 1),
        server=servers,
        reason="; ".join(told),
    )


def _admins() -> Generator[AdminClient, None, None]:
    """Each job server, to ask in a hurry."""
    options = conf.settings_for()
    for server in options.servers:
        timeout = min(options.connect_timeout, EXPLANATION_TIMEOUT)
        with AdminClient(
            server, connect_timeout=timeout, timeout=timeout, tls=conf.client_tls(options)
        ) as admin:
            yield admin
