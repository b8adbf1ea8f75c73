"""Tasks of ``django.tasks`` that the tests enqueue and workers of the acceptance tests run."""

import asyncio
import datetime
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import django

from django_gearman import Discard
from django_gearman.backends import TaskContext
from django_gearman.exceptions import JobCancelled

try:
    from django.tasks import task
except ImportError:
    from django_tasks import task

logger = logging.getLogger("django_gearman.tests")

noted: list[tuple[Any, ...]] = []
"""What functions of this file were told, of those that run in the test's process."""


@task()
def noop_task(*args: Any, **kwargs: Any) -> None:
    return None


@task
def noop_task_from_bare_decorator(*args: Any, **kwargs: Any) -> None:
    return None


@task()
async def noop_task_async(*args: Any, **kwargs: Any) -> None:
    return None


@task()
def calculate_meaning_of_life() -> int:
    return 42


@task()
def failing_task_value_error() -> None:
    raise ValueError("This Task failed due to ValueError")


@task()
def failing_task_system_exit() -> None:
    raise SystemExit("This Task failed due to SystemExit")


@task()
def failing_task_keyboard_interrupt() -> None:
    raise KeyboardInterrupt("This Task failed due to KeyboardInterrupt")


@task()
def complex_exception() -> None:
    raise ValueError(ValueError("This task failed"))


@task()
def complex_return_value() -> Callable[[], bool]:
    return lambda: True


@task()
def exit_task() -> None:
    exit(1)


@task(takes_context=True)
def get_task_id(context: TaskContext) -> str:
    return context.task_result.id


@task(takes_context=True)
def check_context(context: TaskContext, attempt: int) -> None:
    assert isinstance(context, TaskContext)
    assert context.attempt == attempt


@task
def echo(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs]


@task
def return_what_json_changes() -> Any:
    return {1: (b"bytes", 2.5), None: {"x": True}}


@task
def return_not_a_number() -> float:
    return float("nan")


@task(queue_name="slow", priority=20)
def in_the_slow_queue() -> str:
    return "slow"


@task
def kill_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@task(takes_context=True)
def report_progress(context: Any, steps: int) -> int:
    for step in range(1, steps + 1):
        context.job.set_progress(step, steps)
    return steps


@task(takes_context=True)
async def report_progress_async(context: Any, steps: int) -> int:
    context.job.set_progress(steps, steps)
    return steps


if django.VERSION[:2] != (6, 0):
    # Django 6.0's decorator takes no options beside its own.

    def soon(error: BaseException, result: Any) -> float:
        """A backoff that says what it was told."""
        logger.warning("backoff told of %s, attempt %d of task %s", error, result.attempts, result.id)
        noted.append((str(error), result.attempts, result.id, result.task.module_path))
        return 0.05

    @task(max_attempts=3, backoff=soon, takes_context=True)
    def fail_first(context: TaskContext, times: int) -> int:
        if context.attempt <= times:
            raise ValueError(f"attempt {context.attempt}")
        return context.attempt

    @task(max_attempts=2, backoff=lambda error, result: datetime.timedelta(seconds=0.05))
    def fail_always() -> None:
        raise ValueError("again")

    @task(max_attempts=2)
    def be_cancelled() -> None:
        """As a worker's main thread does it to a function."""
        raise JobCancelled

    @task(max_attempts=2)
    async def be_cancelled_on_the_loop() -> None:
        """As a worker's event loop does it to a function."""
        raise asyncio.CancelledError

    @task(max_attempts=5)
    def discard() -> None:
        raise Discard("the photo is gone")

    @task(max_attempts=2)
    def kill_worker_twice() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @task(timeout=1)
    def sleep_long() -> None:
        time.sleep(30)
