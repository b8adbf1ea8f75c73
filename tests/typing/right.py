"""What type checkers are to make of ``@job``; read by mypy, never run."""

from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import assert_type

from django_gearman import (
    AsyncClient,
    Client,
    Data,
    Job,
    JobContext,
    JobResult,
    Progress,
    Task,
    Value,
    Warned,
    cron,
    every,
    job,
)


@job
def add(left: int, right: int = 1) -> str:
    return str(left + right)


@job
async def add_later(left: int, right: int = 1) -> str:
    return str(left + right)


@job(queue_name="sums", priority=5)
def add_with_options(left: int) -> str:
    return str(left)


@job(name="add")
async def add_later_with_options(left: int) -> str:
    return str(left)


@job(takes_context=True)
def report(context: JobContext, steps: int) -> list[str]:
    return [context.handle] * steps


@job(takes_context=True, queue_name="slow")
async def report_later(context: JobContext, steps: int) -> list[str]:
    return [context.handle] * steps


@job(takes_context=False)
def no_context(steps: int) -> None: ...


@job(raw=True)
def shout(workload: bytes) -> bytes:
    return workload.upper()


@job(schedule=cron("*/5 * * * *", tz="Europe/Paris", catch_up="none", args=[1]))
def scheduled(left: int) -> str:
    return str(left)


@job(schedule=[cron("0 3 * * *"), every(timedelta(minutes=5), name="often")], takes_context=True)
def scheduled_twice(context: JobContext) -> None: ...


def names_and_defaults() -> None:
    assert_type(add.enqueue(1), JobResult[str])
    assert_type(add.enqueue(1, right=2).return_value, str)
    assert_type(add.enqueue(left=1).get(timeout=5), str)
    assert_type(add.run(1), str)
    assert_type(add.call(1), str)
    assert_type(add(1), str)
    assert_type(add.get_result("7"), JobResult[str])


def async_def_is_unwrapped() -> None:
    assert_type(add_later.enqueue(1).return_value, str)
    assert_type(add_later.run(1, 2), str)
    assert_type(add_later(1), str)
    assert_type(add_later_with_options.enqueue(1).return_value, str)


def options_keep_the_signature() -> None:
    assert_type(add_with_options.enqueue(1).return_value, str)
    assert_type(shout.enqueue(b"a").return_value, bytes)
    assert_type(no_context.enqueue(1).return_value, None)
    assert_type(scheduled.enqueue(1).return_value, str)
    assert_type(scheduled_twice.enqueue().return_value, None)


def context_is_no_argument() -> None:
    assert_type(report.enqueue(3).return_value, list[str])
    assert_type(report.enqueue(steps=3).return_value, list[str])
    assert_type(report_later.enqueue(3).return_value, list[str])


def using_keeps_types() -> None:
    assert_type(add.using(priority=5).enqueue(1, 2).return_value, str)
    assert_type(report_later.using(run_after=timedelta(hours=1)).enqueue(3).return_value, list[str])


async def twins_for_asyncio() -> None:
    assert_type(await add.aenqueue(1), JobResult[str])
    assert_type(await add.arun(1, right=2), str)
    assert_type(await add_later.arun(1), str)
    assert_type(await add_later.acall(1), str)
    assert_type(await report.arun(3), list[str])
    result = await add.aenqueue(1)
    assert_type(await result.aget(timeout=5), str)
    assert_type(await result.acancel(), bool)
    assert_type(await result.aretry(), JobResult[str])
    await result.arefresh()


def many_at_once() -> None:
    assert_type(add.enqueue_many([((1,), {"right": 2})]), list[JobResult[str]])


def streams() -> None:
    assert_type(add.stream(1), Generator[Data | Warned | Progress | Value[str], None, None])
    assert_type(report.astream(3), AsyncGenerator[Data | Warned | Progress | Value[list[str]], None])
    for part in add.stream(1):
        match part:
            case Value(value):
                assert_type(value, str)
            case Progress(numerator, denominator):
                assert_type((numerator, denominator), tuple[int, int])
            case Data(data) | Warned(data):
                assert_type(data, bytes)


def results() -> None:
    result = add.enqueue(1)
    assert_type(result.retry(), JobResult[str])
    assert_type(result.cancel(), bool)
    assert_type(result.progress, tuple[int, int] | None)


async def clients(client: Client, other: AsyncClient) -> None:
    assert_type(client.do("f", b"w", unique="u", timeout=5.0, on_data=print, resubmit=True), bytes)
    assert_type(await other.do("f", b"w", unique="u", timeout=5.0, on_data=print), bytes)
    assert_type(client.add_task("f", b"w", on_complete=lambda task: task.data), Task)
    assert_type(client.run_tasks(timeout=5, on_fail=print), list[Task])
    assert_type(await other.run_tasks(timeout=5, on_fail=print), list[Task])


def a_job_can_be_passed_on(any_job: Job[[int], str]) -> None:
    assert_type(any_job.enqueue(1).return_value, str)


a_job_can_be_passed_on(add_with_options)
