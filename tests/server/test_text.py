"""The administrative protocol, to the byte."""

import pytest

from django_gearman import __version__
from django_gearman.protocol.packets import PacketType

from .harness import Wire, handle

P = PacketType


def unknown(word: bytes) -> bytes:
    return b"ERR UNKNOWN_COMMAND Unknown+server+command" + word + b"\r\n"


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
