"""
How far jobs are, as Server-Sent Events: a page hears of it when it changes.

Under ASGI a stream is a coroutine and costs next to nothing. Under WSGI it
keeps a thread, so there are few at a time, and each ends soon: the browser
comes again, or polls when it is told that all places are taken.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, StreamingHttpResponse

INTERVAL = 0.5
"""Seconds between two looks at the records."""

LIFE = 300.0
"""Seconds after which a stream of ASGI ends, and the browser asks anew."""

LIFE_OF_THREAD = 15.0
"""The same of WSGI."""

PLACES = 2
"""Streams at a time in a process under WSGI; gunicorn.conf.py gives it more threads than that."""

Look = Callable[[], tuple[dict[str, str], bool]]
"""What to show by its id, empty for what is gone, and whether all of it has ended."""

_places = threading.BoundedSemaphore(PLACES)


def stream(request: HttpRequest, look: Look) -> StreamingHttpResponse:
    """Tell what ``look`` finds, whole at first and then what has changed, until all has ended."""
    body: Any
    if isinstance(request, ASGIRequest):
        body = _aevents(look)
    elif _places.acquire(blocking=False):
        body = _Place(_events(look))
    else:
        body = [event("busy")]
    headers = {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",  # nginx would gather it
    }
    return StreamingHttpResponse(body, headers=headers)


class _Place:
    """The events of a stream that keeps one of the places until it is closed, be it read or not."""

    def __init__(self, events: Iterator[bytes]) -> None:
        self._events = events
        self._is_open = True

    def __iter__(self) -> Iterator[bytes]:
        return self._events

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            _places.release()


class _Changes:
    """What to send of each look."""

    def __init__(self) -> None:
        self._sent: dict[str, str] = {}

    def since_last(self, found: dict[str, str]) -> bytes:
        fresh = {id: html for id, html in found.items() if self._sent.get(id) != html}
        gone = [id for id in self._sent if id not in found]
        self._sent = found
        if not fresh and not gone:
            return b": nothing new\n\n"  # finds out whether somebody still listens
        return event("cards", fresh | dict.fromkeys(gone, ""))


def _events(look: Look) -> Iterator[bytes]:
    changes, end = _Changes(), time.monotonic() + LIFE_OF_THREAD
    while True:
        found, is_over = look()
        yield changes.since_last(found)
        if is_over or time.monotonic() >= end:
            break
        time.sleep(INTERVAL)
    yield event("over" if is_over else "again")


async def _aevents(look: Look) -> AsyncIterator[bytes]:
    changes, end = _Changes(), time.monotonic() + LIFE
    while True:
        found, is_over = await sync_to_async(look)()
        yield changes.since_last(found)
        if is_over or time.monotonic() >= end:
            break
        await asyncio.sleep(INTERVAL)
    yield event("over" if is_over else "again")


def event(name: str, data: Any = None) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
