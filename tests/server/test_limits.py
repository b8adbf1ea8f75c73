"""Functions of which only so many jobs may run, or begin, at a time."""

from __future__ import annotations

import json

import pytest

from django_gearman.exceptions import StoreError
from django_gearman.permits import Limit
from django_gearman.protocol.packets import PacketType
from django_gearman.server.entries import StoredJob

from .harness import Caller, Wire, handle
from .test_journal import Office

P = PacketType
DOWN = StoreError("down")


def limited(wire: Wire, **limits: object) -> Wire:
    wire.core.limits.learn({b"f": Limit(**limits)})
    return wire


def submit(wire: Wire, count: int, *, key: str | None = None, kind: P = P.SUBMIT_JOB_BG) -> None:
    client = wire.connect()
    for _ in range(count):
        workload = b"w" if key is None else json.dumps({"args": [], "kwargs": {}, "limit": key}).encode()
        client(kind, b"f", b"", workload)
    wire.core.limits.settle()


def worker(wire: Wire, *functions: bytes) -> Caller:
    """One that sleeps."""
    caller = wire.connect()
    for function in functions or (b"f",):
        caller(P.CAN_DO, function)
    # It may hear at once that there is something for it.
    caller.woken = (P.NOOP,) in caller(P.PRE_SLEEP)
    wire.core.limits.settle()
    return caller


def wakes(caller: Caller) -> bool:
    woken, caller.woken = caller.woken, False
    return (P.NOOP,) in caller.hears() or woken


def grab(caller: Caller) -> bytes | None:
    """What a worker does that has been woken, or has nothing to do: a handle, or None and it sleeps."""
    caller.hears()
    got = caller.grabs()
    if got is None:
        caller(P.PRE_SLEEP)
    caller.wire.core.limits.settle()
    return got


def complete(caller: Caller, job: bytes) -> None:
    caller(P.WORK_COMPLETE, job, b"")
    caller.wire.core.limits.settle()


class TestConcurrency:
    def test_no_more_at_once(self):
        wire = limited(Wire(), concurrency=2)
        workers = [worker(wire) for _ in range(4)]
        submit(wire, 5)
        assert sum(map(wakes, workers)) == 2
        got = [grab(each) for each in workers]
        assert sorted(filter(None, got)) == [handle(1), handle(2)]

    def test_an_end_lets_the_next_begin(self):
        wire = limited(Wire(), concurrency=1)
        first, second = worker(wire), worker(wire)
        submit(wire, 3)
        order = []
        for _ in range(3):
            for each in (first, second):
                got = grab(each)
                if got is not None:
                    order.append(got)
                    complete(each, got)
        assert order == [handle(1), handle(2), handle(3)]

    def test_another_worker_is_woken_for_it(self):
        wire = limited(Wire(), concurrency=1)
        first = worker(wire)
        submit(wire, 2)
        assert wakes(first)
        assert grab(first) == handle(1)
        second = worker(wire)
        assert not wakes(second)
        complete(first, handle(1))
        assert wakes(second)
        assert grab(second) == handle(2)

    def test_keys_are_forgotten_whose_jobs_were_cancelled_before_a_worker_came(self) -> None:
        wire = limited(Wire(), concurrency=1, keyed=True)
        submit(wire, 1, key="first")
        for number in range(2, 500):
            submit(wire, 1, key=str(number))
            assert wire.core.cancel(handle(number))
        limiter = wire.core.limits.limiters[b"f"]
        assert len(limiter.gates) == 1
        assert len(limiter.turns) < 110
        submit(wire, 1, key="2")
        someone = worker(wire)
        assert wakes(someone)
        assert [grab(someone), grab(someone), grab(someone)] == [handle(1), handle(500), None]

    @pytest.mark.parametrize("how", ["fail", "leave", "cancel", "withdraw"])
    def test_however_an_attempt_ends(self, how):
        wire = limited(Wire(), concurrency=1)
        first = worker(wire)
        submit(wire, 2)
        assert grab(first) == handle(1)
        second = worker(wire)
        match how:
            case "fail":
                first(P.WORK_FAIL, handle(1))
            case "leave":
                first.leaves()
            case "cancel":
                assert wire.core.cancel(handle(1))
            case "withdraw":
                first(P.CANT_DO, b"f")
        wire.core.limits.settle()
        assert wakes(second)
        assert grab(second) == handle(1 if how in ("leave", "withdraw") else 2)

    def test_other_functions_go_on(self):
        wire = limited(Wire(), concurrency=1)
        first = worker(wire, b"f", b"g")
        submit(wire, 3)
        assert grab(first) == handle(1)
        wire.connect()(P.SUBMIT_JOB_BG, b"g", b"", b"w")
        second = worker(wire, b"f", b"g")
        assert wakes(second)
        assert grab(second) == handle(4)

    def test_foreground_jobs_count(self):
        wire = limited(Wire(), concurrency=1)
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"w")
        submit(wire, 1)
        first, second = worker(wire), worker(wire)
        assert [grab(first), grab(second)] in ([handle(1), None], [None, handle(1)])

    def test_an_abandoned_job_that_waits_takes_no_place(self):
        wire = limited(Wire(), concurrency=1)
        client = wire.connect()
        client(P.SUBMIT_JOB, b"f", b"", b"w")
        client.leaves()
        submit(wire, 1)
        assert grab(worker(wire)) == handle(2)

    def test_status_counts_those_that_wait(self):
        wire = limited(Wire(), concurrency=1)
        first = worker(wire)
        submit(wire, 3)
        grab(first)
        assert wire.connect().line(b"status") == b"f\t3\t1\t1\n.\n"
        assert wire.connect().line(b"prioritystatus") == b"f\t0\t2\t0\t1\n.\n"

    def test_urgent_ones_first(self):
        wire = limited(Wire(), concurrency=1)
        submit(wire, 1)
        submit(wire, 1, kind=P.SUBMIT_JOB_HIGH_BG)
        one = worker(wire)
        assert grab(one) == handle(2)

    def test_a_lost_worker_s_job_is_the_next(self):
        wire = limited(Wire(), concurrency=1)
        first = worker(wire)
        submit(wire, 2)
        assert grab(first) == handle(1)
        first.leaves()
        assert grab(worker(wire)) == handle(1)


class TestKeys:
    def test_each_key_has_its_own(self):
        wire = limited(Wire(), concurrency=1, keyed=True)
        for key in ("a", "a", "b", "b"):
            submit(wire, 1, key=key)
        workers = [worker(wire) for _ in range(4)]
        assert sorted(filter(None, map(grab, workers))) == [handle(1), handle(3)]

    def test_they_take_turns_by_their_oldest(self):
        wire = limited(Wire(), concurrency=5, keyed=True)
        for key in ("a", "b", "a", "c"):
            submit(wire, 1, key=key)
        one = worker(wire)
        order = []
        while (got := grab(one)) is not None or (got := grab(one)) is not None:
            order.append(got)
            complete(one, got)
        assert order == [handle(1), handle(2), handle(3), handle(4)]

    def test_those_that_nobody_uses_are_forgotten(self):
        wire = limited(Wire(), concurrency=1, keyed=True)
        for key in "abc":
            submit(wire, 1, key=key)
        assert wire.core.cancel(handle(1))
        one = worker(wire)
        for _ in range(2):
            got = grab(one) or grab(one)
            assert got is not None
            complete(one, got)
        wire.core.tick()
        assert wire.core.limits.limiters[b"f"].gates == {}

    def test_rows_have_theirs_and_packets_of_bytes_share_one(self):
        """Of a raw job: its workload has no place for a key, its row has."""
        wire = limited(Wire(), concurrency=1, keyed=True)
        rows = [(b"H:test:1:r%d" % number, key) for number, key in enumerate([b"a", b"a", b"b"])]
        wire.core.adopt([StoredJob(name, b"f", b"", b"raw", 0, 0, None, limit_key=key) for name, key in rows])
        submit(wire, 2, kind=P.SUBMIT_JOB)
        workers = [worker(wire) for _ in range(5)]
        assert sorted(filter(None, map(grab, workers))) == [handle(1), b"H:test:1:r0", b"H:test:1:r2"]

    @pytest.mark.parametrize("workload", [b"", b"\xff", b"[1]", b'{"limit": 3}', b"[" * 50_000])
    def test_what_has_no_key_has_an_empty_one(self, workload):
        wire = limited(Wire(), concurrency=1, keyed=True)
        client = wire.connect()
        for _ in range(2):
            client(P.SUBMIT_JOB_BG, b"f", b"", workload)
        wire.core.limits.settle()
        assert [grab(worker(wire)), grab(worker(wire))] == [handle(1), None]


class TestRate:
    def test_no_more_in_any_period(self):
        wire = limited(Wire(), rate=3, period=10.0)
        submit(wire, 50)
        one = worker(wire)
        starts = []
        for _ in range(400):
            got = grab(one)
            if got is not None:
                starts.append(wire.core.clock)
                complete(one, got)
            wire.core.clock += 0.1
            wire.core.now += 0.1
            wire.core.limits.ask_again()
            wire.core.limits.settle()
        assert 10 <= len(starts) <= 13
        assert all(later - earlier >= 10.0 - 1e-6 for earlier, later in zip(starts, starts[3:], strict=False))

    def test_it_says_when_to_ask_again(self):
        wire = limited(Wire(), rate=1, period=10.0)
        submit(wire, 2)
        one = worker(wire)
        complete(one, grab(one))
        assert grab(one) is None
        # At first to tell when it began.
        wire.core.clock = wire.core.limits.due
        wire.core.limits.ask_again()
        wire.core.limits.settle()
        assert 9.0 < wire.core.limits.due - wire.core.clock < 11.0


class TestPermits:
    def test_none_is_taken_without_a_worker(self):
        wire = limited(Wire(), concurrency=1)
        submit(wire, 3)
        assert not wire.core.ready

    def test_one_that_nobody_comes_for_goes_back(self):
        wire = limited(Wire(), concurrency=1)
        one = worker(wire)
        submit(wire, 1)
        assert wire.core.ready
        one.leaves()
        wire.core.clock += 1.1
        wire.core.tick()
        assert not wire.core.ready
        assert grab(worker(wire)) == handle(1)

    def test_one_is_kept_for_workers_that_are_busy(self):
        """They come for it when they have done what they have in hand, not within the second."""
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 2)
        submit(wire, 1, kind=P.SUBMIT_JOB_HIGH_BG)
        assert grab(one) == handle(2)
        for _ in range(5):
            wire.core.clock += 1.0
            wire.core.tick()
        assert grab(one) == handle(3)

    def test_none_is_kept_for_ever(self):
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 2)
        submit(wire, 1, kind=P.SUBMIT_JOB_HIGH_BG)
        assert grab(one) == handle(2)
        assert len(wire.core.ready) == 1
        wire.core.clock += 10.1
        wire.core.tick()
        assert not wire.core.ready

    def busy(self, wire: Wire, count: int) -> Caller:
        """A worker of the limited function and another, of which it has a job in hand, and others wait."""
        caller = wire.worker(b"f", b"other")
        client = wire.connect()
        for _ in range(count):
            client(P.SUBMIT_JOB_BG, b"other", b"", b"")
        assert grab(caller) == handle(1)
        return caller

    def test_urgent_ones_are_begun_while_there_is_other_work(self):
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 100)
        submit(wire, 3, kind=P.SUBMIT_JOB_HIGH_BG)
        urgent = [handle(101), handle(102), handle(103)]
        begun = []
        for _ in range(8):
            wire.core.clock += 0.1
            got = grab(one)
            begun.append(got)
            if got in urgent:
                complete(one, got)
        # At each hand-out one is asked for, which is there at the next.
        assert begun[1::2][:3] == urgent
        assert not set(begun[6:]) & set(urgent)

    def test_those_of_equal_priority_take_turns_with_other_work(self):
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 100)
        submit(wire, 3)
        begun = []
        for _ in range(6):
            wire.core.clock += 0.1
            got = grab(one)
            begun.append(got)
            complete(one, got)
        assert begun == [handle(n) for n in (2, 101, 3, 102, 4, 103)]

    def test_no_permit_is_taken_while_there_is_more_urgent_work(self):
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 100)
        submit(wire, 3, kind=P.SUBMIT_JOB_LOW_BG)
        for _ in range(5):
            wire.core.clock += 0.1
            grab(one)
            assert len(wire.core.ready) == 1

    def test_many_hand_outs_are_one_look_at_what_is_limited(self, monkeypatch):
        wire = limited(Wire(), concurrency=1)
        one = self.busy(wire, 100)
        submit(wire, 1, kind=P.SUBMIT_JOB_LOW_BG)
        limits, looks = wire.core.limits, []
        look = limits._look_for_busy
        monkeypatch.setattr(limits, "_look_for_busy", lambda: looks.append(look()))
        for _ in range(50):
            grab(one)
        assert len(looks) == 1
        wire.core.clock += 0.1
        grab(one)
        assert len(looks) == 2

    def test_more_are_allowed_while_it_goes(self):
        wire = limited(Wire(), concurrency=1)
        workers = [worker(wire) for _ in range(3)]
        submit(wire, 3)
        assert len([got for got in map(grab, workers) if got]) == 1
        limited(wire, concurrency=3)
        wire.core.limits.settle()
        assert len([got for got in map(grab, [w for w in workers if not w.peer.running]) if got]) == 2

    def test_no_limit_any_more(self):
        wire = limited(Wire(), concurrency=1)
        submit(wire, 5)
        one = worker(wire)
        grab(one)
        wire.core.limits.learn({})
        assert [grab(worker(wire)) for _ in range(4)] == [handle(n) for n in (2, 3, 4, 5)]
        complete(one, handle(1))

    def test_a_limit_for_what_is_there(self):
        wire = Wire()
        submit(wire, 4)
        first = wire.worker(b"f")
        assert first.grabs() == handle(1)
        limited(wire, concurrency=2)
        assert grab(worker(wire)) == handle(2)
        assert grab(worker(wire)) is None
        complete(first, handle(1))
        third = worker(wire)
        assert wakes(third)
        assert grab(third) == handle(3)


class TestStore:
    def office(self, *script: object, **limits: object) -> Office:
        office = Office(*script)
        office.store._clock = lambda: office.wire.core.now
        office.store._monotonic = lambda: office.wire.core.clock
        office.wire.core.clock = office.now
        office.store.book.limits = {b"f": Limit(**limits)}
        self.settle(office)
        return office

    def settle(self, office: Office) -> None:
        while office.trip() is not None:
            pass

    def test_permits_are_the_store_s(self):
        office = self.office(concurrency=1)
        wire = office.wire
        submit(wire, 2)
        first = worker(wire)
        assert grab(first) is None
        self.settle(office)
        assert wakes(first)
        assert grab(first) == handle(1)
        second = worker(wire)
        self.settle(office)
        assert not wakes(second)
        complete(first, handle(1))
        self.settle(office)
        assert wakes(second)

    def test_none_while_it_is_away(self):
        office = self.office(concurrency=1)
        wire = office.wire
        submit(wire, 1)
        self.settle(office)
        office.store.ask = lambda questions: (_ for _ in ()).throw(DOWN)
        first = worker(wire)
        for _ in range(5):
            office.trip()
            office.pass_time(1.0)
            wire.core.tick()
        assert not wakes(first)
        del office.store.ask
        office.pass_time(1.0)
        self.settle(office)
        assert wakes(first)

    def test_everything_is_given_back_in_the_end(self):
        office = self.office(concurrency=2, rate=5, period=1.0)
        wire = office.wire
        submit(wire, 3)
        one = worker(wire)
        for _ in range(30):
            self.settle(office)
            got = grab(one)
            if got is not None:
                complete(one, got)
            office.pass_time(0.3)
            wire.core.tick()
        assert not wire.core.jobs
        office.pass_time(2.0)
        wire.core.tick()
        self.settle(office)
        (use,) = office.store.book.uses.values()
        assert use.count(office.store.book.limits[b"f"], wire.core.now) == (0, 0)
        assert not wire.core.limits.limiters[b"f"].gates

    def test_one_key_does_not_keep_the_others_away(self):
        office = Office(window=4)
        office.store._clock = lambda: office.wire.core.now
        office.store._monotonic = lambda: office.wire.core.clock
        office.wire.core.clock = office.now
        office.store.book.limits = {b"f": Limit(concurrency=1, keyed=True)}
        self.settle(office)
        wire = office.wire
        for key in (*"a" * 30, "b"):
            submit(wire, 1, key=key)
            self.settle(office)
        assert len(wire.core.jobs) <= 6
        assert office.store.unclaimed
        first, second = worker(wire), worker(wire)
        began = []
        for _ in range(4):
            self.settle(office)
            for each in (first, second):
                got = grab(each)
                if got is not None:
                    began.append(got)
            office.pass_time(1.0)
            wire.core.tick()
        assert began == [handle(1), handle(31)]
