"""Groups, chains, and what follows them."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, transaction
from django.utils import timezone

from django_gearman import GroupResult, Signature, amap_reduce, chain, continuations, group, map_reduce
from django_gearman.exceptions import (
    CommandNotSupported,
    ConnectionLost,
    GroupDoesNotExist,
    GroupFailed,
    GroupNotFinished,
    InvalidGroup,
    JobFailed,
    NotJSON,
    ResponseTimeout,
    TooLarge,
    WaitInTransaction,
)
from django_gearman.history import History, Retention, lanes_of
from django_gearman.jobs import job
from django_gearman.models import Cancellation, JobGroup, JobRecord
from django_gearman.protocol.packets import PacketType
from django_gearman.reduction import _Reduction
from django_gearman.registry import registry
from django_gearman.server.entries import JobFinished, Outcome, Question, Topic
from django_gearman.store import DatabaseStore
from django_gearman.store.folding import Folded
from django_gearman.testing import GearmanJobs, override_gearman
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.app import jobs
from tests.client.fake_server import fake_server, play

P = PacketType
Status = JobRecord.Status


@pytest.fixture
def gearman_jobs(db: None) -> Iterator[GearmanJobs]:
    with GearmanJobs() as made:
        yield made


def statuses() -> list[str]:
    return list(JobRecord.objects.order_by("pk").values_list("status", flat=True))


class TestEnqueuedGroups:
    def test_members_run_and_then_what_follows(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(number) for number in range(5)).enqueue(
            on_success=jobs.total.s(), on_complete=jobs.note.si("over")
        )
        assert (made.total, made.finished) == (5, 0)
        gearman_jobs.run_all(check=True)
        made.refresh()
        assert (made.total, made.finished, made.successful, made.failed) == (5, 5, 5, 0)
        assert made.is_finished
        assert made.get() == [1, 2, 3, 4, 5]
        assert made.on_success is not None
        assert made.on_success.return_value == 15
        assert made.on_complete is not None
        assert made.on_complete.return_value == "over"

    def test_thousands_of_members_are_few_statements(
        self, gearman_jobs: GearmanJobs, django_assert_max_num_queries: Any
    ) -> None:
        calls = [jobs.add.s(number) for number in range(3000)]
        calls[1000:1000] = [jobs.note.using(priority=5).s(str(number)) for number in range(1000)]
        with django_assert_max_num_queries(20):
            made = group(calls).enqueue(on_success=jobs.total.s())
        assert made.total == 4000
        in_order = list(made)
        assert [result._record.group_index for result in in_order] == list(range(4000))
        assert {result.function for result in in_order[1000:2000]} == {jobs.note.name}
        assert in_order[3999]._record.workload == b'{"args":[2999],"kwargs":{}}'
        assert JobRecord.objects.filter(function=jobs.note.name, priority=5).count() == 1000

    def test_a_failure_keeps_success_away(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1), jobs.fail.s("no"), jobs.add.s(2), jobs.fail.s("never")).enqueue(
            on_success=jobs.total.s(), on_complete=jobs.tell_group.s(7)
        )
        gearman_jobs.run_all()
        made.refresh()
        assert (made.successful, made.failed, made.is_finished, made.is_successful) == (2, 2, True, False)
        assert made.on_success is not None
        assert made.on_success.status == Status.CANCELLED
        assert made.on_complete is not None
        assert made.on_complete.return_value == [4, 2, ["SUCCESSFUL", "FAILED", "SUCCESSFUL", "FAILED"], 7]
        with pytest.raises(GroupFailed, match=r"member 1 of the group: .*ValueError: no; 2 of 4") as caught:
            made.get()
        assert caught.value.index == 1
        assert caught.value.job == jobs.fail.name
        assert caught.value.outcomes[0] == 2
        assert caught.value.outcomes[2] == 3
        assert "never" in str(caught.value.outcomes[3])

    def test_members_that_are_tried_again_are_waited_for(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.fail_first.s(2), jobs.fail_first.s(0)).enqueue(on_success=jobs.note.si("both"))
        gearman_jobs.run_one()
        gearman_jobs.run_one()
        made.refresh()
        assert made.finished <= 1
        gearman_jobs.run_all()
        assert made.get() == [[3, 3], [1, 3]]
        assert made.on_success is not None
        assert made.on_success.return_value == "both"

    @pytest.mark.parametrize("empty", [group(), group([])])
    def test_an_empty_group_is_over_at_once(self, gearman_jobs: GearmanJobs, empty: group[Any]) -> None:
        made = empty.enqueue(on_success=jobs.total.s(), on_complete=jobs.note.si("over"))
        assert made.is_finished
        assert made.get() == []
        gearman_jobs.run_all(check=True)
        assert made.on_success is not None
        assert made.on_success.return_value == 0

    def test_nothing_of_a_transaction_that_was_rolled_back_is_left(self, gearman_jobs: GearmanJobs) -> None:
        with transaction.atomic():
            made = group(jobs.add.s(1)).enqueue(on_success=jobs.total.s())
            transaction.set_rollback(True)
        assert not JobGroup.objects.exists()
        assert not JobRecord.objects.exists()
        with pytest.raises(GroupDoesNotExist):
            made.refresh()
        with pytest.raises(GroupDoesNotExist):
            GroupResult.find(made.id)

    def test_it_is_found_by_its_id(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1)).enqueue()
        found = GroupResult.find(made.id)
        assert (found.id, found.total, found.name) == (made.id, 1, "add")
        with pytest.raises(GroupDoesNotExist):
            GroupResult.find("x")

    def test_scheduled_members(self, gearman_jobs: GearmanJobs) -> None:
        later = jobs.add.using(run_after=timedelta(hours=1))
        made = group(jobs.add.s(1), later.s(2)).enqueue(on_success=jobs.total.s())
        gearman_jobs.run_all()
        made.refresh()
        assert (made.finished, made.is_finished) == (1, False)
        with pytest.raises(GroupNotFinished, match="1 of 2 members"):
            _ = made.return_value
        gearman_jobs.run_all(scheduled=True)
        assert made.get() == [2, 3]

    def test_a_delay_of_what_follows_begins_when_it_is_let_go(self, gearman_jobs: GearmanJobs) -> None:
        later = jobs.note.using(run_after=timedelta(hours=1))
        made = group(jobs.add.s(1)).enqueue(on_success=later.si("late"), on_complete=jobs.note.si("now"))
        JobRecord.objects.update(enqueued_at=timezone.now() - timedelta(hours=2))
        before = timezone.now()
        gearman_jobs.run_all()
        assert made.on_success is not None
        record = made.on_success._record
        assert record.status == Status.SCHEDULED
        assert record.run_after is not None
        assert record.run_after >= before + timedelta(hours=1)

    def test_what_follows_keeps_its_options(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1)).enqueue(on_success=jobs.report.using(priority=7, unique="once").si(1))
        gearman_jobs.run_all()
        assert made.on_success is not None
        record = made.on_success._record
        assert (record.queue_name, record.priority, record.unique) == ("slow", 7, "once")
        assert record.unique_key is None, "it has ended"

    def test_twins(self, gearman_jobs: GearmanJobs) -> None:
        async def use() -> None:
            made = await group(jobs.add.s(1), jobs.add.s(2)).aenqueue(on_success=jobs.total.s())
            await gearman_jobs.arun_all(check=True)
            assert await made.aget(timeout=30) == [2, 3]
            assert [result.return_value async for result in made] == [2, 3]
            one = await chain(jobs.add.s(1)).aenqueue()
            assert await one.acancel()
            await one.arefresh()
            assert one.is_finished

        async_to_sync(use)()

    def test_results_that_are_gone_are_a_readable_failure(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue(on_success=jobs.total.s())
        gearman_jobs.run_one()
        gearman_jobs.run_one()
        JobRecord.objects.filter(group_index=0).delete()
        gearman_jobs.run_all()
        assert made.on_success is not None
        assert made.on_success.status == Status.FAILED
        assert "results of its members are gone" in made.on_success.errors[0].message

    def test_a_member_that_is_run_again_is_no_member(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.fail.s("no")).enqueue(on_complete=jobs.tell_group.s())
        gearman_jobs.run_all()
        (member,) = made
        assert member.retry()._record.group_id is None
        assert made.on_complete is not None
        again = made.on_complete.retry()
        gearman_jobs.run_all()
        again.refresh()
        assert again.return_value == [1, 1, ["FAILED"]]

    def test_waiting_in_a_transaction_is_refused(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1)).enqueue()
        with pytest.raises(WaitInTransaction):
            made.get(timeout=30)

    def test_members_keep_their_attempts_and_their_time(
        self, gearman_jobs: GearmanJobs, settings: Any
    ) -> None:
        settings.GEARMAN = {"default": {**settings.GEARMAN["default"], "JOB_TIMEOUT": 77}}
        steps = (jobs.fail_first.s(0), jobs.sleep_long.si())
        group(*steps).enqueue(on_success=jobs.hang_in_c.si())
        chain(*steps).enqueue()
        rows = JobRecord.objects.order_by("pk").values_list("function", "max_attempts", "timeout")
        first, long, last = (f"tests.app.jobs.{name}" for name in ("fail_first", "sleep_long", "hang_in_c"))
        assert list(rows) == [(first, 3, 77), (long, 2, 1), (last, 1, 1), (first, 3, 77), (long, 2, 1)]

    def test_members_of_one_job_with_other_options(self, gearman_jobs: GearmanJobs) -> None:
        later = jobs.add.using(priority=5, run_after=timedelta(hours=1))
        group(jobs.add.s(1), jobs.add.using(priority=5).s(2), later.s(3), jobs.add.s(4)).enqueue()
        rows = JobRecord.objects.order_by("group_index").values_list("priority", "status")
        assert list(rows) == [(0, "READY"), (5, "READY"), (5, "SCHEDULED"), (0, "READY")]

    def test_values_that_are_gone_are_not_left_out(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue()
        gearman_jobs.run_all()
        JobRecord.objects.filter(group_index=0).delete()
        with pytest.raises(GroupDoesNotExist):
            made.get()


class TestChains:
    def test_each_step_gets_the_value_of_the_one_before(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1, 2), jobs.add.s(10), jobs.add.s(right=100), jobs.add.si(7)).enqueue()
        assert statuses() == ["READY", "WAITING", "WAITING", "WAITING"]
        gearman_jobs.run_all(check=True)
        assert [result.return_value for result in made.results()] == [3, 13, 113, 8]
        made.refresh()
        assert (made.total, made.finished, made.get()) == (4, 4, 8)

    def test_a_failure_ends_it(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1), jobs.fail.si("no"), jobs.add.s(1), jobs.add.s(2)).enqueue(
            on_success=jobs.note.si("good"), on_complete=jobs.tell_group.si()
        )
        gearman_jobs.run_all()
        made.refresh()
        assert (made.total, made.finished, made.failed) == (4, 4, 3)
        assert statuses() == ["SUCCESSFUL", "FAILED", *["CANCELLED"] * 3, "SUCCESSFUL"]
        with pytest.raises(GroupFailed, match=r"^step 2 of 4 of the chain: .*ValueError: no$") as caught:
            made.get()
        assert (caught.value.index, caught.value.job) == (1, jobs.fail.name)

    def test_a_failure_in_a_group_of_it(self, gearman_jobs: GearmanJobs) -> None:
        members = group(jobs.add.s(1), jobs.fail.s("no"))
        made = chain(jobs.add.s(1), group(jobs.add.si(1), jobs.fail.si("no")), jobs.total.s()).enqueue()
        first = chain(members, jobs.total.s()).enqueue()
        gearman_jobs.run_all()
        with pytest.raises(GroupFailed, match=r"^member 1 of the group in step 2 of 3 of the chain: job "):
            made.get()
        with pytest.raises(GroupFailed, match=r"^member 1 of the group in step 1 of 2 of the chain: job "):
            first.get()

    def test_bytes_of_raw_jobs(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.shout.s(b"a\xff"), jobs.shout.s()).enqueue(on_success=jobs.shout.s())
        gearman_jobs.run_all(check=True)
        assert made.get() == b"A\xff"
        assert made.on_success is not None
        assert bytes(made.on_success._record.workload) == b"A\xff"
        of_json = chain(jobs.note.s("json"), jobs.shout.s()).enqueue()
        gearman_jobs.run_all(check=True)
        assert of_json.get() == b'"JSON"'

    def test_what_follows_gets_the_last_value(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1), jobs.add.s(1)).enqueue(on_success=jobs.add.s(40))
        gearman_jobs.run_all(check=True)
        assert made.on_success is not None
        assert made.on_success.return_value == 43

    def test_groups_in_a_chain(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(
            jobs.add.s(0),
            group(jobs.add.s(10), jobs.add.si(20), jobs.add.s(30)),
            jobs.total.s(1000),
            group(jobs.add.s(1)),
            group(),
            jobs.total.s(),
        ).enqueue(on_complete=jobs.note.si("over"))
        gearman_jobs.run_all(check=True)
        assert [result.return_value for result in made] == [1, 11, 21, 31, 1063, 1064, 0]
        assert made.get() == 0
        assert chain(group(jobs.add.s(1)), group(jobs.total.s(), jobs.total.s())).steps

    def test_a_group_at_the_end_gives_its_list(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(0), group(jobs.add.s(number) for number in range(3))).enqueue(
            on_success=jobs.total.s()
        )
        gearman_jobs.run_all(check=True)
        assert made.get() == [1, 2, 3]
        assert made.on_success is not None
        assert made.on_success.return_value == 6

    def test_a_value_too_large_for_the_next_is_a_readable_failure(
        self, gearman_jobs: GearmanJobs, settings: Any
    ) -> None:
        settings.GEARMAN = {"default": {**settings.GEARMAN["default"], "MAX_PACKET": 300}}
        gearman_jobs._runner = None
        made = chain(jobs.note.s("x" * 250), jobs.note.s(), jobs.note.s()).enqueue(
            on_complete=jobs.note.si("over")
        )
        JobRecord.objects.filter(group_index=0).update(
            status=Status.SUCCESSFUL, result=b'"' + b"x" * 290 + b'"'
        )
        continuations.count({int(made.id): continuations.Ended(successful=1)}, "default", 300)
        assert statuses() == ["SUCCESSFUL", "FAILED", "CANCELLED", "READY"]
        assert "its workload would have 31" in JobRecord.objects.get(group_index=1).message
        made.refresh()
        assert (made.finished, made.failed, made.is_finished) == (3, 2, True)

    def test_members_of_a_later_step_wait_for_their_moment(self, gearman_jobs: GearmanJobs) -> None:
        moment = timezone.now() + timedelta(hours=1)
        chain(jobs.add.s(1), group(jobs.add.using(run_after=moment).si(1), jobs.add.si(2))).enqueue()
        gearman_jobs.run_all(check=True)
        assert statuses() == ["SUCCESSFUL", "SCHEDULED", "SUCCESSFUL"]

    def test_a_step_that_is_too_large_is_refused(self, gearman_jobs: GearmanJobs) -> None:
        with (
            override_gearman(MAX_PACKET=300),
            pytest.raises(TooLarge, match=r"the workload of tests\.app\.jobs\.total "),
        ):
            chain(jobs.note.s("a"), jobs.total.s(more="x" * 300)).enqueue()
        assert not JobRecord.objects.exists()


class TestRefused:
    def test_what_is_no_call(self) -> None:
        with pytest.raises(InvalidGroup, match=r"not the job itself; write add\.s\(\.\.\.\)"):
            group(jobs.add, jobs.add.s(1))
        with pytest.raises(InvalidGroup, match="not 3"):
            group([jobs.add.s(1), 3])
        with pytest.raises(InvalidGroup, match=r"not the job itself; write add\.s\(\.\.\.\)"):
            group(jobs.add)
        with pytest.raises(InvalidGroup, match=r"a call of a job, .* not 3"):
            group(3)
        with pytest.raises(InvalidGroup, match=r"a group is a call of a job, .* not a chain"):
            group([chain(jobs.add.s(1))])
        with pytest.raises(InvalidGroup, match=r"a step of a chain .* not a chain"):
            chain(chain(jobs.add.s(1)), jobs.add.s(1))
        with pytest.raises(InvalidGroup, match="at least one step"):
            chain()

    def test_arguments(self, db: None) -> None:
        with pytest.raises(NotJSON, match=r"argument 'left' of .*add is a set"):
            jobs.add.s({1})
        with pytest.raises(NotJSON):
            jobs.add.si({1})
        with pytest.raises(TypeError, match=r"add\(\) got an unexpected keyword argument 'middle'"):
            jobs.add.s(middle=1)
        with pytest.raises(TypeError, match="missing a required argument"):
            jobs.add.si()
        with pytest.raises(TypeError, match="too many positional"):
            chain(jobs.add.s(1), jobs.add.s(1, 2))
        with pytest.raises(TypeError, match="missing a required argument"):
            group(jobs.add.s()).enqueue()
        assert not JobRecord.objects.exists()

    def test_bytes_and_json_do_not_mix(self, db: None) -> None:
        with pytest.raises(InvalidGroup, match="cannot take the bytes that the raw job shout returns"):
            chain(jobs.shout.s(b"a"), jobs.note.s())
        with pytest.raises(InvalidGroup, match="cannot take the list of a group's values"):
            group(jobs.add.s(1)).enqueue(on_success=jobs.shout.s())
        with pytest.raises(InvalidGroup, match="is all that it gets"):
            chain(jobs.shout.s(b"a"), jobs.shout.s(b"b"))

    def test_the_wire_has_nobody_to_count(self, db: None, settings: Any) -> None:
        settings.GEARMAN = {"default": {**settings.GEARMAN["default"], "ENQUEUE": "wire"}}
        with pytest.raises(InvalidGroup, match=r"ENQUEUE = 'wire'.*wait for them with run\(\)"):
            group(jobs.add.s(1)).enqueue()

    def test_a_unique_that_is_another_jobs(self, gearman_jobs: GearmanJobs) -> None:
        there = jobs.append_once.enqueue("p", "x")
        with pytest.raises(InvalidGroup, match=f"member 1, .*append_once.* already, {there.id}"):
            group(jobs.add.s(1), jobs.append_once.s("p", "y")).enqueue()
        assert JobRecord.objects.count() == 1
        group(jobs.append_once.using(unique="").s("p", "y")).enqueue()
        with pytest.raises(InvalidGroup, match="made of its arguments"):
            chain(jobs.note.s("p"), jobs.append_once.s("y")).enqueue()
        chain(jobs.note.s("p"), jobs.append_once.using(unique="q").s("y")).enqueue()


class TestLimitKeys:
    """What a limit is counted by is known when members are inserted, or the group is refused."""

    @pytest.fixture
    def keyed(self) -> Iterator[Any]:
        def keyed(left: int, right: int = 1) -> int:
            return left + right

        keyed.__qualname__ = "keyed"
        made = job(concurrency=1, limit_key="right")(keyed)
        yield made
        registry.pop(made.name)

    def test_each_member_has_its_own(self, db: None, keyed: Any) -> None:
        made = group(keyed.s(1), keyed.s(2, right=5)).enqueue()
        keys = JobRecord.objects.filter(group=int(made.id)).order_by("group_index")
        assert list(keys.values_list("limit_key", flat=True)) == ["[1]", "[5]"]

    def test_of_a_step_that_takes_a_value(self, db: None, keyed: Any) -> None:
        made = chain(jobs.add.s(1), keyed.s(7), keyed.si(1, 8)).enqueue()
        keys = JobRecord.objects.filter(group=int(made.id)).order_by("group_index")
        assert list(keys.values_list("limit_key", flat=True)) == [None, "[7]", "[8]"]

    def test_the_value_itself_is_refused(self, db: None, keyed: Any) -> None:
        for limit_key in ("left", ("right", "left"), lambda left, right: str(left)):
            keyed.limit_key = limit_key
            with pytest.raises(InvalidGroup, match=r"limit_key .* not known before"):
                chain(jobs.add.s(1), keyed.s(7)).enqueue()
        assert not JobRecord.objects.exists()


class TestSignatures:
    def test_pickled(self) -> None:
        call = jobs.add.using(priority=3, unique="u", run_after=timedelta(seconds=5)).s(1, right=2)
        again: Signature[int] = pickle.loads(pickle.dumps(call))
        assert (again.args, again.kwargs, again.takes_result) == (call.args, call.kwargs, True)
        assert again.job.priority == 3
        assert again.job.unique == call.job.unique
        assert again.job.run_after == timedelta(seconds=5)
        assert pickle.loads(pickle.dumps(jobs.add)) is jobs.add
        assert str(jobs.add.s(1, right=2)) == "tests.app.jobs.add(1, right=2)"

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            jobs.add.s(1).args = ()


class TestCancel:
    def test_members_at_the_door(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(number) for number in range(1200)).enqueue(
            on_success=jobs.note.si("good"), on_complete=jobs.tell_group.s()
        )
        gearman_jobs.run_one()
        JobRecord.objects.filter(status=Status.READY).update(server=None)
        assert made.cancel()
        made.refresh()
        assert (made.successful, made.failed, made.is_finished) == (1, 1199, True)
        assert not made.cancel()
        assert made.on_success is not None
        assert made.on_success.status == Status.CANCELLED
        assert made.on_complete is not None
        assert made.on_complete.status == Status.READY

    def test_one_member(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue(on_complete=jobs.tell_group.s())
        for result in made:
            assert result.cancel()
            assert not result.cancel()
        gearman_jobs.run_all()
        made.refresh()
        assert (made.failed, made.is_finished) == (2, True)
        assert made.on_complete is not None
        assert made.on_complete.return_value == [2, 2, ["CANCELLED", "CANCELLED"]]

    def test_a_step_whose_turn_has_not_come(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1), jobs.add.s(2), jobs.add.s(3)).enqueue(on_complete=jobs.note.si("over"))
        list(made)[1].cancel()
        made.refresh()
        assert (made.finished, made.is_finished) == (1, False)
        gearman_jobs.run_all()
        made.refresh()
        assert (made.successful, made.failed, made.is_finished) == (1, 2, True)
        assert statuses() == ["SUCCESSFUL", "CANCELLED", "CANCELLED", "SUCCESSFUL"]

    def test_what_follows(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1)).enqueue(on_success=jobs.note.si("no"), on_complete=jobs.note.si("yes"))
        assert made.on_success is not None
        assert made.on_success.cancel()
        gearman_jobs.run_all()
        assert statuses() == ["SUCCESSFUL", "CANCELLED", "SUCCESSFUL"]
        assert JobGroup.objects.get().failed == 0


class TestBytes:
    def test_many_workloads_that_are_no_text(self, gearman_jobs: GearmanJobs) -> None:
        """Of every database, whatever its character set."""
        workloads = [b"\xff\x00'\\%d" % number for number in range(3)]
        jobs.shout.enqueue_many([((workload,), {}) for workload in workloads])
        assert [result.args[0] for result in gearman_jobs.enqueued()] == workloads


Reduce = Callable[..., Any]
REDUCE = [map_reduce, async_to_sync(amap_reduce)]


def sum_of_two(left: int, right: int) -> int:
    return left + right


class TestReduction:
    def test_a_server_that_knows_no_reduce_jobs_is_asked_plainly(self) -> None:
        work = _Reduction(jobs.total, jobs.add, range(4), 2, 1, None)
        first = work.next()
        assert first is not None
        assert first.reducer == jobs.add.name
        refusal = CommandNotSupported(
            "127.0.0.1:4730", "server_error", "", command="SUBMIT_REDUCE_JOB", version=""
        )
        work.failed(first, refusal)
        assert work.next() is first
        assert first.reducer == ""
        second = work.next()
        assert second is not None
        assert second.reducer == ""
        with pytest.raises(CommandNotSupported):
            work.failed(second, refusal)
        assert work.next() is None
        work.ended(first, b"1")
        assert work.next() is None
        work.ended(second, b"5")
        last = work.next()
        assert last is not None
        assert (last.job, last.workload) == (jobs.add, b'{"args":[1,5],"kwargs":{}}')
        work.ended(last, b"6")
        assert work.next() is None
        assert work.value() == 6

    @pytest.mark.parametrize("reduce", REDUCE)
    def test_a_job_has_its_own_time(self, settings: Any, reduce: Reduce) -> None:
        """The rest of the items is not touched when it is up."""
        items = iter(range(10))
        mapper = jobs.total.using(run_timeout=0.25)
        with harness.server(store="memory") as server:
            settings.GEARMAN = server.setting
            with pytest.raises(ResponseTimeout) as caught:
                reduce(mapper, sum_of_two, items, chunk=1, in_flight=2, timeout=30)
            settings.GEARMAN = {}
        assert caught.value.timeout == 0.25
        assert list(items) == list(range(2, 10))

    @pytest.mark.parametrize("reduce", REDUCE)
    def test_its_own_time_is_not_that_of_all(self, settings: Any, reduce: Reduce) -> None:
        """So many jobs take longer together than one of them may."""
        harness.in_one_try(lambda: self.many_in_time(settings, reduce), tries=5)

    def many_in_time(self, settings: Any, reduce: Reduce) -> None:
        def total(assigned: AssignedJob) -> bytes:
            time.sleep(0.1)
            return b"1"

        with (
            harness.server(store="memory") as server,
            harness.worker_thread({jobs.total.name: total}, server.port),
        ):
            settings.GEARMAN = server.setting
            mapper = jobs.total.using(run_timeout=0.5)
            value = reduce(mapper, sum_of_two, range(10), chunk=1, in_flight=1, timeout=60)
            settings.GEARMAN = {}
        assert value == 10

    @pytest.mark.parametrize("reduce", REDUCE)
    def test_no_more_is_taken_when_the_time_is_up(self, settings: Any, reduce: Reduce) -> None:
        items = iter(range(10))
        with harness.server(store="memory") as server:
            settings.GEARMAN = server.setting
            with pytest.raises(ResponseTimeout) as caught:
                reduce(jobs.total, sum_of_two, items, chunk=1, in_flight=2, timeout=0.25)
            settings.GEARMAN = {}
        assert caught.value.timeout == 0.25
        assert list(items) == list(range(2, 10))

    @pytest.mark.parametrize(
        "error",
        [
            TimeoutError("the database did not answer"),
            JobFailed("another"),
            ConnectionLost("127.0.0.1:1", "gone"),
            CommandNotSupported("127.0.0.1:1", "server_error", "", command="SUBMIT_REDUCE_JOB", version=""),
        ],
    )
    @pytest.mark.parametrize("reduce", REDUCE)
    def test_what_its_functions_raise(self, settings: Any, reduce: Reduce, error: Exception) -> None:
        """It is no error of the jobs, nor is the time up."""

        def reducer(left: int, right: int) -> int:
            raise error

        def items() -> Iterator[int]:
            yield 1
            raise error

        functions = {jobs.total.name: lambda assigned: b"1"}
        with (
            harness.server(store="memory") as server,
            harness.worker_thread(functions, server.port),
        ):
            settings.GEARMAN = server.setting
            for call in (
                lambda: reduce(jobs.total, reducer, range(3), chunk=1, timeout=60),
                lambda: reduce(jobs.total, sum_of_two, items(), chunk=1, timeout=60),
            ):
                with pytest.raises(type(error)) as caught:
                    call()
                assert caught.value is error
            settings.GEARMAN = {}

    @pytest.mark.parametrize("resubmit", [False, True])
    @pytest.mark.parametrize("reduce", REDUCE)
    def test_a_job_goes_to_another_server_when_it_may(
        self, settings: Any, reduce: Reduce, resubmit: bool
    ) -> None:
        proof = (P.ECHO_REQ, (P.ECHO_RES, b""))
        ends = (P.SUBMIT_JOB, (P.JOB_CREATED, b"H:2"), (P.WORK_COMPLETE, b"H:2", b"5"))
        with (
            fake_server(play(*proof, P.SUBMIT_JOB, (P.JOB_CREATED, b"H:1"))) as first,
            fake_server(play(*proof, *ends, None)) as second,
        ):
            settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{port}" for port in (first, second)]}}
            mapper = jobs.total.using(resubmit=resubmit)
            if resubmit:
                assert reduce(mapper, sum_of_two, [5], timeout=30) == 5
            else:
                with pytest.raises(ConnectionLost):
                    reduce(mapper, sum_of_two, [5], timeout=30)
            settings.GEARMAN = {}

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="at least 1, not 0"):
            map_reduce(jobs.total, jobs.add, [1], chunk=0)
        with pytest.raises(InvalidGroup, match="a @job that takes a list"):
            map_reduce(sum, jobs.add, [1])


@pytest.mark.django_db(transaction=True)
class TestServers:
    def test_two_end_the_last_two_members_at_once(self) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue(
            on_success=jobs.total.s(), on_complete=jobs.note.si("over")
        )
        stores = [DatabaseStore("default", name) for name in ("one", "two")]
        held = []
        for store in stores:
            store.take_lease("")
            (job,) = store.claim(1, {}).jobs
            held.append(job)

        def end(number: int) -> None:
            entry = JobFinished(held[number].handle, Outcome.SUCCESSFUL, b"2", "", time.time())
            assert stores[number].write([entry], again=False) == {}

        def end_later() -> None:
            try:
                end(1)
            finally:
                connection.close()

        other = threading.Thread(target=end_later)
        with transaction.atomic():
            end(0)
            other.start()
            # Here the first is done and nobody else sees it.
            other.join(0.5)
            assert other.is_alive(), "it did not wait for the group's row"
        other.join(30)
        assert not other.is_alive()
        made.refresh()
        assert (made.successful, made.is_finished) == (2, True)
        assert [store.laid for store in stores] == [False, True]
        assert [store.over for store in stores] == [[], [int(made.id)]]
        assert statuses() == ["SUCCESSFUL", "SUCCESSFUL", "READY", "READY"]

    @pytest.mark.parametrize("whole", [False, True])
    def test_what_waits_is_cancelled_while_its_turn_comes(
        self, whole: bool, nudges: list[None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = chain(jobs.add.s(1), jobs.add.s(2), jobs.add.s(3)).enqueue()
        store = DatabaseStore("default", "one")
        store.take_lease("")
        (held,) = store.claim(1, {}).jobs
        cancels = made.cancel if whole else list(made)[1].cancel
        views: list[Future[bool]] = []
        go_on = continuations._Group.go_on

        def go_on_later(group: Any) -> None:
            if not views:
                views.append(pool.submit(cancel))
                assert not wait(views, 0.5).done, "it did not wait for the group's row"
            go_on(group)

        def cancel() -> bool:
            try:
                return cancels()
            finally:
                connection.close()

        with ThreadPoolExecutor(1) as pool:
            monkeypatch.setattr(continuations._Group, "go_on", go_on_later)
            entry = JobFinished(held.handle, Outcome.SUCCESSFUL, b"2", "", time.time())
            assert store.write([entry], again=False) == {}
            (view,) = views
            assert view.result(60)
        assert statuses() == ["SUCCESSFUL", "CANCELLED", "CANCELLED"]
        made.refresh()
        assert (made.successful, made.failed, made.is_finished) == (1, 2, True)

    def test_many_are_cancelled_by_a_server_and_a_view_at_once(
        self, nudges: list[None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = group(jobs.add.s(number) for number in range(501)).enqueue()
        store = DatabaseStore("default", "one")
        store.take_lease("")
        ids = JobRecord.objects.values_list("pk", flat=True)
        Cancellation.objects.bulk_create(Cancellation(job_id=id) for id in ids)
        views: list[Future[bool]] = []
        end = store._door.end

        def cancel() -> bool:
            try:
                return made.cancel()
            finally:
                connection.close()

        def end_and_wait(**which: Any) -> int:
            ended = end(**which)
            if not views:
                views.append(pool.submit(cancel))
                assert not wait(views, 0.5).done, "it did not wait for the group's row"
            return ended

        with ThreadPoolExecutor(1) as pool:
            monkeypatch.setattr(store._door, "end", end_and_wait)
            assert store.claim(1, {}).jobs == []
            (view,) = views
            assert view.result(60)
        made.refresh()
        assert (made.failed, made.is_finished) == (501, True)

    def test_a_batch_that_is_written_twice_counts_once(self) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue(on_complete=jobs.note.si("over"))
        store = DatabaseStore("default", "one")
        store.take_lease("")
        first, second = store.claim(10, {}).jobs
        entry = JobFinished(first.handle, Outcome.FAILED, b"", "no", time.time())
        store._write(Folded([entry], lambda function: ""), again=False)
        # The answer to COMMIT was lost.
        store.write([entry], again=True)
        made.refresh()
        assert (made.failed, made.is_finished) == (1, False)
        assert list(store._members.group_of) == [second.handle]
        store.write([entry._replace(handle=second.handle)], again=False)
        assert not store._members.group_of
        made.refresh()
        assert (made.failed, made.is_finished) == (2, True)

    def test_cancelled_by_an_operator_at_the_door(self) -> None:
        made = group(jobs.add.s(1)).enqueue(on_complete=jobs.note.si("over"))
        one, two = (DatabaseStore("default", name) for name in ("one", "two"))
        one.take_lease("")
        (job,) = one.claim(10, {}).jobs
        one.close()
        two.take_lease("")
        question = Question(Topic.CANCEL, 1, handle=job.handle, at=0.0)
        assert two.ask([question]) == {1: True}
        assert two.laid
        assert two.over == [int(made.id)]
        made.refresh()
        assert (made.failed, made.is_finished) == (1, True)
        assert two.ask([question]) == {1: None}

    def test_rows_that_were_deleted_by_hand_hold_nothing_up(self) -> None:
        made = group(jobs.add.s(number) for number in range(3)).enqueue(
            on_success=jobs.note.si("no"), on_complete=jobs.note.si("over")
        )
        steps = chain(jobs.add.s(1), jobs.add.s(1), jobs.add.s(1)).enqueue(on_complete=jobs.note.si("over"))
        waiting = group(jobs.add.s(1)).enqueue()
        store = DatabaseStore("default", "one")
        store.take_lease("")
        store.tend()
        assert not JobGroup.objects.exclude(finished_at=None).exists()
        JobRecord.objects.filter(group=made.id, group_index__in=(0, 2)).delete()
        JobRecord.objects.filter(group=made.id, group_index=1).update(status=Status.SUCCESSFUL)
        JobRecord.objects.filter(group=steps.id, group_index=0).delete()
        store._members.watch_at = 0.0
        store.tend()
        assert store.laid
        assert sorted(store.over) == sorted([int(made.id), int(steps.id)])
        for result in (made, steps, waiting):
            result.refresh()
        assert (made.successful, made.failed, made.is_finished) == (1, 2, True)
        assert (steps.finished, steps.failed, steps.is_finished) == (3, 3, True)
        assert not waiting.is_finished
        for result in (made, steps):
            assert result.on_complete is not None
            assert result.on_complete.status == Status.READY
        assert made.on_success is not None
        assert made.on_success.status == Status.CANCELLED
        with pytest.raises(GroupFailed):
            made.get()

    def test_a_group_at_work_is_left_alone(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1), jobs.add.s(1)).enqueue(on_complete=jobs.note.si("over"))
        before = statuses()
        with transaction.atomic():
            assert not continuations.Watch("default").settle([int(made.id)], math.inf).groups
        assert statuses() == before

    def test_groups_take_turns_to_be_looked_at(
        self, gearman_jobs: GearmanJobs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(continuations, "AT_ONCE", 2)
        made = [group(jobs.add.s(number)).enqueue() for number in range(3)]
        JobRecord.objects.filter(group=int(made[2].id)).delete()
        watch = continuations.Watch("default")
        assert [watch.stuck(), watch.stuck()] == [[], [int(made[2].id)]]

    def test_rows_of_later_steps_that_were_deleted_are_counted(self, gearman_jobs: GearmanJobs) -> None:
        made = chain(jobs.add.s(1), jobs.add.s(1), jobs.add.s(1)).enqueue()
        JobRecord.objects.exclude(group_index=2).delete()
        with transaction.atomic():
            continuations.Watch("default").settle([int(made.id)], math.inf)
        made.refresh()
        assert (made.finished, made.failed, made.is_finished) == (3, 3, True)


class TestHistory:
    def test_a_group_goes_with_its_members_and_not_before_it_is_over(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(1), jobs.add.s(2)).enqueue(on_success=jobs.total.s())
        history = History("default", lanes_of(Retention(successful=timedelta(hours=1))))
        later = timezone.now() + timedelta(days=1)
        gearman_jobs.run_one()
        assert history.prune(later).deleted == 0
        gearman_jobs.run_one()
        made.refresh()
        assert made.is_finished
        history.start_over()
        assert history.prune(later).deleted == 0, "what follows has not read them"
        gearman_jobs.run_all(check=True)
        history.start_over()
        assert history.prune(later).deleted == 3
        assert not JobGroup.objects.exists()
