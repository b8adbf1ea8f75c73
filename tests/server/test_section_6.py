"""
Section 6: each row of the table, bytes in and bytes out.

What the commands do is in test_text.py and test_operator.py.
"""

from __future__ import annotations

import os

import pytest

from django_gearman import __version__
from django_gearman.protocol.packets import PacketType as P

from .harness import Caller, Wire, handle
from .test_section_2 import H, req, res

OK = b"OK\r\n"
INCOMPLETE = b"ERR INVALID_ARGUMENTS An+incomplete+set+of+arguments+was+sent+to+this+command+%s\r\n"
UNKNOWN = b"ERR UNKNOWN_COMMAND Unknown+server+command%s\r\n"
STILL_USED = b"ERR there are still connected workers or executing clients\r\n"

ROWS: list[tuple[bytes, bytes]] = [
    (b"status", b"f\t3\t1\t1\nidle\t0\t0\t0\ng\t0\t0\t1\n.\n"),
    (b"status and more", b"f\t3\t1\t1\nidle\t0\t0\t0\ng\t0\t0\t1\n.\n"),
    (b"prioritystatus", b"f\t1\t0\t1\t1\nidle\t0\t0\t0\t0\ng\t0\t0\t0\t1\n.\n"),
    (b"workers", b"1 127.0.0.1 - :\n2 10.0.0.7 w 1 : g f\n.\n"),
    (b"show jobs", b"%s\t0\t0\t0\n%s\t0\t0\t1\n%s\t0\t0\t1\n.\n" % (H, handle(2), handle(3))),
    (b"show unique jobs", b"u\n\n-\n.\n"),
    (b"cancel job " + handle(2), OK),
    (b"cancel job H:no:1", b"ERR UNKNOWN_JOB\r\n"),
    (b"create function new", OK),
    (b"create function f", OK),
    (b"drop function idle", OK),
    (b"drop function none", b"ERR function not found\r\n"),
    (b"drop function IDLE", b"ERR function not found\r\n"),
    (b"drop function f", STILL_USED),
    (b"maxqueue f", OK),
    (b"maxqueue f 10", OK),
    (b"maxqueue f 10 20", OK),
    (b"maxqueue f 10 20 30", OK),
    (b"maxqueue f -1", OK),
    (b"maxqueue f many", OK),
    (b"maxqueue none 10", OK),
    (b"getpid", b"OK %d\n" % os.getpid()),
    (b"verbose", b"OK ERROR\n"),
    (b"version", b"OK %s\n" % __version__.encode()),
    (b"shutdown", UNKNOWN % b"shutdown"),
    (b"shutdown graceful", UNKNOWN % b"shutdown"),
    (b"maxqueue", INCOMPLETE % b"maxqueue"),
    (b"create", INCOMPLETE % b"create"),
    (b"create function", INCOMPLETE % b"create"),
    (b"create x y", INCOMPLETE % b"create"),
    (b"Create x y", INCOMPLETE % b"Create"),
    (b"drop", INCOMPLETE % b"drop"),
    (b"drop function", INCOMPLETE % b"drop"),
    (b"show foo", b"ERR UNKNOWN_SHOW_ARGUMENTS\r\n"),
    (b"show unique", b"ERR UNKNOWN_SHOW_ARGUMENTS\r\n"),
    (b"show jobs x", b"ERR UNKNOWN_SHOW_ARGUMENTS\r\n"),
    (b"show", UNKNOWN % b"show"),
    (b"cancel", UNKNOWN % b"cancel"),
    (b"cancel job", UNKNOWN % b"cancel"),
    (b"nonsense", UNKNOWN % b"nonsense"),
    (b"", UNKNOWN % b""),
    (b" status", UNKNOWN % b""),
    (b"cancel foo bar", b"ERR UNKNOWN_ERROR\r\n"),
]


def busy_place() -> tuple[Wire, Caller, Caller]:
    """A server with jobs of every kind, its operator, who waits for the running job, and its worker."""
    wire = Wire()
    operator, worker = wire.connect(), wire.connect("10.0.0.7")
    worker(P.CAN_DO, b"f")
    operator(P.SUBMIT_JOB, b"f", b"u", b"1")
    operator.line(b"create function idle")
    assert worker.grabs() == H
    operator(P.SUBMIT_JOB_HIGH_BG, b"f", b"", b"2")
    operator(P.SUBMIT_JOB_LOW_BG, b"f", b"-", b"3")
    worker(P.SET_CLIENT_ID, b"w 1")
    worker(P.CAN_DO, b"g")
    return wire, operator, worker


class TestRows:
    """Section 6: the table, row by row."""

    @pytest.fixture(autouse=True)
    def at_error_level(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("ERROR", "django_gearman")

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
    @pytest.mark.parametrize(("line", "reply"), ROWS, ids=[line.decode() for line, _ in ROWS])
    def test_row(self, line: bytes, reply: bytes, end: bytes):
        _, operator, _ = busy_place()
        assert operator.sends(line + end) == reply
        # One reply to a line, and the connection stays.
        assert operator.sends(req(16, b"x")) == res(17, b"x")

    def test_words_are_matched_without_case_and_parted_by_any_number_of_spaces(self):
        _, operator, _ = busy_place()
        assert operator.sends(b"SHOW   Unique JOBS  \n") == b"u\n\n-\n.\n"

    def test_more_than_five_words_close(self):
        assert busy_place()[1].sends(b"maxqueue f 1 2 3 4\n") is None
        assert busy_place()[1].sends(b"maxqueue f 1 2 3\n") == OK

    def test_lines_and_packets_alternate(self):
        _, operator, _ = busy_place()
        answer = operator.sends(b"getpid\r\n" + req(16, b"status\n") + b"show unique jobs\n" + req(16))
        assert answer == (b"OK %d\n" % os.getpid() + res(17, b"status\n") + b"u\n\n-\n.\n" + res(17))


class TestCancel:
    """Section 6, "Cancel", as it is wanted."""

    def test_queued_job_is_gone_at_once(self):
        _, operator, worker = busy_place()
        assert operator.sends(b"cancel job " + handle(2) + b"\r\n") == OK
        assert operator.sends(req(15, handle(2))) == res(20, handle(2), b"0", b"0", b"0", b"0")
        assert operator.sends(b"cancel job " + handle(2) + b"\r\n") == b"ERR UNKNOWN_JOB\r\n"
        assert worker.grabs() == handle(3)

    def test_client_of_a_running_job_hears_one_final_packet(self):
        _, operator, worker = busy_place()
        # The operator is the client; it hears the failure before its OK.
        assert operator.sends(b"cancel job " + H + b"\r\n") == res(14, H) + OK
        assert worker.sends(req(12, H, b"1", b"2") + req(13, H, b"r")) == b""
        assert operator.sends(b"") == b""

    def test_unique_of_a_cancelled_job_makes_a_new_one_that_is_answered(self):
        _, operator, worker = busy_place()
        operator.sends(b"cancel job " + H + b"\r\n")
        assert operator.sends(req(21, b"f", b"u", b"again")) == res(8, handle(4))
        assert operator.sends(b"cancel job " + handle(2) + b"\n") == OK
        assert worker.grabs() == handle(4)
        worker(P.WORK_COMPLETE, handle(4), b"r")
        assert operator.sends(b"") == res(13, handle(4), b"r")


class TestDrop:
    """Section 6, "Drop", as it is wanted: no orphans."""

    def test_function_whose_jobs_wait_stays(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"w")
        assert client.sends(b"drop function f\r\n") == STILL_USED
        assert wire.worker(b"f").grabs() == H

    def test_function_without_jobs_and_workers_goes_and_may_come_back(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        assert client.sends(b"drop function f\r\n") == STILL_USED
        worker.leaves()
        assert client.sends(b"status\ndrop function f\r\nstatus\n") == b"f\t0\t0\t0\n.\n" + OK + b".\n"
        assert client.sends(req(18, b"f", b"", b"")) == res(8, H)
