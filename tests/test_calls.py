"""``@job``'s ways to call, with a real server and real workers: streams, asyncio, many at once, waiting."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, transaction
from django.utils import timezone

from django_gearman import Data, GroupResult, JobResult, Progress, Value, Warned, chain, conf, group
from django_gearman.exceptions import (
    GearmanError,
    GroupDoesNotExist,
    GroupFailed,
    JobFailed,
    JobNotFinished,
    JobResultDoesNotExist,
    NotJSON,
    NoWorker,
    ResponseTimeout,
    TooLarge,
)
from django_gearman.models import Cancellation, JobRecord
from django_gearman.results import _STANDING
from django_gearman.server import watchers
from django_gearman.submission import async_client_for, client_for
from django_gearman.waiting import Patience
from tests import harness

from .app import jobs

Status = JobRecord.Status


def awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's value; Django's connections of its threads are closed too."""

    async def main() -> Any:
        return await coroutine

    return async_to_sync(main)()


@pytest.fixture
def served(database_server: harness.GearmanServerProcess) -> Iterator[harness.GearmanServerProcess]:
    with harness.worker(database_server, processes=2):
        yield database_server


class TestForeground:
    """One server and its workers for all of them, since they take a second to start."""

    def test_every_way(self, served: harness.GearmanServerProcess) -> None:
        self.streams()
        self.failures()
        awaited(self.twins())
        self.waits(served)

    def streams(self) -> None:
        first, *rest = jobs.report.stream(3)
        assert first == Progress(1, 3)
        assert rest[-2] == Warned(b"almost done")
        assert isinstance(rest[-1], Value)
        assert rest[-1].value[0].startswith("H:")
        assert [part for part in rest if isinstance(part, Data)] == [
            Data(b"step 1"),
            Data(b"step 2"),
            Data(b"step 3"),
        ]
        assert list(jobs.shout.stream(b"a")) == [Value(b"A")]
        assert list(jobs.add.using(priority=5).stream(1)) == [Value(2)]

    def failures(self) -> None:
        with pytest.raises(JobFailed, match=r"failed with ValueError: no") as caught:
            jobs.fail.run("no")
        told = caught.value
        assert "raise ValueError(message)" in told.traceback
        assert told.__notes__ == [f"At the worker:\n{told.traceback.rstrip()}"]
        with pytest.raises(JobFailed, match="ValueError: no"):
            list(jobs.fail.stream("no"))
        with pytest.raises(NotJSON) as refused:
            jobs.add.run({1})
        assert (refused.value.what, refused.value.remedy) == (
            "argument 'left' of tests.app.jobs.add",
            "pass a list of it",
        )

    async def twins(self) -> None:
        assert await jobs.add.arun(1, right=5) == 6
        assert await jobs.shout.arun(b"a") == b"A"
        assert await asyncio.gather(*[jobs.add.arun(number) for number in range(200)]) == list(range(1, 201))
        parts = [part async for part in jobs.report.astream(2)]
        assert parts[0] == Progress(1, 2)
        assert isinstance(parts[-1], Value)
        async with aclosing(jobs.report.astream(1000)) as stream:
            async for part in stream:
                assert part == Progress(1, 1000)
                break
        with pytest.raises(JobFailed, match=r"failed with ValueError: no"):
            await jobs.fail.arun("no")
        with pytest.raises(JobFailed, match=r"failed with ValueError: no"):
            [part async for part in jobs.fail.astream("no")]
        with pytest.raises(TypeError, match="missing a required argument"):
            await jobs.add.arun()
        result = await jobs.add.aenqueue(3, right=4)
        assert await result.aget(timeout=20) == 7
        many = await jobs.add.aenqueue_many([((number,), {}) for number in range(20)])
        assert await asyncio.gather(*[each.aget(timeout=20) for each in many]) == list(range(1, 21))

    def waits(self, server: harness.GearmanServerProcess) -> None:
        """Who waits for long is told by the server, and does not look again and again."""
        waits: list[Callable[[JobResult[int]], int]] = [
            lambda result: result.get(timeout=30),
            lambda result: awaited(result.aget(timeout=30)),
        ]
        for wait in waits:
            harness.in_one_try(partial(self.waits_by_the_wire, server, wait))
        self.is_told_from_the_beginning(server)
        self.sees_what_a_view_cancelled(server)

    def waits_by_the_wire(
        self, server: harness.GearmanServerProcess, wait: Callable[[JobResult[int]], int]
    ) -> None:
        path = server._folder / uuid4().hex
        result = jobs.wait_for_file.enqueue(str(path))
        harness.wait_until(lambda: is_running(result))
        looks: list[float] = []

        def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            looks.append(time.monotonic() - began)
            return execute(sql, params, many, context)

        thread = threading.Timer(1.0, path.touch)
        thread.start()
        with connection.execute_wrapper(note):
            began = time.monotonic()
            assert wait(result) > 1
            took = time.monotonic() - began
        thread.join()
        assert took < 1.5
        assert not [look for look in looks if 0.5 < look < 0.95], "it looks at the wire alone by then"

    def is_told_from_the_beginning(self, server: harness.GearmanServerProcess) -> None:
        """Of one job and of a group: they look before the first pause, and when they are told."""
        for wait in (
            lambda made: made.get(timeout=20),
            lambda made: awaited(made.aget(timeout=20)),
        ):
            for kind in ("job", "group", "chain"):
                path = server._folder / uuid4().hex
                call = jobs.wait_for_file.s(str(path))
                made: Any = {
                    "job": lambda path=path: jobs.wait_for_file.enqueue(str(path)),
                    "group": lambda call=call: group(jobs.add.s(1), call).enqueue(),
                    "chain": lambda call=call: chain(
                        jobs.add.s(1), jobs.add.s(2), call.job.si(*call.args)
                    ).enqueue(),
                }[kind]()
                waits = threading.Event()

                def pause(patience: Patience, longest: float = 0.0, waits: threading.Event = waits) -> float:
                    waits.set()
                    return max(patience.left, 0.0)

                def end(path: Path = path, waits: threading.Event = waits) -> None:
                    assert waits.wait(20)
                    path.touch()

                with pytest.MonkeyPatch.context() as patch:
                    # Without a word from the server it would look next when the time is up.
                    patch.setattr(Patience, "pause", pause)
                    patch.setattr(Patience, "listens", False)
                    thread = threading.Thread(target=end)
                    thread.start()
                    began = time.monotonic()
                    assert wait(made)
                    thread.join()
                assert time.monotonic() - began < 15, kind

    def sees_what_a_view_cancelled(self, server: harness.GearmanServerProcess) -> None:
        """The view itself may write the end of a group that no server has."""
        later = jobs.add.using(run_after=timedelta(hours=1))
        for wait in (
            lambda made: made.get(timeout=20),
            lambda made: awaited(made.aget(timeout=20)),
        ):
            made = group(later.s(1), later.s(2)).enqueue()
            thread = threading.Timer(0.1, cancel_here, [made.id])
            thread.start()
            with pytest.raises(GroupFailed, match="group was cancelled"):
                wait(made)
            thread.join()


def cancel_here(id: str) -> None:
    try:
        GroupResult.find(id).cancel()
    finally:
        connection.close()


def workloads(results: list[JobResult[Any]]) -> list[bytes]:
    return [bytes(JobRecord.objects.get(pk=each.id).workload) for each in results]


def is_running(result: JobResult[Any]) -> bool:
    result.refresh()
    return result.status == Status.RUNNING


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("nudges")
class TestMany:
    """``enqueue_many``."""

    def test_in_order(self) -> None:
        results = jobs.add.enqueue_many([((number,), {"right": 2}) for number in range(12_000)])
        assert [int(each.id) for each in results] == sorted(int(each.id) for each in results)
        for number in (0, 1, 4_999, 5_000, 11_999):
            record = JobRecord.objects.get(pk=results[number].id)
            assert bytes(record.workload) == b'{"args":[%d],"kwargs":{"right":2}}' % number
            assert bytes(results[number]._record.workload) == bytes(record.workload)
        assert JobRecord.objects.count() == 12_000
        assert (results[7].status, results[7].function, results[7].attempts) == ("READY", jobs.add.name, 0)

    def test_rows_are_those_of_enqueue(self) -> None:
        later = jobs.add.using(priority=7, run_after=timedelta(hours=1))
        one = later.enqueue(1)._record
        (many,) = later.enqueue_many([((1,), {})])
        many.refresh()
        own = {"id", "enqueued_at", "run_after"}
        names = [field.attname for field in JobRecord._meta.concrete_fields if field.name not in own]
        found = JobRecord.objects.get(pk=many.id)
        expected = JobRecord.objects.get(pk=one.pk)
        assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
        assert found.status == Status.SCHEDULED
        assert (found.run_after - expected.run_after).total_seconds() < 5

    def test_one_nudge(self, nudges: list[None]) -> None:
        jobs.add.enqueue_many([((number,), {}) for number in range(100)])
        assert len(nudges) == 1

    def test_few_statements(self, django_assert_max_num_queries: Any) -> None:
        with django_assert_max_num_queries(6):
            jobs.add.enqueue_many([((number,), {}) for number in range(4_000)])

    def test_none(self) -> None:
        assert jobs.add.enqueue_many([]) == []
        for wrong in (3, (3,), (3, {})):
            with pytest.raises(TypeError, match=r"call 1 of .*add.enqueue_many\(\) is .*; write "):
                jobs.add.enqueue_many([((1,), {}), wrong])

    def test_a_wrong_one_leaves_none(self) -> None:
        with pytest.raises(NotJSON, match=r"argument 'left' of .*add is a set"):
            jobs.add.enqueue_many([((1,), {}), (({1},), {})])
        with pytest.raises(TypeError, match="missing a required argument: 'left'"):
            jobs.add.enqueue_many([((1,), {}), ((), {})])
        with pytest.raises(TypeError, match="unexpected keyword argument 'middle'"):
            jobs.add.enqueue_many([((1,), {}), ((1,), {"middle": 2})])
        assert not JobRecord.objects.exists()

    def test_a_rollback_takes_all(self) -> None:
        with transaction.atomic():
            jobs.add.enqueue_many([((1,), {})] * 10)
            transaction.set_rollback(True)
        assert not JobRecord.objects.exists()

    def test_raw(self) -> None:
        results = jobs.shout.enqueue_many([((b"\0%d" % number,), {}) for number in range(3)])
        assert workloads(results) == [b"\x000", b"\x001", b"\x002"]

    def test_uniques(self) -> None:
        """Equal ones are one."""
        results = jobs.append_once.enqueue_many([((path, "line"), {}) for path in "abab"])
        assert [results[0].id, results[1].id] == [results[2].id, results[3].id]
        assert JobRecord.objects.count() == 2

    def test_uniques_come_in_their_own_order(self) -> None:
        """Results are in the order of the calls; jobs without a unique keep it, too."""
        calls = [((path, "line"), {}) for path in ("10", "b", "9", "b")]
        results = jobs.append_once.enqueue_many(calls)
        assert [json.loads(workload)["args"][0] for workload in workloads(results)[:3]] == ["10", "b", "9"]
        ids = [int(each.id) for each in results]
        assert ids[2] < ids[1] == ids[3] < ids[0]
        free = [int(each.id) for each in jobs.append_once.using(unique="").enqueue_many(calls)]
        assert free == sorted(set(free))

    def test_the_same_uniques_from_many_sides(self) -> None:
        """Nobody waits for one who waits for him, whatever the order of the calls."""
        together = threading.Barrier(4)

        def enqueue(seed: int) -> list[str]:
            paths = [str(number) for number in range(200)]
            random.Random(seed).shuffle(paths)
            try:
                together.wait(30)
                results = jobs.append_once.enqueue_many([((path, "line"), {}) for path in paths])
                return [each.id for _, each in sorted(zip(paths, results, strict=True), key=itemgetter(0))]
            finally:
                connection.close()

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(enqueue, range(4))
        assert others == [first] * 3
        assert JobRecord.objects.count() == len(set(first)) == 200

    def test_large_ones(self) -> None:
        """More than a statement takes."""
        results = jobs.shout.enqueue_many([(((b"%d" % number) * 3_000_000,), {}) for number in range(4)])
        assert [workload[:1] for workload in workloads(results)] == [b"0", b"1", b"2", b"3"]

    def test_over_the_wire(self, memory_server: harness.GearmanServerProcess, settings: Any) -> None:
        settings.GEARMAN = {"default": {"SERVERS": [memory_server.address], "ENQUEUE": "wire"}}
        with transaction.atomic():
            results = jobs.add.enqueue_many([((number,), {}) for number in range(50)])
            high = jobs.add.using(priority=5).enqueue_many([((1,), {})])
            assert jobs.add.name not in memory_server.status()
        assert memory_server.status()[jobs.add.name][0] == 51
        assert len({each.handle for each in [*results, *high]}) == 51


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("nudges")
class TestCancelAndRetry:
    def test_cancel_what_waits_in_the_database(self) -> None:
        result = jobs.append_once.enqueue("path", "line")
        assert result.cancel() is True
        assert result.status == Status.CANCELLED
        assert result.finished_at is not None
        assert result.cancel() is False
        # Its unique is free again.
        assert jobs.append_once.enqueue("path", "line").id != result.id

    def test_cancel_what_is_for_later(self) -> None:
        result = jobs.add.using(run_after=timedelta(hours=1)).enqueue(1)
        assert awaited(result.acancel()) is True
        assert result.status == Status.CANCELLED

    def test_cancel_what_is_gone(self) -> None:
        result = jobs.add.enqueue(1)
        JobRecord.objects.all().delete()
        with pytest.raises(JobResultDoesNotExist):
            result.cancel()

    def test_retry(self) -> None:
        result = jobs.add.using(priority=3).enqueue(1, right=2)
        with pytest.raises(JobNotFinished):
            result.retry()
        result.cancel()
        again = result.retry()
        assert again.id != result.id
        assert (again.status, again._record.priority) == (Status.READY, 3)
        assert bytes(again._record.workload) == bytes(result._record.workload)
        assert awaited(result.aretry()).id not in (result.id, again.id)

    def test_a_running_job(self, database_server: harness.GearmanServerProcess) -> None:
        with harness.worker(database_server, processes=1):
            path = str(database_server._folder / "never")
            result = jobs.wait_for_file.enqueue(path)
            client_for().claim()
            harness.wait_until(lambda: is_running(result))
            assert result.cancel() is True
            assert result.status == Status.CANCELLED
            open(path, "w").close()
            with pytest.raises(JobFailed, match="cancelled"):
                result.get(timeout=30)
            assert result.retry().get(timeout=20) > 1

    @pytest.mark.parametrize("way", ["job", "group"])
    def test_others_query_while_a_server_that_hangs_is_awaited(
        self, way: str, database_server: harness.GearmanServerProcess
    ) -> None:
        """On asyncio, where all queries of a process share a thread."""
        path = str(database_server._folder / "never")
        made: JobResult[Any] | GroupResult[Any]
        if way == "job":
            result = made = jobs.wait_for_file.enqueue(path)
        else:
            made = group(jobs.wait_for_file.s(path)).enqueue()
            (result,) = made

        async def use() -> None:
            cancelling = asyncio.create_task(made.acancel())
            try:
                async with asyncio.timeout(30):
                    while not await Cancellation.objects.filter(job_id=result.id).aexists():
                        await asyncio.sleep(0.01)
                assert not cancelling.done()
            finally:
                database_server.signal(signal.SIGCONT)
            assert await cancelling

        with harness.worker(database_server, processes=1):
            client_for().claim()
            harness.wait_until(lambda: is_running(result))
            database_server.signal(signal.SIGSTOP)
            awaited(use())
        assert not is_running(result)
        assert result.status == Status.CANCELLED
        assert awaited(made.acancel()) is False


@pytest.mark.django_db(transaction=True)
class TestTold:
    """What a job server tells of an end in place of the record."""

    @pytest.mark.parametrize("way", ["get", "aget"])
    def test_what_the_record_says(self, way: str, database_server: harness.GearmanServerProcess) -> None:
        looks: list[str] = []

        def wait(result: JobResult[Any]) -> Any:
            return result.get(timeout=20) if way == "get" else async_to_sync(result.aget)(timeout=20)

        def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            looks.append(sql)
            return execute(sql, params, many, context)

        with harness.worker(database_server, processes=1):
            for _ in range(50):
                result = jobs.add.enqueue(1, right=2)
                looks.clear()
                with connection.execute_wrapper(note):
                    assert wait(result) == 3
                told = {name: getattr(result._record, name) for name in _STANDING}
                result.refresh()
                assert told == {name: getattr(result._record, name) for name in _STANDING}
                if len(looks) <= 1:
                    break
            else:
                pytest.fail("it looked at the record, each time")
            # What else a record says is looked up.
            assert wait(jobs.report.enqueue(2))[0].startswith("H:")
            assert len(wait(jobs.shout.enqueue(bytes(watchers.LARGEST + 1)))) > watchers.LARGEST


@pytest.mark.django_db(transaction=True)
class TestWords:
    """Failures in the user's words."""

    def test_nobody_offers_it(self, database_server: harness.GearmanServerProcess) -> None:
        results = [jobs.add.enqueue(number) for number in range(3)]
        harness.in_one_try(lambda: self.check_nobody_offers_it(results))

    def check_nobody_offers_it(self, results: list[JobResult[int]]) -> None:
        with pytest.raises(NoWorker, match=r"3 jobs wait for tests\.app\.jobs\.add and no worker offers it"):
            results[0].get(timeout=0.3)
        with pytest.raises(NoWorker, match=r"jobs? waits? for shout and no worker offers it"):
            jobs.shout.using(run_timeout=0.1).run(b"a")
        with pytest.raises(NoWorker, match="shout and no worker offers it"):
            awaited(jobs.shout.using(run_timeout=0.1).arun(b"a"))
        with pytest.raises(NoWorker):
            awaited(results[1].aget(timeout=0.1))

    def test_no_server(self) -> None:
        result, many = jobs.add.enqueue(1), group(jobs.add.s(1)).enqueue()
        said = r"took longer than 0\.05 s; no job server answers at 127\.0\.0\.1:9; is `manage\.py gearman_se"
        for made in (result, many):
            with pytest.raises(ResponseTimeout, match=said):
                made.get(timeout=0.05)
            with pytest.raises(ResponseTimeout, match=said):
                awaited(made.aget(timeout=0.05))
        with pytest.raises(GearmanError, match=r"no job server answers at 127\.0\.0\.1:9"):
            awaited(jobs.add.arun(1))

    def test_for_later(self, database_server: harness.GearmanServerProcess) -> None:
        moment = timezone.now().replace(microsecond=0) + timedelta(hours=1)
        later = jobs.add.using(run_after=moment)
        said = f"took longer than 0.05 s; tests.app.jobs.add is not to run before {moment}"
        for made in (later.enqueue(1), group(later.s(1)).enqueue()):
            with pytest.raises(ResponseTimeout, match=re.escape(said)):
                made.get(timeout=0.05)

    def test_too_large(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"MAX_PACKET": 1000}}
        with pytest.raises(TooLarge, match="the workload of shout has 1001 bytes, more than MAX_PACKET=1000"):
            jobs.shout.enqueue(bytes(1001))
        with pytest.raises(TooLarge):
            jobs.shout.enqueue_many([((bytes(1001),), {})])


@pytest.mark.django_db
class TestFoundAgain:
    def test_a_job(self) -> None:
        result = jobs.add.enqueue(1)
        assert awaited(jobs.add.aget_result(result.id)) == result
        with pytest.raises(JobResultDoesNotExist):
            awaited(jobs.add.aget_result("x"))

    def test_a_group(self) -> None:
        made = group(jobs.add.s(1)).enqueue()
        assert awaited(GroupResult.afind(made.id)) == made
        with pytest.raises(GroupDoesNotExist):
            awaited(GroupResult.afind("x"))


class TestCall:
    def test_in_this_loop(self) -> None:
        assert asyncio.run(jobs.add_later.acall(1, 2)) == 3

    def test_a_plain_function(self) -> None:
        assert awaited(jobs.add.acall(1)) == 2

    def test_with_a_context(self) -> None:
        assert awaited(jobs.report.acall(2)) == [""]


@pytest.mark.parametrize("spread", [False, True])
def test_spread_is_a_setting(settings: Any, spread: bool) -> None:
    settings.GEARMAN = {"default": {"SERVERS": ["a:1", "b:2"], "SPREAD": spread}}
    assert conf.settings_for().spread is spread
    for client in (client_for(), async_client_for()):
        assert bool(client._servers._ring) is spread
