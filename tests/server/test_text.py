"""The administrative protocol, to the byte."""

import os

import pytest

from django_gearman import __version__
from django_gearman.protocol.packets import CLAIM, PacketType
from django_gearman.protocol.reader import PacketReader
from django_gearman.server.entries import JobQueued, StoredJob
from django_gearman.server.options import Shutdown

from .harness import Wire, handle

P = PacketType
OK = b"OK\r\n"


def unknown(word: bytes) -> bytes:
    return b"ERR UNKNOWN_COMMAND Unknown+server+command" + word + b"\r\n"


def incomplete(word: bytes) -> bytes:
    return b"ERR INVALID_ARGUMENTS An+incomplete+set+of+arguments+was+sent+to+this+command+" + word + b"\r\n"


class TestStatus:
    """PROTOCOL section 6, ``status``."""

    def test_nothing(self):
        assert Wire().connect().line(b"status") == b".\n"

    def test_total_running_and_workers_of_each_function(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f", b"g")
        wire.worker(b"f")
        for _ in range(3):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"alone", b"", b"")
        worker.grabs()
        assert client.line(b"status") == b"f\t3\t1\t2\ng\t0\t0\t1\nalone\t1\t0\t0\n.\n"
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert client.line(b"status") == b"f\t2\t0\t2\ng\t0\t0\t1\nalone\t1\t0\t0\n.\n"

    def test_counts_follow_a_lost_worker(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker.grabs()
        worker.leaves()
        assert client.line(b"status") == b"f\t1\t0\t0\n.\n"

    def test_words_behind_are_ignored(self):
        assert Wire().connect().line(b"status of all the functions") == b".\n"


class TestWorkers:
    """PROTOCOL section 6, ``workers``."""

    def test_every_connection_with_its_functions_the_last_registered_first(self):
        wire = Wire()
        client = wire.connect("10.0.0.1")
        worker = wire.worker(b"f", b"g")
        worker(P.SET_CLIENT_ID, b"w 1")
        wire.connect("::1")
        assert client.line(b"workers") == (
            b"1 10.0.0.1 - :\n"
            b"2 127.0.0.1 w 1 : g f\n"
            b"3 ::1 - :\n"
            b".\n"
        )  # fmt: skip

    def test_empty_id_leaves_two_spaces(self):
        client = Wire().connect()
        client(P.SET_CLIENT_ID, b"")
        assert client.line(b"workers") == b"1 127.0.0.1  :\n.\n"

    def test_connection_that_left_is_not_listed(self):
        wire = Wire()
        client = wire.connect()
        wire.worker(b"f").leaves()
        assert client.line(b"workers") == b"1 127.0.0.1 - :\n.\n"


class TestWords:
    """PROTOCOL section 6, before the table, and its last rows."""

    def test_version(self):
        assert Wire().connect().line(b"version") == b"OK " + __version__.encode() + b"\n"

    @pytest.mark.parametrize("line", [b"VERSION", b"Version", b"version ", b"version  x"])
    def test_words_are_matched_without_case_and_parted_by_spaces(self, line):
        assert Wire().connect().line(line).startswith(b"OK ")

    @pytest.mark.parametrize(
        ("line", "word"),
        [
            (b"", b""),
            (b" ", b""),
            (b" status", b""),
            (b"nonsense", b"nonsense"),
            (b"nonsense with words", b"nonsense"),
            (b"Status2", b"Status2"),
            (b"statu", b"statu"),
            (b"shutdown", b"shutdown"),
            (b"show", b"show"),
            (b"cancel", b"cancel"),
            (b"a&b=5% b", b"a&b=5%"),
        ],
    )
    def test_anything_else_is_an_unknown_command(self, line, word):
        assert Wire().connect().line(line) == unknown(word)

    @pytest.mark.parametrize("line", [b"\xff\x00\x1b[2J", b"a\rb", b"status\r", b"\x1b]0;x\x07"])
    def test_no_control_character_comes_back(self, line):
        answer = Wire().connect().line(line)
        assert answer.startswith(b"ERR UNKNOWN_COMMAND ")
        assert all(byte >= 0x20 for byte in answer.removesuffix(b"\r\n"))

    def test_five_words_are_allowed_and_six_close(self):
        client = Wire().connect()
        assert client.line(b"a b c d e") == unknown(b"a")
        assert client.line(b"status  b  c  d  e") == b".\n"
        assert client.line(b"status b c d e f") is None


class TestPriorityStatus:
    """PROTOCOL section 6, ``prioritystatus``: jobs that wait, not those that run."""

    def test_waiting_jobs_of_each_priority(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        for kind in (P.SUBMIT_JOB_HIGH_BG, P.SUBMIT_JOB_BG, P.SUBMIT_JOB_BG, P.SUBMIT_JOB_LOW_BG):
            client(kind, b"f", b"", b"")
        assert client.line(b"prioritystatus") == b"f\t1\t2\t1\t1\n.\n"
        worker.grabs()
        assert client.line(b"PriorityStatus x") == b"f\t0\t2\t1\t1\n.\n"

    def test_numbers_between_count_by_their_sign(self):
        wire = Wire()
        for number, priority in enumerate((100, 1, 0, -1, -100)):
            wire.core.adopt([StoredJob(b"H:r%d" % number, b"f", b"", b"", priority, 0, None)])
        assert wire.connect().line(b"prioritystatus") == b"f\t2\t1\t2\t0\n.\n"

    def test_cancelled_jobs_are_not_counted(self):
        wire = Wire()
        client = wire.connect()
        for _ in range(3):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert client.line(b"cancel job " + handle(2)) == OK
        assert client.line(b"prioritystatus") == b"f\t0\t2\t0\t0\n.\n"

    def test_job_for_later_is_counted(self):
        client = Wire().connect()
        client(P.SUBMIT_JOB_EPOCH, b"f", b"", b"2000", b"")
        assert client.line(b"prioritystatus") == b"f\t0\t1\t0\t0\n.\n"
        assert client.line(b"status") == b"f\t1\t0\t0\n.\n"


class TestShow:
    """PROTOCOL section 6, ``show jobs`` and ``show unique jobs``."""

    def test_jobs_with_lost_workers_whether_ignored_and_whether_kept(self):
        wire = Wire()
        client, leaver, worker = wire.connect(), wire.connect(), wire.worker(b"f")
        leaver(P.SUBMIT_JOB, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        assert [worker.grabs(), worker.grabs()] == [handle(1), handle(2)]
        leaver.leaves()
        assert client.line(b"show jobs") == (
            b"%s\t0\t1\t0\n%s\t0\t0\t1\n%s\t0\t0\t0\n.\n" % (handle(1), handle(2), handle(3))
        )
        worker.leaves()
        assert client.line(b"SHOW Jobs") == b"%s\t1\t0\t1\n%s\t0\t0\t0\n.\n" % (handle(2), handle(3))
        again = wire.worker(b"f")
        again.grabs()
        assert client.line(b"show jobs").startswith(handle(2) + b"\t1\t0\t1\n")

    def test_uniques(self):
        wire = Wire()
        client = wire.connect()
        for unique in (b"u", b"", b"-", b"two words", "ä".encode()):
            client(P.SUBMIT_JOB_BG, b"f", unique, b"x")
        assert client.line(b"show unique jobs") == b"u\n\n-\ntwo words\n\xc3\xa4\n.\n"

    def test_unique_cannot_forge_the_listing(self):
        wire = Wire()
        client = wire.connect()
        for unique in (b".", b"a\nH:fake\t0", b"\x1b[2J", b"\xff\x9b", b"\xc2\x9b", b"..", b"x\r"):
            client(P.SUBMIT_JOB_BG, b"f", unique, b"")
        answer = client.line(b"show unique jobs")
        assert answer == "?\na?H:fake?0\n?[2J\n\ufffd\ufffd\n?\n..\nx?\n.\n".encode()

    def test_nothing_of_a_job_that_is_not_written_yet(self):
        wire = Wire(durable=True)
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"u", b"")
        other = wire.connect()
        assert other.line(b"show jobs") == other.line(b"show unique jobs") == b".\n"
        wire.commit()
        assert other.line(b"show jobs") == handle(1) + b"\t0\t0\t1\n.\n"

    @pytest.mark.parametrize(
        "line", [b"show foo", b"show unique", b"show jobs x", b"show unique jobs x", b"show unique foo"]
    )
    def test_anything_else_is_an_error(self, line):
        assert Wire().connect().line(line) == b"ERR UNKNOWN_SHOW_ARGUMENTS\r\n"


class TestCancel:
    """PROTOCOL section 6, ``cancel job``; what becomes of the job is in test_operator.py."""

    def test_known_and_unknown_job(self):
        client = Wire().connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        assert client.line(b"cancel job " + handle(2)) == b"ERR UNKNOWN_JOB\r\n"
        assert client.line(b"Cancel  JOB " + handle(1)) == OK
        assert client.line(b"cancel job " + handle(1)) == b"ERR UNKNOWN_JOB\r\n"

    @pytest.mark.parametrize("line", [b"cancel foo bar", b"cancel job a b", b"cancel foo bar baz"])
    def test_wrong_words(self, line):
        assert Wire().connect().line(line) == b"ERR UNKNOWN_ERROR\r\n"

    @pytest.mark.parametrize("line", [b"cancel", b"cancel job", b"cancel x"])
    def test_missing_words(self, line):
        assert Wire().connect().line(line) == unknown(b"cancel")


class TestFunctions:
    """PROTOCOL section 6, ``create function`` and ``drop function``."""

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_created_whatever_the_line_end(self, end):
        reader = PacketReader()
        reader.feed(b"create function foo" + end)
        _, (line,) = reader.take()
        client = Wire().connect()
        assert client.line(line) == OK
        assert client.line(line) == OK
        assert client.line(b"status") == b"foo\t0\t0\t0\n.\n"

    def test_created_function_serves(self):
        client = Wire().connect()
        client.line(b"CREATE Function Foo")
        client(P.SUBMIT_JOB_BG, b"Foo", b"", b"")
        assert client.line(b"status") == b"Foo\t1\t0\t0\n.\n"

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            (b"a\tb", b"ERR INVALID_FUNCTION_NAME Function+names+are+UTF-8+without+control+characters\r\n"),
            (b"\xff", b"ERR INVALID_FUNCTION_NAME Function+names+are+UTF-8+without+control+characters\r\n"),
            (b"a\0b", b"ERR INVALID_FUNCTION_NAME Function+names+are+UTF-8+without+control+characters\r\n"),
            (CLAIM, b"ERR INVALID_FUNCTION_NAME Function+names+are+UTF-8+without+control+characters\r\n"),
            (b"x" * 513, b"ERR ARGUMENT_TOO_LARGE Function+name+too+large\r\n"),
        ],
    )
    def test_refused_names(self, name, error):
        client = Wire().connect()
        assert client.line(b"create function " + name) == error
        assert client.line(b"status") == b".\n"

    def test_drop(self):
        client = Wire().connect()
        client.line(b"create function foo")
        assert client.line(b"drop function foo") == OK
        assert client.line(b"status") == b".\n"
        assert client.line(b"drop function foo") == b"ERR function not found\r\n"

    def test_drop_looks_at_case(self):
        client = Wire().connect()
        client.line(b"create function Foo")
        assert client.line(b"drop function fOO") == b"ERR function not found\r\n"
        assert client.line(b"DROP FUNCTION Foo") == OK

    def test_drop_refuses_while_workers_or_jobs_are_there(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        refused = b"ERR there are still connected workers or executing clients\r\n"
        assert client.line(b"drop function f") == refused
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker.grabs()
        worker.leaves()
        assert client.line(b"drop function f") == refused
        assert client.line(b"cancel job " + handle(1)) == OK
        assert client.line(b"drop function f") == OK

    @pytest.mark.parametrize("word", [b"create", b"drop", b"Drop"])
    @pytest.mark.parametrize(
        "rest", [b"", b" function", b" x", b" x y", b" function a b", b" function a b c"]
    )
    def test_wrong_words(self, word, rest):
        assert Wire().connect().line(word + rest) == incomplete(word)


class TestMaxqueue:
    """PROTOCOL section 6, ``maxqueue``, and 5.7."""

    def submit(self, client, *kinds):
        """Whether each submission was taken."""
        taken = []
        for kind in kinds:
            (heard,) = client(kind, b"f", b"", b"")
            taken.append(heard[0] == P.JOB_CREATED)
            assert taken[-1] or heard == (P.ERROR, b"QUEUE_ERROR", b"Job queue is full")
        return taken

    def test_each_priority_is_compared_with_the_total(self):
        client = Wire().connect()
        client.line(b"create function f")
        assert client.line(b"maxqueue f 5 4 3") == OK
        assert self.submit(client, *[P.SUBMIT_JOB_BG] * 3) == [True] * 3
        assert self.submit(client, P.SUBMIT_JOB_LOW_BG, P.SUBMIT_JOB_BG, P.SUBMIT_JOB) == [False, True, False]
        assert self.submit(client, P.SUBMIT_JOB_HIGH, P.SUBMIT_JOB_HIGH_BG) == [True, False]

    def test_running_jobs_count(self):
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client.line(b"maxqueue f 1")
        assert self.submit(client, P.SUBMIT_JOB_BG) == [True]
        worker.grabs()
        assert self.submit(client, P.SUBMIT_JOB_BG) == [False]
        worker(P.WORK_COMPLETE, handle(1), b"")
        assert self.submit(client, P.SUBMIT_JOB_BG) == [True]

    def test_jobs_that_are_not_written_yet_count(self):
        wire = Wire(durable=True)
        client = wire.connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        entries = wire.commit()
        assert [type(entry) for entry in entries] == [JobQueued]
        assert client.hears() == [
            (P.JOB_CREATED, handle(1)),
            (P.ERROR, b"QUEUE_ERROR", b"Job queue is full"),
        ]

    def test_who_joins_is_never_refused(self):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        assert client(P.SUBMIT_JOB, b"f", b"u", b"") == [(P.JOB_CREATED, handle(1))]
        assert client(P.SUBMIT_JOB_HIGH, b"f", b"u", b"") == [(P.JOB_CREATED, handle(1))]

    @pytest.mark.parametrize("limits", [b"", b" 0", b" -1", b" many", b" 0 0 0"])
    def test_no_limit(self, limits):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        assert client.line(b"maxqueue f" + limits) == OK
        assert self.submit(client, *[P.SUBMIT_JOB_LOW] * 3) == [True] * 3

    def test_two_numbers_leave_low_without_limit(self):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1 1")
        assert self.submit(client, P.SUBMIT_JOB, P.SUBMIT_JOB, P.SUBMIT_JOB_HIGH) == [True, False, False]
        assert self.submit(client, P.SUBMIT_JOB_LOW) == [True]

    def test_function_that_is_not_listed_is_not_remembered(self):
        client = Wire().connect()
        assert client.line(b"maxqueue f 1") == OK
        assert client.line(b"status") == b".\n"
        assert self.submit(client, P.SUBMIT_JOB, P.SUBMIT_JOB) == [True, True]

    def test_dropped_with_the_function(self):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        assert client.line(b"drop function f") == OK
        assert self.submit(client, P.SUBMIT_JOB, P.SUBMIT_JOB) == [True, True]

    def test_limited_function_is_not_forgotten_with_idle_ones(self):
        client = Wire(max_idle_functions=2).connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        for number in range(5):
            client.line(b"create function other%d" % number)
        assert client.line(b"status") == b"f\t0\t0\t0\nother3\t0\t0\t0\nother4\t0\t0\t0\n.\n"

    def test_number_of_many_digits(self):
        client = Wire().connect()
        client.line(b"create function f")
        assert client.line(b"maxqueue f " + b"9" * 5000) == OK
        assert self.submit(client, P.SUBMIT_JOB) == [True]

    def test_wrong_words(self):
        client = Wire().connect()
        assert client.line(b"MaxQueue") == incomplete(b"MaxQueue")
        assert client.line(b"maxqueue f 1 2 3 4") is None


class TestProcess:
    """PROTOCOL section 6, ``getpid`` and ``verbose``."""

    def test_process_id(self):
        assert Wire().connect().line(b"getpid x") == b"OK %d\n" % os.getpid()

    @pytest.mark.parametrize("name", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    def test_verbosity(self, caplog, name):
        caplog.set_level(name, "django_gearman")
        assert Wire().connect().line(b"verbose") == b"OK %s\n" % name.encode()


class TestShutdown:
    """PROTOCOL section 6, ``shutdown``; the end itself is in test_transport.py."""

    @pytest.mark.parametrize("line", [b"shutdown", b"shutdown graceful", b"shutdown x"])
    def test_unknown_unless_allowed(self, line):
        wire = Wire()
        assert wire.connect().line(line) == unknown(b"shutdown")
        assert wire.core.shutdown_wanted is None

    def test_wanted_where_allowed(self):
        wire = Wire(allow_shutdown=True)
        client = wire.connect()
        assert client.line(b"shutdown graceful") == OK
        assert wire.core.shutdown_wanted is Shutdown.GRACEFUL
        assert client.line(b"SHUTDOWN") == OK
        assert client.line(b"shutdown Graceful") == OK
        assert wire.core.shutdown_wanted is Shutdown.IMMEDIATE

    def test_wrong_words(self):
        wire = Wire(allow_shutdown=True)
        assert wire.connect().line(b"shutdown now") == incomplete(b"shutdown")
        assert wire.core.shutdown_wanted is None


class TestWhoMayChangeThings:
    """DESIGN section 4: nothing but the address tells an operator from anybody else."""

    CHANGES = (
        b"cancel job H:1",
        b"create function f",
        b"drop function f",
        b"maxqueue f 1",
        b"shutdown",
        b"shutdown graceful",
    )

    @pytest.mark.parametrize("line", CHANGES)
    @pytest.mark.parametrize(
        "address",
        ["10.0.0.1", "192.168.1.1", "2001:db8::1", "fe80::1%eth0", "::ffff:10.0.0.1", "", "localhost"],
    )
    def test_other_machines_may_not(self, line, address):
        wire = Wire(allow_shutdown=True)
        answer = wire.connect(address).line(line)
        assert (
            answer == b"ERR PERMISSION_DENIED This+command+is+taken+from+the+server's+own+machine+alone\r\n"
        )
        assert not wire.core.functions
        assert wire.core.shutdown_wanted is None

    @pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "unix"])
    def test_this_machine_may(self, address):
        assert Wire().connect(address).line(b"create function f") == OK

    @pytest.mark.parametrize(
        "line", [b"status", b"prioritystatus", b"workers", b"show jobs", b"show unique jobs", b"version"]
    )
    def test_anybody_may_ask(self, line):
        assert not Wire().connect("10.0.0.1").line(line).startswith(b"ERR")

    def test_shutdown_that_is_off_is_unknown_there_too(self):
        assert Wire().connect("10.0.0.1").line(b"shutdown") == unknown(b"shutdown")


class TestInsight:
    """``running`` and ``counters``, which no other server has."""

    def test_nothing(self):
        client = Wire().connect()
        assert client.line(b"running") == client.line(b"counters") == b".\n"

    def test_who_runs_what(self):
        wire = Wire()
        client = wire.connect()
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        first, second = wire.worker(b"f"), wire.worker(b"f")
        first.grabs()
        wire.core.now += 7.9
        second.grabs()
        first(P.WORK_STATUS, handle(1), b"-3\t.\n", b"10")
        assert client.line(b"Running") == b"%s\tf\t2\t1\t7\t-3\t10\n%s\tf\t3\t1\t0\t0\t0\n.\n" % (
            handle(1),
            handle(2),
        )

    def test_what_became_of_jobs(self):
        wire = Wire(job_retries=2)
        client = wire.connect()
        for _ in range(5):
            client(P.SUBMIT_JOB_BG, b"f", b"", b"")
        worker = wire.worker(b"f")
        for kind in (P.WORK_COMPLETE, P.WORK_FAIL):
            grabbed = worker.grabs()
            worker(kind, grabbed, *([b""] if kind == P.WORK_COMPLETE else []))
        worker.grabs()
        worker.leaves()
        other = wire.worker(b"f")
        other.grabs()
        other.leaves()
        client.line(b"cancel job " + handle(4))
        # Submitted, handed out, tried again; successful, failed, dead, cancelled.
        assert client.line(b"counters") == b"f\t5\t4\t1\t1\t1\t1\t1\n.\n"
