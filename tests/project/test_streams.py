"""How far jobs are, as a stream of events, under WSGI and under ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.http import StreamingHttpResponse

from project.gallery import streams

pytestmark = pytest.mark.django_db  # the end of a request looks at the connection


class Work:
    """What is looked at: something else each time, until there is no more."""

    def __init__(self, *states: dict[str, str], is_over: bool = True) -> None:
        self._states = list(states)
        self._is_over = is_over

    def __call__(self) -> tuple[dict[str, str], bool]:
        is_last = len(self._states) == 1
        return self._states[0] if is_last else self._states.pop(0), is_last and self._is_over


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "INTERVAL", 0.001)


def events(parts: list[bytes]) -> list[tuple[str, Any]]:
    found = []
    for part in b"".join(parts).decode().split("\n\n")[:-1]:
        if part.startswith(":"):
            continue
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def read(response: StreamingHttpResponse) -> list[tuple[str, Any]]:
    assert response.headers["Content-Type"] == "text/event-stream"
    content: Iterator[bytes] = response.streaming_content
    found = events(list(content))
    response.close()
    return found


STATES = ({"a": "1", "b": "1"}, {"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"b": "3"}, {"b": "\n\ndone"})
TOLD = [
    ("cards", {"a": "1", "b": "1"}),
    ("cards", {"b": "2"}),
    ("cards", {"a": "", "b": "3"}),
    ("cards", {"b": "\n\ndone"}),
    ("over", None),
]
"""Whole at first, then what has changed or is gone."""


class TestUnderWSGI:
    def test_changes(self, rf: Any):
        assert read(streams.stream(rf.get("/"), Work(*STATES))) == TOLD

    def test_ends_soon(self, rf: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(streams, "LIFE_OF_THREAD", 0.02)
        assert read(streams.stream(rf.get("/"), Work({"a": "1"}, is_over=False))) == [
            ("cards", {"a": "1"}),
            ("again", None),
        ]

    def test_few_at_a_time(self, rf: Any):
        held = [streams.stream(rf.get("/"), Work(*STATES)) for _ in range(streams.PLACES)]
        assert read(streams.stream(rf.get("/"), Work(*STATES))) == [("busy", None)]
        for response in held:
            response.close()  # nobody has read from it
            response.close()

        for _ in range(streams.PLACES + 1):
            assert read(streams.stream(rf.get("/"), Work(*STATES))) == TOLD

    def test_listener_who_leaves_frees_the_place(self, rf: Any):
        for _ in range(streams.PLACES + 1):
            response = streams.stream(rf.get("/"), Work({"a": "1"}, is_over=False))
            assert events([next(iter(response.streaming_content))]) == [("cards", {"a": "1"})]
            response.close()


class TestUnderASGI:
    def test_any_number(self, async_rf: Any):
        async def read(response: StreamingHttpResponse) -> list[tuple[str, Any]]:
            assert response.is_async
            return events([part async for part in response.streaming_content])

        async def read_all() -> list[list[tuple[str, Any]]]:
            responses = [streams.stream(async_rf.get("/"), Work(*STATES)) for _ in range(50)]
            return await asyncio.gather(*map(read, responses))

        assert async_to_sync(read_all)() == [TOLD] * 50
