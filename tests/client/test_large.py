"""Ends of jobs that are larger than may be taken, without a connection."""

from __future__ import annotations

from typing import Any

import pytest

from django_gearman.client.large import LONGEST_HANDLE, LargeEnds
from django_gearman.exceptions import ConnectionLost, ProtocolError, ResultTooLarge
from django_gearman.protocol.packets import RESPONSE, PacketType, encode_response
from django_gearman.protocol.reader import PacketReader

P = PacketType
SMALL = encode_response(P.WORK_COMPLETE, b"H:2", b"small")


def read(data: bytes, step: int, max_packet: int = 20) -> list[Any]:
    """What comes of data that is received in such steps: packets, and the ends that were passed over."""
    reader: PacketReader | LargeEnds = PacketReader(RESPONSE, max_body=max_packet)
    found: list[Any] = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        while True:
            try:
                packet = reader.take()
            except ProtocolError as error:
                reader = LargeEnds(reader, error, "server:1", max_packet)
                continue
            except ResultTooLarge as error:
                if error.end is None:
                    raise
                found.append(error.end)
                continue
            if packet is None:
                break
            found.append(packet)
    assert not (isinstance(reader, LargeEnds) and reader.is_passing)
    return found


@pytest.mark.parametrize("step", [*range(1, 40), 10_000])
class TestLargeEnds:
    def test_they_are_passed_over(self, step: int) -> None:
        large = [
            encode_response(kind, b"H:%d" % kind, b"x" * 1000) for kind in (P.WORK_COMPLETE, P.WORK_EXCEPTION)
        ]
        small = (P.WORK_COMPLETE, [b"H:2", b"small"])
        assert read(SMALL + large[0] + SMALL + large[1] + large[0] + SMALL, step) == [
            small,
            (P.WORK_COMPLETE, b"H:13"),
            small,
            (P.WORK_EXCEPTION, b"H:25"),
            (P.WORK_COMPLETE, b"H:13"),
            small,
        ]

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(encode_response(P.WORK_DATA, b"H:1", b"x" * 1000), id="a part"),
            pytest.param(encode_response(P.WORK_COMPLETE, b"H" * (LONGEST_HANDLE + 40), b""), id="whose?"),
            pytest.param(encode_response(P.WORK_FAIL, b"H" * 40), id="no more than a handle"),
        ],
    )
    def test_others_are_not(self, step: int, data: bytes) -> None:
        with pytest.raises(ResultTooLarge) as caught:
            read(SMALL + data, step)
        assert caught.value.end is None
        # Another one went before.
        with pytest.raises(ResultTooLarge) as caught:
            read(encode_response(P.WORK_COMPLETE, b"H:1", b"x" * 1000) + data, step)
        assert caught.value.end is None

    def test_nonsense(self, step: int) -> None:
        large = encode_response(P.WORK_COMPLETE, b"H:1", b"x" * 1000)
        for data in (SMALL, large):
            with pytest.raises(ConnectionLost, match="speaks no Gearman"):
                read(data + b"HTTP/1.1 400 Bad Request\r\n", step)
