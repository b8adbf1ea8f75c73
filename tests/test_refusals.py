"""What cannot be is refused where it is written, in a sentence that says what to write instead."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation

from django_gearman import Client, GroupResult, JobContext, amap_reduce, chain, group, job, map_reduce
from django_gearman.client.aio import AsyncClient
from django_gearman.exceptions import (
    CommandNotSupported,
    ConnectionFailed,
    GearmanError,
    GroupDoesNotExist,
    GroupFailed,
    GroupTimedOut,
    InvalidCall,
    InvalidGroup,
    InvalidJob,
    JobFailed,
    JobResultDoesNotExist,
    NotJSON,
    NoWorker,
    ResponseTimeout,
    Retry,
    TooLarge,
    WaitInTransaction,
)
from django_gearman.models import JobGroup, JobRecord
from django_gearman.registry import registry
from django_gearman.submission import client_for
from django_gearman.testing import GearmanJobs
from tests.app import jobs

add, total = jobs.add, jobs.total
later = add.using(run_after=timedelta(hours=1))


def plus(left: int, right: int) -> int:
    return left + right


async def coroutine(task: object) -> None: ...


def awaited(call: Callable[[], Any]) -> Callable[[], Any]:
    async def main() -> Any:
        return await call()

    return lambda: asyncio.run(main())


def iterated(call: Callable[[], Any]) -> Callable[[], Any]:
    async def main() -> Any:
        return [part async for part in call()]

    return lambda: asyncio.run(main())


class TestForegroundJobs:
    """``run`` and its like honour an option, or say that they do not."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda: later.run(1),
            awaited(lambda: later.arun(1)),
            lambda: list(later.stream(1)),
            iterated(lambda: later.astream(1)),
            lambda: group(add.s(1), later.s(1)).run(),
            awaited(lambda: group(later.s(1)).arun()),
            lambda: chain(later.s(1)).run(),
            awaited(lambda: chain(later.s(1)).arun()),
            lambda: map_reduce(total.using(run_after=timedelta(0)), plus, [1]),
        ],
    )
    def test_not_for_later(self, call: Callable[[], Any]) -> None:
        with pytest.raises(
            InvalidCall, match=r"has run_after, .*; have it run later by enqueue\(\)"
        ) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert caught.value.option == "run_after"

    @pytest.mark.parametrize(
        "call",
        [
            lambda: add.using(resubmit=True).stream(1),
            lambda: add.using(resubmit=True).astream(1),
        ],
    )
    def test_a_stream_does_not_begin_anew(self, call: Callable[[], Any]) -> None:
        with pytest.raises(InvalidCall, match=r"has resubmit, .*; run\(\) it, or leave resubmit out"):
            call()

    @pytest.mark.parametrize("seconds", [0, -1, "5", float("nan"), timedelta(1)])
    def test_run_timeout(self, seconds: Any) -> None:
        with pytest.raises(InvalidJob, match=r"run_timeout of .* must be a number of seconds above 0, not "):
            add.using(run_timeout=seconds)


class TestTimeouts:
    @pytest.mark.parametrize(
        "call",
        [
            lambda timeout: group(add.s(1)).run(timeout=timeout),
            lambda timeout: awaited(lambda: group(add.s(1)).arun(timeout=timeout))(),
            lambda timeout: chain(add.s(1)).run(timeout=timeout),
            lambda timeout: awaited(lambda: chain(add.s(1)).arun(timeout=timeout))(),
            lambda timeout: map_reduce(total, plus, [1], timeout=timeout),
            lambda timeout: awaited(lambda: amap_reduce(total, plus, [1], timeout=timeout))(),
            lambda timeout: Client().do("reverse", timeout=timeout),
            lambda timeout: Client().wait_for("H:1", timeout=timeout),
            lambda timeout: list(Client().stream("reverse", timeout=timeout)),
            lambda timeout: Client().run_tasks(timeout=timeout),
            lambda timeout: awaited(lambda: AsyncClient().do("reverse", timeout=timeout))(),
        ],
    )
    @pytest.mark.parametrize("timeout", ["5", timedelta(1), float("nan")])
    def test_what_is_no_number(self, call: Callable[[Any], Any], timeout: Any) -> None:
        with pytest.raises(
            (TypeError, ValueError), match="a time-out is a number of seconds, or None to wait"
        ):
            call(timeout)

    @pytest.mark.parametrize("timeout", [0, -1, -1e300])
    def test_none_left(self, gearman_jobs: GearmanJobs, timeout: float) -> None:
        """``get`` looks once."""
        for made in (add.enqueue(1), group(add.s(1)).enqueue()):
            JobRecord.objects.update(status="SUCCESSFUL", result=b"2", finished_at="2026-01-01T00:00Z")
            JobGroup.objects.update(finished_at="2026-01-01T00:00Z", successful=1)
            assert made.get(timeout=timeout) in (2, [2])

    @pytest.mark.parametrize("timeout", ["5", float("nan")])
    def test_of_get(self, gearman_jobs: GearmanJobs, timeout: Any) -> None:
        for made in (add.enqueue(1), group(add.s(1)).enqueue()):
            with pytest.raises((TypeError, ValueError), match="a time-out is a number of seconds"):
                made.get(timeout=timeout)


class TestDeclarations:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"max_retries": 3}, "has no option 'max_retries'; use max_attempts"),
            ({"bind": True}, "has no option 'bind'; use takes_context"),
            ({"priorty": 3}, "has no option 'priorty'; use priority"),
            ({"countdown": 3}, r"has no option 'countdown'; use using\(run_after=...\)"),
            ({"colour": 3}, "has no option 'colour'; it has backoff, concurrency, "),
            ({"rate_limit": 5}, 'must be a text such as "10/m", not 5'),
            ({"rate_limit": "x"}, "'x' is no rate: "),
            ({"rate_limit": "10/w"}, "'10/w' is no rate: "),
            ({"concurrency": "2"}, "concurrency of .* must be a whole number from 1 to 1000000, not '2'"),
            ({"concurrency": 0}, "must be a whole number from 1 to 1000000, not 0"),
            ({"limit_key": "left"}, "needs a rate_limit or a concurrency"),
            ({"limit_key": "right", "concurrency": 1}, "names 'right', which is no argument"),
        ],
    )
    def test_options(self, options: dict[str, Any], sentence: str) -> None:
        def made(left: int) -> int:
            return left

        made.__qualname__ = "made"
        with pytest.raises(InvalidJob, match=sentence):
            job(**options)(made)
        assert "tests.test_refusals.made" not in registry

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"unique": 5}, "the unique that using.. gives .* must be a str, not 5"),
            ({"run_after": 5}, "must be a datetime or a timedelta, not 5"),
            ({"run_after": timedelta.max}, "is beyond the year 9999"),
            (
                {"run_after": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))},
                "is a moment that UTC has no date for",
            ),
            (
                {"run_after": datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))},
                "is a moment that UTC has no date for",
            ),
        ],
    )
    def test_using(self, options: dict[str, Any], sentence: str) -> None:
        with pytest.raises(InvalidJob, match=sentence):
            add.using(**options)

    @pytest.mark.parametrize(
        ("word", "use"),
        [("delay", r"; use enqueue\(...\)$"), ("apply_async", r"; use enqueue\(...\), after"), ("x", "'x'$")],
    )
    def test_words_of_other_libraries(self, word: str, use: str) -> None:
        with pytest.raises(
            AttributeError, match=f"a @job has no attribute {word!r}{use.removeprefix(repr(word))}"
        ):
            getattr(add, word)
        assert not hasattr(add, word)


class TestWhatIsNoCall:
    @pytest.mark.parametrize(
        ("thing", "sentence"),
        [
            (plus, r"not the function plus; decorate it with @job and write plus\.s\(...\)$"),
            (len, "not the function len; decorate it"),
            (None, "not None; was the function called"),
            (b"ab", "not b'ab'; was the function called"),
            (add, r"not the job itself; write add\.s\(...\)"),
            ([[add.s(1)]], r"not a list; write group\(\*calls\)"),
            (group(add.s(1)), r"not a group; write group\(\*its\.members, \.\.\.\)"),
        ],
    )
    def test_members(self, thing: Any, sentence: str) -> None:
        with pytest.raises(InvalidGroup, match=sentence):
            group(thing)
        with pytest.raises(InvalidGroup):
            group(add.s(1), thing)

    def test_steps(self) -> None:
        with pytest.raises(InvalidGroup, match=r"not a generator; write chain\(\*calls\)"):
            chain(add.s(number) for number in range(2))  # type: ignore[call-overload]
        with pytest.raises(InvalidGroup, match=r"not a chain; write chain\(\*its\.steps, \.\.\.\)"):
            chain(chain(add.s(1)))  # type: ignore[call-overload]
        with pytest.raises(InvalidGroup, match="not 3; was the function called"):
            chain(3)  # type: ignore[call-overload]

    def test_enqueued_already(self, gearman_jobs: GearmanJobs) -> None:
        with pytest.raises(InvalidGroup, match=r"a job that is enqueued already; write add\.s\(...\)"):
            group(add.enqueue(1))  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["on_success", "on_complete"])
    def test_what_follows(self, db: None, name: str) -> None:
        for thing, sentence in ((plus, "the function plus"), ([total.s()], "a list of them"), (3, "not 3")):
            with pytest.raises(InvalidGroup, match=f"{name} is one call of a job, .*{sentence}"):
                group(add.s(1)).enqueue(**{name: thing})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("arguments", "options", "sentence"),
        [
            ((plus, plus, [1]), {}, "takes a list of items, not the function plus; decorate it with @job$"),
            ((total.s(), plus, [1]), {}, r"not the call tests.app.jobs.total\(\); hand in the job itself"),
            ((total, 3, [1]), {}, "the reducer is a @job or a function of two results, not 3"),
            ((total, plus, 7), {}, "the items are something to iterate over, not 7"),
            (
                (total, plus, [1]),
                {"chunk": "a"},
                "chunk of map_reduce is a whole number, at least 1, not 'a'",
            ),
            ((total, plus, [1]), {"in_flight": 0}, "in_flight of map_reduce is a whole number"),
        ],
    )
    def test_map_reduce(self, arguments: Any, options: Any, sentence: str) -> None:
        with pytest.raises(InvalidGroup, match=sentence):
            map_reduce(*arguments, **options)
        with pytest.raises(InvalidGroup, match=sentence):
            asyncio.run(amap_reduce(*arguments, **options))


class TestClients:
    """Both: what is told by name is looked at."""

    @pytest.mark.parametrize(
        ("call", "error", "sentence"),
        [
            (
                lambda client: client.do("f", time_out=5),
                TypeError,
                r"do\(\) has no option 'time_out'; it has on_data",
            ),
            (lambda client: client.do(add), TypeError, "function must be a str, not <Job"),
            (lambda client: client.do(b"f"), TypeError, "function must be a str, not b'f'"),
            (lambda client: client.do(""), ValueError, "a job needs the name of a function"),
            (lambda client: client.do("f", "text"), TypeError, "must be bytes, not str; encode it first"),
            (lambda client: client.do("f", unique=5), TypeError, "unique must be a str, not 5"),
            (lambda client: client.do("f", unique="\ud800"), ValueError, "cannot be UTF-8"),
            (lambda client: client.do_background("f\0g"), ValueError, "has a NUL"),
            (lambda client: client.do_epoch("f", epoch="now"), ValueError, "epoch is a time in seconds"),
            (lambda client: client.echo("x"), TypeError, "what is to be echoed must be bytes, not str"),
            (lambda client: client.do("f", on_data=3), TypeError, "on_data must be a function, not 3"),
            (lambda client: client.do("f", on_data=coroutine), TypeError, "must be a plain function: nobody"),
            (lambda client: client.run_tasks(limit=0), ValueError, "limit is how many tasks .* at least 1"),
            (lambda client: client.run_tasks(limit="x"), ValueError, "limit is how many tasks"),
            (lambda client: client.job_status(None), TypeError, "handle must be a str, not None"),
        ],
    )
    def test_calls(self, call: Callable[[Any], Any], error: type[Exception], sentence: str) -> None:
        with pytest.raises(error, match=sentence):
            call(Client())
        with pytest.raises(error, match=sentence):
            awaited(lambda: call(AsyncClient()))()

    def test_call_backs(self) -> None:
        client = Client()
        with pytest.raises(TypeError, match=r"add_task\(\) has no option 'on_done'; it has on_complete, "):
            client.add_task("f", on_done=print)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="on_complete must be a function, not 3"):
            client.add_task_status("H:1", on_complete=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="on_fail must be a plain function: nobody would await"):
            client.add_task("f", on_fail=coroutine)
        with pytest.raises(TypeError, match=r"run_tasks\(\) has no option 'on_finished'"):
            client.run_tasks(on_finished=print)  # type: ignore[call-arg]
        assert client.run_tasks() == []

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"servers": None}, "servers must be a sequence"),
            ({"servers": [("127.0.0.1", 4730)]}, r"^\('127.0.0.1', 4730\) is not an address such as"),
            ({"servers": ["a:b"]}, "is not an address"),
            ({"timeout": 0}, "timeout must be a number of seconds above 0, not 0"),
            ({"timeout": "5"}, "timeout must be a number of seconds"),
            ({"connect_timeout": -1}, "connect_timeout must be a number of seconds above 0"),
            ({"connect_timeout": float("nan")}, "connect_timeout must be a number of seconds above 0"),
        ],
    )
    def test_what_they_are_made_of(self, arguments: dict[str, Any], sentence: str) -> None:
        for kind in (Client, AsyncClient):
            with pytest.raises(ValueError, match=sentence):
                kind(**arguments)


class TestArguments:
    def test_what_contains_itself(self) -> None:
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(
            NotJSON, match=r"argument 'left' of .*add is nested too deeply, or contains itself"
        ):
            add.s(loop)

    def test_numbers_that_readers_refuse(self) -> None:
        with pytest.raises(
            NotJSON, match=r"argument 'left' of .*add has more digits than JSON's readers take"
        ):
            add.s(10**5000)
        assert add.s(10**4000)

    @pytest.mark.parametrize("unique", ["a\0b", "\ud800", "ü" * 101])
    def test_uniques_that_nothing_takes_are_hashed(self, gearman_jobs: GearmanJobs, unique: str) -> None:
        one, other = (add.using(unique=unique).enqueue(number) for number in (1, 2))
        assert one.id == other.id
        assert len(one._record.unique) == 64
        assert add.using(unique=unique + "x").enqueue(1).id != one.id


class TestUniquesInAGroup:
    """Each member counts: two of one unique would be one job."""

    @pytest.mark.parametrize(
        ("made", "sentence"),
        [
            (
                lambda: group(jobs.append_once.s("p", "x"), add.s(1), jobs.append_once.s("p", "y")),
                r"member 2, .*append_once\('p', 'y'\): member 0 of the same group has its unique",
            ),
            (
                lambda: chain(jobs.append_once.s("p", "x"), jobs.append_once.si("p", "y")),
                "member 1, .*: member 0 of the same group",
            ),
        ],
    )
    def test_refused(self, gearman_jobs: GearmanJobs, made: Callable[[], Any], sentence: str) -> None:
        with pytest.raises(InvalidGroup, match=sentence) as caught:
            made().enqueue()
        assert 'using(unique="")' in str(caught.value)
        assert not JobRecord.objects.exists()
        assert not JobGroup.objects.exists()

    def test_of_what_follows(self, gearman_jobs: GearmanJobs) -> None:
        once = add.using(unique="u")
        with pytest.raises(InvalidGroup, match=r"on_success=.*: member 0 of the same group"):
            group(once.s(1)).enqueue(on_success=once.si(2))
        with pytest.raises(InvalidGroup, match=r"on_complete=.*: what follows it of the same group"):
            group(add.s(1)).enqueue(on_success=once.si(2), on_complete=once.si(2))
        assert not JobRecord.objects.exists()


@pytest.fixture
def keyed() -> Iterator[Any]:
    """A raw job with a limit for each key."""

    def keyed(workload: bytes) -> bytes:
        return workload

    keyed.__qualname__ = "keyed"
    made: Any = job(raw=True, concurrency=1, limit_key=lambda workload: workload[:1].decode())(keyed)
    yield made
    registry.pop(made.name)


class TestKeysOfRawJobs:
    """Their packets have no place for a key."""

    def test_a_row_has_one(self, gearman_jobs: GearmanJobs, keyed: Any) -> None:
        assert keyed.enqueue(b"abc")._record.limit_key == "a"
        (record,) = JobRecord.objects.filter(group=group(keyed.s(b"bcd")).enqueue().id)
        assert record.limit_key == "b"

    def test_a_packet_has_none(self, gearman_jobs: GearmanJobs, keyed: Any, settings: Any) -> None:
        for call in (
            lambda: keyed.run(b"abc"),
            lambda: keyed.stream(b"abc"),
            lambda: group(keyed.s(b"abc")).run(),
        ):
            with pytest.raises(InvalidCall, match=r"has limit_key, but .*no place for the key"):
                call()
        settings.GEARMAN = {"default": {"SERVERS": ["127.0.0.1:9"], "ENQUEUE": "wire"}}
        with pytest.raises(InvalidCall, match="has limit_key"):
            keyed.enqueue(b"abc")

    def test_none_is_needed(self, keyed: Any) -> None:
        """No key is the one that is shared by all that have none: so it gets as far as to a server."""
        with pytest.raises(GearmanError, match="no job server answers"):
            keyed.run(b"")


def test_a_group_that_cannot_be_submitted_leaves_nothing_for_the_next(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.GEARMAN = {"default": {"SERVERS": ["127.0.0.1:9"]}}
    client = client_for()
    monkeypatch.setattr(client, "_max_packet", 200)
    with pytest.raises(GearmanError, match="the workload of shout has 300 bytes"):
        group(jobs.shout.s(b"a"), jobs.shout.s(bytes(300))).run()
    assert client.run_tasks() == []


class TestTimeIsUp:
    """``group.run``: a time-out is one, and a failure is another matter."""

    def test_a_time_out(self, settings: Any, memory_server: Any) -> None:
        settings.GEARMAN = memory_server.setting
        with pytest.raises(
            GroupTimedOut, match=r"2 of 2 members have not ended in time; member 0 of"
        ) as caught:
            group(add.s(1), add.s(2)).run(timeout=0.2)
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert isinstance(error, ResponseTimeout)
        assert not isinstance(error, GroupFailed)
        assert isinstance(error.error, NoWorker)
        assert error.timeout == 0.2
        assert (error.index, error.job, len(error.outcomes)) == (0, add.name, 2)
        with pytest.raises(TimeoutError, match="1 member has not ended in time"):
            asyncio.run(group(add.s(1)).arun(timeout=0.2))
        with pytest.raises(TimeoutError) as noted:
            chain(group(add.s(1)), total.s()).run(timeout=0.2)
        assert noted.value.__notes__[0].startswith("In step 1 of 2 of the chain")


def test_a_group_that_nobody_takes(settings: Any) -> None:
    """As ``job.run``, so that a view has one fall-back for both; with some taken it is another matter."""
    settings.GEARMAN = {"default": {"SERVERS": ["127.0.0.1:9"]}}
    with pytest.raises(ConnectionFailed, match="no job server answers"):
        group(add.s(1), add.s(2)).run(timeout=5)
    with pytest.raises(ConnectionFailed, match="no job server answers"):
        asyncio.run(group(add.s(1), add.s(2)).arun(timeout=5))


def test_signatures_are_pickled_with_their_options() -> None:
    call = add.using(run_timeout=5.0, resubmit=True).s(1)
    again = pickle.loads(pickle.dumps(call))
    assert (again.job.run_timeout, again.job.resubmit, again.args) == (5.0, True, (1,))
    both = pickle.loads(pickle.dumps((group(call, add.s(2)), chain(call, add.s(2)))))
    assert [len(both[0].members), len(both[1].steps)] == [2, 2]


@pytest.mark.parametrize("progress", [(0.5, 1), (1, 2.0), ("1", "2"), (None, 3), (float("nan"), 1)])
def test_progress_is_of_whole_numbers(progress: Any) -> None:
    """What cannot be sent is refused where it is said, and not when it leaves."""
    context = JobContext()
    context.set_progress(7, 9)
    with pytest.raises(TypeError, match=r"two whole numbers, such as 3 and 10, not .*; a fraction is round"):
        context.set_progress(*progress)
    context.flush()
    assert context._progress == (7, 9)


def test_context_is_for_jobs_that_take_it() -> None:
    def made(left: int, context: JobContext) -> None: ...

    made.__qualname__ = "made"
    with pytest.raises(InvalidJob, match="its first argument must be `context`"):
        job(takes_context=True)(made)  # type: ignore[arg-type]


class TestIds:
    @pytest.mark.parametrize("id", ["x", "", None, -1, 1.5, 10**30, "1" * 5000, "1.0", True])
    def test_what_is_no_id(self, gearman_jobs: GearmanJobs, id: Any) -> None:
        add.enqueue(1)
        group(add.s(1)).enqueue()
        with pytest.raises(JobResultDoesNotExist, match="there is no job with the id"):
            add.get_result(id)
        with pytest.raises(GroupDoesNotExist, match="there is no group with the id"):
            GroupResult.find(id)


def test_results_are_equal_by_what_they_are_of(gearman_jobs: GearmanJobs) -> None:
    one, other = add.enqueue_many([((1,), {}), ((1,), {})])
    assert add.get_result(one.id) == one != other
    assert {one, other, add.get_result(one.id)} == {one, other}
    made, later_one = group(add.s(1)).enqueue(), group(add.s(1)).enqueue()
    gearman_jobs.run_all()
    assert GroupResult.find(made.id) == made != later_one
    assert len({made, GroupResult.find(made.id)}) == 1
    assert gearman_jobs.enqueued()[0] == one
    assert one != one.id


@pytest.mark.parametrize(
    "calls",
    [
        5,
        [5],
        ["ab"],
        [("text", {})],
        [(b"ab", {})],
        [({"left": 1}, {})],
        [((1,), None)],
        [((1,), [2])],
        [(1, {})],
    ],
)
def test_what_is_no_pair(db: None, calls: Any) -> None:
    with pytest.raises(TypeError, match=r"call 0 of .*add.enqueue_many\(\) is .*, and no pair of positional"):
        add.enqueue_many(calls)
    assert not JobRecord.objects.exists()


def test_waiting_in_a_transaction(gearman_jobs: GearmanJobs) -> None:
    one, many = add.enqueue(1), group(add.s(1)).enqueue()
    for wait, what in ((one.get, "job "), (many.get, "group "), (one.aget, "job "), (many.aget, "group ")):
        with pytest.raises(WaitInTransaction, match=rf"get\(\) would wait for {what}\d+ \("):
            wait() if wait in (one.get, many.get) else async_to_sync(wait)()


@pytest.mark.parametrize("job", [add, add.using(unique="")])
def test_the_call_of_many_that_is_wrong(db: None, job: Any, settings: Any) -> None:
    name = "tests.app.jobs.add"
    said = rf"^call 1 of {name}\.enqueue_many\(\): "
    with pytest.raises(TypeError, match=rf"{said}{name}\(\) missing a required argument: 'left'"):
        job.enqueue_many([((1,), {}), ((), {})])
    with pytest.raises(NotJSON, match=f"{said}argument 'left' of {name} is a set, which JSON cannot"):
        job.enqueue_many([((1,), {}), (({1},), {})])
    settings.GEARMAN = {"default": {"MAX_PACKET": 100}}
    with pytest.raises(TooLarge, match=f"{said}the workload of {name} has"):
        job.enqueue_many([((1,), {}), (("x" * 100,), {})])
    with pytest.raises(TypeError, match=r"^call 1 of shout\.enqueue_many\(\): raw job shout takes one bytes"):
        jobs.shout.enqueue_many([((b"a",), {}), (("b",), {})])
    assert not JobRecord.objects.exists()


ERRORS = [
    NoWorker("job f", 1.0, function="f", waiting=3, server="a:1"),
    GroupTimedOut(0, "f", ResponseTimeout("job f", 1.0), [1, ResponseTimeout("job f", 1.0)]),
    JobFailed("f", exception="builtins.ValueError", message="no", traceback="at", data=b"x"),
    TooLarge("the workload of f", 5, 4, setting="MAX_PACKET"),
    CommandNotSupported("a:1", "X", "y", command="status", version="1"),
    ConnectionFailed("a:1", "refused"),
    InvalidCall("f", "run_after", "it runs at once", "leave it out"),
    Retry("later", after=timedelta(seconds=3)),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_pickled(error: GearmanError) -> None:
    """As test runners and pools of processes do."""
    error.add_note("in step 1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__notes__[-1] == "in step 1"
    known = {name: value for name, value in vars(error).items() if name not in ("outcomes", "error")}
    assert {name: vars(again)[name] for name in known} == known


@pytest.mark.parametrize(
    "wait",
    [
        lambda: add.run(1),
        lambda: list(add.stream(1)),
        lambda: group(add.s(1)).run(),
        lambda: chain(add.s(1), add.s()).run(),
        lambda: map_reduce(add, total, [1]),
    ],
)
def test_an_event_loop_does_not_stand_still(wait: Callable[[], object]) -> None:
    async def view() -> None:
        wait()

    with pytest.raises(SynchronousOnlyOperation, match="use the async twin"):
        asyncio.run(view())


@pytest.mark.parametrize(
    "enqueue",
    [
        lambda: add.enqueue(1),
        lambda: add.enqueue_many([((1,), {})]),
        lambda: add.using(unique="one").enqueue_many([((1,), {})]),
        lambda: group(add.s(1)).enqueue(),
        lambda: chain(add.s(1), add.s()).enqueue(),
    ],
)
def test_an_event_loop_does_not_wait_for_the_database(db: None, enqueue: Callable[[], object]) -> None:
    async def view() -> None:
        enqueue()

    with pytest.raises(SynchronousOnlyOperation, match=r"use the async twin \(aenqueue"):
        asyncio.run(view())
