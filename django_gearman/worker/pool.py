"""
How the jobs in hand are run, and interrupted when their time is up.

In the main thread, one at a time (``Alarm``); in threads; or as tasks of one
event loop. Each raises ``JobTimedOut`` or ``JobCancelled`` inside a function,
as far as Python can: the main thread hears of a signal even in a C-level sleep
or while it waits for a thread, other threads only between two instructions, a
task only where it awaits. What goes on all the same is killed by the parent.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import signal
import threading
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final, Protocol

from ..exceptions import JobCancelled, JobTimedOut

COOPERATION: Final = 2.0
"""Seconds that a function which looks at ``cancelled`` gets to see it."""

SOON: Final = 0.01
"""Seconds by which a timer may ring early."""

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = (ctypes.c_ulong, ctypes.py_object)


class Running(Protocol):
    """The job in hand, as those who interrupt it see it."""

    limit: float | None
    """Seconds that it may take."""

    @property
    def is_cancelled(self) -> bool: ...
    @property
    def has_looked(self) -> bool:
        """Whether its function has asked whether it was cancelled."""
        ...


class Alarm:
    """
    Interrupts the main thread: SIGALRM, from its own timer or from the parent.

    Made in the main thread of a process that does nothing else with that signal.
    """

    def __init__(self) -> None:
        self._job: Running | None = None
        self._until = math.inf
        self._rang = False
        self._is_held = False
        self._is_due = False
        signal.signal(signal.SIGALRM, self._ring)

    def hold(self) -> None:
        """Raise nothing until ``release``: what follows is not to be left halfway."""
        self._is_held = True

    def release(self) -> None:
        """Raise what was due meanwhile."""
        self._is_held = False
        if self._is_due:
            self._ring()

    def __enter__(self) -> None:
        """Between ``begin`` and the end of the block, the exception may be raised."""

    def begin(self, job: Running) -> Alarm:
        """Watch over a job from now on; to be used as a context at once."""
        self._rang = self._is_due = False
        self._until = math.inf
        self._job = job
        if job.limit is not None:
            self._until = monotonic() + job.limit
            signal.setitimer(signal.ITIMER_REAL, job.limit)
        if job.is_cancelled:
            # The signal came a moment before.
            self._ring()
        return self

    def __exit__(self, *args: object) -> None:
        self._job = None
        if self._until != math.inf or self._rang:
            self._until = math.inf
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *args: object) -> None:
        job = self._job
        if job is None:
            return
        self._is_due = self._is_held
        if self._is_held:
            return
        if job.is_cancelled:
            if job.has_looked and not self._rang:
                self._rang = True
                signal.setitimer(signal.ITIMER_REAL, COOPERATION)
                return
            # Once: what it does about it takes a moment.
            self._job = None
            raise JobCancelled
        if monotonic() >= self._until - SOON:
            self._job = None
            raise JobTimedOut(job.limit or 0)


class Interruptible:
    """A job that runs beside the thread that takes jobs, and may be interrupted by it once."""

    def __init__(self, job: Running) -> None:
        self.job = job
        self.until = math.inf if job.limit is None else monotonic() + job.limit
        """The monotonic time at which it is to be looked at."""
        self._cancelled_at: float | None = None
        self.error: JobTimedOut | JobCancelled | None = None
        """What was raised in it."""

    def look(self, now: float) -> None:
        """Interrupt it if it is time."""
        if self.error is not None:
            return
        if self.job.is_cancelled:
            if self._cancelled_at is None:
                self._cancelled_at = now
                if self.job.has_looked:
                    self.until = now + COOPERATION
                    return
            elif now < self.until:
                return
            self._interrupt(JobCancelled())
        elif now >= self.until:
            self._interrupt(JobTimedOut(self.job.limit or 0))

    def _interrupt(self, error: JobTimedOut | JobCancelled) -> None:
        self.until = math.inf
        self.error = error
        self.interrupt(error)

    def interrupt(self, error: JobTimedOut | JobCancelled) -> None:
        raise NotImplementedError

    def told(self, error: BaseException) -> BaseException:
        """The error that ended the function, as it is to be told."""
        return error


class _InThread(Interruptible):
    def __init__(self, job: Running) -> None:
        super().__init__(job)
        self._lock = threading.Lock()
        self._thread: int | None = None

    def run(self, work: Callable[[], Any]) -> Any:
        """
        Call the function, in the thread that is to be interrupted.

        Raises:
            BaseException: Whatever it raises.
        """
        failure: BaseException | None = None
        result = None
        try:
            with self._lock:
                self._thread = threading.get_ident()
            result = work()
        except BaseException as error:
            failure = error
        while True:
            try:
                with self._lock:
                    # None may come after this: the thread goes on to other jobs.
                    self._thread = None
                    if self.error is not None:
                        _raise_in(threading.get_ident(), ctypes.py_object())
                break
            except (JobTimedOut, JobCancelled) as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return result

    def interrupt(self, error: JobTimedOut | JobCancelled) -> None:
        with self._lock:
            if self._thread is not None:
                _raise_in(self._thread, type(error))

    def told(self, error: BaseException) -> BaseException:
        # Raised as a class, it does not know the limit.
        if self.error is not None and type(error) is type(self.error):
            return self.error.with_traceback(error.__traceback__)
        return error


class Threads:
    """So many threads, each with one job at a time; started when they are needed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(
        self, job: Running, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> _InThread:
        """
        Run a job; at most ``count`` at a time.

        Args:
            work: The job's function, to be called in the thread.
            done: Called there with its result, or with what it raised.
        """
        running = _InThread(job)

        def perform() -> None:
            try:
                result = running.run(work)
            except BaseException as error:
                done(None, running.told(error))
            else:
                done(result, None)

        if len(self._threads) < self.count:
            thread = threading.Thread(
                target=self._serve, name=f"gearman-job-{len(self._threads) + 1}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._queue.put(perform)
        return running

    def close(self) -> None:
        """End the threads; only when no job is left."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (perform := self._queue.get()) is not None:
            perform()
            # A result may be large, and the next job far.
            del perform


class _AsTask(Interruptible):
    def __init__(self, job: Running, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(job)
        self._loop = loop
        self.task: asyncio.Task[Any] | None = None
        self.has_begun = False

    def interrupt(self, error: JobTimedOut | JobCancelled) -> None:
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        assert self.task is not None, "it was begun by an earlier call of the loop"
        if self.has_begun:
            self.task.cancel()
        else:
            # A task that is cancelled before its first step would end without a word.
            self._loop.call_soon(self._cancel)

    def told(self, error: BaseException) -> BaseException:
        # What we cancelled, we tell of; what it cancelled itself is its own affair.
        if self.error is not None and isinstance(error, asyncio.CancelledError):
            return self.error.with_traceback(error.__traceback__)
        return error


class Tasks:
    """So many tasks at a time, on one event loop in a thread of its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="gearman-tasks", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_ended = False
        self._thread.start()

    def start(
        self,
        job: Running,
        work: Callable[[], Awaitable[Any]],
        done: Callable[[Any, BaseException | None], None],
    ) -> _AsTask:
        """Run a job; ``work`` and ``done`` are called in the loop's thread."""
        running = _AsTask(job, self._loop)

        async def perform() -> None:
            running.has_begun = True
            try:
                result = await work()
            except BaseException as error:
                done(None, running.told(error))
            else:
                done(result, None)

        def begin() -> None:
            running.task = self._loop.create_task(perform())
            # The loop itself holds tasks by weak references.
            self._tasks.add(running.task)
            running.task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)
        return running

    def close(self) -> None:
        """End the loop; only when no job is left."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._loop.close()

    def _end(self) -> None:
        self._has_ended = True
        self._loop.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._has_ended:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                # One that a job began as a task has raised it: asyncio raises it here, too, besides where
                # the job awaits it.
                pass
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
