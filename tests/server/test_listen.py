"""``listen HANDLE``: our extension by which one hears of a job that somebody else submitted."""

from __future__ import annotations

from django_gearman.protocol.packets import LISTEN, PacketType

from .harness import Wire, handle

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
