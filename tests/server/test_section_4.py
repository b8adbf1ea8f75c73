"""
Section 4: malformed input, bytes in and bytes out.

In any fragmentation it is in tests/protocol/test_reader.py; on real sockets in test_transport.py.
"""

from __future__ import annotations

import struct

import pytest

from django_gearman.protocol.packets import PacketType as P
from django_gearman.server.entries import JobQueued

from .harness import Wire, handle
from .test_section_2 import NO_JOB, H, packet, req, res

ECHO = req(16, b"still here")
ECHOED = res(17, b"still here")
UNEXPECTED = res(19, b"INVALID_COMMAND", b"Command not expected")
TOO_FEW = res(19, b"INVALID_PACKET", b"Too few arguments in the packet")


class TestHeaders:
    """Section 4: magic, type and size."""

    @pytest.mark.parametrize("magic", [b"\0FOO", b"\0req", b"\0res", b"\0\0\0\0"])
    def test_unknown_magic_closes_without_a_word(self, magic):
        client = Wire().connect()
        assert client.sends(packet(magic, 16, (b"x",))) is None
        assert client.takes() == b""

    @pytest.mark.parametrize("number", [6, 8, 16, 19])
    def test_response_to_the_server_is_an_error(self, number):
        client = Wire().connect()
        answer = client.sends(res(number, b"body", b"of it") + ECHO)
        assert answer == res(19, b"INVALID_MAGIC", b"Request magic expected") + ECHOED

    @pytest.mark.parametrize("number", [0, 43, 44, 255, 65536, 0x7FFFFFFF, 0xFFFFFFFF])
    def test_unknown_type_closes_without_a_word(self, number):
        client = Wire().connect()
        assert client.sends(req(number, b"x")) is None
        assert client.takes() == b""

    @pytest.mark.parametrize("number", [6, 8, 10, 11, 17, 19, 20, 27, 31, 40, 42, 5])
    @pytest.mark.parametrize("body", [(), (b"a", b"b", b"c", b"d", b"e", b"f", b"g")])
    def test_type_that_only_a_server_sends_is_an_error(self, number, body):
        assert Wire().connect().sends(req(number, *body) + ECHO) == UNEXPECTED + ECHOED

    def test_size_larger_than_what_follows_waits(self):
        client = Wire().connect()
        whole = req(16, b"x" * 100)
        assert client.sends(whole[:-1]) == b""
        assert client.sends(whole[-1:]) == res(17, b"x" * 100)

    def test_size_that_cannot_be_meant_closes(self):
        assert Wire().connect().sends(b"\0REQ" + struct.pack(">II", 16, 0xFFFFFFFF)) is None

    def test_connection_cut_inside_a_packet_leaves_nothing(self):
        wire = Wire()
        client = wire.connect()
        assert client.sends(req(7, b"f", b"u", b"workload")[:-1]) == b""
        client.leaves()
        assert wire.core.jobs == {}
        assert wire.core.functions == {}
        assert wire.core.peers == {}


class TestTooFewArguments:
    """Section 4: a body ends where its size says, whatever is missing in it."""

    @pytest.mark.parametrize(
        ("number", "body"),
        [
            (7, (b"func",)),
            (7, (b"func", b"unique")),
            (7, ()),
            (18, (b"func", b"unique")),
            (36, (b"func", b"unique", b"12")),
            (37, (b"func", b"unique", b"reducer", b"workload")),
            (12, (b"handle",)),
            (13, ()),
            (25, ()),
            (28, ()),
        ],
    )
    def test_error_and_the_next_packet_is_read(self, number, body):
        wire = Wire()
        assert wire.connect().sends(req(number, *body) + ECHO) == TOO_FEW + ECHOED
        assert wire.core.jobs == {}

    def test_can_do_timeout_without_its_time(self):
        """gearmand hangs the connection."""
        worker = Wire().connect()
        assert (worker.sends(req(23, b"f") + ECHO) or b"").endswith(ECHOED)

    def test_reports_without_their_last_argument_do_not_hang(self):
        """gearmand reads on into the next packet; Perl's workers send such, and mean an empty one."""
        wire = Wire()
        client, worker = wire.connect(), wire.worker(b"f")
        client(P.SUBMIT_JOB, b"f", b"", b"")
        worker.grabs()
        assert worker.sends(req(12, H, b"1") + req(28, H) + req(13, H) + ECHO) == ECHOED
        assert client.sends(b"") == res(12, H, b"1", b"") + res(28, H, b"") + res(13, H, b"")


class TestArguments:
    """Section 4: what an argument may be."""

    @pytest.mark.parametrize("epoch", [b"abc", b"", b"0", b"-1", b" 5"])
    def test_epoch_that_is_no_later_time_runs_at_once(self, epoch):
        wire = Wire()
        assert wire.connect().sends(req(36, b"f", b"", epoch, b"w")) == res(8, H)
        assert wire.worker(b"f").grabs() == H

    def test_epoch_that_overflows_is_far_away(self):
        """gearmand closes the connection."""
        wire = Wire()
        assert wire.connect().sends(req(36, b"f", b"", b"9" * 30, b"w") + ECHO) == res(8, H) + ECHOED
        assert wire.worker(b"f").sends(req(9)) == NO_JOB

    def test_timeout_that_overflows(self):
        """gearmand ends."""
        assert Wire().connect().sends(req(23, b"f", b"9" * 30) + ECHO) == ECHOED

    @pytest.mark.parametrize("handle", [b"H" * 64, b"H" * 10_000])
    def test_work_fail_with_a_handle_that_is_too_long(self, handle):
        worker = Wire().worker(b"f")
        text = b"Error occurred due to GEARMAND_JOB_HANDLE_SIZE being too small from snprintf"
        assert worker.sends(req(14, handle) + ECHO) == res(19, b"ARGUMENT_TOO_LARGE", text) + ECHOED

    @pytest.mark.parametrize("handle", [b"H" * 63, b"H" * 63 + b"\0"])
    def test_work_fail_with_a_handle_that_is_just_short_enough(self, handle):
        worker = Wire().worker(b"f")
        text = b"Job given in work result not found"
        assert worker.sends(req(14, handle)) == res(19, b"JOB_NOT_FOUND", text)

    def test_option_that_is_unknown(self):
        answer = res(19, b"UNKNOWN_OPTION", b"Server does not recognize given option")
        assert Wire().connect().sends(req(26, b"no such") + ECHO) == answer + ECHOED


class TestQueue:
    """Section 4: submissions that the queue does not take."""

    @pytest.mark.parametrize("number", [7, 18, 21, 32, 33, 34])
    def test_limit_reached(self, number):
        client = Wire().connect()
        client.line(b"create function f")
        client.line(b"maxqueue f 1")
        answer = client.sends(req(18, b"f", b"", b"") + req(number, b"f", b"", b"") + ECHO)
        assert answer == res(8, H) + res(19, b"QUEUE_ERROR", b"Job queue is full") + ECHOED

    def test_store_failed(self):
        wire = Wire(durable=True)
        client = wire.connect()
        assert client.sends(req(18, b"f", b"", b"") + ECHO) == b""
        (entry,) = wire.entries()
        assert isinstance(entry, JobQueued)
        wire.core.rejected(entry, "The disk is full")
        assert client.sends(b"") == res(19, b"QUEUE_ERROR", b"The disk is full") + ECHOED


class TestAfterAnError:
    """Section 4: after an ERROR the connection goes on, in the order of its requests."""

    def test_errors_keep_their_place(self):
        client = Wire().connect()
        answer = client.sends(
            req(7, b"f", b"", b"")
            + req(8)
            + res(16)
            + req(7, b"f")
            + req(13, b"H:no:1", b"")
            + req(26, b"?")
            + b"nonsense\n"
            + req(7, b"f", b"", b"")
        )
        assert answer == (
            res(8, H)
            + UNEXPECTED
            + res(19, b"INVALID_MAGIC", b"Request magic expected")
            + TOO_FEW
            + res(19, b"JOB_NOT_FOUND", b"Job given in work result not found")
            + res(19, b"UNKNOWN_OPTION", b"Server does not recognize given option")
            + b"ERR UNKNOWN_COMMAND Unknown+server+commandnonsense\r\n"
            + res(8, handle(2))
        )
