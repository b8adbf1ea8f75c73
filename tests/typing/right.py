"""What type checkers are to make of ``@job``; read by mypy, never run."""

from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any, assert_type

from django_gearman import (
    AsyncClient,
    Client,
    Data,
    GroupResult,
    Job,
    JobContext,
    JobResult,
    Progress,
    Signature,
    Task,
    Value,
    Warned,
    amap_reduce,
    chain,
    cron,
    every,
    group,
    job,
    map_reduce,
)
from django_gearman.backends import GearmanTaskContext, TaskContext, TaskResult, task


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


@job
def length(texts: list[str]) -> int:
    return sum(map(len, texts))


@job
def merge(left: int, right: int) -> int:
    return left + right


def soon(error: BaseException, result: TaskResult[Any, Any]) -> float | None:
    return None if isinstance(error, LookupError) else 0.1 * result.attempts


def later(error: BaseException, result: JobResult[Any]) -> float | None:
    return None if isinstance(error, LookupError) else 0.1 * result.attempts


@job(max_attempts=3, backoff=later)
def tried_again(left: int) -> str:
    return str(left)


@task
def task_alone(left: int, right: int = 1) -> str:
    return str(left + right)


@task(queue_name="sums", priority=5, max_attempts=3, backoff=soon, timeout=60)
def task_with_options(left: int) -> str:
    return str(left)


@task(max_attempts=3)
async def task_later(left: int) -> str:
    return str(left)


@task(takes_context=True, timeout=60)
def task_of_context(context: GearmanTaskContext, to: str) -> int:
    context.job.set_progress(1, 1)
    return context.attempt


@task(takes_context=True)
async def task_of_djangos_context(context: TaskContext[Any, Any], to: str) -> int:
    return context.attempt


def tasks() -> None:
    assert_type(task_alone.enqueue(1, right=2).return_value, str)
    assert_type(task_alone.call(1), str)
    assert_type(task_with_options.enqueue(1).return_value, str)
    assert_type(task_later.enqueue(1).return_value, str)
    assert_type(task_of_context.enqueue("kim").return_value, int)
    assert_type(task_of_djangos_context.enqueue("kim").return_value, int)


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
    assert_type(await add.aget_result("7"), JobResult[str])
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


def parallel() -> None:
    assert_type(add.s(1), Signature[str])
    assert_type(add.si(1, right=2), Signature[str])
    assert_type(add.using(priority=5).si(1), Signature[str])
    assert_type(add_later.si(1), Signature[str])
    assert_type(report.si(steps=3), Signature[list[str]])
    assert_type(group(add.s(1), add.s(2)), group[str])
    assert_type(group(add.s(number) for number in range(3)).run(timeout=5), list[str])
    calls: list[Signature[int] | Signature[str]] = [length.s([]), add.s(1)]
    assert len(group(length.s([]), add.s(1)).run()) == len(group(calls).run())
    result = group([add.s(1)]).enqueue(on_success=no_context.s(), on_complete=report.si(1))
    assert_type(result, GroupResult[list[str]])
    assert_type(result.get(timeout=5), list[str])
    assert_type(result.on_success, JobResult[Any] | None)
    assert_type(chain(add.s(1), report.s()).run(), list[str])
    assert_type(chain(add.s(1), group(add.s(1)), no_context.si(3), report.s()).enqueue().get(), list[str])
    assert_type(map_reduce(length, lambda left, right: left + right, ["a"]), int)
    assert_type(map_reduce(length, merge, ["a"], chunk=10, timeout=5), int)
    for member in result:
        assert_type(member, JobResult[Any])


async def parallel_twins() -> None:
    assert_type(await GroupResult.afind("7"), GroupResult[Any])
    assert_type(await group(add.s(1)).arun(timeout=5), list[str])
    assert_type(await (await chain(add.s(1), report.s()).aenqueue()).aget(), list[str])
    assert_type(await amap_reduce(length, merge, ["a"]), int)


def a_job_can_be_passed_on(any_job: Job[[int], str]) -> None:
    assert_type(any_job.enqueue(1).return_value, str)


a_job_can_be_passed_on(add_with_options)
