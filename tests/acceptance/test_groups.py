"""Groups, chains and map_reduce by real servers and workers, some of which are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import pytest

from django_gearman import amap_reduce, chain, group, map_reduce
from django_gearman.exceptions import GroupFailed, GroupTimedOut, JobFailed, ResponseTimeout
from django_gearman.models import JobGroup, JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE, Trace
from .site.jobs import leave_trace
from .test_crashes import wait_for_runs

pytestmark = pytest.mark.acceptance

Status = JobRecord.Status


@pytest.fixture
def cluster(transactional_db: None, settings: Any) -> Iterator[harness.GearmanServerProcess]:
    with harness.server() as server, harness.worker(server, processes=2) as worker:
        settings.GEARMAN = server.setting
        worker.wait_connected()
        yield server


@pytest.mark.django_db(transaction=True)
class TestNow:
    """One server and worker for all of it."""

    def test_all(self, cluster: harness.GearmanServerProcess, tmp_path: Path) -> None:
        for name in dir(self):
            if name.startswith("check_"):
                (tmp_path / name).mkdir()
                getattr(self, name)(tmp_path / name)

    def check_values_come_in_order(self, tmp_path: Path) -> None:
        members = [jobs.add.s(number) for number in range(100)]
        members[50] = jobs.add.using(priority=-5).s(50, right=0)
        expected = [*range(1, 51), 50, *range(52, 101)]
        assert group(members).run(timeout=20) == expected
        assert asyncio.run(group(members).arun(timeout=20)) == expected
        assert group().run() == []
        assert not JobGroup.objects.exists()

    def check_a_failure_tells_of_all(self, tmp_path: Path) -> None:
        failing = group(jobs.add.s(1), jobs.fail.s("no"), jobs.add.s(2))
        with pytest.raises(GroupFailed, match=r"member 1 of the group: .*ValueError: no$") as caught:
            failing.run(timeout=20)
        error = caught.value.error
        assert isinstance(error, JobFailed)
        assert "ValueError: no" in error.traceback
        assert caught.value.outcomes == [2, error, 3]
        with pytest.raises(GroupFailed):
            asyncio.run(failing.arun(timeout=20))

    def check_time_is_up(self, tmp_path: Path) -> None:
        harness.in_one_try(lambda: self.time_is_up(tmp_path / uuid4().hex))

    def time_is_up(self, path: Path) -> None:
        with pytest.raises(GroupTimedOut) as caught:
            group(jobs.add.s(1), jobs.wait_for_file.s(str(path))).run(timeout=1.0)
        path.touch()
        assert caught.value.outcomes[0] == 2
        assert isinstance(caught.value.error, ResponseTimeout)
        # A failure says more.
        never = path.with_suffix(".never")
        failing = group(jobs.wait_for_file.s(str(never)), jobs.fail.s("no"))
        with pytest.raises(GroupFailed, match=r"member 1 of the group: .*ValueError: no") as failed:
            failing.run(timeout=1.0)
        never.touch()
        assert isinstance(failed.value.outcomes[0], ResponseTimeout)

    def check_chains(self, tmp_path: Path) -> None:
        steps = chain(jobs.add.s(1), group(jobs.add.s(10), jobs.add.si(5)), jobs.total.s(more=7))
        assert steps.run() == (2 + 10) + 6 + 7
        assert asyncio.run(steps.arun(timeout=20)) == 25
        assert chain(jobs.note.s("a"), jobs.shout.s(), jobs.shout.s()).run(timeout=20) == b'"A"'
        with pytest.raises(JobFailed) as caught:
            chain(jobs.add.s(1), jobs.fail.si("no"), jobs.add.s(1)).run()
        assert "In step 2 of 3 of the chain: tests.app.jobs.fail('no')" in caught.value.__notes__

    def check_map_reduce(self, tmp_path: Path) -> None:
        numbers = range(10_000)
        taken: list[int] = []

        def items() -> Iterator[int]:
            for number in numbers:
                taken.append(number)
                yield number

        def plus(left: int, right: int) -> int:
            # The items are taken as there is room for them.
            assert len(taken) - counted[0] * 100 <= 5 * 100
            counted[0] += 1
            return left + right

        counted = [0]
        assert map_reduce(jobs.total, plus, items(), chunk=100, in_flight=4, timeout=60) == sum(numbers)
        assert counted == [99]
        assert map_reduce(jobs.total, jobs.add, numbers, chunk=300, timeout=60) == sum(numbers)
        assert asyncio.run(amap_reduce(jobs.total, jobs.add, numbers, chunk=300)) == sum(numbers)
        assert map_reduce(jobs.total, lambda left, right: left + right, [], initial=7) == 7
        with pytest.raises(ValueError, match="give it an initial="):
            map_reduce(jobs.total, jobs.add, [])
        with pytest.raises(JobFailed):
            map_reduce(jobs.total, jobs.add, ["x"] * 2000, timeout=20)
        with pytest.raises(JobFailed):
            asyncio.run(amap_reduce(jobs.total, jobs.add, ["x"] * 2000, timeout=20))
        # Each mapping named the reducer.
        named = JobRecord.objects.filter(function=jobs.total.name, reducer=jobs.add.name)
        harness.wait_until(lambda: named.filter(status=Status.SUCCESSFUL).count() >= 68, what="records")

    def check_map_reduce_takes_no_longer_than_it_may(self, tmp_path: Path) -> None:
        path = tmp_path / "never"
        with pytest.raises(ResponseTimeout):
            map_reduce(jobs.wait_for_files, jobs.add, [str(path)], timeout=0.5)
        with pytest.raises(ResponseTimeout):
            asyncio.run(amap_reduce(jobs.wait_for_files, jobs.add, [str(path)], timeout=0.5))
        path.touch()


@pytest.mark.django_db(transaction=True)
class TestEnqueued:
    """One server and worker for all of it."""

    def test_all(self, cluster: harness.GearmanServerProcess, tmp_path: Path) -> None:
        for name in dir(self):
            if name.startswith("check_"):
                (tmp_path / name).mkdir()
                getattr(self, name)(tmp_path / name)

    def check_what_follows_follows_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            chain(jobs.add.s(), jobs.add.s()).enqueue()
        assert chain(*[jobs.add.s(1, 1), *[jobs.add.s(1)] * 9]).enqueue().get(timeout=30) == 11
        others = set(JobRecord.objects.values_list("pk", flat=True))
        made = chain(*[jobs.add.s(0 if number else 1) for number in range(10)]).enqueue()
        # Who waits with get() tells the servers to look; by themselves they do once a second.
        records = JobRecord.objects.exclude(pk__in=others)
        harness.wait_until(lambda: not records.exclude(status="SUCCESSFUL").exists(), 60.0, "all steps")
        assert made.get(timeout=30) == 2
        steps = list(records.order_by("finished_at"))
        pauses = [
            (later.started_at - earlier.finished_at).total_seconds()
            for earlier, later in pairwise(steps)
            if later.started_at and earlier.finished_at
        ]
        assert len(pauses) == 9
        assert median(pauses) < 0.5

    def check_an_async_function_reads_the_group(self, tmp_path: Path) -> None:
        made = group(jobs.add.s(number) for number in range(3)).enqueue(on_success=jobs.atell_group.s())
        assert made.get(timeout=30) == [1, 2, 3]
        assert made.on_success is not None
        assert made.on_success.get(timeout=30) == [[1, 2, 3], ["SUCCESSFUL"] * 3]

    def check_running_members_are_cancelled(self, tmp_path: Path) -> None:
        paths = [str(tmp_path / str(number)) for number in range(4)]
        made = group(jobs.wait_for_file.s(path) for path in paths).enqueue(
            on_success=jobs.note.si("no"), on_complete=jobs.tell_group.s()
        )
        harness.wait_until(lambda: os.path.exists(paths[1] + ".pid"), 60.0, "two that run")
        assert made.cancel()
        for path in paths:
            # One may have been handed out while it was cancelled.
            Path(path).touch()
        assert (made.failed, made.is_finished) == (4, True)
        assert made.on_complete is not None
        assert made.on_complete.get(timeout=30) == [4, 4, ["CANCELLED"] * 4]

    def check_time_is_up(self, tmp_path: Path) -> None:
        made = group(jobs.add.using(run_after=jobs.AN_HOUR).s(1)).enqueue()
        with pytest.raises(ResponseTimeout, match="of which 0 of 1 have ended"):
            made.get(timeout=0.2)
        assert made.cancel()

    def check_a_member_that_dies_is_counted(self, tmp_path: Path) -> None:
        made = group(jobs.kill_worker_twice.s(), jobs.add.s(1)).enqueue(on_complete=jobs.tell_group.s())
        harness.wait_until(lambda: made.refresh() or made.is_finished, 60.0, "the end")
        assert (made.successful, made.failed) == (1, 1)
        assert made.on_complete is not None
        assert made.on_complete.get(timeout=30) == [2, 1, ["DEAD", "SUCCESSFUL"]]


@pytest.mark.django_db(transaction=True)
class TestDeaths:
    def test_what_follows_runs_once_whatever_dies(self, trace: Trace, settings: Any) -> None:
        server = harness.GearmanServerProcess(name="the-server", env=SITE)
        worker = harness.WorkerProcess(server, processes=2, env=SITE)
        settings.GEARMAN = server.setting
        names = [f"member-{number}" for number in range(200)]
        made = group(leave_trace.s(trace.path, name) for name in names).enqueue(
            on_success=leave_trace.si(trace.path, "success"),
            on_complete=leave_trace.si(trace.path, "complete"),
        )
        steps = [f"step-{number}" for number in range(20)]
        one_by_one = chain(*(leave_trace.si(trace.path, name) for name in steps)).enqueue(
            on_success=leave_trace.si(trace.path, "chain-success"),
            on_complete=leave_trace.si(trace.path, "chain-complete"),
        )
        with server, worker:
            wait_for_runs(trace, 40)
            server.kill()
            server.start()
            wait_for_runs(trace, 100)
            for pid in worker.children():
                os.kill(pid, signal.SIGKILL)
            wait_for_runs(trace, 180)
            server.kill()
            worker.kill()
            server.start()
            worker.start()
            live = JobRecord.objects.filter(status__in=JobRecord.LIVE)
            harness.wait_until(lambda: not live.exists(), 60.0, "the end of all jobs")
            server.complaints_allowed = True
        counts = Counter(trace.names())
        assert set(counts) == {*names, *steps, "success", "complete", "chain-success", "chain-complete"}
        for name in ("success", "complete", "chain-success", "chain-complete"):
            assert counts[name] == 1, name
        for result in (made, one_by_one):
            result.refresh()
            assert (result.successful, result.failed) == (result.total, 0)
        assert JobRecord.objects.count() == 224
        # Each step of a chain began when the one before had ended.
        firsts = [trace.names().index(name) for name in steps]
        assert firsts == sorted(firsts)
