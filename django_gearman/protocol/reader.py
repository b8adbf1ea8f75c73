"""
Bytes to packets: the one place that takes a Gearman stream apart.

Knows how long things may be and what a body of each type looks like, and
nothing of what packets mean. One port serves two languages: the first byte of
each *message* tells a binary packet (NUL) from a line of text (PROTOCOL:
"Administrative Protocol"), in any order on one connection.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ..exceptions import ProtocolError, UnreadableStream
from .packets import (
    FROM_SERVER_ONLY,
    HEADER_SIZE,
    HIGHEST_TYPE,
    LAST_MAY_BE_MISSING,
    REQUEST,
    RESPONSE,
    SEPARATORS,
)

TEXT: Final = 0
"""The type given with a line of text; no packet has it."""

Packet = tuple[int, list[bytes]]
"""A type and its arguments; for ``TEXT`` the line, without its line end, is the one argument."""

MAX_BODY: Final = 64 * 1024 * 1024
MAX_LINE: Final = 8 * 1024

# From here on a body's arguments are cut out one by one: splitting would copy the large one twice.
_LARGE = 64 * 1024

_unpack_header = Struct(">4sII").unpack_from


class PacketReader:
    """
    Feed it bytes as they come, take packets as they are whole.

    Args:
        magic: What packets must begin with: ``REQUEST`` at a server, ``RESPONSE`` at a client or worker.
        max_body: Bytes that a packet's body may have. Memory is taken only as bytes arrive.
        max_line: Bytes that a line of text may have, line end included.
    """

    __slots__ = ("_buffer", "_magic", "_max_body", "_max_line", "_needed", "_offset", "_partial", "_server")

    def __init__(self, magic: bytes = REQUEST, *, max_body: int = MAX_BODY, max_line: int = MAX_LINE) -> None:
        self._magic = magic
        self._server = magic == REQUEST
        self._max_body = max_body
        self._max_line = max_line
        self._buffer = b""
        self._offset = 0
        # A message that came in parts gathers here until ``_needed`` bytes are there.
        self._partial: bytearray | None = None
        self._needed = 0

    @property
    def incomplete(self) -> bool:
        """Whether a message has begun and not ended, once ``take`` has returned None."""
        return self._partial is not None

    def feed(self, data: bytes) -> None:
        """Add what was received. Take packets until there are none before feeding again."""
        partial = self._partial
        if partial is None:
            if self._offset < len(self._buffer):
                data = self._buffer[self._offset :] + data
            self._buffer = data
        else:
            partial += data
            if len(partial) < self._needed:
                return
            self._buffer = bytes(partial)
            self._partial = None
        self._offset = 0

    def take(self) -> Packet | None:
        """
        The next whole message; None when more bytes are needed.

        Raises:
            ProtocolError: The message is wrong and was skipped; answer ERROR and take the next.
            UnreadableStream: Close the connection; the reader must not be used again.
        PROTOCOL: "Binary Packet".
        """
        if self._partial is not None:
            return None
        buffer = self._buffer
        offset = self._offset
        available = len(buffer) - offset
        if available < HEADER_SIZE:
            if available == 0:
                # An idle connection must not hold on to what it last received.
                self._buffer = b""
                self._offset = 0
                return None
            if buffer[offset] != 0:
                return self._take_line()
            self._wait_for(HEADER_SIZE)
            return None
        if buffer[offset] != 0:
            return self._take_line()
        magic, kind, size = _unpack_header(buffer, offset)
        if magic != self._magic:
            if magic not in (REQUEST, RESPONSE):
                raise UnreadableStream(b"INVALID_MAGIC", b"Neither a packet nor a line of text")
        elif kind > HIGHEST_TYPE or (SEPARATORS[kind] is None and kind != 5):
            # PROTOCOL leaves it open; gearmand closes on types that it never heard of.
            raise UnreadableStream(b"INVALID_COMMAND", b"No such packet type")
        if size > self._max_body:
            raise UnreadableStream(b"ARGUMENT_TOO_LARGE", b"Packet larger than this server takes")
        end = offset + HEADER_SIZE + size
        if end > len(buffer):
            self._wait_for(HEADER_SIZE + size)
            return None
        self._offset = end
        if magic != self._magic:
            raise ProtocolError(b"INVALID_MAGIC", b"Request magic expected")
        if self._server and kind in FROM_SERVER_ONLY:
            raise ProtocolError(b"INVALID_COMMAND", b"Command not expected")
        separators = SEPARATORS[kind]
        if separators is None:
            raise ProtocolError(b"INVALID_COMMAND", b"Command not expected")
        start = offset + HEADER_SIZE
        if size < _LARGE:
            arguments = buffer[start:end].split(b"\0", separators)
        else:
            arguments = self._cut(start, end, separators)
        if len(arguments) <= separators:
            if self._server and size and len(arguments) == separators and kind in LAST_MAY_BE_MISSING:
                return kind, [*arguments, b""]
            raise ProtocolError(b"INVALID_PACKET", b"Too few arguments in the packet")
        return kind, arguments

    def too_large(self) -> tuple[int, int, bytes]:
        """
        Of the packet whose size ``take`` refused: its type, that size, and all that came after its header.

        The reader must not be used again all the same.
        """
        _, kind, size = _unpack_header(self._buffer, self._offset)
        return kind, size, self._buffer[self._offset + HEADER_SIZE :]

    def _cut(self, start: int, end: int, separators: int) -> list[bytes]:
        arguments = []
        for _ in range(separators):
            nul = self._buffer.find(b"\0", start, end)
            if nul < 0:
                break
            arguments.append(self._buffer[start:nul])
            start = nul + 1
        arguments.append(self._buffer[start:end])
        return arguments

    def _take_line(self) -> Packet | None:
        if not self._server:
            raise UnreadableStream(b"INVALID_MAGIC", b"Response magic expected")
        end = self._buffer.find(b"\n", self._offset, self._offset + self._max_line)
        if end < 0:
            if len(self._buffer) - self._offset >= self._max_line:
                raise UnreadableStream(b"ARGUMENT_TOO_LARGE", b"Line longer than this server takes")
            # A line says nothing of its length, so every new byte has to be looked at.
            self._wait_for(len(self._buffer) - self._offset + 1)
            return None
        line = self._buffer[self._offset : end]
        self._offset = end + 1
        return TEXT, [line.removesuffix(b"\r")]

    def _wait_for(self, needed: int) -> None:
        self._partial = bytearray(self._buffer[self._offset :])
        self._needed = needed
        self._buffer = b""
        self._offset = 0
