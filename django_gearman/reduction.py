"""
``map_reduce``: a stream of items in chunks to workers, and their results put together as they come.

Foreground jobs of any Gearman server. What is mapped next is taken from the
items when there is room for it, so that neither they nor the results pile up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic
from typing import Any, Final, TypeVar, overload

from .client.core import ClientProtocol, JobRequest, Question
from .client.tasks import DoOptions, Task, TaskRun, deadline_in
from .exceptions import CommandNotSupported, GearmanError, InvalidGroup, JobFailed, ResponseTimeout
from .jobs import Job, told
from .submission import async_client_for, waiting_client

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")

IN_FLIGHT: Final = 64
"""Chunks of one ``map_reduce`` that are with job servers at a time."""


@overload
def map_reduce(
    mapper: Job[[list[T]], R],
    reducer: Callable[[R, R], R],
    items: Iterable[T],
    *,
    chunk: int = ...,
    timeout: float | None = ...,
    in_flight: int = ...,
) -> R: ...
@overload
def map_reduce(
    mapper: Job[[list[T]], R],
    reducer: Callable[[V, R], V],
    items: Iterable[T],
    *,
    initial: V,
    chunk: int = ...,
    timeout: float | None = ...,
    in_flight: int = ...,
) -> V: ...
def map_reduce(
    mapper: Job[[list[Any]], Any],
    reducer: Callable[[Any, Any], Any],
    items: Iterable[Any],
    *,
    initial: Any = None,
    chunk: int = 1000,
    timeout: float | None = None,
    in_flight: int = IN_FLIGHT,
) -> Any:
    """
    Have workers map the items, a chunk at a time, and put their results together as they come.

    The results come in any order: that must not matter to the reducer. Items are
    taken as they are needed, and no more than ``in_flight`` chunks are in memory.
    A ``run_timeout`` of ``using`` is of each of the jobs; without one they take as
    long as they take.

    Args:
        mapper: A job that takes a list of items; its value is one of the two that the reducer takes.
        reducer: Makes one of two. A function is called here, with what there is so far and the next
            result. A job runs at the workers, with two results at a time; then each mapping names it in
            its SUBMIT_REDUCE_JOB, where the server takes that.
        items: Anything to iterate over, of values that JSON can carry.
        initial: What a function begins with; also the value of no items.
        chunk: Items of one job.
        timeout: Seconds for everything; None to wait as long as it takes.
        in_flight: Jobs that are with servers at a time.
    Raises:
        JobFailed: A job failed; what is still to do is abandoned.
        ResponseTimeout: The time was up, of everything or of one job.
        ValueError: There are no items, and no initial value.
    """
    work = _Reduction(mapper, reducer, items, chunk, in_flight, initial)
    waiting_client().run_fed(_Feed(work, in_flight), timeout=timeout)
    return work.value()


@overload
async def amap_reduce(
    mapper: Job[[list[T]], R],
    reducer: Callable[[R, R], R],
    items: Iterable[T],
    *,
    chunk: int = ...,
    timeout: float | None = ...,
    in_flight: int = ...,
) -> R: ...
@overload
async def amap_reduce(
    mapper: Job[[list[T]], R],
    reducer: Callable[[V, R], V],
    items: Iterable[T],
    *,
    initial: V,
    chunk: int = ...,
    timeout: float | None = ...,
    in_flight: int = ...,
) -> V: ...
async def amap_reduce(
    mapper: Job[[list[Any]], Any],
    reducer: Callable[[Any, Any], Any],
    items: Iterable[Any],
    *,
    initial: Any = None,
    chunk: int = 1000,
    timeout: float | None = None,
    in_flight: int = IN_FLIGHT,
) -> Any:
    """As ``map_reduce``, on asyncio: items, and a reducer that is a function, are run in the event loop."""
    work = _Reduction(mapper, reducer, items, chunk, in_flight, initial)
    deadline = deadline_in(timeout)
    running: dict[asyncio.Task[bytes], _Piece] = {}
    try:
        async with asyncio.timeout(None if deadline is None else deadline - monotonic()) as limit:
            while True:
                while len(running) < in_flight and (piece := work.next()) is not None:
                    running[asyncio.create_task(piece.arun())] = piece
                if not running:
                    return work.value()
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    piece = running.pop(task)
                    try:
                        result = task.result()
                    except GearmanError as error:
                        work.failed(piece, error)
                    else:
                        # What a reducer raises is no error of the piece's.
                        work.ended(piece, result)
    except TimeoutError as error:
        if isinstance(error, GearmanError) or not limit.expired():
            raise
        raise ResponseTimeout(f"map_reduce of {mapper.name}", timeout or 0.0) from None
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


class _Piece:
    """One job of a ``map_reduce``."""

    def __init__(self, job: Job[Any, Any], args: tuple[Any, ...], reducer: str = "") -> None:
        self.job = job
        self.reducer = reducer
        """What is to be named in its submission."""
        self.workload, self.unique, _ = job._prepared(args, {})

    def task(self, work: _Reduction) -> Task:
        """For a client's ``run_fed``."""
        request = JobRequest(
            function=self.job.name.encode(),
            workload=self.workload,
            unique=self.unique.encode(),
            priority=self.job._wire_priority,
            background=False,
        )
        if self.reducer:
            request.reducer = self.reducer.encode()

        def failed(task: Task) -> None:
            assert task.error is not None, "it failed"
            work.failed(self, task.error)

        task = Task(
            request,
            "",
            None,
            {
                "on_complete": lambda task: work.ended(self, task.data),
                "on_fail": failed,
                "on_exception": failed,
            },
        )
        task.attach({})
        task.resubmit = self.job.resubmit
        return task

    async def arun(self) -> bytes:
        client = async_client_for()
        options: DoOptions = {
            "unique": self.unique,
            "timeout": self.job.run_timeout,
            "resubmit": self.job.resubmit,
        }
        if self.reducer:
            return await client.do_reduce(self.job.name, self.workload, reducer=self.reducer, **options)
        do = {"high": client.do_high, "normal": client.do, "low": client.do_low}[self.job._wire_priority]
        return await do(self.job.name, self.workload, **options)


class _Reduction:
    """What is left to do of a ``map_reduce``, and what has come of it."""

    def __init__(
        self,
        mapper: Job[Any, Any],
        reducer: Callable[[Any, Any], Any],
        items: Iterable[Any],
        chunk: int,
        in_flight: int,
        initial: Any,
    ) -> None:
        if not isinstance(mapper, Job):
            what = told(mapper).partition(" and write ")[0]
            raise InvalidGroup(f"the mapper is a @job that takes a list of items, not {what}")
        if not callable(reducer):
            raise InvalidGroup(f"the reducer is a @job or a function of two results, not {reducer!r:.200}")
        given: object = items
        if not isinstance(given, Iterable):
            raise InvalidGroup(f"the items are something to iterate over, not {items!r:.200}")
        for name, number in (("chunk", chunk), ("in_flight", in_flight)):
            if type(number) is not int or number < 1:
                raise InvalidGroup(f"{name} of map_reduce is a whole number, at least 1, not {number!r}")
        self._mapper = mapper
        self._reducer = reducer
        self._items = iter(items)
        self._chunk = chunk
        self._results: deque[Any] = deque() if initial is None else deque([initial])
        """One at the most where the reducer is a function."""
        self._again: deque[_Piece] = deque()
        # The packet has no place for another priority.
        self._named = reducer.name if isinstance(reducer, Job) and mapper._wire_priority == "normal" else ""

    def next(self) -> _Piece | None:
        """What can be submitted now; None when nothing is left, or it waits for what was submitted."""
        if self._again:
            return self._again.popleft()
        if isinstance(self._reducer, Job) and len(self._results) > 1:
            # Before more is mapped: what was mapped takes room.
            return _Piece(self._reducer, (self._results.popleft(), self._results.popleft()))
        some = list(islice(self._items, self._chunk))
        return _Piece(self._mapper, (some,), self._named) if some else None

    def ended(self, piece: _Piece, result: bytes) -> None:
        value = piece.job._value_of(result)
        if isinstance(self._reducer, Job) or not self._results:
            self._results.append(value)
        else:
            self._results.append(self._reducer(self._results.popleft(), value))

    def failed(self, piece: _Piece, error: GearmanError) -> None:
        """Raise what is to be raised; a server that knows no such packet is asked plainly."""
        if isinstance(error, CommandNotSupported) and piece.reducer:
            piece.reducer = self._named = ""
            self._again.append(piece)
            return
        raise piece.job._as_told(error) if isinstance(error, JobFailed) else error

    def value(self) -> Any:
        if not self._results:
            raise ValueError("map_reduce of no items has no value; give it an initial= one")
        (value,) = self._results
        return value


class _Feed(TaskRun):
    """The tasks of a ``map_reduce``, made when there is room for them."""

    def __init__(self, work: _Reduction, limit: int) -> None:
        super().__init__((), limit=limit, resubmit=False)
        self._work = work
        self._patience: dict[Task, float] = {}
        """Seconds that a task may take, of those that have a time of their own."""
        self._until: dict[Task, float] = {}
        """When that time is up."""

    @property
    def is_over(self) -> bool:
        if not super().is_over:
            return False
        piece = self._work.next()
        if piece is not None:
            self._waiting.append(self._task(piece))
        return piece is None

    def next_deadline(self, end: float | None) -> float | None:
        due = min(self._until.values(), default=None)
        return due if end is None else end if due is None else min(due, end)

    def next(self) -> Task | None:
        task = super().next()
        if task is None and self._count < self._limit and (piece := self._work.next()) is not None:
            task = self._task(piece)
        return task

    def submit(self, task: Task, server: str, protocol: ClientProtocol) -> bytes:
        if task in self._patience:
            # What is submitted again goes on with its time.
            self._until.setdefault(task, monotonic() + self._patience[task])
        return super().submit(task, server, protocol)

    def give_up(self, error: Callable[[Task], ResponseTimeout]) -> None:
        now = monotonic()
        for task, until in self._until.items():
            if until <= now:
                late = error(task)
                late.timeout = self._patience[task]
                task.fail(late)  # which raises it
        super().give_up(error)

    def _task(self, piece: _Piece) -> Task:
        task = piece.task(self._work)
        if piece.job.run_timeout is not None:
            self._patience[task] = piece.job.run_timeout
        return task

    def _land(self, there: dict[JobRequest | Question, Task], landed: JobRequest | Question) -> None:
        self._patience.pop(there[landed], None)
        self._until.pop(there[landed], None)
        super()._land(there, landed)
