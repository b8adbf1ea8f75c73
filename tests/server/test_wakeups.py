"""Who is asleep, and who is woken."""

import pytest

from django_gearman.protocol.packets import ATTEMPTS, RETURN, WAITS, PacketType

from .harness import Caller, Heard, Wire, handle

P = PacketType
NOOP = [(P.NOOP,)]


def submit(wire: Wire, function: bytes, kind: PacketType = P.SUBMIT_JOB_BG) -> None:
    wire.connect()(kind, function, b"", b"")


def woken(*workers: Caller) -> list[Caller]:
    """Those that hear NOOP, which must be all that they hear."""
    heard = {worker: worker.hears() for worker in workers}
    assert all(packets in ([], NOOP) for packets in heard.values())
    return [worker for worker in workers if heard[worker]]


class TestSleeping:
    """PROTOCOL section 5.4."""

    def test_worker_that_sleeps_hears_of_a_job(self):
        wire = Wire()
        worker = wire.worker(b"f").sleeps()
        submit(wire, b"f")
        assert worker.hears() == NOOP
        assert worker.grabs() == handle(1)

    def test_worker_that_never_slept_does_not(self):
        wire = Wire()
        worker = wire.worker(b"f")
        submit(wire, b"f")
        assert worker.hears() == []

    def test_worker_that_grabbed_since_does_not(self):
        wire = Wire()
        worker = wire.worker(b"f").sleeps()
        assert worker.grabs() is None
        submit(wire, b"f")
        assert worker.hears() == []

    def test_worker_of_another_function_does_not(self):
        wire = Wire()
        worker = wire.worker(b"g").sleeps()
        submit(wire, b"f")
        assert worker.hears() == []

    def test_noop_comes_once_until_the_next_sleep(self):
        wire = Wire()
        worker = wire.worker(b"f").sleeps()
        submit(wire, b"f")
        submit(wire, b"f")
        assert worker.hears() == NOOP

    def test_job_that_came_before_pre_sleep_is_told_at_once(self):
        wire = Wire()
        worker = wire.worker(b"f")
        assert worker.grabs() is None
        submit(wire, b"f")
        assert worker(P.PRE_SLEEP) == NOOP
        assert worker(P.PRE_SLEEP) == NOOP
        assert worker.grabs() == handle(1)

    def test_sleep_after_a_noop_without_a_grab_counts(self):
        """Where gearmand would not wake the worker any more."""
        wire = Wire()
        worker, thief = wire.worker(b"f").sleeps(), wire.worker(b"f")
        submit(wire, b"f")
        assert worker.hears() == NOOP
        assert thief.grabs() == handle(1)
        assert worker(P.PRE_SLEEP) == []
        submit(wire, b"f")
        assert worker.hears() == NOOP

    def test_function_offered_while_asleep_counts_from_then_on(self):
        wire = Wire()
        submit(wire, b"f")
        worker = wire.worker(b"g").sleeps()
        assert worker(P.CAN_DO, b"f") == []
        submit(wire, b"f")
        assert worker.hears() == NOOP

    def test_function_withdrawn_while_asleep_does_not_wake(self):
        wire = Wire()
        worker = wire.worker(b"f", b"g").sleeps()
        worker(P.CANT_DO, b"f")
        submit(wire, b"f")
        assert worker.hears() == []
        submit(wire, b"g")
        assert worker.hears() == NOOP

    def test_worker_asleep_for_many_functions_hears_one_noop_per_sleep(self):
        wire = Wire()
        worker = wire.worker(b"f", b"g").sleeps()
        submit(wire, b"f")
        submit(wire, b"g")
        assert worker.hears() == NOOP
        worker.grabs(), worker.grabs()
        worker.sleeps()
        submit(wire, b"g")
        assert worker.hears() == NOOP


class TestOneWakeUpForEachJob:
    """PROTOCOL section 5.4; where gearmand wakes all, one of those asleep is enough."""

    def test_one_job_wakes_one_worker(self):
        wire = Wire()
        workers = [wire.worker(b"f").sleeps() for _ in range(5)]
        submit(wire, b"f")
        assert len(woken(*workers)) == 1

    def test_each_ready_job_wakes_another(self):
        wire = Wire()
        workers = [wire.worker(b"f").sleeps() for _ in range(3)]
        for _ in range(3):
            submit(wire, b"f")
        assert len(woken(*workers)) == 3

    @pytest.mark.parametrize(("wakeup", "expected"), [(2, 2), (7, 5), (2**31 - 1, 5), (0, 5)])
    def test_or_as_many_as_the_server_is_told(self, wakeup, expected):
        """PROTOCOL section 7, --worker-wakeup."""
        wire = Wire(worker_wakeup=wakeup)
        workers = [wire.worker(b"f").sleeps() for _ in range(5)]
        submit(wire, b"f")
        assert len(woken(*workers)) == expected

    def test_requeued_job_wakes_another(self):
        wire = Wire()
        lost = wire.worker(b"f")
        submit(wire, b"f")
        lost.grabs()
        worker = wire.worker(b"f").sleeps()
        lost.leaves()
        assert worker.hears() == NOOP

    def test_job_that_was_given_back_wakes_another_and_not_the_giver(self):
        wire = Wire()
        giver = wire.worker(b"f", b"g")
        submit(wire, b"f")
        giver.grabs()
        giver.sleeps()
        worker = wire.worker(b"f").sleeps()
        giver(P.CANT_DO, b"f")
        assert woken(giver, worker) == [worker]


class TestNoWakeUpIsLost:
    """A job for which somebody was woken must not wait when that worker does not take it."""

    def two_asleep(self, wire: Wire, *functions: bytes) -> tuple[Caller, Caller]:
        """The one that was woken for a job of the first function, and the one that sleeps on."""
        workers = [wire.worker(*functions).sleeps() for _ in range(2)]
        submit(wire, functions[0])
        (awake,) = woken(*workers)
        workers.remove(awake)
        return awake, workers[0]

    def test_woken_worker_leaves(self):
        wire = Wire()
        awake, asleep = self.two_asleep(wire, b"f")
        awake.leaves()
        assert asleep.hears() == NOOP

    def test_woken_worker_takes_another_functions_job(self):
        wire = Wire()
        awake, asleep = self.two_asleep(wire, b"f", b"g")
        awake(P.CAN_DO, b"h")
        submit(wire, b"h", P.SUBMIT_JOB_HIGH_BG)
        assert awake(P.GRAB_JOB)[0][2] == b"h"
        assert asleep.hears() == NOOP

    def test_woken_worker_takes_the_job(self):
        wire = Wire()
        awake, asleep = self.two_asleep(wire, b"f")
        assert awake.grabs() == handle(1)
        assert asleep.hears() == []

    def test_woken_worker_withdraws_the_function(self):
        for kind, arguments in ((P.CANT_DO, [b"f"]), (P.RESET_ABILITIES, [])):
            wire = Wire()
            awake, asleep = self.two_asleep(wire, b"f", b"g")
            assert awake(kind, *arguments) == []
            assert asleep.hears() == NOOP

    def test_job_is_gone_when_the_woken_worker_leaves(self):
        wire = Wire()
        awake, asleep = self.two_asleep(wire, b"f")
        thief = wire.worker(b"f")
        thief.grabs()
        awake.leaves()
        assert asleep.hears() == []

    def test_woken_worker_is_stuck(self):
        """The tick wakes one more for each function while jobs wait, and nobody once none do."""
        wire = Wire()
        workers = [wire.worker(b"f").sleeps() for _ in range(4)]
        submit(wire, b"f")
        awake = woken(*workers)
        for expected in (2, 3, 4, 4):
            wire.core.tick()
            awake += woken(*workers)
            assert len(set(awake)) == len(awake) == expected
        awake[-1].grabs()
        workers[0].sleeps()
        wire.core.tick()
        assert woken(*workers) == []

    def test_tick_looks_at_every_function(self):
        wire = Wire()
        pairs = [[wire.worker(name).sleeps() for _ in range(2)] for name in (b"f", b"g")]
        submit(wire, b"f")
        submit(wire, b"g")
        assert [len(woken(*pair)) for pair in pairs] == [1, 1]
        wire.core.tick()
        assert [len(woken(*pair)) for pair in pairs] == [1, 1]

    def test_worker_that_left_is_not_woken(self):
        wire = Wire()
        stays = wire.worker(b"f").sleeps()
        leaves = wire.worker(b"f").sleeps()
        leaves.leaves()
        submit(wire, b"f")
        assert woken(stays, leaves) == [stays]


class TestWaiting:
    """``packets.WAITS``: who was told NO_JOB gets a job without asking again."""

    def worker(self, wire: Wire, *functions: bytes) -> Caller:
        worker = wire.worker(*functions)
        assert worker(P.OPTION_REQ, WAITS) == [(P.OPTION_RES, WAITS)]
        return worker

    def waiting(self, wire: Wire, *functions: bytes) -> Caller:
        worker = self.worker(wire, *functions)
        assert worker(P.GRAB_JOB_UNIQ) == [(P.NO_JOB,)]
        return worker

    def assigned(self, number: int, function: bytes = b"f") -> list[Heard]:
        return [(P.JOB_ASSIGN_UNIQ, handle(number), function, b"", b"")]

    def test_one_job_comes_for_one_question(self):
        wire = Wire()
        worker = self.waiting(wire, b"f")
        submit(wire, b"f")
        submit(wire, b"f")
        assert worker.hears() == self.assigned(1)
        wire.core.tick()
        assert worker.hears() == []
        assert worker(P.GRAB_JOB_UNIQ) == self.assigned(2)

    def test_no_job_need_not_be_sent_before_there_is_one(self):
        wire = Wire()
        worker = self.worker(wire, b"f")
        wire.core.dirty.clear()
        wire.core.receive(worker.peer, (P.GRAB_JOB_UNIQ, [b""]))
        assert (wire.core.dirty, wire.core.patient) == ([], [worker.peer])
        submit(wire, b"f")
        wire.core.serve_woken()
        assert worker.peer in wire.core.dirty
        assert worker.hears() == [(P.NO_JOB,), *self.assigned(1)]

    def test_others_are_told_at_once_that_there_is_no_job(self):
        wire = Wire()
        worker = wire.worker(b"f")
        wire.core.dirty.clear()
        wire.core.receive(worker.peer, (P.GRAB_JOB_UNIQ, [b""]))
        assert (wire.core.dirty, wire.core.patient) == ([worker.peer], [])

    def test_last_to_fall_asleep_is_first(self):
        wire = Wire()
        first, last = self.waiting(wire, b"f"), self.waiting(wire, b"f")
        submit(wire, b"f")
        assert (first.hears(), last.hears()) == ([], self.assigned(1))
        submit(wire, b"f")
        assert first.hears() == self.assigned(2)

    def test_not_before_the_first_question(self):
        wire = Wire()
        worker = self.worker(wire, b"f")
        submit(wire, b"f")
        assert worker.hears() == []
        assert worker(P.GRAB_JOB_UNIQ) == self.assigned(1)
        submit(wire, b"f")
        assert worker.hears() == []

    def test_job_that_is_gone_already(self):
        """Then it sleeps on."""
        wire = Wire(worker_wakeup=0)
        workers = [self.waiting(wire, b"f") for _ in range(3)]
        submit(wire, b"f")
        assert [worker.hears() for worker in workers].count(self.assigned(1)) == 1
        submit(wire, b"f")
        submit(wire, b"f")
        heard = [packet for worker in workers for packet in worker.hears()]
        assert sorted(heard) == [*self.assigned(2), *self.assigned(3)]

    def test_attempt_is_told_ahead(self):
        wire = Wire()
        waiting = self.waiting(wire, b"f")
        submit(wire, b"f")
        assert waiting.hears() == self.assigned(1)
        again = self.waiting(wire, b"f")
        again(P.OPTION_REQ, ATTEMPTS)
        waiting.leaves()
        assert again.hears() == [(P.OPTION_RES, b"attempt 2 0"), *self.assigned(1)]

    def test_who_gives_back_all_gets_nothing_more(self):
        wire = Wire()
        stays, leaves = self.waiting(wire, b"f"), self.waiting(wire, b"f")
        leaves(P.OPTION_REQ, ATTEMPTS)
        submit(wire, b"f")
        assert leaves.hears() == self.assigned(1)
        assert leaves(P.GRAB_JOB_UNIQ) == [(P.NO_JOB,)]
        assert leaves(P.OPTION_REQ, RETURN) == []
        assert stays.hears() == self.assigned(1)
        submit(wire, b"f")
        assert leaves.hears() == []

    def test_one_that_is_gone_gets_nothing(self):
        """Its end may be read after the submission: the job would be lost with it, and the attempt count."""
        wire = Wire()
        stays, gone = self.waiting(wire, b"f"), self.waiting(wire, b"f")
        wire.core.is_gone = lambda peer: peer is gone.peer
        submit(wire, b"f")
        assert (stays.hears(), gone.hears()) == (self.assigned(1), [])
        submit(wire, b"f")
        gone.leaves()
        assert self.worker(wire, b"f")(P.GRAB_JOB_UNIQ) == self.assigned(2)

    def test_who_takes_another_functions_job_has_another_woken(self):
        wire = Wire()
        had_both = self.worker(wire, b"f", b"g")
        wire.connect()(P.SUBMIT_JOB_HIGH_BG, b"g", b"", b"")
        assert had_both(P.GRAB_JOB_UNIQ) == self.assigned(1, b"g")
        submit(wire, b"f")
        assert had_both(P.GRAB_JOB_UNIQ) == self.assigned(2)
        of_one, of_both = self.waiting(wire, b"f"), self.waiting(wire, b"g", b"f")
        had_both.leaves()
        wire.core.serve_woken()
        assert not wire.core.woken, "in the same turn"
        assert of_both.hears() == self.assigned(1, b"g")
        assert of_one.hears() == self.assigned(2)

    def test_behind_an_answer_that_waits_it_is_told_by_noop(self):
        """What stands in its line reaches it later: a job is not to stand there too."""
        wire = Wire(durable=True)
        worker = self.waiting(wire, b"f")
        worker(P.SUBMIT_JOB_BG, b"g", b"", b"")
        wire.connect()(P.SUBMIT_JOB, b"f", b"", b"")
        assert worker.hears() == []
        wire.core.committed(wire.core.entries)
        assert worker.hears() == [(P.JOB_CREATED, handle(1)), (P.NOOP,)]
        assert worker(P.GRAB_JOB_UNIQ) == self.assigned(2)

    def test_only_on_the_server_s_machine(self):
        wire = Wire()
        worker = wire.connect("192.0.2.1")
        ((kind, code, _),) = worker(P.OPTION_REQ, WAITS)
        assert (kind, code) == (P.ERROR, b"UNKNOWN_OPTION")
