"""
Section 3: packets in detail, where no file of a theme of its own has the test.

The others: test_submissions.py, test_workers.py, test_reduce.py, test_time.py.
"""

from __future__ import annotations

import pytest

from django_gearman.protocol.packets import PacketType as P

from .harness import Wire, handle
from .test_section_2 import H, req, res

TOO_LARGE = b"ARGUMENT_TOO_LARGE"
NOT_FOUND = b"Job given in work result not found"
GRABS = [P.GRAB_JOB, P.GRAB_JOB_UNIQ, P.GRAB_JOB_ALL]


class TestSubmitJob:
    """Section 3, "SUBMIT_JOB family"."""

    @pytest.mark.parametrize(
        "kind",
        [
            P.SUBMIT_JOB,
            P.SUBMIT_JOB_BG,
            P.SUBMIT_JOB_HIGH,
            P.SUBMIT_JOB_HIGH_BG,
            P.SUBMIT_JOB_LOW,
            P.SUBMIT_JOB_LOW_BG,
        ],
    )
    def test_function_is_made_by_a_submission_without_any_worker(self, kind):
        client = Wire().connect()
        assert client(kind, b"new", b"", b"") == [(P.JOB_CREATED, H)]
        assert client.line(b"status") == b"new\t1\t0\t0\n.\n"

    @pytest.mark.parametrize("length", [63, 64, 65, 255])
    def test_unique_is_never_cut(self, length):
        """gearmand cuts 64 bytes to 63, and refuses more."""
        wire = Wire()
        client, unique = wire.connect(), b"u" * length
        client(P.SUBMIT_JOB_BG, b"f", unique, b"w")
        assert client.line(b"show unique jobs") == unique + b"\n.\n"
        assert wire.worker(b"f")(P.GRAB_JOB_UNIQ) == [(P.JOB_ASSIGN_UNIQ, H, b"f", unique, b"w")]


class TestReduceJobs:
    """Section 3, "Reduce jobs"."""

    @pytest.mark.parametrize("number", [37, 38])
    def test_three_arguments_are_an_error_and_the_connection_goes_on(self, number):
        """gearmand looks for the fourth in the bytes that follow."""
        client = Wire().connect()
        answer = client.sends(req(number, b"f", b"u", b"reducer", b"w") + req(16, b"x"))
        assert answer == res(19, b"INVALID_PACKET", b"Too few arguments in the packet") + res(17, b"x")

    def test_fourth_argument_is_read_and_dropped(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_REDUCE_JOB_BACKGROUND, b"f", b"u", b"r", b"dropped", b"w\0w")
        assert wire.worker(b"f")(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_ALL, H, b"f", b"u", b"r", b"w\0w")]

    def test_priority_is_normal(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_LOW_BG, b"f", b"", b"")
        client(P.SUBMIT_REDUCE_JOB_BACKGROUND, b"f", b"", b"r", b"", b"")
        client(P.SUBMIT_JOB_HIGH_BG, b"f", b"", b"")
        worker = wire.worker(b"f")
        assert [worker.grabs() for _ in range(3)] == [handle(3), handle(2), handle(1)]

    def test_background_job_outlives_its_client(self):
        wire = Wire()
        for kind in (P.SUBMIT_REDUCE_JOB, P.SUBMIT_REDUCE_JOB_BACKGROUND):
            client = wire.connect()
            client(kind, b"f", b"", b"r", b"", b"")
            client.leaves()
        worker = wire.worker(b"f")
        assert [worker.grabs(), worker.grabs()] == [handle(2), None]

    def test_reducer_goes_along_when_the_job_comes_back(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_REDUCE_JOB_BACKGROUND, b"f", b"", b"r", b"", b"w")
        lost = wire.worker(b"f")
        lost.grabs()
        lost.leaves()
        assert wire.worker(b"f")(P.GRAB_JOB_ALL) == [(P.JOB_ASSIGN_ALL, H, b"f", b"", b"r", b"w")]


class TestGrabJob:
    """Section 3, "GRAB_JOB / _UNIQ / _ALL"."""

    @pytest.mark.parametrize("kind", GRABS)
    def test_each_clears_the_sleep(self, kind):
        wire = Wire()
        worker = wire.worker(b"f").sleeps()
        assert worker(kind) == [(P.NO_JOB,)]
        wire.connect()(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert worker.hears() == []

    @pytest.mark.parametrize("unique", [b"", b"-", b"u"])
    @pytest.mark.parametrize("kind", [P.GRAB_JOB_UNIQ, P.GRAB_JOB_ALL])
    def test_unique_is_given_as_it_was_sent(self, kind, unique):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB, b"f", unique, b"w")
        assert wire.worker(b"f")(kind) == [(P.JOB_ASSIGN_UNIQ, H, b"f", unique, b"w")]

    def test_every_way_takes_the_next_job(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        for _ in GRABS:
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert [worker(kind)[0][1] for kind in GRABS] == [handle(1), handle(2), handle(3)]


class TestGetStatus:
    """Section 3, "GET_STATUS"."""

    def test_handle_that_is_too_long_is_an_error(self):
        """gearmand does not answer at all."""
        client = Wire().connect()
        assert client(P.GET_STATUS, b"H" * 63)[0][0] == P.STATUS_RES
        ((kind, code, _),) = client(P.GET_STATUS, b"H" * 64)
        assert (kind, code) == (P.ERROR, TOO_LARGE)

    def test_a_nul_ends_the_handle(self):
        client = Wire().connect()
        assert client(P.GET_STATUS, H + b"\0more") == [(P.STATUS_RES, H, b"0", b"0", b"0", b"0")]

    def test_long_handle_of_ours_is_known(self):
        wire = Wire(handle_prefix="H:" + "x" * 100 + ":")
        client, worker = wire.connect(), wire.worker(b"f")
        ((_, long),) = client(P.SUBMIT_JOB, b"f", b"", b"")
        assert client(P.GET_STATUS, long) == [(P.STATUS_RES, long, b"1", b"0", b"0", b"0")]
        assert worker.grabs() == long
        assert worker(P.WORK_FAIL, long) == []
        assert client.hears() == [(P.WORK_FAIL, long)]

    def test_done_and_never_there_look_the_same(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker.grabs()
        worker(P.WORK_STATUS, H, b"1", b"2")
        worker(P.WORK_COMPLETE, H, b"")
        for each in (H, handle(2)):
            assert client(P.GET_STATUS, each) == [(P.STATUS_RES, each, b"0", b"0", b"0", b"0")]

    def test_anybody_may_ask(self):
        wire = Wire()
        wire.connect()(P.SUBMIT_JOB, b"f", b"", b"")
        assert wire.connect()(P.GET_STATUS, H) == [(P.STATUS_RES, H, b"1", b"0", b"0", b"0")]


class TestGetStatusUnique:
    """Section 3, "GET_STATUS_UNIQUE"."""

    def test_numbers_are_those_of_get_status(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        worker.grabs()
        worker(P.WORK_STATUS, H, b"50.5", b"-1")
        answer = (P.STATUS_RES_UNIQUE, b"u", b"1", b"1", b"50", b"4294967295", b"0")
        assert client(P.GET_STATUS_UNIQUE, b"u") == [answer]

    @pytest.mark.parametrize("length", [63, 64, 65, 255])
    def test_long_unique_is_found(self, length):
        """gearmand closes the connection from 64 bytes on."""
        client, unique = Wire().connect(), b"u" * length
        client(P.SUBMIT_JOB_BG, b"f", unique, b"")
        assert client(P.GET_STATUS_UNIQUE, unique)[0][:3] == (P.STATUS_RES_UNIQUE, unique, b"1")

    def test_longer_ones_than_a_job_may_have_are_refused(self):
        assert Wire().connect()(P.GET_STATUS_UNIQUE, b"u" * 256)[0][:2] == (P.ERROR, TOO_LARGE)

    def test_a_nul_ends_the_unique(self):
        answer = (P.STATUS_RES_UNIQUE, b"x", b"0", b"0", b"0", b"0", b"0")
        assert Wire().connect()(P.GET_STATUS_UNIQUE, b"x\0y") == [answer]

    def test_who_submitted_twice_counts_twice_and_background_not(self):
        wire = Wire()
        client = wire.connect()
        for kind in (P.SUBMIT_JOB, P.SUBMIT_JOB, P.SUBMIT_JOB_BG):
            client(kind, b"f", b"u", b"")
        assert client(P.GET_STATUS_UNIQUE, b"u")[0][-1] == b"2"


class TestReports:
    """Section 3, "WORK_STATUS", "WORK_DATA / WORK_WARNING", and what is final."""

    @pytest.fixture
    def wire(self):
        wire = Wire()
        self.client, self.worker = wire.connect(), wire.worker(b"f")
        self.client(P.SUBMIT_JOB, b"f", b"u", b"")
        self.worker.grabs()
        return wire

    def test_status_is_forwarded_as_text_and_remembered_as_numbers(self, wire):
        self.worker(P.WORK_STATUS, H, b"abc", b" 007")
        assert self.client.hears() == [(P.WORK_STATUS, H, b"abc", b" 007")]
        assert wire.connect()(P.GET_STATUS, H) == [(P.STATUS_RES, H, b"1", b"1", b"0", b"7")]

    def test_client_that_comes_later_gets_later_reports_only(self, wire):
        self.worker(P.WORK_STATUS, H, b"1", b"2")
        self.worker(P.WORK_WARNING, H, b"early")
        late = wire.connect()
        assert late(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, H)]
        self.worker(P.WORK_WARNING, H, b"late")
        assert late.hears() == [(P.WORK_WARNING, H, b"late")]

    @pytest.mark.parametrize(
        ("kind", "arguments"), [(P.WORK_COMPLETE, [b"r"]), (P.WORK_FAIL, []), (P.WORK_EXCEPTION, [b"e"])]
    )
    def test_each_of_three_is_final(self, wire, kind, arguments):
        self.worker(kind, H, *arguments)
        assert len(self.client.hears()) == 1
        assert self.worker(P.WORK_COMPLETE, H, b"") == [(P.ERROR, b"JOB_NOT_FOUND", NOT_FOUND)]
        assert self.client.hears() == []
        assert self.client.line(b"show jobs") == b".\n"
        assert self.client.line(b"status") == b"f\t0\t0\t1\n.\n"
        # The unique is free.
        assert self.client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(2))]

    def test_what_follows_the_handle_of_a_failure_is_passed_over(self, wire):
        """PROTOCOL has nothing there; gearmand fails the job all the same."""
        assert self.worker(P.WORK_FAIL, H + b"\0why") == []
        assert self.client.hears() == [(P.WORK_FAIL, H)]

    def test_exception_to_each_as_it_asked(self, wire):
        asked = wire.connect()
        assert asked(P.OPTION_REQ, b"exceptions") == [(P.OPTION_RES, b"exceptions")]
        asked(P.SUBMIT_JOB, b"f", b"u", b"")
        self.worker(P.WORK_EXCEPTION, H, b"e\0")
        assert asked.sends(b"") == res(25, H, b"e\0")
        assert self.client.sends(b"") == res(14, H), "without the NUL of gearmand's"


class TestAbilities:
    """Section 3, "CAN_DO" and "SET_CLIENT_ID"."""

    def test_offered_twice_one_cant_do_withdraws_it(self):
        wire = Wire()
        worker = wire.worker(b"f", b"f")
        worker(P.CANT_DO, b"f")
        assert worker.line(b"workers") == b"1 127.0.0.1 - :\n.\n"
        assert worker.line(b"status") == b"f\t0\t0\t0\n.\n"

    def test_id_is_a_dash_before_one_is_set_and_the_last_one_counts(self):
        client = Wire().connect()
        assert client.line(b"workers") == b"1 127.0.0.1 - :\n.\n"
        client(P.SET_CLIENT_ID, b"first")
        client(P.SET_CLIENT_ID, b"second")
        assert client.line(b"workers") == b"1 127.0.0.1 second :\n.\n"


class TestJobHandle:
    """Section 3, "Job handle"."""

    def test_prefix_and_a_number_counted_from_1_over_all_functions(self):
        client = Wire().connect()
        handles = [client(P.SUBMIT_JOB, function, b"", b"")[0][1] for function in (b"f", b"g", b"f")]
        assert handles == [b"H:test:1:7.1", b"H:test:1:7.2", b"H:test:1:7.3"]

    def test_handles_of_two_runs_differ(self):
        """gearmand's collide: its counter starts again from 1."""
        first, second = Wire(), Wire(handle_prefix="H:test:1:8.")
        handles = [wire.connect()(P.SUBMIT_JOB, b"f", b"", b"")[0][1] for wire in (first, second)]
        assert handles[0] != handles[1]
