"""
The end of a job that is larger than may be taken: passed over, so that others on the connection go on.

The handle stands ahead of the result, so that it is known whose it is. Only the
end of a job can be passed over: one of which a part is missing would go on as
if it was whole.

No I/O.
"""

from __future__ import annotations

from typing import Final

from ..exceptions import ConnectionLost, ProtocolError, ResultTooLarge
from ..protocol.packets import RESPONSE, PacketType
from ..protocol.reader import Packet, PacketReader
from .core import FINAL

LONGEST_HANDLE: Final = 512
"""Bytes in which the handle of a job ends, where the rest of the packet is too much."""


class LargeEnds:
    """
    Takes the place of a connection's ``PacketReader`` when that has refused something, and reads on.

    Args:
        reader: What refused it.
        error: What it raised.
        server: Where that came from.
        max_packet: Bytes of the largest packet body taken.
    Raises:
        ConnectionLost: It was something else than the end of a job that is too large.
    """

    def __init__(
        self, reader: PacketReader | LargeEnds, error: ProtocolError, server: str, max_packet: int
    ) -> None:
        self._server = server
        self._max_packet = max_packet
        self._kind = PacketType.WORK_COMPLETE
        self._left = 0
        """Bytes still to come of what is passed over."""
        self._head: bytes | None = None
        """What came of its handle; None when that is known, or nothing is passed over."""
        if error.code != b"ARGUMENT_TOO_LARGE":
            raise self._unreadable(error) from error
        assert isinstance(reader, PacketReader), "what is too large for one of these it passes over itself"
        self._reader = reader
        self._begin(error)

    @property
    def is_passing(self) -> bool:
        """Whether more is to come of what is passed over."""
        return self._left > 0

    def feed(self, data: bytes) -> None:
        """As ``PacketReader.feed``."""
        if self._left:
            if self._head is not None:
                self._head += data[: min(self._left, LONGEST_HANDLE)]
            after = data[self._left :]
            self._left -= len(data) - len(after)
            data = after
        if data:
            self._reader.feed(data)

    def take(self) -> Packet | None:
        """
        As ``PacketReader.take``.

        Raises:
            ResultTooLarge: Its ``end`` is passed over: take the next. None: as ``ConnectionLost``.
            ConnectionLost: Close the connection.
        """
        if self._head is None and not self._left:
            try:
                return self._reader.take()
            except ProtocolError as error:
                self._begin(error)
        if self._head is not None:
            handle, nul, _ = self._head.partition(b"\0")
            too_large = ResultTooLarge(self._server, self._max_packet)
            if nul:
                self._head = None
                too_large.end = self._kind, handle
                raise too_large
            if len(self._head) >= LONGEST_HANDLE or not self._left:
                raise too_large
        return None

    def _begin(self, error: ProtocolError) -> None:
        """Pass over what the reader has refused, if that can be done."""
        lost = self._unreadable(error)
        if not isinstance(lost, ResultTooLarge):
            raise lost from error
        kind, size, data = self._reader.too_large()
        if kind not in FINAL:
            raise lost from error
        self._reader = PacketReader(RESPONSE, max_body=self._max_packet)
        self._kind, self._left, self._head = PacketType(kind), size, b""
        self.feed(data)

    def _unreadable(self, error: ProtocolError) -> ConnectionLost:
        if error.code == b"ARGUMENT_TOO_LARGE":
            return ResultTooLarge(self._server, self._max_packet)
        return ConnectionLost(self._server, f"it speaks no Gearman: {error}")
