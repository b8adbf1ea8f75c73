"""Bytes to packets, whatever pieces they come in."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_gearman.exceptions import ProtocolError, UnreadableStream
from django_gearman.protocol.packets import (
    ARGUMENTS,
    FROM_SERVER_ONLY,
    LAST_MAY_BE_MISSING,
    REQUEST,
    RESPONSE,
    SEPARATORS,
    PacketType,
    encode_request,
    encode_response,
)
from django_gearman.protocol.reader import TEXT, PacketReader

ECHO = encode_request(PacketType.ECHO_REQ, b"after")
ECHO_READ = (PacketType.ECHO_REQ, [b"after"])
LARGE = 64 * 1024
"""From this size on bodies are cut in another way."""


def raw(kind: int, body: bytes, magic: bytes = REQUEST, size: int | None = None) -> bytes:
    """A packet with any numbers in its header."""
    return magic + struct.pack(">II", kind, len(body) if size is None else size) + body


def drain(reader: PacketReader) -> list:
    """All that can be taken: packets, and what became of the wrong ones; nothing follows "closed"."""
    taken: list = []
    while True:
        try:
            packet = reader.take()
        except UnreadableStream as error:
            return [*taken, ("closed", error.code)]
        except ProtocolError as error:
            taken.append(("error", error.code))
            continue
        if packet is None:
            return taken
        taken.append(packet)


def read(pieces: list[bytes], **options) -> list:
    """What a reader makes of a stream that comes in these pieces."""
    reader = PacketReader(**options)
    taken = []
    for piece in pieces:
        reader.feed(piece)
        taken += drain(reader)
        if taken and taken[-1][0] == "closed":
            break
    return taken


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[index : index + 1] for index in range(len(stream))]


def check_in_all_ways(stream: bytes, expected: list, **options) -> None:
    """Whole, byte by byte, in two pieces at every place, and with a packet behind."""
    assert read([stream], **options) == expected
    assert read(bytewise(stream), **options) == expected
    for cut in range(1, min(len(stream), 64)):
        assert read([stream[:cut], stream[cut:]], **options) == expected
    behind = [] if expected and expected[-1][0] == "closed" else [ECHO_READ]
    if options.get("magic", REQUEST) == REQUEST:
        assert read([stream + ECHO], **options) == expected + behind
        assert read(bytewise(stream + ECHO), **options) == expected + behind


class TestPackets:
    """PROTOCOL section 1: packets arrive in any fragmentation."""

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (PacketType.CAN_DO, [b"reverse"]),
            (PacketType.PRE_SLEEP, [b""]),
            (PacketType.ECHO_REQ, [b""]),
            (PacketType.ECHO_REQ, [b"\0REQ\0\0\0\x10"]),
            (PacketType.SUBMIT_JOB, [b"", b"", b""]),
            (PacketType.SUBMIT_JOB, [b"reverse", b"unique", b"\0\0"]),
            (PacketType.WORK_STATUS, [b"H:a:1", b"50", b"100"]),
            (PacketType.WORK_COMPLETE, [b"H:a:1", b"line\nline\r\n"]),
            (PacketType.SUBMIT_JOB_EPOCH, [b"f", b"u", b"0", b"w"]),
            (PacketType.SUBMIT_REDUCE_JOB, [b"f", b"u", b"r", b"a", b"w\0w"]),
            (PacketType.SUBMIT_JOB_SCHED, [b"f", b"u", b"1", b"2", b"3", b"4", b"5", b"w"]),
        ],
    )
    def test_arguments_come_back_as_they_were(self, kind, arguments):
        check_in_all_ways(encode_request(kind, *arguments), [(kind, arguments)])

    @pytest.mark.parametrize("kind", [PacketType.GRAB_JOB, PacketType.RESET_ABILITIES, PacketType.PRE_SLEEP])
    def test_body_of_a_type_without_arguments_is_skipped(self, kind):
        check_in_all_ways(raw(kind, b"what\0ever"), [(kind, [b"what\0ever"])])

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (PacketType.GET_STATUS, [b"H:a:1\0"]),
            (PacketType.WORK_FAIL, [b"H:a:1\0"]),
            (PacketType.OPTION_REQ, [b"exceptions\0"]),
        ],
    )
    def test_last_argument_takes_the_rest_as_it_is(self, kind, arguments):
        check_in_all_ways(encode_request(kind, *arguments), [(kind, arguments)])

    @pytest.mark.parametrize("size", [LARGE - 1, LARGE, LARGE + 1, 3 * LARGE])
    def test_large_body_is_cut_like_a_small_one(self, size):
        workload = (b"\0\xff" * size)[: size - 4]
        packet = encode_request(PacketType.SUBMIT_JOB, b"f", b"u", workload)
        expected = [(PacketType.SUBMIT_JOB, [b"f", b"u", workload]), ECHO_READ]
        assert read([packet + ECHO]) == expected
        assert read([packet[:13], packet[13:LARGE], packet[LARGE:] + ECHO]) == expected

    def test_many_packets_at_once_keep_their_order(self):
        numbers = [b"%d" % number for number in range(1000)]
        stream = b"".join(encode_request(PacketType.ECHO_REQ, number) for number in numbers)
        assert read([stream]) == [(PacketType.ECHO_REQ, [number]) for number in numbers]

    def test_packets_left_untaken_are_there_after_the_next_feed(self):
        reader = PacketReader()
        reader.feed(encode_request(PacketType.ECHO_REQ, b"1") + encode_request(PacketType.ECHO_REQ, b"2"))
        assert reader.take() == (PacketType.ECHO_REQ, [b"1"])
        reader.feed(encode_request(PacketType.ECHO_REQ, b"3"))
        assert drain(reader) == [(PacketType.ECHO_REQ, [b"2"]), (PacketType.ECHO_REQ, [b"3"])]


class TestLines:
    """PROTOCOL sections 1 and 6: the first byte of each message tells text from packets."""

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            (b"status\n", b"status"),
            (b"status\r\n", b"status"),
            (b"\n", b""),
            (b"\r\n", b""),
            (b"a\rb\n", b"a\rb"),
            (b"status\r\r\n", b"status\r"),
            (b"nul\0inside\n", b"nul\0inside"),
            (b"REQ\0\n", b"REQ\0"),
        ],
    )
    def test_line_ends_with_lf_or_crlf(self, line, expected):
        check_in_all_ways(line, [(TEXT, [expected])])

    def test_several_lines_at_once(self):
        check_in_all_ways(
            b"status\nworkers\r\n\n", [(TEXT, [b"status"]), (TEXT, [b"workers"]), (TEXT, [b""])]
        )

    def test_line_as_long_as_allowed(self):
        line = b"x" * 31 + b"\n"
        check_in_all_ways(line, [(TEXT, [b"x" * 31])], max_line=32)

    @pytest.mark.parametrize("line", [b"x" * 32 + b"\n", b"x" * 32, b"x" * 1000])
    def test_longer_line_closes(self, line):
        check_in_all_ways(line, [("closed", b"ARGUMENT_TOO_LARGE")], max_line=32)

    def test_default_limit_is_8_kib(self):
        assert read([b"x" * 8191 + b"\n"]) == [(TEXT, [b"x" * 8191])]
        assert read([b"x" * 8192]) == [("closed", b"ARGUMENT_TOO_LARGE")]

    def test_line_to_a_client_closes(self):
        assert read([b"status\r\n and more"], magic=RESPONSE) == [("closed", b"INVALID_MAGIC")]
        assert read([b"s"], magic=RESPONSE) == [("closed", b"INVALID_MAGIC")]


class TestMalformed:
    """PROTOCOL section 4."""

    @pytest.mark.parametrize("magic", [b"\0FOO", b"\0req", b"\0RE\0", b"\0\0\0\0"])
    def test_unknown_magic_closes(self, magic):
        check_in_all_ways(raw(PacketType.ECHO_REQ, b"x", magic), [("closed", b"INVALID_MAGIC")])

    @pytest.mark.parametrize("kind", [PacketType.ECHO_REQ, PacketType.NOOP, 0, 43, 0xFFFFFFFF])
    def test_response_to_a_server_is_an_error_and_its_body_is_skipped(self, kind):
        check_in_all_ways(raw(kind, b"a\0b\nc", RESPONSE), [("error", b"INVALID_MAGIC")])

    def test_error_says_what_gearmand_says(self):
        reader = PacketReader()
        reader.feed(raw(1, b"", RESPONSE))
        with pytest.raises(ProtocolError) as caught:
            reader.take()
        assert (caught.value.code, caught.value.text) == (b"INVALID_MAGIC", b"Request magic expected")

    @pytest.mark.parametrize("kind", [0, 43, 44, 1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    def test_unknown_type_closes(self, kind):
        check_in_all_ways(raw(kind, b"abc"), [("closed", b"INVALID_COMMAND")])

    @pytest.mark.parametrize("kind", [5, *sorted(FROM_SERVER_ONLY)])
    def test_type_that_no_client_sends_is_an_error(self, kind):
        check_in_all_ways(raw(kind, b"a\0b\0c\0d\0e\0f"), [("error", b"INVALID_COMMAND")])

    @pytest.mark.parametrize(
        "kind",
        [kind for kind in PacketType if SEPARATORS[kind] and kind not in FROM_SERVER_ONLY],
    )
    def test_body_is_never_read_beyond_its_end(self, kind):
        """Where gearmand looks for the missing NUL in the next packet, this one alone is refused."""
        for given_arguments in range(len(ARGUMENTS[kind])):
            body = b"\0".join([b"arg"] * given_arguments)
            expected: object = ("error", b"INVALID_PACKET")
            if kind in LAST_MAY_BE_MISSING and body and given_arguments == len(ARGUMENTS[kind]) - 1:
                expected = (kind, [b"arg"] * given_arguments + [b""])
            check_in_all_ways(raw(kind, body), [expected])

    @pytest.mark.parametrize("kind", sorted(LAST_MAY_BE_MISSING))
    def test_report_of_a_worker_without_its_last_argument(self, kind):
        """Perl's worker sends no NUL and no data where the result is false to Perl."""
        given = [b"H:x:1", b"2"][: len(ARGUMENTS[kind]) - 1]
        check_in_all_ways(raw(kind, b"\0".join(given)) + ECHO, [(kind, [*given, b""]), ECHO_READ])

    def test_large_body_with_too_few_arguments_is_an_error(self):
        for arguments in ([b"x" * LARGE], [b"f", b"x" * LARGE]):
            packet = raw(PacketType.SUBMIT_JOB, b"\0".join(arguments))
            assert read([packet, ECHO]) == [("error", b"INVALID_PACKET"), ECHO_READ]
            assert read([packet + ECHO + b"\0\0\0"]) == [("error", b"INVALID_PACKET"), ECHO_READ]

    def test_body_as_large_as_allowed(self):
        body = b"x" * 32
        check_in_all_ways(raw(PacketType.ECHO_REQ, body), [(PacketType.ECHO_REQ, [body])], max_body=32)

    @pytest.mark.parametrize("size", [33, 0x7FFFFFFF, 0xFFFFFFFF])
    @pytest.mark.parametrize("magic", [REQUEST, RESPONSE])
    def test_larger_body_closes_at_its_header(self, size, magic):
        header = raw(PacketType.ECHO_REQ, b"", magic, size)
        check_in_all_ways(header, [("closed", b"ARGUMENT_TOO_LARGE")], max_body=32)

    def test_request_to_a_client_is_an_error(self):
        stream = ECHO + encode_response(PacketType.NOOP)
        assert read([stream], magic=RESPONSE) == [("error", b"INVALID_MAGIC"), (PacketType.NOOP, [b""])]


class TestIncomplete:
    """PROTOCOL section 4: a size larger than what follows waits for more."""

    def test_nothing_is_incomplete_at_the_start(self):
        reader = PacketReader()
        assert reader.take() is None
        assert not reader.incomplete

    @pytest.mark.parametrize("stream", [ECHO, b"status\n"])
    def test_message_is_incomplete_from_its_first_byte_to_its_last(self, stream):
        reader = PacketReader()
        for byte in bytewise(stream[:-1]):
            reader.feed(byte)
            assert reader.take() is None
            assert reader.incomplete
        reader.feed(stream[-1:])
        assert reader.take() is not None
        assert reader.take() is None
        assert not reader.incomplete


class TestMemory:
    """DESIGN section 6: memory is taken only as bytes arrive."""

    def test_idle_reader_keeps_nothing(self):
        reader = PacketReader()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for stream in (b"x" * 8000 + b"\n", raw(PacketType.ECHO_REQ, b"x" * 1_000_000)):
                for pieces in ([stream], [stream[:5000], stream[5000:]]):
                    for piece in pieces:
                        reader.feed(piece)
                        drain(reader)
            del piece, pieces, stream
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 5_000

    def test_announced_size_takes_no_memory(self):
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            reader = PacketReader(max_body=2**32)
            reader.feed(raw(PacketType.ECHO_REQ, b"x", size=0xFFFFFFFF))
            assert reader.take() is None
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 5_000


def _packets() -> st.SearchStrategy[tuple[bytes, tuple]]:
    """A message and what is read of it."""
    argument = st.binary(max_size=12).map(lambda value: value.replace(b"\0", b"_"))

    def packet(kind: PacketType) -> st.SearchStrategy[tuple[bytes, tuple]]:
        count = len(ARGUMENTS[kind])
        arguments = st.tuples(*[argument] * max(count - 1, 0), *[st.binary(max_size=40)] * (count > 0))
        return arguments.map(lambda values: (encode_request(kind, *values), (kind, list(values) or [b""])))

    kinds = [kind for kind in PacketType if kind not in FROM_SERVER_ONLY]
    line = st.binary(max_size=40).filter(lambda value: b"\n" not in value and value[:1] != b"\0")
    return st.one_of(
        st.sampled_from(kinds).flatmap(packet),
        line.filter(lambda value: not value.endswith(b"\r")).map(
            lambda value: (value + b"\n", (TEXT, [value]))
        ),
        line.map(lambda value: (value + b"\r\n", (TEXT, [value]))),
        st.binary(max_size=20).map(lambda body: (raw(43, body, RESPONSE), ("error", b"INVALID_MAGIC"))),
        st.binary(max_size=20).map(lambda body: (raw(6, body), ("error", b"INVALID_COMMAND"))),
        argument.map(lambda body: (raw(PacketType.SUBMIT_JOB, body), ("error", b"INVALID_PACKET"))),
    )


class TestAnyOrderAndFragmentation:
    """PROTOCOL section 1: text and packets alternate on one connection, cut anywhere."""

    @settings(deadline=None)
    @given(st.lists(_packets(), max_size=12), st.data())
    def test_stream_means_the_same_however_it_is_cut(self, messages, data):
        stream = b"".join(message for message, _ in messages)
        expected = [meaning for _, meaning in messages]
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
        pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert read([piece for piece in pieces if piece]) == expected
        assert read(bytewise(stream)) == expected

    @settings(deadline=None)
    @given(st.binary(max_size=300), st.data())
    def test_no_input_ends_otherwise_than_in_an_error_of_ours(self, stream, data):
        cut = data.draw(st.integers(0, len(stream)))
        whole = read([stream], max_body=64, max_line=64)
        assert (
            read([piece for piece in (stream[:cut], stream[cut:]) if piece], max_body=64, max_line=64)
            == whole
        )
        assert read(bytewise(stream), max_body=64, max_line=64) == whole

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 45), st.binary(max_size=30)), max_size=10))
    def test_random_bodies_never_spill_into_the_next_packet(self, packets):
        known = [(kind, body) for kind, body in packets if 1 <= kind <= 42]
        stream = b"".join(raw(kind, body) + ECHO for kind, body in known)
        taken = read([stream])
        assert len(taken) == 2 * len(known)
        assert taken[1::2] == [ECHO_READ] * len(known)
