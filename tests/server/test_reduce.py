"""Jobs with a reducer, and the rarer questions."""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import PacketType as P
from django_gearman.server.entries import JobQueued, StoredJob

from .harness import Wire, handle


class TestReduce:
    """PROTOCOL section 3, "Reduce jobs": SUBMIT_REDUCE_JOB, four arguments before the data; GRAB_JOB_ALL."""

    @pytest.mark.parametrize("kind", [P.SUBMIT_REDUCE_JOB, P.SUBMIT_REDUCE_JOB_BACKGROUND])
    def test_reducer_reaches_the_worker_that_grabs_all(self, kind):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        assert client(kind, b"f", b"u", b"sum", b"aggregator", b"w\0w") == [(P.JOB_CREATED, handle(1))]
        assert worker(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_ALL, handle(1), b"f", b"u", b"sum", b"w\0w")]
        worker(P.WORK_COMPLETE, handle(1), b"6")
        heard = [(P.WORK_COMPLETE, handle(1), b"6")]
        assert client.hears() == (heard if kind is P.SUBMIT_REDUCE_JOB else [])

    def test_other_grabs_lose_it(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_REDUCE_JOB, b"f", b"u", b"sum", b"", b"w")
        assert wire.worker(b"f")(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"u", b"w")]

    def test_job_without_a_reducer_is_assigned_with_its_unique(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert wire.worker(b"f")(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_UNIQ, handle(1), b"f", b"u", b"w")]

    def test_three_arguments_are_too_few_and_end_with_the_packet(self):
        wire = Wire()
        client = wire.connect()
        client._requests.feed(b"\0REQ\0\0\0\x25\0\0\0\x06f\0u\0r\0")
        with pytest.raises(Exception, match="Too few arguments"):
            client._requests.take()

    @pytest.mark.parametrize("reducer", [b"a\nb", b"\xff", b"r" * 513])
    def test_reducer_that_is_no_function_name_is_refused(self, reducer):
        wire = Wire()
        ((kind, code, _),) = wire.connect()(P.SUBMIT_REDUCE_JOB, b"f", b"", reducer, b"", b"w")
        assert (kind, code) == (P.ERROR, b"ARGUMENT_TOO_LARGE")
        assert wire.core.jobs == {}

    def test_reducer_is_journalled_and_replayed(self):
        wire = Wire(durable=True)
        wire.connect()(P.SUBMIT_REDUCE_JOB_BACKGROUND, b"f", b"u", b"sum", b"", b"w")
        (entry,) = wire.commit()
        assert isinstance(entry, JobQueued)
        assert entry.reducer == b"sum"
        wire.core.adopt([StoredJob(b"H:old", b"g", b"", b"w", 0, 0, None, b"max")])
        assert wire.worker(b"g")(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_ALL, b"H:old", b"g", b"", b"max", b"w")]


class TestStatusOfAUnique:
    """PROTOCOL section 3, GET_STATUS_UNIQUE."""

    def test_waiting_and_running_with_the_number_of_clients(self):
        wire = Wire()
        first, second, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        for client in (first, second):
            client(P.SUBMIT_JOB, b"f", b"u", b"w")
        assert first(P.GET_STATUS_UNIQUE, b"u") == [(P.STATUS_RES_UNIQUE, b"u", b"1", b"0", b"0", b"0", b"2")]
        worker.grabs()
        worker(P.WORK_STATUS, handle(1), b"3", b"4")
        second.leaves()
        first.hears()
        assert first(P.GET_STATUS_UNIQUE, b"u") == [(P.STATUS_RES_UNIQUE, b"u", b"1", b"1", b"3", b"4", b"1")]

    def test_background_job_has_no_clients(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert client(P.GET_STATUS_UNIQUE, b"u")[0][-1] == b"0"

    def test_the_last_created_of_several_functions_answers(self):
        wire = Wire()
        client = wire.connect()
        for function in (b"a", b"c", b"b"):
            client(P.SUBMIT_JOB_BG, function, b"u", b"w")
        wire.worker(b"b").grabs()
        assert client(P.GET_STATUS_UNIQUE, b"u")[0][3] == b"1"

    @pytest.mark.parametrize("unique", [b"", b"-", b"other", b"u" * 100])
    def test_nothing_is_known_of_others(self, unique):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"w")
        client(P.SUBMIT_JOB_BG, b"f", b"-", b"w")
        nothing = (P.STATUS_RES_UNIQUE, unique, b"0", b"0", b"0", b"0", b"0")
        assert client(P.GET_STATUS_UNIQUE, unique) == [nothing]

    def test_uncommitted_job_is_not_known_yet(self):
        wire = Wire(durable=True)
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        other = wire.connect()
        assert other(P.GET_STATUS_UNIQUE, b"u")[0][2] == b"0"
        wire.commit()
        assert other(P.GET_STATUS_UNIQUE, b"u")[0][2] == b"1"


class TestAllYours:
    """PROTOCOL section 2, ALL_YOURS; documented, in no C server, and nothing depends on it."""

    def test_it_is_taken_in_silence(self):
        wire = Wire()
        worker = wire.worker(b"f")
        assert worker(P.ALL_YOURS) == []
        assert worker(P.ECHO_REQ, b"x") == [(P.ECHO_RES, b"x")]
