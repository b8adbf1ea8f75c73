"""Calls that type checkers are to refuse: every line with the word ``error`` in its comment, and no other."""

from django_gearman import Client, JobContext, chain, cron, every, group, job, map_reduce
from django_gearman.backends import task


@job
def add(left: int, right: int = 1) -> str:
    return str(left + right)


@job
async def add_later(left: int) -> str:
    return str(left)


@job(takes_context=True)
def report(context: JobContext, steps: int) -> list[str]:
    return [context.handle] * steps


add.enqueue("1")  # error: arg-type
add.enqueue()  # error: call-arg
add.enqueue(1, 2, 3)  # error: call-arg
add.enqueue(1, middle=2)  # error: call-arg
add.run("1")  # error: arg-type
add.call("1")  # error: arg-type
add("1")  # error: arg-type
add.using(priority=5).enqueue("1")  # error: arg-type
add.using(queue="x")  # error: call-arg
add_later.enqueue("1")  # error: arg-type
report.enqueue()  # error: call-arg
report.enqueue("3")  # error: arg-type
add.enqueue(1).retyr()  # error: attr-defined
add.stream("1")  # error: arg-type
add.astream()  # error: call-arg
add.enqueue_many([1, 2])  # error: list-item
add.using(run_timeout="1")  # error: arg-type
add.si("1")  # error: arg-type
add.si()  # error: call-arg
group(add, add)  # error: call-overload
chain(add.s(1), 3)  # error: call-overload
group(add.s(1)).enqueue(on_success=add)  # error: arg-type
map_reduce(add, add, [1])  # error: arg-type
number: int = group(add.s(1)).run()  # error: assignment


async def twins() -> int:
    await add.arun("1")  # error: arg-type
    await add.aenqueue()  # error: call-arg
    await add_later.acall(1, 2)  # error: call-arg
    return await add.arun(1)  # error: return-value


Client().do("f", "text")  # error: arg-type
Client().do("f", uniqe="u")  # error: call-arg
Client().add_task("f", on_end=print)  # error: call-arg
Client().run_tasks(on_complete=1)  # error: arg-type
value: int = add.enqueue(1).return_value  # error: assignment


@job(takes_context=True)  # error: arg-type
def no_context(steps: int) -> None: ...


@job(priority="high")  # error: call-overload
def wrong_option(steps: int) -> None: ...


@job(retries=3)  # error: call-overload
def unknown_option(steps: int) -> None: ...


@job(schedule="*/5 * * * *")  # error: arg-type
def no_schedule(steps: int) -> None: ...


every(5)  # error: arg-type
cron("* * * * *", catch_up="some")  # error: arg-type
cron("* * * * *", zone="UTC")  # error: call-arg


@task(max_attempts=3)
def a_task(left: int) -> str:
    return str(left)


@task(timeout="60")  # error: call-overload
def task_with_a_wrong_option(left: int) -> None: ...


@task(retries=3)  # error: call-overload
def task_with_an_unknown_option(left: int) -> None: ...


a_task.enqueue("1")  # error: arg-type
a_task.enqueue()  # error: call-arg
