"""The table of packets, and what ``encode_*`` make of it."""

import pytest

from django_gearman.protocol.packets import (
    ARGUMENTS,
    FROM_SERVER_ONLY,
    HIGHEST_TYPE,
    REQUEST,
    RESPONSE,
    SEPARATORS,
    PacketType,
    encode_request,
    encode_response,
)
from django_gearman.protocol.reader import PacketReader


def sample(kind: PacketType) -> list[bytes]:
    """Arguments for a packet of that type; the last one holds what only a last one may."""
    arguments = [name.encode() for name in ARGUMENTS[kind]]
    if arguments:
        arguments[-1] += b"\0\xff\n\0"
    return arguments


class TestTable:
    """PROTOCOL section 2."""

    def test_every_type_has_its_number(self):
        assert [kind.value for kind in PacketType] == [*range(1, 5), *range(6, 43)]

    def test_every_type_has_its_arguments(self):
        assert set(ARGUMENTS) == set(PacketType)

    @pytest.mark.parametrize(
        ("kind", "separators"),
        [
            (PacketType.PRE_SLEEP, 0),
            (PacketType.CAN_DO, 0),
            (PacketType.SUBMIT_JOB, 2),
            (PacketType.WORK_STATUS, 2),
            (PacketType.STATUS_RES, 4),
            (PacketType.SUBMIT_JOB_SCHED, 7),
            (PacketType.SUBMIT_JOB_EPOCH, 3),
            (PacketType.SUBMIT_REDUCE_JOB, 4),
            (PacketType.JOB_ASSIGN_ALL, 4),
            (PacketType.STATUS_RES_UNIQUE, 5),
        ],
    )
    def test_every_argument_but_the_last_ends_with_one_nul(self, kind, separators):
        assert SEPARATORS[kind] == separators

    def test_numbers_without_a_type_have_no_separators(self):
        assert [number for number in range(HIGHEST_TYPE + 1) if SEPARATORS[number] is None] == [0, 5]

    def test_what_only_a_server_sends(self):
        assert {kind.value for kind in FROM_SERVER_ONLY} == {6, 8, 10, 11, 17, 19, 20, 27, 31, 40, 42}


class TestEncoding:
    """PROTOCOL section 1: magic, type and size, big-endian; then the arguments."""

    def test_request_to_the_byte(self):
        packet = encode_request(PacketType.SUBMIT_JOB, b"reverse", b"", b"a\0b")
        assert packet == b"\0REQ" + b"\0\0\0\x07" + b"\0\0\0\x0c" + b"reverse\0\0a\0b"

    def test_response_to_the_byte(self):
        packet = encode_response(PacketType.JOB_CREATED, b"H:a:1")
        assert packet == b"\0RES" + b"\0\0\0\x08" + b"\0\0\0\x05" + b"H:a:1"

    def test_packet_without_arguments_has_no_body(self):
        assert encode_response(PacketType.NOOP) == b"\0RES\0\0\0\x06\0\0\0\0"

    @pytest.mark.parametrize("kind", [kind for kind in PacketType if kind not in FROM_SERVER_ONLY])
    def test_request_is_read_back_by_a_server(self, kind):
        reader = PacketReader(REQUEST)
        reader.feed(encode_request(kind, *sample(kind)))
        # An empty body splits into one empty argument: handlers of such types do not look at it.
        assert reader.take() == (kind, sample(kind) or [b""])
        assert reader.take() is None

    @pytest.mark.parametrize("kind", list(PacketType))
    def test_response_is_read_back_by_a_client(self, kind):
        reader = PacketReader(RESPONSE)
        reader.feed(encode_response(kind, *sample(kind)))
        assert reader.take() == (kind, sample(kind) or [b""])
        assert reader.take() is None
