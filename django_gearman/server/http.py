"""
The HTTP door: requests that submit jobs, and the replies that end them.

Bytes in, submissions out; the core's packets in, bytes of replies out. No
sockets, no asyncio, no clock. One request at a time: what a client sends after
it waits until it is answered. Browsers are not served at all, so that no page
that somebody looks at can submit jobs to a server on their own machine.

A reader of HTTP that is lenient invites others to read the same bytes in
another way (request smuggling). This one takes what RFC 9112 says and no more:
lines end with CRLF, a body has one length, and whatever is doubtful is refused
and ends the connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from email.utils import formatdate
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final
from urllib.parse import unquote_to_bytes

from ..protocol.packets import PacketType
from ..protocol.reader import MAX_BODY, Packet
from .metrics import CONTENT_TYPE

MAX_LINE: Final = 8 * 1024
"""Bytes of the request line, of a header, and of a chunk's head."""

MAX_HEADERS: Final = 64
MAX_HEADER_BYTES: Final = 16 * 1024
"""Bytes of all headers of a request, trailers included."""

MAX_AHEAD: Final = 64 * 1024
"""Bytes to take of later requests while one is answered; above it, read no more."""

LINES_PER_TURN: Final = 200
"""Lines and chunks of one connection that are read before others have their turn."""

METHODS: Final = (b"GET", b"HEAD", b"POST", b"PUT")

# Of Sec-Fetch-* only this one: Node's fetch() sends Sec-Fetch-Mode.
_FROM_BROWSERS: Final = frozenset({b"origin", b"referer", b"sec-fetch-site"})

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_request_line = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")
# Spaces around the value are cut off afterwards: a pattern for them could be made to try for minutes.
_header = re.compile(rb"(" + _TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)")
_chunk = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_length = re.compile(rb"[0-9]{1,19}")
_bad_escape = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_authority = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^:\[\]@/]+)(?::[0-9]{0,5})?")

_SUBMISSIONS: Final = {
    (b"normal", False): PacketType.SUBMIT_JOB,
    (b"high", False): PacketType.SUBMIT_JOB_HIGH,
    (b"low", False): PacketType.SUBMIT_JOB_LOW,
    (b"normal", True): PacketType.SUBMIT_JOB_BG,
    (b"high", True): PacketType.SUBMIT_JOB_HIGH_BG,
    (b"low", True): PacketType.SUBMIT_JOB_LOW_BG,
}

# What the reader waits for.
_REQUEST, _HEADERS, _BODY, _CHUNK, _CHUNK_DATA, _TRAILERS = range(6)


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        self.status = status
        self.reason = reason
        """A sentence of ours, without a word of the client's: it goes into the log."""


class Conversation:
    """
    One connection of an HTTP client.

    ``feed`` bytes, ``take`` a submission and hand it to the core, let it ``hear``
    what the core answers; after each, send ``output``. Once ``closed``, nothing
    follows the output, and what still comes is not for us.

    Args:
        max_body: Bytes of function, unique and workload together, and of a reply's body.
        hosts: Names that requests may call this server by, beside ``localhost`` and any IP address.
    """

    __slots__ = (
        "_background",
        "_body",
        "_buffer",
        "_handle",
        "_head_only",
        "_header_bytes",
        "_headers",
        "_hosts",
        "_keep_alive",
        "_kind",
        "_line",
        "_max_body",
        "_missing",
        "_name",
        "_parts",
        "_parts_size",
        "_seen",
        "_state",
        "_unique",
        "busy",
        "closed",
        "more",
        "now",
        "output",
        "refusal",
    )

    _text_type = "text/plain; charset=utf-8"
    _methods: tuple[bytes, ...] = METHODS

    def __init__(self, *, max_body: int = MAX_BODY, hosts: Collection[str] = ()) -> None:
        self._max_body = max_body
        self._hosts = {b"localhost", *(host.lower().encode() for host in hosts)}
        self._buffer = bytearray()
        self.output: list[bytes] = []
        """What is to be sent."""
        self.busy = False
        """Whether a submission waits for the core's answer."""
        self.more = False
        """Whether ``take`` stopped before it had read all that is there, so that others have their turn."""
        self.closed = False
        self.refusal: str | None = None
        """Why the connection was closed, in words of ours; None when it ended as it should."""
        self.now = 0.0
        """Seconds since 1970, for the header Date; the shell sets it."""
        self._reset()

    def _reset(self) -> None:
        self._state = _REQUEST
        self._seen = 0
        """Bytes of the buffer in which no line end was found."""
        self._line: re.Match[bytes] | None = None
        self._headers: dict[bytes, list[bytes]] = {}
        self._header_bytes = 0
        self._head_only = False
        self._keep_alive = False
        self._kind = PacketType.SUBMIT_JOB
        self._background = False
        self._name = b""
        self._unique = b""
        self._body = bytearray()
        """What came in chunks so far."""
        self._missing = 0
        """Bytes to come, of the body or of a chunk with its line end."""
        self._handle: bytes | None = None
        self._parts: list[bytes] = []
        """What the worker sent before its result."""
        self._parts_size = 0

    @property
    def incomplete(self) -> bool:
        """Whether a request has begun and not come to its end."""
        return not self.busy and not self.closed and (self._state != _REQUEST or bool(self._buffer))

    @property
    def ahead(self) -> int:
        """Bytes that came and were not looked at."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        if not self.closed:
            self._buffer += data

    def take(self) -> Packet | None:
        """The next submission as a packet; None when none is there, or one is under way."""
        self.more = False
        if self.busy or self.closed:
            return None
        try:
            workload = self._read()
        except _Refused as refused:
            self._refuse(refused.status, refused.reason)
            return None
        if workload is None:
            return None
        self.busy = True
        self._body = bytearray()
        return self._kind, [self._name, self._unique, workload]

    def expire(self) -> None:
        """The client took too long: tell it, if it had begun, and close."""
        if self.incomplete:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive")
        self.closed = True

    def end(self) -> None:
        """The server stops: say so to a client that waits."""
        if self.busy:
            self._keep_alive = False
            self._reply(
                HTTPStatus.SERVICE_UNAVAILABLE, None, b"The server stopped before the job ended.\n", text=True
            )
        self.closed = True

    # Bytes to submissions.

    def _read(self) -> bytes | None:
        """The workload, once the request is whole."""
        for _ in range(LINES_PER_TURN):
            if self._state == _BODY:
                return self._cut() if len(self._buffer) >= self._missing else None
            if self._state == _CHUNK_DATA:
                if len(self._buffer) < self._missing:
                    return None
                data = self._cut()
                if data[-2:] != b"\r\n":
                    raise _Refused(HTTPStatus.BAD_REQUEST, "A chunk does not end where it says")
                self._body += memoryview(data)[:-2]
                self._state = _CHUNK
                continue
            line = self._read_line()
            if line is None:
                return None
            if self._state == _REQUEST:
                # Empty lines before a request are passed over, as RFC 9112 (2.2) wants.
                if line:
                    self._begin(line)
            elif self._state == _CHUNK:
                self._begin_chunk(line)
            elif line:
                self._add_header(line)
            elif self._state == _TRAILERS:
                return bytes(self._body)
            else:
                self._end_headers()
        self.more = True
        return None

    def _cut(self) -> bytes:
        size = self._missing
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        del self._buffer[:size]
        return data

    def _read_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._seen, MAX_LINE)
        if end < 0:
            self._seen = len(self._buffer)
            if self._seen < MAX_LINE:
                return None
            if self._state == _REQUEST:
                raise _Refused(HTTPStatus.REQUEST_URI_TOO_LONG, "The request line is too long")
            if self._state == _CHUNK:
                raise _Refused(HTTPStatus.BAD_REQUEST, "A chunk is malformed")
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "A header is too long")
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        self._seen = 0
        if line[-2:] != b"\r\n":
            raise _Refused(HTTPStatus.BAD_REQUEST, "Lines end with CR and LF")
        return line[:-2]

    def _begin(self, line: bytes) -> None:
        self._line = _request_line.fullmatch(line)
        if self._line is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "This is no request line of HTTP")
        if self._line[3] != b"1":
            raise _Refused(
                HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "Only HTTP/1.0 and HTTP/1.1 are spoken here"
            )
        self._head_only = self._line[1] == b"HEAD"
        self._state = _HEADERS

    def _add_header(self, line: bytes) -> None:
        found = _header.fullmatch(line)
        if found is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "A header is malformed")
        values = self._headers.setdefault(found[1].lower(), [])
        values.append(found[2].strip(b" \t"))
        self._header_bytes += len(line) + 2
        if sum(map(len, self._headers.values())) > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers are too many or too long")

    def _end_headers(self) -> None:
        assert self._line is not None, "headers follow a request line"
        modern = self._line[4] != b"0"
        options = {
            word.strip().lower()
            for value in self._headers.get(b"connection", [])
            for word in value.split(b",")
        }
        length = self._length_of_body(modern=modern)
        target = self._check_origin(self._line[2], modern=modern)
        if self._line[1] not in METHODS:
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Jobs are submitted by GET, HEAD, POST or PUT")
        self._name = _function_of(target)
        # As gearmand: without a unique, equal requests share a job.
        unique = self._single(b"x-gearman-unique")
        self._unique = b"-" if unique is None else unique
        background = self._choice(b"x-gearman-background", (b"false", b"true")) == b"true"
        priority = self._choice(b"x-gearman-priority", (b"normal", b"high", b"low"))
        self._kind = _SUBMISSIONS[priority, background]
        self._background = background
        if length is None and b"transfer-encoding" not in self._headers:
            if self._line[1] in (b"POST", b"PUT"):
                raise _Refused(HTTPStatus.LENGTH_REQUIRED, "A body needs Content-Length, or to be chunked")
            length = 0
        if length != 0 and self._line[1] in (b"GET", b"HEAD"):
            # Others on the way may not have seen one.
            raise _Refused(HTTPStatus.BAD_REQUEST, "GET and HEAD have no body; use POST")
        self._check_size(length or 0)
        # Only now: a request that was refused has no say in it.
        self._keep_alive = b"close" not in options and (modern or b"keep-alive" in options)
        expected = self._single(b"expect")
        if expected is not None and modern:
            if expected.lower() != b"100-continue":
                raise _Refused(HTTPStatus.EXPECTATION_FAILED, "Only 100-continue can be expected")
            if length != 0 and not self._buffer:
                self.output.append(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is None:
            self._state = _CHUNK
        else:
            self._state = _BODY
            self._missing = length

    def _length_of_body(self, *, modern: bool) -> int | None:
        """Bytes; None when nothing says so or the body comes in chunks."""
        lengths = self._headers.get(b"content-length", [])
        codings = self._headers.get(b"transfer-encoding", [])
        if codings:
            if lengths or not modern:
                raise _Refused(HTTPStatus.BAD_REQUEST, "A body has Content-Length or Transfer-Encoding")
            if [coding.lower() for coding in codings] != [b"chunked"]:
                raise _Refused(HTTPStatus.NOT_IMPLEMENTED, "The only Transfer-Encoding is chunked")
            return None
        if not lengths:
            return None
        if len(lengths) > 1 or _length.fullmatch(lengths[0]) is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "Content-Length is one number")
        return int(lengths[0])

    def _check_origin(self, target: bytes, *, modern: bool) -> bytes:
        """
        Refuse what a browser sends, and names that are not ours; the target's path and query.

        A page may have a browser send requests to this machine, but cannot keep
        it from giving itself away: every browser names itself Mozilla, whatever
        else it leaves out. A page could have its own name lead to this machine
        (DNS rebinding); then Host has that name.
        """
        agents = self._headers.get(b"user-agent", [])
        if not _FROM_BROWSERS.isdisjoint(self._headers) or any(a[:8].lower() == b"mozilla/" for a in agents):
            raise _Refused(HTTPStatus.FORBIDDEN, "Browsers are not served")
        hosts = self._headers.get(b"host", [])
        if len(hosts) > 1 or (modern and not hosts):
            raise _Refused(HTTPStatus.BAD_REQUEST, "A request has one Host")
        if target[:7].lower() == b"http://":
            authority, _, path = target[7:].partition(b"/")
            hosts = [*hosts, authority]
            target = b"/" + path
        if not all(self._is_ours(host) for host in hosts):
            raise _Refused(HTTPStatus.FORBIDDEN, "Host is no name of this server; see --http-host")
        return target

    def _is_ours(self, authority: bytes) -> bool:
        found = _authority.fullmatch(authority)
        if found is None:
            return False
        host = found[1].lower()
        if host in self._hosts:
            return True
        try:
            # An address is nobody's name: it cannot be made to lead here.
            ip_address(host.strip(b"[]").decode())
        except ValueError:
            return False
        return True

    def _single(self, name: bytes) -> bytes | None:
        values = self._headers.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise _Refused(HTTPStatus.BAD_REQUEST, "A header that has one value has two")
        return values[0]

    def _choice(self, name: bytes, choices: tuple[bytes, ...]) -> bytes:
        """The header's value in small letters; the first choice when there is none."""
        value = self._single(name)
        if value is None:
            return choices[0]
        if value.lower() not in choices:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"{name.decode()} is {b' or '.join(choices).decode()}")
        return value.lower()

    def _check_size(self, workload: int) -> None:
        # As one packet would be counted.
        if len(self._name) + len(self._unique) + 2 + workload > self._max_body:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is larger than this server takes")

    def _begin_chunk(self, line: bytes) -> None:
        found = _chunk.fullmatch(line)
        if found is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "A chunk is malformed")
        size = int(found[1], 16)
        self._check_size(len(self._body) + size)
        if size:
            self._state = _CHUNK_DATA
            self._missing = size + 2
        else:
            self._state = _TRAILERS

    # Packets to replies.

    def hear(self, packet: Packet) -> None:
        """The core said this to the client. Status and warnings have no place in a reply, and are dropped."""
        if not self.busy or self.closed:
            return
        kind, arguments = packet
        if kind == PacketType.JOB_CREATED:
            self._handle = arguments[0]
            if self._background:
                self._reply(HTTPStatus.ACCEPTED, PacketType.JOB_CREATED)
        elif kind == PacketType.WORK_DATA:
            self._add_part(arguments[1])
        elif kind == PacketType.WORK_COMPLETE:
            self._add_part(arguments[1])
            if self.busy:
                self._reply(HTTPStatus.OK, PacketType.WORK_COMPLETE, b"".join(self._parts))
        elif kind == PacketType.WORK_FAIL:
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, PacketType.WORK_FAIL)
        elif kind == PacketType.WORK_EXCEPTION:
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, PacketType.WORK_EXCEPTION, arguments[1])
        elif kind == PacketType.ERROR:
            full = arguments[0] == b"QUEUE_ERROR"
            status = HTTPStatus.SERVICE_UNAVAILABLE if full else HTTPStatus.BAD_REQUEST
            self._reply(status, PacketType.ERROR, b"%s: %s\n" % (arguments[0], arguments[1]), text=True)

    def _add_part(self, data: bytes) -> None:
        if data:
            self._parts.append(data)
            self._parts_size += len(data)
        if self._parts_size > self._max_body:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "The job sent more data than a reply may have")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Reply, and close: where the next request begins is not known, or not to be trusted."""
        self.refusal = reason
        self._keep_alive = False
        self._reply(status, None, f"{reason}.\n".encode(), text=True)

    def _reply(
        self, status: HTTPStatus, command: PacketType | None, body: bytes = b"", *, text: bool = False
    ) -> None:
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Date: {formatdate(self.now, usegmt=True)}",
            f"Content-Type: {self._text_type if text else 'application/octet-stream'}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            f"Connection: {'keep-alive' if self._keep_alive else 'close'}",
        ]
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append(f"Allow: {b', '.join(self._methods).decode()}")
        if self._handle is not None:
            lines.append(f"X-Gearman-Job-Handle: {_visible(self._handle)}")
        if command is not None:
            lines.append(f"X-Gearman-Command: {command.name}")
        self.output.append("\r\n".join([*lines, "", ""]).encode("ascii"))
        if body and not self._head_only:
            self.output.append(body)
        self.closed = not self._keep_alive
        self.busy = False
        self._reset()
        if self.closed:
            self._buffer.clear()


class MetricsConversation(Conversation):
    """
    One connection to the port of the metrics: ``GET /metrics``, and nothing else.

    Browsers are served, under our own names: there is nothing to submit.

    Args:
        page: Makes the page as it is now.
    """

    __slots__ = ("_page",)

    _text_type = CONTENT_TYPE
    _methods = METHODS[:2]

    def __init__(self, page: Callable[[], bytes], *, hosts: Collection[str] = ()) -> None:
        super().__init__(max_body=0, hosts=hosts)
        self._page = page

    def take(self) -> Packet | None:
        if not self.closed:
            try:
                if self._read() is not None:
                    self._reply(HTTPStatus.OK, None, self._page(), text=True)
            except _Refused as refused:
                self._refuse(refused.status, refused.reason)
        return None

    def _end_headers(self) -> None:
        assert self._line is not None, "headers follow a request line"
        modern = self._line[4] != b"0"
        hosts = self._headers.get(b"host", [])
        if len(hosts) > 1 or (modern and not hosts):
            raise _Refused(HTTPStatus.BAD_REQUEST, "A request has one Host")
        if not all(self._is_ours(host) for host in hosts):
            raise _Refused(HTTPStatus.FORBIDDEN, "Host is no name of this server; see --http-host")
        if self._line[1] not in self._methods:
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "The metrics are there to GET")
        if self._length_of_body(modern=modern) or b"transfer-encoding" in self._headers:
            raise _Refused(HTTPStatus.BAD_REQUEST, "GET and HEAD have no body")
        if self._line[2].partition(b"?")[0] != b"/metrics":
            raise _Refused(HTTPStatus.NOT_FOUND, "The metrics are at /metrics")
        # Never kept alive: who asks again and again does not wait for what was asked before.
        self._state = _BODY
        self._missing = 0


def _function_of(target: bytes) -> bytes:
    """All of path and query, as gearmand takes it, but with its escapes read."""
    if not target.startswith(b"/") or _bad_escape.search(target):
        raise _Refused(HTTPStatus.BAD_REQUEST, "The path is malformed")
    name = unquote_to_bytes(target.lstrip(b"/"))
    if not name:
        raise _Refused(HTTPStatus.NOT_FOUND, "The path is a function's name")
    return name


def _visible(handle: bytes) -> str:
    """Ours, and harmless; but nothing in it may ever begin another header."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in handle)
