"""``listen HANDLE`` and ``listen row NUMBER``: our extensions by which one hears of others' jobs."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import LISTEN, ROW, PacketType
from django_gearman.server import watchers
from django_gearman.server.entries import StoredJob

from .harness import Caller, Wire, handle

P = PacketType
NOT_FOUND = (P.ERROR, b"JOB_NOT_FOUND", b"No such job to listen to")


class TestListen:
    def test_hears_what_a_client_hears(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        worker, listener = wire.worker(b"f"), wire.connect()
        assert listener(P.OPTION_REQ, LISTEN + handle(1)) == [(P.OPTION_RES, LISTEN + handle(1))]
        worker(P.GRAB_JOB)
        worker(P.WORK_STATUS, handle(1), b"1", b"2")
        worker(P.WORK_DATA, handle(1), b"d")
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert listener.hears() == [
            (P.WORK_STATUS, handle(1), b"1", b"2"),
            (P.WORK_DATA, handle(1), b"d"),
            (P.WORK_COMPLETE, handle(1), b"r"),
        ]

    def test_a_job_that_is_not_there(self):
        wire = Wire()
        assert wire.connect()(P.OPTION_REQ, LISTEN + handle(1)) == [NOT_FOUND]

    def test_a_job_that_ended(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        worker = wire.worker(b"f")
        worker(P.GRAB_JOB)
        worker(P.WORK_COMPLETE, handle(1), b"r")
        assert wire.connect()(P.OPTION_REQ, LISTEN + handle(1)) == [NOT_FOUND]

    def test_a_job_that_is_not_written_yet(self):
        wire = Wire(durable=True)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        assert wire.connect()(P.OPTION_REQ, LISTEN + handle(1)) == [NOT_FOUND]

    def test_who_leaves_takes_no_background_job_along(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        listener = wire.connect()
        listener(P.OPTION_REQ, LISTEN + handle(1))
        listener.leaves()
        assert wire.worker(b"f")(P.GRAB_JOB) == [(P.JOB_ASSIGN, handle(1), b"f", b"w")]

    def test_cancelled(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        listener = wire.connect()
        listener(P.OPTION_REQ, LISTEN + handle(1))
        wire.core.cancel(handle(1))
        assert listener.hears() == [(P.WORK_FAIL, handle(1))]


NAME = b"H:test:1:r5"
ROW_5 = ROW + b"5"


def watching(wire: Wire, row: bytes = ROW_5) -> Caller:
    listener = wire.connect()
    assert listener(P.OPTION_REQ, LISTEN + row) == [(P.OPTION_RES, LISTEN + row)]
    return listener


class TestListenToARow:
    def test_hears_when_the_end_is_written(self):
        wire = Wire(durable=True)
        # Before the row was claimed.
        listener = watching(wire)
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, 0, None)])
        worker = wire.worker(b"f")
        worker(P.GRAB_JOB)
        worker(P.WORK_STATUS, NAME, b"1", b"2")
        wire.commit()
        worker(P.WORK_COMPLETE, NAME, b"r")
        assert listener.hears() == []
        wire.commit()
        assert listener.hears() == [(P.WORK_COMPLETE, ROW_5, b"")]
        assert not wire.core._watchers

    @pytest.mark.parametrize("size", [1, watchers.LARGEST, watchers.LARGEST + 1])
    def test_what_the_row_says_of_a_success(self, size: int):
        """If it is told within one batch, so that there is nothing else to know."""
        wire = Wire(durable=True)
        listener = watching(wire)
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, 0, None)])
        worker = wire.worker(b"f")
        wire.core.now = 1000.25
        worker(P.GRAB_JOB)
        wire.core.now = 1001.5
        value = b"\0" * size
        worker(P.WORK_COMPLETE, NAME, value)
        wire.commit()
        told = b"\0".join([NAME, b"1000.25", b"1001.5", value])
        assert listener.hears() == [(P.WORK_COMPLETE, ROW_5, told if size <= watchers.LARGEST else b"")]

    @pytest.mark.parametrize("what", ["progress", "second attempt", "begun before"])
    def test_nothing_of_what_a_success_leaves_open(self, what: str):
        wire = Wire(durable=True)
        listener = watching(wire)
        attempts = int(what == "second attempt")
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, attempts, None)])
        worker = wire.worker(b"f")
        worker(P.GRAB_JOB)
        if what == "begun before":
            wire.commit()
        elif what == "progress":
            worker(P.WORK_STATUS, NAME, b"1", b"2")
        worker(P.WORK_COMPLETE, NAME, b"r")
        wire.commit()
        assert listener.hears() == [(P.WORK_COMPLETE, ROW_5, b"")]

    @pytest.mark.parametrize("how", ["failed", "cancelled"])
    def test_whichever_end(self, how: str):
        wire = Wire(durable=True)
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, 0, None)])
        first, second = watching(wire), watching(wire)
        if how == "cancelled":
            wire.core.cancel(NAME)
        else:
            worker = wire.worker(b"f")
            worker(P.GRAB_JOB)
            worker(P.WORK_FAIL, NAME)
        wire.commit()
        assert first.hears() == second.hears() == [(P.WORK_COMPLETE, ROW_5, b"")]

    def test_another_row(self):
        wire = Wire(durable=True)
        listener = watching(wire, ROW + b"55")
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, 0, None)])
        wire.core.cancel(NAME)
        wire.commit()
        assert listener.hears() == []

    @pytest.mark.parametrize("number", [b"", b"x", b"-5", b"5 ", b"1" * 21])
    def test_no_number(self, number: bytes):
        assert Wire(durable=True).connect()(P.OPTION_REQ, LISTEN + ROW + number) == [NOT_FOUND]

    def test_a_server_without_rows(self):
        assert Wire().connect()(P.OPTION_REQ, LISTEN + ROW_5) == [NOT_FOUND]

    def test_who_left_is_forgotten(self):
        wire = Wire(durable=True)
        gone, other = watching(wire), watching(wire)
        gone.leaves()
        wire.core.adopt([StoredJob(NAME, b"f", b"", b"w", 0, 0, None)])
        wire.core.cancel(NAME)
        wire.commit()
        assert other.hears() == [(P.WORK_COMPLETE, ROW_5, b"")]
        other.leaves()
        last = watching(wire)
        last.leaves()
        assert not wire.core._watchers

    def test_a_row_that_does_not_come_is_forgotten(self):
        wire = Wire(durable=True)
        watching(wire)
        wire.core.clock += watchers.LONGEST / 2
        watching(wire, ROW + b"6")
        wire.core.clock += watchers.LONGEST / 2
        wire.core.tick()
        assert len(wire.core._watchers._rows) == 1
        wire.core.clock += watchers.LONGEST / 2
        wire.core.tick()
        assert not wire.core._watchers
        assert not wire.core._watchers._of_peers

    def test_no_more_than_so_many(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(watchers, "MOST", 2)
        wire = Wire(durable=True)
        watching(wire)
        watching(wire, ROW + b"6")
        assert wire.connect()(P.OPTION_REQ, LISTEN + ROW + b"7") == [NOT_FOUND]


class TestListenToAGroup:
    def test_hears_when_the_last_end_is_written(self):
        wire = Wire(durable=True)
        listener, other = watching(wire, b"group 7"), watching(wire, b"group 77")
        wire.core.groups_ended([5, 7])
        assert listener.hears() == [(P.WORK_COMPLETE, b"group 7", b"")]
        assert other.hears() == []
        wire.core.groups_ended([7])
        assert listener.hears() == []

    def test_a_row_of_that_number_is_another_matter(self):
        wire = Wire(durable=True)
        of_row, of_group = watching(wire), watching(wire, b"group 5")
        wire.core.groups_ended([5])
        assert (of_row.hears(), of_group.hears()) == ([], [(P.WORK_COMPLETE, b"group 5", b"")])

    def test_who_asks_twice_is_told_twice(self):
        """Two calls of one process share a connection."""
        wire = Wire(durable=True)
        listener = watching(wire, b"group 7")
        listener(P.OPTION_REQ, LISTEN + b"group 7")
        wire.core.groups_ended([7])
        assert listener.hears() == [(P.WORK_COMPLETE, b"group 7", b"")] * 2
        assert not wire.core._watchers

    def test_who_asks_again_is_not_forgotten(self):
        wire = Wire(durable=True)
        listener = watching(wire, b"group 7")
        watching(wire, b"group 8")
        wire.core.clock += watchers.LONGEST / 2
        listener(P.OPTION_REQ, LISTEN + b"group 7")
        wire.core.clock += watchers.LONGEST / 2
        wire.core.tick()
        assert list(wire.core._watchers._rows) == [b"group 7"]

    @pytest.mark.parametrize("number", [b"", b"x", b"-5", b"1" * 21])
    def test_no_number(self, number: bytes):
        assert Wire(durable=True).connect()(P.OPTION_REQ, LISTEN + b"group " + number) == [NOT_FOUND]

    def test_a_server_without_rows(self):
        assert Wire().connect()(P.OPTION_REQ, LISTEN + b"group 5") == [NOT_FOUND]
