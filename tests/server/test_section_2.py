"""
Section 2: each packet by its number, bytes in and bytes out.

The packets are made here by hand, so that nothing of ours says what is right.
"""

from __future__ import annotations

import struct

import pytest

from .harness import Wire, handle


def packet(magic: bytes, number: int, arguments: tuple[bytes, ...]) -> bytes:
    body = b"\0".join(arguments)
    return magic + struct.pack(">II", number, len(body)) + body


def req(number: int, *arguments: bytes) -> bytes:
    """A request."""
    return packet(b"\0REQ", number, arguments)


def res(number: int, *arguments: bytes) -> bytes:
    """A response."""
    return packet(b"\0RES", number, arguments)


H = handle(1)
UNEXPECTED = res(19, b"INVALID_COMMAND", b"Command not expected")
NO_JOB = res(10)

Step = tuple[str, bytes, bytes]
"""Who, the bytes sent, the bytes that come back. Nothing sent: what came since."""

# A client waits for the job, a worker has it.
RUNNING: list[Step] = [
    ("client", req(7, b"f", b"u", b"w"), res(8, H)),
    ("worker", req(1, b"f") + req(30), res(31, H, b"f", b"u", b"w")),
]


def passed_on(number: int, *arguments: bytes) -> list[Step]:
    """A worker's packet of a running job reaches the client as it is, and the worker hears nothing."""
    return [
        *RUNNING,
        ("worker", req(number, H, *arguments), b""),
        ("client", b"", res(number, H, *arguments)),
    ]


def submitted(number: int, *more: bytes, foreground: bool) -> list[Step]:
    """A job is created and run; who submitted it hears of its end, or not."""
    heard = res(13, H, b"result") if foreground else b""
    return [
        ("client", req(number, b"f", b"u", *more, b"w\0w"), res(8, H)),
        ("worker", req(1, b"f") + req(30), res(31, H, b"f", b"u", b"w\0w")),
        ("worker", req(13, H, b"result"), b""),
        ("client", b"", heard),
    ]


def from_server_only(number: int) -> list[Step]:
    return [("client", req(number, b"a", b"b"), UNEXPECTED)]


ROWS: dict[int, list[Step]] = {
    1: [("worker", req(1, b"f"), b""), ("client", b"status\n", b"f\t0\t0\t1\n.\n")],
    2: [("worker", req(1, b"f") + req(2, b"f"), b""), ("client", b"status\n", b"f\t0\t0\t0\n.\n")],
    3: [
        ("worker", req(1, b"f") + req(1, b"g") + req(3), b""),
        ("client", b"status\n", b"f\t0\t0\t0\ng\t0\t0\t0\n.\n"),
    ],
    4: [
        ("worker", req(1, b"f") + req(4), b""),
        ("client", req(18, b"f", b"", b""), res(8, H)),
        ("worker", b"", res(6)),
        # Awake now, and the job waits still: NOOP at once.
        ("worker", req(4), res(6)),
    ],
    5: from_server_only(5),
    6: from_server_only(6),
    7: [
        ("client", req(26, b"exceptions"), res(27, b"exceptions")),
        *RUNNING,
        ("worker", req(12, H, b"1", b"2") + req(28, H, b"d") + req(29, H, b"w") + req(25, H, b"e"), b""),
        ("client", b"", res(12, H, b"1", b"2") + res(28, H, b"d") + res(29, H, b"w") + res(25, H, b"e")),
    ],
    8: from_server_only(8),
    9: [
        ("worker", req(1, b"f") + req(9), NO_JOB),
        ("client", req(18, b"f", b"u", b"w\0"), res(8, H)),
        ("worker", req(9), res(11, H, b"f", b"w\0")),
    ],
    10: from_server_only(10),
    11: from_server_only(11),
    12: passed_on(12, b"50", b"100"),
    13: passed_on(13, b"re\0sult"),
    14: passed_on(14),
    15: [
        *RUNNING,
        ("client", req(15, H), res(20, H, b"1", b"1", b"0", b"0")),
        ("client", req(15, b"H:no:1"), res(20, b"H:no:1", b"0", b"0", b"0", b"0")),
    ],
    16: [
        ("client", req(16, b"a\0b\n"), res(17, b"a\0b\n")),
        ("worker", req(16), res(17)),
    ],
    17: from_server_only(17),
    18: submitted(18, foreground=False),
    19: from_server_only(19),
    20: from_server_only(20),
    21: submitted(21, foreground=True),
    22: [
        ("worker", req(22, b"w 1") + req(1, b"f"), b""),
        ("client", req(22, b"c"), b""),
        ("client", b"workers\n", b"1 127.0.0.1 c :\n2 127.0.0.1 w 1 : f\n.\n"),
    ],
    23: [
        ("worker", req(23, b"f", b"1500"), b""),
        ("client", b"status\n", b"f\t0\t0\t1\n.\n"),
    ],
    # gearmand answers INVALID_COMMAND; Perl's and Java's workers send it.
    24: [("worker", req(24), b"")],
    25: [
        ("client", req(26, b"exceptions"), res(27, b"exceptions")),
        *passed_on(25, b"went\0wrong"),
    ],
    26: [
        ("client", req(26, b"exceptions"), res(27, b"exceptions")),
        ("worker", req(26, b"other"), res(19, b"UNKNOWN_OPTION", b"Server does not recognize given option")),
    ],
    27: from_server_only(27),
    28: passed_on(28, b"part\0"),
    29: passed_on(29, b"careful\0"),
    30: [
        ("worker", req(1, b"f") + req(30), NO_JOB),
        ("client", req(18, b"f", b"u", b"w"), res(8, H)),
        ("worker", req(30), res(31, H, b"f", b"u", b"w")),
    ],
    31: from_server_only(31),
    32: submitted(32, foreground=False),
    33: submitted(33, foreground=True),
    34: submitted(34, foreground=False),
    36: submitted(36, b"0", foreground=False),
    37: submitted(37, b"reducer", b"aggregate", foreground=True),
    38: submitted(38, b"reducer", b"aggregate", foreground=False),
    39: [
        ("worker", req(1, b"f") + req(39), NO_JOB),
        ("client", req(18, b"f", b"u", b"w"), res(8, H)),
        ("client", req(37, b"f", b"v", b"reducer", b"aggregate", b"w"), res(8, handle(2))),
        ("worker", req(39), res(31, H, b"f", b"u", b"w")),
        ("worker", req(39), res(40, handle(2), b"f", b"v", b"reducer", b"w")),
    ],
    40: from_server_only(40),
    41: [
        *RUNNING,
        ("worker", req(12, H, b"1", b"2"), b""),
        ("client", b"", res(12, H, b"1", b"2")),
        ("client", req(41, b"u"), res(42, b"u", b"1", b"1", b"1", b"2", b"1")),
        ("client", req(41, b"none"), res(42, b"none", b"0", b"0", b"0", b"0", b"0")),
    ],
    42: from_server_only(42),
}
"""{number of the packet: what is said, and what comes back}"""


def play(steps: list[Step]) -> None:
    """Say it, and compare; in the end both connections are alive, and nothing else was sent to them."""
    wire = Wire()
    callers = {"client": wire.connect(), "worker": wire.connect()}
    for who, sent, came in steps:
        assert callers[who].sends(sent) == came, (who, sent)
    for caller in callers.values():
        assert caller.sends(req(16, b"the end")) == res(17, b"the end")


class TestRows:
    """Section 2: the table, row by row."""

    @pytest.mark.parametrize("number", ROWS)
    def test_row(self, number: int):
        play(ROWS[number])

    def test_every_row_is_there(self):
        # SUBMIT_JOB_SCHED, 35, has its own test in test_cron.py.
        assert ROWS.keys() == set(range(1, 43)) - {35}


class TestBelowTheTable:
    """Section 2: connections have no types."""

    def test_one_connection_is_client_and_worker_and_operator(self):
        both = Wire().connect()
        assert both.sends(req(1, b"f") + req(4)) == b""
        # It sleeps, so that its own job wakes it.
        assert sorted_packets(both.sends(req(7, b"f", b"", b"w"))) == sorted_packets(res(8, H) + res(6))
        assert both.sends(b"status\n" + req(9)) == b"f\t1\t0\t1\n.\n" + res(11, H, b"f", b"w")
        assert both.sends(req(13, H, b"r")) == res(13, H, b"r")

    def test_two_workers_serve_each_other(self):
        wire = Wire()
        first, second = wire.connect(), wire.connect()
        assert first.sends(req(1, b"f") + req(7, b"g", b"", b"1")) == res(8, H)
        assert second.sends(req(1, b"g") + req(7, b"f", b"", b"2")) == res(8, handle(2))
        assert first.sends(req(9)) == res(11, handle(2), b"f", b"2")
        assert second.sends(req(9)) == res(11, H, b"g", b"1")
        assert first.sends(req(14, handle(2))) == b""
        assert second.sends(req(13, H, b"r")) == res(14, handle(2))
        assert first.sends(b"") == res(13, H, b"r")


def sorted_packets(data: bytes | None) -> list[bytes]:
    """Packets whose order does not matter."""
    assert data is not None, "the connection was closed"
    return sorted(data.split(b"\0RES"))
