"""
Section 5: queue semantics, where no file of a theme of its own has the test.

The others: test_submissions.py (5.1, 5.2), test_durability.py (5.1, before it is written), test_workers.py
(5.3, 5.5), test_wakeups.py (5.4), test_time.py (5.5, 5.6), test_text.py (5.7), test_transport.py (5.8).
"""

from __future__ import annotations

import math
import signal
import time

import pytest

from django_gearman import AdminClient, Client
from django_gearman.exceptions import ConnectionFailed
from django_gearman.protocol.packets import PacketType as P
from django_gearman.server.entries import JobFinished, JobRequeued, Outcome
from tests import harness

from .harness import Caller, Wire, handle
from .test_section_2 import H
from .test_time import passes
from .test_transport import hall, in_a_loop

NOOP = [(P.NOOP,)]
FOREGROUND = [P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH, P.SUBMIT_JOB_LOW]
BACKGROUND = [P.SUBMIT_JOB_BG, P.SUBMIT_JOB_HIGH_BG, P.SUBMIT_JOB_LOW_BG]


def submit(
    caller: Caller, kind: P = P.SUBMIT_JOB_BG, *, function: bytes = b"f", unique: bytes = b""
) -> bytes:
    """Submit a job; its handle."""
    more = {P.SUBMIT_JOB_EPOCH: [b"1010"], P.SUBMIT_REDUCE_JOB: [b"r", b""]}.get(kind, [])
    ((created, made),) = caller(kind, function, unique, *more, b"w")
    assert created == P.JOB_CREATED
    return made


class TestCoalescing:
    """Section 5.1: who joins, who hears, and who keeps the job."""

    @pytest.mark.parametrize("running", [False, True], ids=["queued", "running"])
    @pytest.mark.parametrize("second", FOREGROUND + BACKGROUND)
    @pytest.mark.parametrize("first", FOREGROUND + BACKGROUND)
    def test_every_pair(self, first: P, second: P, running: bool):
        wire = Wire()
        one, two, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        assert submit(one, first, unique=b"u") == H
        if running:
            assert worker.grabs() == H
        assert submit(two, second, unique=b"u") == H
        if not running:
            assert worker.grabs() == H
        worker(P.WORK_DATA, H, b"d")
        worker(P.WORK_COMPLETE, H, b"r")
        heard = [(P.WORK_DATA, H, b"d"), (P.WORK_COMPLETE, H, b"r")]
        assert one.hears() == (heard if first in FOREGROUND else [])
        assert two.hears() == (heard if second in FOREGROUND else [])
        assert worker.grabs() is None

    @pytest.mark.parametrize("running", [False, True], ids=["queued", "running"])
    @pytest.mark.parametrize("second", [*FOREGROUND, *BACKGROUND, P.SUBMIT_JOB_EPOCH])
    @pytest.mark.parametrize("first", [*FOREGROUND, *BACKGROUND])
    def test_one_background_submission_makes_it_permanent(self, first: P, second: P, running: bool):
        """gearmand looks at the first only, and forgets even that when a client leaves."""
        wire = Wire()
        clients, worker = [wire.connect(), wire.connect()], wire.worker(b"f")
        submit(clients[0], first, unique=b"u")
        if running:
            worker.grabs()
        submit(clients[1], second, unique=b"u")
        for client in clients:
            client.leaves()
        worker.leaves()
        permanent = first not in FOREGROUND or second not in FOREGROUND
        assert wire.worker(b"f").grabs() == (H if permanent else None)

    def test_reduce_joins_too_and_its_reducer_is_ignored(self):
        wire = Wire()
        client = wire.connect()
        assert submit(client, P.SUBMIT_JOB, unique=b"u") == H
        assert submit(client, P.SUBMIT_REDUCE_JOB, unique=b"u") == H
        assert wire.worker(b"f")(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_UNIQ, H, b"f", b"u", b"w")]

    @pytest.mark.parametrize("end", [P.WORK_COMPLETE, P.WORK_FAIL, P.WORK_EXCEPTION])
    def test_after_any_end_a_new_job(self, end: P):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        submit(client, unique=b"u")
        worker.grabs()
        worker(end, H, *([] if end == P.WORK_FAIL else [b""]))
        assert submit(client, unique=b"u") == handle(2)

    def test_dash_of_a_job_that_ended_is_free(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        submit(client, unique=b"-")
        assert submit(client, unique=b"-") == H
        worker.grabs()
        worker(P.WORK_COMPLETE, H, b"")
        assert submit(client, unique=b"-") == handle(2)


class TestAbandonedJobs:
    """Section 5.2: the last client leaves."""

    def test_running_job_that_a_new_client_joins_is_nobodys_no_more(self):
        wire = Wire()
        first, worker = wire.connect(), wire.worker(b"f")
        submit(first, P.SUBMIT_JOB, unique=b"u")
        worker.grabs()
        first.leaves()
        second = wire.connect()
        assert submit(second, P.SUBMIT_JOB, unique=b"u") == H
        # Not dropped, as it would be if nobody waited.
        worker.leaves()
        other = wire.worker(b"f")
        assert other.grabs() == H
        other(P.WORK_COMPLETE, H, b"r")
        assert second.hears() == [(P.WORK_COMPLETE, H, b"r")]

    def test_reports_of_an_abandoned_job_are_accepted(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        submit(client, P.SUBMIT_JOB)
        worker.grabs()
        client.leaves()
        assert worker(P.WORK_STATUS, H, b"1", b"2") == []
        assert worker(P.WORK_WARNING, H, b"w") == []
        assert worker(P.WORK_EXCEPTION, H, b"e") == []
        assert worker.line(b"status") == b"f\t0\t0\t1\n.\n"

    def test_next_job_is_given_in_its_place(self):
        wire = Wire()
        client, stays, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        submit(client, P.SUBMIT_JOB_HIGH)
        submit(stays, P.SUBMIT_JOB_LOW)
        client.leaves()
        assert worker.grabs() == handle(2)

    def test_one_of_two_clients_leaves(self):
        wire = Wire()
        first, second, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        for client in (first, second):
            submit(client, P.SUBMIT_JOB, unique=b"u")
        first.leaves()
        assert worker.grabs() == H
        worker(P.WORK_COMPLETE, H, b"r")
        assert second.hears() == [(P.WORK_COMPLETE, H, b"r")]

    def test_worker_that_was_woken_for_it_gets_no_job_and_sleeps_again(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f").sleeps()
        submit(client, P.SUBMIT_JOB)
        assert worker.hears() == NOOP
        client.leaves()
        assert worker.grabs() is None
        assert worker(P.PRE_SLEEP) == []
        submit(wire.connect())
        assert worker.hears() == NOOP


class TestSleeping:
    """Section 5.4: its row on who loses the race, and what becomes of the mark."""

    def test_woken_worker_that_finds_nothing_sleeps_again(self):
        wire = Wire()
        client, worker, thief = wire.connect(), wire.worker(b"f").sleeps(), wire.worker(b"f")
        submit(client)
        assert worker.hears() == NOOP
        assert thief.grabs() == H
        assert worker.grabs() is None
        assert worker(P.PRE_SLEEP) == []
        submit(client)
        assert worker.hears() == NOOP

    def test_noop_at_once_is_no_sleep(self):
        """Also of a worker that slept, and then offered a function whose job waits."""
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f").sleeps()
        submit(client, function=b"g")
        assert worker(P.CAN_DO, b"g") == []
        assert worker(P.PRE_SLEEP) == NOOP
        submit(client, function=b"f")
        assert worker.hears() == [], "it was told already, and has not grabbed since"
        assert {worker.grabs(), worker.grabs()} == {handle(1), handle(2)}

    def test_offering_a_function_while_asleep_wakes_nobody(self):
        wire = Wire()
        submit(wire.connect(), function=b"g")
        worker = wire.worker(b"f").sleeps()
        assert worker(P.CAN_DO, b"g") == []
        assert worker(P.CAN_DO_TIMEOUT, b"g", b"1000") == []


class TestLostWorkers:
    """Section 5.5: what is left of an attempt."""

    @pytest.mark.parametrize("kind", [P.SUBMIT_JOB, P.SUBMIT_JOB_BG])
    def test_worker_leaves(self, kind: P):
        wire = Wire(job_retries=0)
        client, lost, sleeper = wire.connect(), wire.worker(b"f"), wire.worker(b"f")
        submit(client, kind)
        lost.grabs()
        lost(P.WORK_STATUS, H, b"3", b"4")
        client.hears()
        sleeper.sleeps()
        lost.leaves()
        assert client.hears() == [], "clients are told nothing"
        assert sleeper.hears() == NOOP
        assert client(P.GET_STATUS, H) == [(P.STATUS_RES, H, b"1", b"0", b"0", b"0")]
        stored = b"1" if kind == P.SUBMIT_JOB_BG else b"0"
        assert client.line(b"show jobs") == H + b"\t1\t0\t" + stored + b"\n.\n"
        assert sleeper.grabs() == H

    def test_time_runs_out(self):
        wire = Wire(job_retries=0)
        client, worker, sleeper = wire.connect(), wire.connect(), wire.worker(b"f")
        worker(P.CAN_DO_TIMEOUT, b"f", b"1000")
        submit(client, P.SUBMIT_JOB)
        worker.grabs()
        worker(P.WORK_STATUS, H, b"3", b"4")
        client.hears()
        sleeper.sleeps()
        passes(wire, 1)
        assert (client.hears(), worker.hears(), sleeper.hears()) == ([], [], NOOP)
        assert client(P.GET_STATUS, H) == [(P.STATUS_RES, H, b"1", b"0", b"0", b"0")]
        assert client.line(b"show jobs") == H + b"\t1\t0\t0\n.\n"
        not_found = (P.ERROR, b"JOB_NOT_FOUND", b"Job given in work result not found")
        assert worker(P.WORK_COMPLETE, H, b"late") == [not_found]
        # The same worker may take it again.
        assert worker.grabs() == H
        assert worker(P.WORK_COMPLETE, H, b"r") == []
        assert client.hears() == [(P.WORK_COMPLETE, H, b"r")]

    @pytest.mark.parametrize("lose", ["leaves", "timeout", "cant_do", "reset_abilities"])
    def test_last_attempt_fails_the_job(self, lose: str):
        wire = Wire(job_retries=1, durable=True)
        client, other, worker = wire.connect(), wire.connect(), wire.connect()
        worker(P.CAN_DO_TIMEOUT, b"f", b"1000")
        submit(client, P.SUBMIT_JOB, unique=b"u")
        other(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        wire.commit()
        worker.grabs()
        if lose == "leaves":
            worker.leaves()
        elif lose == "timeout":
            passes(wire, 1)
        elif lose == "cant_do":
            worker(P.CANT_DO, b"f")
        else:
            worker(P.RESET_ABILITIES)
        assert client.hears() == [(P.WORK_FAIL, H)]
        (finished,) = [entry for entry in wire.entries() if type(entry) is JobFinished]
        assert (finished.handle, finished.outcome) == (H, Outcome.DEAD)
        assert client.line(b"show jobs") == b".\n"
        assert submit(client, P.SUBMIT_JOB, unique=b"u") == handle(2)

    def test_attempts_before_the_last_are_written_as_such(self):
        wire = Wire(job_retries=2, durable=True)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        wire.commit()
        for last in (False, True):
            worker = wire.worker(b"f")
            worker.grabs()
            wire.commit()
            worker.leaves()
            kinds = [type(entry) for entry in wire.commit()]
            assert kinds == [JobFinished if last else JobRequeued]

    @pytest.mark.parametrize("end", [P.WORK_FAIL, P.WORK_EXCEPTION])
    @pytest.mark.parametrize("retries", [0, 1, 5])
    def test_what_a_worker_says_itself_is_final(self, retries: int, end: P):
        wire = Wire(job_retries=retries)
        client, worker = wire.connect(), wire.worker(b"f")
        submit(client, P.SUBMIT_JOB)
        worker.grabs()
        worker(end, H, *([] if end == P.WORK_FAIL else [b"e"]))
        assert client.hears() == [(P.WORK_FAIL, H)]
        assert worker.grabs() is None

    def test_end_of_one_job_leaves_the_limit_of_another(self):
        """gearmand has one timer for a connection, and it may fire after the job is gone."""
        wire = Wire()
        worker = wire.connect()
        worker(P.CAN_DO_TIMEOUT, b"f", b"10000")
        client = wire.connect()
        submit(client)
        submit(client)
        worker.grabs()
        passes(wire, 5)
        worker.grabs()
        worker(P.WORK_COMPLETE, handle(1), b"")
        passes(wire, 6)
        assert client.line(b"status") == b"f\t1\t1\t1\n.\n"
        passes(wire, 4)
        assert client.line(b"status") == b"f\t1\t0\t1\n.\n"


class TestJobsForLater:
    """Section 5.6."""

    def test_always_in_the_background_and_of_normal_priority(self):
        wire = Wire()
        client = wire.connect()
        submit(client, P.SUBMIT_JOB_EPOCH)
        passes(wire, 10)
        for kind in (P.SUBMIT_JOB_LOW_BG, P.SUBMIT_JOB_HIGH_BG):
            submit(client, kind)
        client.leaves()
        worker = wire.worker(b"f")
        assert [worker.grabs() for _ in range(3)] == [handle(3), handle(1), handle(2)]
        worker(P.WORK_COMPLETE, handle(1), b"r")

    @pytest.mark.parametrize("kind", [P.SUBMIT_JOB_HIGH_BG, P.SUBMIT_JOB_BG, P.SUBMIT_JOB_LOW_BG])
    def test_hides_no_job_of_any_priority_and_keeps_nobody_awake(self, kind: P):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        submit(client, P.SUBMIT_JOB_EPOCH)
        submit(client, kind)
        assert worker(P.PRE_SLEEP) == NOOP
        assert worker.grabs() == handle(2)
        assert worker(P.PRE_SLEEP) == []
        passes(wire, 10)
        assert worker.hears() == NOOP
        assert worker.grabs() == handle(1)

    def test_every_job_that_is_due_wakes_somebody(self):
        wire = Wire()
        workers = [wire.worker(b"f").sleeps() for _ in range(3)]
        for _ in range(3):
            submit(wire.connect(), P.SUBMIT_JOB_EPOCH)
        passes(wire, 10)
        assert [worker.hears() for worker in workers] == [NOOP] * 3

    def test_counts_as_queued(self):
        wire = Wire()
        client = wire.connect()
        submit(client, P.SUBMIT_JOB_EPOCH, unique=b"u")
        assert client.line(b"status") == b"f\t1\t0\t0\n.\n"
        assert client.line(b"show jobs") == H + b"\t0\t0\t1\n.\n"
        assert client.line(b"show unique jobs") == b"u\n.\n"
        assert client(P.GET_STATUS_UNIQUE, b"u")[0][2:4] == (b"1", b"0")

    def test_limits_count_it(self):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        submit(client, P.SUBMIT_JOB_EPOCH, unique=b"u")
        full = [(P.ERROR, b"QUEUE_ERROR", b"Job queue is full")]
        assert client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"1010", b"w") == full
        assert submit(client, P.SUBMIT_JOB_EPOCH, unique=b"u") == H


class TestTimeOnSockets:
    """Sections 5.5 and 5.6: nobody has to say anything for it to happen. ``test_time`` has the moments."""

    @in_a_loop
    async def test_due_job_wakes_a_sleeping_worker(self):
        async with hall() as place:
            worker = await place.worker(b"f")
            worker.say(P.PRE_SLEEP)
            client = await place.connect()
            due = math.ceil(time.time() + 0.2)
            await client.ask(P.SUBMIT_JOB_EPOCH, b"f", b"", b"%d" % due, b"w")
            assert await worker.hear() == [(P.NOOP, [b""])]
            assert due <= time.time()
            assert await worker.ask(P.GRAB_JOB) == (P.JOB_ASSIGN, [H, b"f", b"w"])

    @in_a_loop
    async def test_job_whose_time_is_up_goes_to_another_worker(self):
        async with hall() as place:
            slow, other, client = await place.connect(), await place.worker(b"f"), await place.connect()
            slow.say(P.CAN_DO_TIMEOUT, b"f", b"1000")
            await client.ask(P.SUBMIT_JOB, b"f", b"", b"w")
            began = time.monotonic()
            assert (await slow.ask(P.GRAB_JOB))[0] == P.JOB_ASSIGN
            other.say(P.PRE_SLEEP)
            assert await other.hear() == [(P.NOOP, [b""])]
            assert time.monotonic() - began >= 1
            assert await other.ask(P.GRAB_JOB) == (P.JOB_ASSIGN, [H, b"f", b"w"])


@pytest.mark.acceptance
class TestShutdown:
    """Section 5.8: the signals, of the command's own process."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_at_once_though_jobs_wait(self, number: signal.Signals):
        with harness.server(store="memory") as process:
            with Client([process.address]) as client:
                client.do_background("f", b"")
            process.signal(number)
            assert process.wait() == 0

    def test_gracefully_at_once_when_nothing_is_to_do(self):
        with harness.server(store="memory") as process:
            process.signal(signal.SIGUSR1)
            assert process.wait() == 0

    def test_gracefully_when_the_last_job_is_done(self):
        """Connections that are there are served meanwhile, submissions included; new ones are refused."""
        with (
            harness.server(store="memory") as process,
            harness.worker_thread({"quick": lambda job: b"done"}, process),
            Client([process.address]) as client,
            AdminClient(process.address) as admin,
        ):
            harness.wait_until(lambda: "quick" in process.status())
            held = client.do_background("held", b"")
            assert admin.jobs()
            process.signal(signal.SIGUSR1)
            harness.wait_until(lambda: "Shutting down" in process.stderr)
            with AdminClient(process.address) as late, pytest.raises(ConnectionFailed):
                late.status()
            assert client.do("quick", b"", timeout=30) == b"done"
            assert process.is_running
            admin.cancel(held)
            assert process.wait() == 0
