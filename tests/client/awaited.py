"""``AsyncClient`` with the face of ``Client``: each call is awaited in an event loop of the client's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from inspect import isasyncgen, iscoroutine
from typing import Any, ClassVar

from django_gearman.client.aio import AsyncClient, AsyncWatch
from django_gearman.client.tasks import Task


class AwaitedClient:
    """Takes the arguments of ``AsyncClient``; ``test_aio.everywhere`` closes what is left open."""

    made: ClassVar[list[AwaitedClient]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        self._runner: asyncio.Runner | None = None
        self._client = AsyncClient(*args, **options)
        # Each call is an asyncio task of its own here.
        tasks: list[Task] = []
        self._client._added = lambda: tasks
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **options: Any) -> Any:
            async def called() -> Any:
                made = attribute(*args, **options)
                return await made if iscoroutine(made) else made

            made = self.run(called())
            if isinstance(made, AsyncWatch):
                return AwaitedWatch(self, made)
            return self._iterate(made) if isasyncgen(made) else made

        return call

    def run(self, coroutine: Any) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _iterate(self, made: AsyncGenerator[Any, None]) -> Iterator[Any]:
        async def step() -> Any:
            return await anext(made)

        try:
            while True:
                try:
                    yield self.run(step())
                except StopAsyncIteration:
                    return
        finally:
            self.run(made.aclose())

    def close(self) -> None:
        if self._runner is not None:
            # Closes the connections too.
            self._runner.close()
            self._runner = None

    def __enter__(self) -> AwaitedClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AwaitedWatch:
    """An ``AsyncWatch`` with the face of ``Watch``."""

    def __init__(self, client: AwaitedClient, watch: AsyncWatch) -> None:
        self._client = client
        self._watch = watch

    @property
    def is_open(self) -> bool:
        return self._watch.is_open

    @property
    def told(self) -> bytes:
        return self._watch.told

    def wait(self, seconds: float) -> bool:
        return bool(self._client.run(self._watch.wait(seconds)))

    def close(self) -> None:
        async def close() -> None:
            self._watch.close()

        self._client.run(close())
