"""A queue larger than memory: a window of it here, the rest at the store's door."""

from __future__ import annotations

from dataclasses import replace

import pytest

from django_gearman.exceptions import StoreError
from django_gearman.protocol.packets import PacketType
from django_gearman.server.entries import Claimed, JobFinished, JobQueued, JobStarted, Outcome, StoredJob
from django_gearman.server.journal import CLAIM_PAUSE
from django_gearman.server.window import PATIENCE

from .harness import Caller, handle
from .test_journal import Office

P = PacketType
DOWN = StoreError("down")


def office_of(window: int = 2, **options: float) -> Office:
    office = Office(window=window, **options)
    office.store._clock = lambda: office.wire.core.now
    settle(office)
    return office


def settle(office: Office) -> None:
    """Until nothing is left to be carried to the store."""
    while office.trip() is not None:
        pass


def submit(office: Office, count: int, first: int = 1, kind: PacketType = P.SUBMIT_JOB_BG) -> Caller:
    """Submit jobs with their numbers for workloads; all are acknowledged."""
    client = office.wire.connect()
    for number in range(first, first + count):
        client(kind, b"f", b"", b"%d" % number)
    settle(office)
    assert [kind for kind, _ in client.hears()] == [P.JOB_CREATED] * count
    return client


def drain(office: Office, worker: Caller) -> list[int]:
    """Workloads of all jobs, in the order in which they are handed out."""
    done = []
    for _ in range(100):
        heard = worker(P.GRAB_JOB)[-1]
        if heard == (P.NO_JOB,):
            if not office.wire.core.window.away:
                return done
        else:
            done.append(int(heard[-1]))
            worker(P.WORK_COMPLETE, heard[1], b"")
        settle(office)
        # While jobs wait here there is a moment between two claims.
        office.pass_time(CLAIM_PAUSE)
    raise AssertionError("there is no end of it")


def status(office: Office) -> bytes:
    answer = office.wire.connect().line(b"status")
    assert answer is not None
    return answer.removesuffix(b".\n")


class TestDepth:
    def test_window_is_all_that_is_held(self):
        office = office_of(window=2)
        submit(office, 7)
        assert len(office.wire.core.jobs) == 2
        assert len(office.store.unclaimed) == 5
        assert status(office) == b"f\t7\t0\t0\n"

    def test_order_is_kept(self):
        office = office_of(window=2)
        submit(office, 7)
        assert drain(office, office.wire.worker(b"f")) == [1, 2, 3, 4, 5, 6, 7]
        assert status(office) == b"f\t0\t0\t1\n"

    def test_order_is_kept_while_others_come(self):
        office = office_of(window=3)
        worker = office.wire.worker(b"f")
        submit(office, 5)
        heard = [worker(P.GRAB_JOB)[-1] for _ in range(3)]
        assert [int(each[-1]) for each in heard] == [1, 2, 3]
        # There is room, but those behind the door are first.
        client = office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"6")
        assert status(office) == b"f\t5\t3\t1\n"
        settle(office)
        assert drain(office, worker) == [4, 5, 6]

    def test_once_it_is_drained_jobs_wait_here_again(self):
        office = office_of(window=2)
        submit(office, 5)
        drain(office, office.wire.worker(b"f"))
        submit(office, 2)
        assert office.store.unclaimed == []
        assert len(office.wire.core.jobs) == 2

    def test_urgent_ones_are_not_behind(self):
        office = office_of(window=2)
        submit(office, 5)
        submit(office, 4, first=10, kind=P.SUBMIT_JOB_HIGH_BG)
        assert office.wire.connect().line(b"prioritystatus") == b"f\t4\t5\t0\t0\n.\n"
        assert drain(office, office.wire.worker(b"f")) == [10, 11, 12, 13, 1, 2, 3, 4, 5]

    def test_less_urgent_ones_wait_for_their_turn(self):
        office = office_of(window=2)
        submit(office, 3)
        submit(office, 3, first=10, kind=P.SUBMIT_JOB_LOW_BG)
        assert len(office.wire.core.jobs) == 2
        assert drain(office, office.wire.worker(b"f")) == [1, 2, 3, 10, 11, 12]

    def test_pending_ones_fill_the_window_too(self):
        office = office_of(window=2)
        client = office.wire.connect()
        for number in range(5):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"%d" % number)
        laid = [entry.unclaimed for entry in office.wire.core.entries if type(entry) is JobQueued]
        assert laid == [False, False, True, True, True]
        settle(office)
        assert drain(office, office.wire.worker(b"f")) == [0, 1, 2, 3, 4]

    def test_every_function_has_a_window_of_its_own(self):
        office = office_of(window=2)
        submit(office, 4)
        office.wire.connect()(P.SUBMIT_JOB_BG, b"other", b"", b"")
        settle(office)
        assert office.wire.worker(b"other").grabs() is not None

    def test_foreground_jobs_are_always_here(self):
        office = office_of(window=2)
        submit(office, 5)
        client = office.wire.connect()
        assert client(P.SUBMIT_JOB_HIGH, b"f", b"", b"now")[-1][0] == P.JOB_CREATED
        assert office.wire.worker(b"f")(P.GRAB_JOB)[-1][-1] == b"now"

    def test_large_jobs_fill_it_by_their_size(self):
        office = office_of(window=1000)
        worker = office.wire.worker(b"f")
        client = office.wire.connect()
        for _ in range(4):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"x" * 10_000_000)
            settle(office)
        assert len(office.wire.core.jobs) == 2
        sizes = []
        for _ in range(4):
            heard = worker(P.GRAB_JOB)[-1]
            sizes.append(len(heard[-1]))
            worker(P.WORK_COMPLETE, heard[1], b"")
            settle(office)
        assert sizes == [10_000_000] * 4
        assert office.wire.core.window.weight == 0

    def test_limit_of_a_function_counts_all_of_its_jobs(self):
        office = office_of(window=2)
        submit(office, 5)
        client = office.wire.connect()
        assert client.line(b"maxqueue f 5") == b"OK\r\n"
        assert client(P.SUBMIT_JOB, b"f", b"", b"")[-1][:2] == (P.ERROR, b"QUEUE_ERROR")

    def test_function_with_jobs_in_the_store_is_not_dropped(self):
        office = office_of(window=1)
        submit(office, 2)
        worker = office.wire.worker(b"f")
        office.store.claim_error = DOWN
        worker(P.WORK_COMPLETE, worker.grabs(), b"")
        worker.leaves()
        assert office.wire.connect().line(b"drop function f") != b"OK\r\n"

    def test_jobs_that_another_server_took_are_counted_no_more(self):
        office = office_of(window=2)
        submit(office, 5)
        office.store.unclaimed.clear()
        office.pass_time(1.0)
        settle(office)
        assert status(office) == b"f\t2\t0\t0\n"

    def test_large_jobs_of_many_functions_fill_it_together(self):
        office = office_of(window=1000)
        client = office.wire.connect()
        share = office.wire.core.options.window_bytes // 8
        for number in range(9):
            client(P.SUBMIT_JOB_BG, b"f%d" % number, b"", b"x" * share)
            settle(office)
        client(P.SUBMIT_JOB_BG, b"f8", b"", b"")
        settle(office)
        assert [len(job.workload) for job in office.store.unclaimed] == [0]


class TestLater:
    def test_jobs_for_later_wait_in_the_store(self):
        office = office_of()
        client = office.wire.connect()
        for number in (3, 1, 2):
            client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"%d" % (1000 + number), b"%d" % number)
        settle(office)
        assert office.wire.core.jobs == {}
        assert status(office) == b"f\t3\t0\t0\n"
        worker = office.wire.worker(b"f")
        assert worker.grabs() is None
        assert office.journal.next_deadline() == office.now + 1
        office.pass_time(1.0)
        settle(office)
        assert worker(P.GRAB_JOB)[-1][-1] == b"1"
        assert worker.grabs() is None
        office.pass_time(2.0)
        settle(office)
        assert drain(office, worker) == [2, 3]

    def test_time_is_not_awaited_for_long_when_it_comes_between_two_looks(self):
        office = office_of()
        client = office.wire.connect()
        office.wire.core.clock = office.now
        client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"1001", b"")
        office.trip()
        assert office.journal.next_deadline() == office.now + 1


class TestQuestions:
    """What only the store knows."""

    def test_status_of_a_job_that_waits_there(self):
        office = office_of(window=1)
        client = submit(office, 3)
        assert client(P.GET_STATUS, handle(3)) == []
        assert client(P.ECHO_REQ, b"behind") == []
        settle(office)
        assert client.hears() == [
            (P.STATUS_RES, handle(3), b"1", b"0", b"0", b"0"),
            (P.ECHO_RES, b"behind"),
        ]

    def test_status_of_a_job_that_is_nowhere(self):
        office = office_of()
        client = office.wire.connect()
        client(P.GET_STATUS, b"H:no")
        settle(office)
        assert client.hears() == [(P.STATUS_RES, b"H:no", b"0", b"0", b"0", b"0")]

    def test_status_by_unique(self):
        office = office_of(window=1)
        client = submit(office, 1)
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        settle(office)
        client.hears()
        for unique in (b"u", b"other"):
            client(P.GET_STATUS_UNIQUE, unique)
        settle(office)
        assert client.hears() == [
            (P.STATUS_RES_UNIQUE, b"u", b"1", b"0", b"0", b"0", b"0"),
            (P.STATUS_RES_UNIQUE, b"other", b"0", b"0", b"0", b"0", b"0"),
        ]

    def test_what_a_nul_ends_is_all_that_the_store_is_asked(self):
        office = office_of()
        client = office.wire.connect()
        client(P.GET_STATUS, b"H:x\0y")
        client(P.GET_STATUS_UNIQUE, b"x\0y")
        asked = office.wire.core.questions
        assert [(question.handle, question.unique) for question in asked] == [(b"H:x", b""), (b"", b"x")]

    @pytest.mark.parametrize("unique", [b"", b"-"])
    def test_a_unique_that_names_no_job_is_not_looked_for(self, unique):
        """Many may be kept under "-": each stands for its workload."""
        client = office_of(window=1).wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", unique, b"w")
        nothing = (P.STATUS_RES_UNIQUE, unique, b"0", b"0", b"0", b"0", b"0")
        assert client.wire.connect()(P.GET_STATUS_UNIQUE, unique) == [nothing]

    def test_cancel(self):
        office = office_of(window=1)
        client = submit(office, 3)
        assert client.line(b"cancel job " + handle(3)) == b""
        assert client.line(b"cancel job H:no") == b""
        settle(office)
        assert client.takes() == b"OK\r\nERR UNKNOWN_JOB\r\n"
        assert drain(office, office.wire.worker(b"f")) == [1, 2]

    def test_store_that_is_away_keeps_nobody_waiting(self):
        """A job that may be there is not told to be gone: who asks goes on asking."""
        office = office_of(window=1)
        client = submit(office, 3)
        office.store.ask = lambda questions: (_ for _ in ()).throw(DOWN)
        client(P.GET_STATUS, handle(3))
        client.line(b"cancel job " + handle(2))
        settle(office)
        assert client.takes() == b""
        office.pass_time(PATIENCE)
        office.wire.core.clock = office.now
        office.wire.core.tick()
        (known, refused) = client.takes().split(b"ERR")
        assert known.endswith(handle(3) + b"\x001\x000\x000\x000")
        assert refused == b" UNKNOWN_JOB\r\n"

    def test_question_is_asked_again_when_the_store_is_back(self):
        office = office_of(window=1)
        client = submit(office, 3)
        ask = office.store.ask
        office.store.ask = lambda questions: (_ for _ in ()).throw(DOWN)
        client(P.GET_STATUS, handle(3))
        office.trip()
        office.store.ask = ask
        office.pass_time(0.5)
        settle(office)
        assert client.hears() == [(P.STATUS_RES, handle(3), b"1", b"0", b"0", b"0")]

    def test_job_that_is_taken_for_nobody_is_run_all_the_same(self):
        office = office_of(window=1)
        client = submit(office, 1)
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"2")
        settle(office)
        client(P.SUBMIT_JOB, b"f", b"u", b"")
        batch = office.begin()
        assert batch is not None
        batch.perform(office.store)
        client.leaves()
        office.journal.done(batch, office.now)
        assert drain(office, office.wire.worker(b"f")) == [1, 2]


class TestUniques:
    def test_background_submission_joins_what_waits_there(self):
        office = office_of(window=1)
        client = submit(office, 1)
        for _ in range(2):
            client(P.SUBMIT_JOB_BG, b"f", b"u", b"2")
            settle(office)
            assert client.hears() == [(P.JOB_CREATED, handle(2))]
        assert drain(office, office.wire.worker(b"f")) == [1, 2]

    def test_foreground_submission_joins_what_waits_there(self):
        office = office_of(window=1)
        client = submit(office, 3)
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"4")
        settle(office)
        client.hears()
        other = office.wire.connect()
        assert other(P.SUBMIT_JOB, b"f", b"u", b"") == []
        assert other(P.ECHO_REQ, b"behind") == []
        settle(office)
        assert other.hears() == [(P.JOB_CREATED, handle(4)), (P.ECHO_RES, b"behind")]
        worker = office.wire.worker(b"f")
        assert drain(office, worker) == [1, 4, 2, 3]
        assert other.hears() == [(P.WORK_COMPLETE, handle(4), b"")]

    def test_foreground_submission_of_a_new_unique(self):
        office = office_of(window=1)
        submit(office, 3)
        client = office.wire.connect()
        client(P.SUBMIT_JOB, b"f", b"u", b"4")
        settle(office)
        assert client.hears() == [(P.JOB_CREATED, handle(4))]

    def test_two_that_ask_are_one_job(self):
        office = office_of(window=1)
        submit(office, 3)
        clients = [office.wire.connect() for _ in range(2)]
        for client in clients:
            client(P.SUBMIT_JOB, b"f", b"u", b"4")
        settle(office)
        assert [client.hears() for client in clients] == [[(P.JOB_CREATED, handle(4))]] * 2

    def test_foreground_client_of_a_job_that_is_on_its_way_there(self):
        office = office_of(window=1)
        client, other = submit(office, 1), office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"2")
        other(P.SUBMIT_JOB, b"f", b"u", b"")
        settle(office)
        assert client.hears() == other.hears() == [(P.JOB_CREATED, handle(2))]
        assert drain(office, office.wire.worker(b"f")) == [1, 2]
        assert other.hears() == [(P.WORK_COMPLETE, handle(2), b"")]

    def test_foreground_client_of_a_job_that_another_server_took(self):
        """It cannot hear of it there: the job is run here for it, and not kept."""
        office = office_of(window=1)
        client, other = submit(office, 1), office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"2")
        other(P.SUBMIT_JOB, b"f", b"u", b"")
        office.trip()
        office.store.unclaimed.clear()
        settle(office)
        assert drain(office, office.wire.worker(b"f")) == [1, 2]
        assert other.hears()[-1] == (P.WORK_COMPLETE, handle(2), b"")


class TestRefusals:
    def test_store_that_is_away_refuses_them_like_others(self):
        office = office_of(window=1, submit_limit=3.0)
        client = submit(office, 1)
        office.store.script = [DOWN, DOWN]
        client(P.SUBMIT_JOB_BG, b"f", b"", b"2")
        office.trip()
        office.pass_time(5.0)
        office.trip()
        assert client.hears()[-1][:2] == (P.ERROR, b"QUEUE_ERROR")
        office.pass_time(5.0)
        settle(office)
        assert drain(office, office.wire.worker(b"f")) == [1]
        function = office.wire.core.functions[b"f"]
        assert (function.spilling, function.arriving, function.held) == ({}, 0, 0)

    def test_refused_while_the_store_had_it_is_not_run(self):
        """The same trip writes and claims it; what undoes it comes after."""
        office = office_of(window=1, submit_limit=3.0)
        client = submit(office, 1)
        worker = office.wire.worker(b"f")
        worker(P.WORK_COMPLETE, worker.grabs(), b"")
        settle(office)
        # Two, of which one is laid at the door.
        for number in (2, 3):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"%d" % number)
        office.journal.claim_soon()
        batch = office.begin()
        assert batch is not None
        assert batch.claim
        office.pass_time(5.0)
        office.journal.refuse_overdue()
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        settle(office)
        assert [kind for kind, *_ in client.hears()] == [P.ERROR, P.ERROR]
        assert worker.grabs() is None
        assert {entry.outcome for entry in office.store.finished.values()} >= {Outcome.CANCELLED}
        assert not office.store.jobs
        assert not office.store.unclaimed

    def test_cancelled_while_it_was_on_its_way(self):
        office = office_of(window=1)
        client = submit(office, 1)
        client(P.SUBMIT_JOB_BG, b"f", b"", b"2")
        batch = office.begin()
        assert batch is not None
        assert office.wire.core.cancel(handle(2))
        batch.perform(office.store)
        office.journal.done(batch, office.now)
        settle(office)
        assert client.hears() == [(P.JOB_CREATED, handle(2))]
        assert drain(office, office.wire.worker(b"f")) == [1]


class TestClaims:
    def test_function_is_listed_that_only_the_store_has_jobs_of(self):
        office = office_of(window=1)
        office.store.unclaimed = [StoredJob(b"r1", b"g", b"", b"", 0, 0, None, b"", 2000.0)]
        office.pass_time(1.0)
        settle(office)
        assert status(office) == b"g\t1\t0\t0\n"

    @pytest.mark.parametrize("window", [1, 2, 3, 5])
    def test_what_came_back_is_before_those_that_wait(self, window: int):
        office = office_of(window=window)
        submit(office, 6)
        worker = office.wire.worker(b"f")
        worker.grabs()
        settle(office)
        worker.leaves()
        assert drain(office, office.wire.worker(b"f")) == [1, 2, 3, 4, 5, 6]

    def test_ends_of_jobs_are_written_once(self):
        office = office_of(window=1)
        submit(office, 4)
        drain(office, office.wire.worker(b"f"))
        settle(office)
        office.journal.hurry()
        settle(office)
        ended = [e.handle for w, _ in office.store.writes for e in w if type(e) is JobFinished]
        assert sorted(ended) == [handle(number) for number in range(1, 5)]


class TestTakenBack:
    """A job that was laid at the door, and that somebody waits for here."""

    def waited_for(self) -> tuple[Office, Caller, Caller]:
        """An office that writes a job to the door, which a client has joined in the foreground meanwhile."""
        office = office_of(window=1)
        submit(office, 1)
        background, foreground = office.wire.connect(), office.wire.connect()
        background(P.SUBMIT_JOB_BG, b"f", b"u", b"2")
        office.gather()
        foreground(P.SUBMIT_JOB, b"f", b"u", b"")
        return office, background, foreground

    def finish(self, office: Office, foreground: Caller) -> None:
        """The foreground client gets its result, and the record tells of it."""
        worker = office.wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
        for number in (1, 2):
            worker(P.WORK_COMPLETE, handle(number), b"r")
        settle(office)
        assert (P.WORK_COMPLETE, handle(2), b"r") in foreground.hears()
        assert office.store.jobs == {}
        assert office.store.unclaimed == []
        assert office.store.finished[handle(2)].outcome is Outcome.SUCCESSFUL

    def test_claimed_on_the_trip_that_laid_it_there(self):
        office, background, foreground = self.waited_for()
        office.journal.claim_soon()
        office.wire.core.options = replace(office.wire.core.options, window=9)
        settle(office)
        assert background.hears() == [(P.JOB_CREATED, handle(2))]
        self.finish(office, foreground)

    def test_claimed_after_it_was_given_up(self):
        office, _, foreground = self.waited_for()
        office.trip()
        # Nobody knows where it is by now: it runs for those who wait.
        office.pass_time(PATIENCE)
        office.wire.core.tick()
        office.wire.core.options = replace(office.wire.core.options, window=9)
        office.journal.claim_soon()
        settle(office)
        self.finish(office, foreground)

    def test_given_up_and_wanted_in_the_background_again(self):
        office, background, _ = self.waited_for()
        office.trip()
        office.pass_time(PATIENCE)
        office.wire.core.tick()
        # It is kept: at the door.
        background.hears()
        assert background(P.SUBMIT_JOB_BG, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]
        assert not any(isinstance(entry, JobQueued) for entry in office.wire.core.entries)

    def test_given_up_for_nobody(self):
        office, _, foreground = self.waited_for()
        office.trip()
        foreground.leaves()
        office.pass_time(PATIENCE)
        office.wire.core.tick()
        assert handle(2) not in office.wire.core.jobs

    def test_room_in_the_window_is_what_it_was(self):
        office, _, _ = self.waited_for()
        settle(office)
        function = office.wire.core.functions[b"f"]
        assert (function.arriving, function.spilling) == (0, {})
        assert function.weight == sum(job.weight for job in office.wire.core.jobs.values())

    def test_claimed_while_it_runs_after_it_was_given_up(self):
        office, _, _ = self.waited_for()
        office.trip()
        office.pass_time(PATIENCE)
        office.wire.core.tick()
        worker = office.wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
        office.wire.core.options = replace(office.wire.core.options, window=9)
        office.journal.claim_soon()
        office.trip()
        begun = [entry.handle for entry in office.wire.core.entries if isinstance(entry, JobStarted)]
        assert handle(2) in begun


class TestWindow:
    def test_jobs_that_have_ended_do_not_fill_it(self):
        office = office_of(window=2)
        submit(office, 1, first=10, kind=P.SUBMIT_JOB_LOW_BG)
        submit(office, 3)
        assert [job.workload for job in office.store.unclaimed] == [b"3"]
        for number in (2, 3):
            # They lie in the queue until they would be next.
            assert office.wire.core.cancel(handle(number))
        office.pass_time(1.0)
        settle(office)
        assert drain(office, office.wire.worker(b"f")) == [3, 10]

    def test_before_the_first_look_at_the_door_new_jobs_are_behind(self):
        office = Office(window=2)
        office.wire.core.window.door_seen = False
        office.store.unclaimed.append(StoredJob(b"H:old", b"f", b"", b"1", 0, 0, None))
        client = office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"2")
        settle(office)
        assert drain(office, office.wire.worker(b"f")) == [1, 2]

    def test_rows_that_nobody_had_counted_do_not_hide_one_that_lies_there(self):
        office = office_of(window=1)
        submit(office, 2)
        core = office.wire.core
        assert core.functions[b"f"].left == {0: 1}
        # From a view, and more urgent than what was laid there.
        views = StoredJob(b"H:r1", b"f", b"", b"9", 0, 0, None)
        core.window.claimed(Claimed([views], more=True))
        client = office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"3")
        (entry,) = core.entries
        assert isinstance(entry, JobQueued)
        assert entry.unclaimed

    def test_what_was_cancelled_a_moment_ago_is_not_claimed(self):
        office = office_of(window=1)
        submit(office, 1)
        client = office.wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"2")
        worker = office.wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"")
        office.journal.claim_soon()
        batch = office.begin()
        assert batch is not None
        batch.perform(office.store)
        assert batch.claimed is not None
        assert [job.handle for job in batch.claimed.jobs] == [handle(2)]
        assert office.wire.core.cancel(handle(2))
        office.journal.done(batch, office.now)
        assert worker.grabs() is None
        settle(office)
        assert office.store.finished[handle(2)].outcome is Outcome.CANCELLED
