"""A job server without sockets: peers that say packets and hear packets."""

from __future__ import annotations

from typing import Any

from django_gearman.exceptions import ProtocolError, UnreadableStream
from django_gearman.protocol.packets import RESPONSE, PacketType, encode_request
from django_gearman.protocol.reader import TEXT, PacketReader
from django_gearman.server import text
from django_gearman.server.core import JobServer
from django_gearman.server.entries import Entry
from django_gearman.server.options import ServerOptions
from django_gearman.server.peers import Peer

Heard = tuple[Any, ...]
"""(type, argument, ...); a type without arguments stands alone."""


def handle(number: int) -> bytes:
    """Handle of the ``number``-th job that a ``Wire`` makes, from 1."""
    return b"H:test:1:7.%d" % number


class Caller:
    """One connection to the server under test."""

    def __init__(self, wire: Wire, peer: Peer) -> None:
        self.wire = wire
        self.peer = peer
        self._reader = PacketReader(RESPONSE)
        self._requests = PacketReader()
        self.woken = False
        """Whether it was told of a job when it was about to sleep; for tests that look."""

    def __call__(self, kind: PacketType, *arguments: bytes) -> list[Heard]:
        """Say one packet; what the connection hears then."""
        self._requests.feed(encode_request(kind, *arguments))
        packet = self._requests.take()
        assert packet is not None, "encode_request makes whole packets"
        self.wire.core.receive(self.peer, packet)
        return self.hears()

    def sends(self, data: bytes) -> bytes | None:
        """Send bytes, packets and lines; the bytes that come back, None when it would be closed."""
        reader = self._requests
        reader.feed(data)
        while True:
            try:
                packet = reader.take()
            except UnreadableStream:
                return None
            except ProtocolError as error:
                self.wire.core.refuse(self.peer, error.code, error.text)
                continue
            if packet is None:
                return self.takes()
            if packet[0] != TEXT:
                self.wire.core.receive(self.peer, packet)
                continue
            answer = text.answer(self.wire.core, self.peer, packet[1][0])
            if answer is None:
                return None
            self.wire.core.send(self.peer, answer)

    def takes(self) -> bytes:
        """The bytes that were left for the connection since it was last asked."""
        self.wire.core.serve_woken()
        if self.peer.output:
            core = self.wire.core
            told = core.patient if self.peer.is_patient else core.dirty
            assert self.peer in told, "the shell would not know that there is output"
        output, self.peer.output = self.peer.output, []
        return b"".join(output)

    def hears(self) -> list[Heard]:
        """The packets that were left for the connection since it was last asked."""
        self._reader.feed(self.takes())
        heard = []
        while (packet := self._reader.take()) is not None:
            kind, arguments = packet
            heard.append((PacketType(kind), *(arguments if arguments != [b""] else [])))
        return heard

    def line(self, line: bytes) -> bytes | None:
        """Say one line of text; what comes back, None when the connection would be closed."""
        answer = text.answer(self.wire.core, self.peer, line)
        if answer is None:
            return None
        self.wire.core.send(self.peer, answer)
        return self.takes()

    def leaves(self) -> None:
        self.wire.core.disconnected(self.peer)

    def sleeps(self, *functions: bytes) -> Caller:
        """Offer functions and fall asleep."""
        for function in functions:
            assert self(PacketType.CAN_DO, function) == []
        assert self(PacketType.PRE_SLEEP) == []
        return self

    def grabs(self) -> bytes | None:
        """Grab a job; its handle, or None when there is none."""
        (heard,) = self(PacketType.GRAB_JOB)
        assert heard[0] in (PacketType.JOB_ASSIGN, PacketType.NO_JOB)
        return heard[1] if heard[0] == PacketType.JOB_ASSIGN else None


class Wire:
    """The core with a scripted world around it; the options are ``ServerOptions``."""

    def __init__(self, core: JobServer | None = None, **options: Any) -> None:
        self.core = core or JobServer(ServerOptions(name="test:1", epoch=7, **options))
        self.core.now = 1000.0
        self._number = 0

    def connect(self, address: str = "127.0.0.1") -> Caller:
        self._number += 1
        return Caller(self, self.core.connected(self._number, address))

    def worker(self, *functions: bytes) -> Caller:
        caller = self.connect()
        for function in functions:
            assert caller(PacketType.CAN_DO, function) == []
        return caller

    def entries(self) -> list[Entry]:
        """What the journal is to write since it was last asked."""
        entries, self.core.entries = self.core.entries, []
        return entries

    def commit(self) -> list[Entry]:
        """Let the journal write all that there is."""
        entries = self.entries()
        self.core.committed(entries)
        return entries
