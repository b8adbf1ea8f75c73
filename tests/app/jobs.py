"""Jobs that the tests enqueue and workers of the acceptance tests run."""

import logging
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from django_gearman import Discard, JobContext, JobResult, Retry, job

AN_HOUR = timedelta(hours=1)
logger = logging.getLogger("django_gearman.tests")


@job
def add(left: int, right: int = 1) -> int:
    return left + right


@job(priority=10)
async def add_later(left: int, right: int) -> int:
    return left + right


@job(name="shout", raw=True)
def shout(workload: bytes) -> bytes:
    return workload.upper()


@job
def fail(message: str) -> None:
    raise ValueError(message)


@job
def return_a_set() -> object:
    return {1}


@job(queue_name="slow", takes_context=True)
def report(context: JobContext, steps: int) -> list[str]:
    for step in range(steps):
        context.set_progress(step + 1, steps)
        context.send_data(f"step {step + 1}")
    context.warn("almost done")
    return [context.handle]


@job
def append_line(path: str, line: str) -> None:
    """Leave a trace that counts how often a job ran, whole lines at a time."""
    with open(path, "a") as file:
        file.write(line + "\n")


@job
def wait_for_file(path: str) -> int:
    """Run until somebody makes the file; say in ``path.pid`` who runs it."""
    Path(path + ".pid").write_text(str(os.getpid()))
    deadline = time.monotonic() + 150
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)
    return os.getpid()


@job
def wait_for_files(paths: list[str]) -> int:
    return sum(wait_for_file.call(path) for path in paths)


@job
def kill_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def soon(error: BaseException, result: JobResult[Any]) -> float:
    """A backoff that says what it was told."""
    logger.warning("backoff told of %s, attempt %d of job %s", error, result.attempts, result.id)
    return 0.05


@job(max_attempts=3, backoff=soon, takes_context=True)
def fail_first(context: JobContext, times: int) -> list[int | None]:
    if context.attempt <= times:
        raise ValueError(f"attempt {context.attempt}")
    return [context.attempt, context.max_attempts]


@job(takes_context=True)
def ask_again(context: JobContext, times: int) -> int:
    """Ask for another attempt so often."""
    if context.attempt <= times:
        raise Retry("not ready", after=0.05)
    return context.attempt


@job(max_attempts=5)
def discard() -> None:
    raise Discard("the photo is gone")


@job(max_attempts=2)
def kill_worker_twice() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@job(max_attempts=2, backoff=lambda error, result: 3600)
def fail_for_an_hour() -> None:
    raise ValueError("not now")


@job(timeout=1, max_attempts=2, backoff=soon)
def sleep_long() -> None:
    time.sleep(30)


@job(timeout=1)
def pass_over_everything() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # what a careless function does
            pass


@job(timeout=1, max_attempts=1)
def hang_in_c() -> None:
    """Python's own signals are not heard in here."""
    sum(range(10**13))


@job(timeout=2)
def just_in_time() -> str:
    time.sleep(0.1)
    return "done"


@job(unique="path")
def append_once(path: str, line: str) -> None:
    """One for each path at a time; long enough for many to ask for it."""
    time.sleep(0.5)
    append_line.call(path, line)


@job(takes_context=True, max_attempts=2, backoff=lambda error, result: 0.0)
def chatter(context: JobContext, path: str) -> None:
    """Say something, wait for somebody to make the file, and say more; fail the first time."""
    context.logger.info("<script>alert('attempt %d')</script>", context.attempt)
    context.set_progress(1, 3)
    context.set_progress(2, 3)
    wait_for_file.call(path)
    logger.warning("%s is there", os.path.basename(path))
    if context.attempt == 1:
        raise ValueError("once more")


@job
def total(numbers: list[int], more: int = 0) -> int:
    return sum(numbers) + more


@job
def note(text: str) -> str:
    return text


@job(takes_context=True)
def tell_group(context: JobContext, *args: int) -> list[object]:
    """What a continuation sees of its group."""
    group = context.group
    assert group is not None
    return [group.total, group.failed, [result.status for result in group], *args]


@job(takes_context=True)
async def atell_group(context: JobContext, values: list[int]) -> list[object]:
    group = await context.agroup()
    assert group is not None
    return [values, [result.status async for result in group]]
