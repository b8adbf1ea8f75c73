"""Section 10: the HTTP door. What comes in as bytes, what goes out; then real sockets and processes."""

from __future__ import annotations

import asyncio
import http.client
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from django_gearman.protocol.packets import RESPONSE, PacketType
from django_gearman.protocol.reader import PacketReader
from django_gearman.server import http_connection as http_connection_module
from django_gearman.server import transport as transport_module
from django_gearman.server.connection import PROGRESS, TransportLimits
from django_gearman.server.core import JobServer
from django_gearman.server.http import LINES_PER_TURN, MAX_AHEAD, MAX_HEADERS, MAX_LINE, Conversation
from django_gearman.server.http_connection import HTTPConnection
from django_gearman.server.options import ServerOptions
from django_gearman.server.peers import Peer
from django_gearman.server.transport import GearmanServer, bind
from tests import harness, needs

from ..acceptance.conftest import program
from .harness import Caller, Wire, handle
from .test_transport import LIMIT, Link, Place, in_a_loop, served, until

P = PacketType


class Reply:
    """One reply, taken apart without leniency."""

    def __init__(self, data: bytes, *, to_head: bool = False) -> None:
        head, _, rest = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        version, code, self.phrase = status.split(" ", 2)
        assert version == "HTTP/1.1"
        self.code = int(code)
        pairs = [line.split(": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}
        assert len(self.headers) == len(pairs), "a header comes twice"
        if self.code == 100:
            self.body, self.rest = b"", rest
            return
        length = 0 if to_head else int(self.headers["content-length"])
        self.body, self.rest = rest[:length], rest[length:]
        assert len(self.body) == length, "the body is cut"

    @property
    def command(self) -> str | None:
        return self.headers.get("x-gearman-command")

    @property
    def handle(self) -> bytes:
        return self.headers["x-gearman-job-handle"].encode()


class Visitor:
    """An HTTP client of the core: bytes in, replies out."""

    def __init__(self, wire: Wire, **options: Any) -> None:
        self.wire = wire
        self.conversation = Conversation(**options)
        self.caller = wire.connect()
        self._reader = PacketReader(RESPONSE)

    def says(self, data: bytes) -> None:
        """Send bytes, and let the core and the door do what there is to do."""
        self.conversation.feed(data)
        self.works()

    def works(self) -> None:
        while True:
            packet = self.conversation.take()
            if packet is not None:
                self.wire.core.receive(self.caller.peer, packet)
            self._reader.feed(self.caller.takes())
            heard = False
            while (answer := self._reader.take()) is not None:
                heard = True
                self.conversation.hear(answer)
            if packet is None and not heard and not self.conversation.more:
                return

    def hears(self) -> bytes:
        """What was sent to it since it was last asked."""
        self.works()
        output, self.conversation.output = self.conversation.output, []
        return b"".join(output)

    def reply(self, data: bytes = b"", *, to_head: bool = False) -> Reply:
        """The one reply to that."""
        self.says(data)
        reply = Reply(self.hears(), to_head=to_head)
        assert reply.rest == b""
        return reply

    @property
    def waits(self) -> bool:
        """Whether a submission is under way and nothing was said yet."""
        return self.conversation.busy and not self.conversation.output


def request(
    method: str = "POST", path: str = "/f", body: bytes | None = b"", version: str = "1.1", **headers: str
) -> bytes:
    """A request; underscores in headers' names become hyphens."""
    lines = [f"{method} {path} HTTP/{version}"]
    if "Host" not in headers:
        lines.append("Host: localhost:8080")
    if body is not None and method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def raw(*lines: bytes) -> bytes:
    """A request of just these lines."""
    return b"\r\n".join([*lines, b"", b""])


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def visitor(wire: Wire) -> Visitor:
    return Visitor(wire)


def job(worker: Caller) -> tuple[bytes, bytes, bytes, bytes] | None:
    """Handle, function, unique and workload of the next job."""
    (heard,) = worker(P.GRAB_JOB_UNIQ)
    if heard == (P.NO_JOB,):
        return None
    kind, *arguments = heard
    assert kind == P.JOB_ASSIGN_UNIQ
    assert len(arguments) == 4
    return arguments[0], arguments[1], arguments[2], arguments[3]


class TestSubmissions:
    """Section 10: what a request submits."""

    @pytest.mark.parametrize("method", ["POST", "PUT"])
    def test_body_is_the_workload(self, wire: Wire, visitor: Visitor, method: str):
        visitor.says(request(method, "/resize", b"\0a\r\n\r\nbinary\xff"))
        assert visitor.waits
        assert job(wire.worker(b"resize")) == (handle(1), b"resize", b"-", b"\0a\r\n\r\nbinary\xff")

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_without_a_body_the_workload_is_empty(self, wire: Wire, visitor: Visitor, method: str):
        visitor.says(request(method, "/resize"))
        assert job(wire.worker(b"resize")) == (handle(1), b"resize", b"-", b"")

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("/reverse", b"reverse"),
            ("///reverse", b"reverse"),
            ("/shop/resize", b"shop/resize"),
            ("/%2Fodd", b"/odd"),
            ("/na%C3%AFve%20name", "na\u00efve name".encode()),
            ("/a+b", b"a+b"),
            ("/f?x=1&y", b"f?x=1&y"),
            ("/f%3Fx", b"f?x"),
            ("http://LOCALHOST:8080/reverse", b"reverse"),
        ],
    )
    def test_path_is_the_function(self, wire: Wire, visitor: Visitor, path: str, name: bytes):
        visitor.says(request(path=path))
        assert list(wire.core.functions) == [name]

    def test_byte_by_byte(self, wire: Wire, visitor: Visitor):
        data = request(body=b"payload", X_Gearman_Unique="u")
        for at in range(len(data)):
            assert not visitor.conversation.busy
            visitor.says(data[at : at + 1])
        assert job(wire.worker(b"f")) == (handle(1), b"f", b"u", b"payload")

    def test_unique_is_shared(self, wire: Wire, visitor: Visitor):
        other = Visitor(wire)
        visitor.says(request(body=b"1", X_Gearman_Unique="u"))
        other.says(request(body=b"2", X_Gearman_Unique="u"))
        worker = wire.worker(b"f")
        assert job(worker) == (handle(1), b"f", b"u", b"1")
        assert worker.grabs() is None
        worker(P.WORK_COMPLETE, handle(1), b"done")
        assert visitor.reply().body == other.reply().body == b"done"

    def test_equal_requests_without_unique_share_a_job(self, wire: Wire, visitor: Visitor):
        others = [Visitor(wire), Visitor(wire)]
        visitor.says(request(body=b"same"))
        others[0].says(request(body=b"same"))
        others[1].says(request(body=b"different"))
        assert len(wire.core.jobs) == 2

    def test_empty_unique_shares_nothing(self, wire: Wire, visitor: Visitor):
        visitor.says(request(body=b"same", X_Gearman_Unique=""))
        Visitor(wire).says(request(body=b"same", X_Gearman_Unique=""))
        assert len(wire.core.jobs) == 2

    @pytest.mark.parametrize("background", ["true", "false"])
    def test_priorities_go_before_one_another(self, wire: Wire, background: str):
        for priority in ("low", "normal", "HIGH"):
            Visitor(wire).says(
                request(body=priority.encode(), X_Gearman_Priority=priority, X_Gearman_Background=background)
            )
        worker = wire.worker(b"f")
        jobs = [job(worker) for _ in range(3)]
        assert [each and each[3] for each in jobs] == [b"HIGH", b"normal", b"low"]

    @pytest.mark.parametrize("headers", [{"X_Gearman_Priority": "urgent"}, {"X_Gearman_Background": "maybe"}])
    def test_other_values_are_refused(self, wire: Wire, visitor: Visitor, headers: dict[str, str]):
        reply = visitor.reply(request(**headers))
        assert reply.code == 400
        assert next(iter(headers)).replace("_", "-").lower().encode() in reply.body
        assert not wire.core.jobs

    def test_chunks(self, wire: Wire, visitor: Visitor):
        visitor.says(
            raw(b"POST /f HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: Chunked")
            + b"3\r\nabc\r\n"
            + b'A;note="x"\r\n0123456789\r\n'
            + b"0\r\nDigest: none\r\n\r\n"
        )
        assert job(wire.worker(b"f")) == (handle(1), b"f", b"-", b"abc0123456789")

    def test_many_small_chunks_leave_others_their_turn(self, wire: Wire):
        conversation = Conversation()
        head = raw(b"POST /f HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: chunked")
        conversation.feed(head + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        turns = 1
        while (packet := conversation.take()) is None:
            assert conversation.more
            turns += 1
        assert turns > 5000 // LINES_PER_TURN
        assert packet[1][-1] == b"x" * 5000
        assert not conversation.more

    def test_client_that_leaves_drops_its_foreground_job(self, wire: Wire, visitor: Visitor):
        visitor.says(request())
        visitor.caller.leaves()
        assert wire.worker(b"f").grabs() is None

    def test_client_that_leaves_keeps_its_background_job(self, wire: Wire, visitor: Visitor):
        visitor.says(request(X_Gearman_Background="true"))
        visitor.caller.leaves()
        assert wire.worker(b"f").grabs() == handle(1)


class TestReplies:
    """Section 10: what becomes of the job, and what the client is told."""

    @pytest.fixture
    def worker(self, wire: Wire, visitor: Visitor) -> Caller:
        """Runs a job that the visitor waits for."""
        visitor.says(request(body=b"in"))
        worker = wire.worker(b"f")
        assert worker.grabs() == handle(1)
        assert visitor.waits
        return worker

    def test_result(self, visitor: Visitor, worker: Caller):
        worker(P.WORK_COMPLETE, handle(1), b"\0out\r\n")
        reply = visitor.reply()
        assert (reply.code, reply.phrase, reply.body) == (200, "OK", b"\0out\r\n")
        assert (reply.handle, reply.command) == (handle(1), "WORK_COMPLETE")
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["date"] == "Thu, 01 Jan 1970 00:00:00 GMT"

    def test_data_comes_before_the_result(self, visitor: Visitor, worker: Caller):
        worker(P.WORK_DATA, handle(1), b"one, ")
        worker(P.WORK_STATUS, handle(1), b"1", b"2")
        worker(P.WORK_WARNING, handle(1), b"careful")
        worker(P.WORK_DATA, handle(1), b"two, ")
        assert visitor.hears() == b""
        worker(P.WORK_COMPLETE, handle(1), b"three")
        assert visitor.reply().body == b"one, two, three"

    def test_failure(self, visitor: Visitor, worker: Caller):
        worker(P.WORK_DATA, handle(1), b"a part")
        worker(P.WORK_FAIL, handle(1))
        reply = visitor.reply()
        assert (reply.code, reply.command, reply.handle, reply.body) == (500, "WORK_FAIL", handle(1), b"")
        assert not visitor.conversation.closed

    def test_exception_is_a_failure(self, visitor: Visitor, worker: Caller):
        worker(P.WORK_EXCEPTION, handle(1), b"went wrong")
        reply = visitor.reply()
        assert (reply.code, reply.command, reply.body) == (500, "WORK_FAIL", b"")

    def test_exception_where_the_server_sends_them(self):
        wire = Wire(exceptions=True)
        visitor = Visitor(wire)
        visitor.says(request())
        worker = wire.worker(b"f")
        worker(P.WORK_EXCEPTION, worker.grabs() or b"", b"went wrong")
        reply = visitor.reply()
        assert (reply.code, reply.command, reply.body) == (500, "WORK_EXCEPTION", b"went wrong")

    def test_cancelled_by_an_operator(self, visitor: Visitor, wire: Wire, worker: Caller):
        assert wire.connect().line(b"cancel job " + handle(1)) == b"OK\r\n"
        assert visitor.reply().code == 500

    def test_background(self, wire: Wire, visitor: Visitor):
        reply = visitor.reply(request(X_Gearman_Background="true"))
        assert (reply.code, reply.command, reply.handle, reply.body) == (
            202,
            "JOB_CREATED",
            handle(1),
            b"",
        )
        worker = wire.worker(b"f")
        assert worker.grabs() == handle(1)
        worker(P.WORK_COMPLETE, handle(1), b"out")
        assert visitor.hears() == b""

    def test_background_is_accepted_when_it_is_written(self):
        wire = Wire(durable=True)
        visitor = Visitor(wire)
        visitor.says(request(X_Gearman_Background="true"))
        assert visitor.waits
        wire.commit()
        assert visitor.reply().code == 202

    def test_background_that_cannot_be_written(self):
        wire = Wire(durable=True)
        visitor = Visitor(wire)
        visitor.says(request(X_Gearman_Background="true"))
        for entry in wire.entries():
            wire.core.rejected(entry, "The database is out of reach")
        reply = visitor.reply()
        assert (reply.code, reply.body) == (503, b"QUEUE_ERROR: The database is out of reach\n")

    def test_full_queue(self, wire: Wire, visitor: Visitor):
        operator = wire.connect()
        operator.line(b"create function f")
        operator.line(b"maxqueue f 1")
        Visitor(wire).says(request(body=b"1"))
        reply = visitor.reply(request(body=b"2"))
        assert (reply.code, reply.command, reply.body) == (503, "ERROR", b"QUEUE_ERROR: Job queue is full\n")
        assert "x-gearman-job-handle" not in reply.headers

    @pytest.mark.parametrize("path", ["/%0Aforged", "/a%00b", "/%FF", "/" + "n" * 513, "/gearman:claim"])
    def test_name_that_the_server_refuses(self, wire: Wire, visitor: Visitor, path: str):
        reply = visitor.reply(request(path=path))
        assert (reply.code, reply.command) == (400, "ERROR")
        assert not visitor.conversation.closed
        assert not wire.core.functions

    def test_unique_that_the_server_refuses(self, visitor: Visitor):
        reply = visitor.reply(request(X_Gearman_Unique="u" * 256))
        assert (reply.code, reply.body) == (400, b"ARGUMENT_TOO_LARGE: Unique value too large\n")

    @pytest.mark.parametrize("path", ["/", "//", "http://localhost"])
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
    def test_no_function(self, visitor: Visitor, method: str, path: str):
        assert visitor.reply(request(method, path), to_head=method == "HEAD").code == 404

    def test_head_has_the_length_and_no_body(self, wire: Wire, visitor: Visitor):
        visitor.says(request("HEAD"))
        worker = wire.worker(b"f")
        worker(P.WORK_COMPLETE, worker.grabs() or b"", b"four")
        reply = visitor.reply(to_head=True)
        assert (reply.code, reply.headers["content-length"], reply.handle) == (200, "4", handle(1))

    def test_more_data_than_a_reply_may_have(self, wire: Wire):
        visitor = Visitor(wire, max_body=100)
        visitor.says(request())
        worker = wire.worker(b"f")
        worker.grabs()
        worker(P.WORK_DATA, handle(1), b"x" * 60)
        worker(P.WORK_COMPLETE, handle(1), b"x" * 60)
        reply = visitor.reply()
        assert reply.code == 500
        assert b"more data" in reply.body
        assert visitor.conversation.closed

    def test_end_of_the_server(self, visitor: Visitor, worker: Caller):
        visitor.conversation.end()
        reply = visitor.reply()
        assert (reply.code, reply.headers["connection"]) == (503, "close")
        assert visitor.conversation.closed


class TestConnections:
    """Section 10 and RFC 9112: more than one request on a connection."""

    @pytest.mark.parametrize(
        ("version", "connection", "stays"),
        [
            ("1.1", None, True),
            ("1.1", "close", False),
            ("1.1", "Upgrade, CLOSE", False),
            ("1.0", None, False),
            ("1.0", "Keep-Alive", True),
        ],
    )
    def test_who_keeps_it(self, visitor: Visitor, version: str, connection: str | None, stays: bool):
        headers = {"X_Gearman_Background": "true"} | ({"Connection": connection} if connection else {})
        reply = visitor.reply(request(version=version, **headers))
        assert reply.code == 202
        assert reply.headers["connection"] == ("keep-alive" if stays else "close")
        assert visitor.conversation.closed is not stays

    def test_pipelined_requests_are_answered_in_order(self, wire: Wire, visitor: Visitor):
        visitor.says(
            b"".join(request(path=f"/f{number}") for number in range(3))
            + request(X_Gearman_Background="true")
        )
        for number in range(3):
            worker = wire.worker(b"f0", b"f1", b"f2")
            (_, found, name, _) = worker(P.GRAB_JOB)[0]
            assert name == b"f%d" % number
            # One at a time: the next is not submitted before this one is answered.
            assert worker.grabs() is None
            worker(P.WORK_COMPLETE, found, name)
            visitor.works()
        reply = Reply(visitor.hears())
        for number in range(3):
            assert reply.body == b"f%d" % number
            reply = Reply(reply.rest)
        assert (reply.command, reply.rest) == ("JOB_CREATED", b"")

    def test_empty_lines_before_a_request(self, visitor: Visitor):
        assert visitor.reply(b"\r\n\r\n" + request(X_Gearman_Background="true")).code == 202

    def test_nothing_of_one_request_is_left_for_the_next(self, wire: Wire, visitor: Visitor):
        visitor.reply(
            request(body=b"1", X_Gearman_Background="true", X_Gearman_Unique="u", X_Gearman_Priority="high")
        )
        visitor.says(request("GET", "/g"))
        assert job(wire.worker(b"g")) == (handle(2), b"g", b"-", b"")
        assert visitor.waits

    def test_100_continue(self, wire: Wire, visitor: Visitor):
        data = request(body=b"payload", Expect="100-continue")
        visitor.says(data[:-7])
        assert visitor.hears() == b"HTTP/1.1 100 Continue\r\n\r\n"
        visitor.says(b"payload")
        assert visitor.hears() == b""
        assert job(wire.worker(b"f")) is not None

    @pytest.mark.parametrize("body", [b"payload", b""])
    def test_no_100_where_nobody_waits_for_it(self, visitor: Visitor, body: bytes):
        visitor.says(request(body=body, Expect="100-continue"))
        assert visitor.waits

    def test_no_100_before_a_refusal(self):
        visitor = Visitor(Wire(), max_body=100)
        assert visitor.reply(request(body=None, Content_Length="101", Expect="100-continue")).code == 413

    def test_no_100_for_http_1_0(self, visitor: Visitor):
        visitor.says(request(body=b"payload", version="1.0", Expect="100-continue")[:-7])
        assert visitor.hears() == b""

    def test_other_expectations(self, visitor: Visitor):
        assert visitor.reply(request(Expect="a miracle")).code == 417

    def test_expired_request(self, visitor: Visitor):
        visitor.says(request(body=b"payload")[:-1])
        assert visitor.conversation.incomplete
        visitor.conversation.expire()
        assert visitor.reply().code == 408
        assert visitor.conversation.closed

    def test_expired_request_of_many_small_chunks(self, visitor: Visitor):
        conversation = visitor.conversation
        conversation.feed(request(body=None, Transfer_Encoding="chunked") + b"1\r\na\r\n" * LINES_PER_TURN)
        assert conversation.take() is None
        assert conversation.more
        conversation.expire()
        # Who would go on would go on for as long as the client takes to read why.
        assert conversation.take() is None
        assert not conversation.more

    def test_expired_without_a_request(self, visitor: Visitor):
        visitor.conversation.expire()
        assert visitor.hears() == b""
        assert visitor.conversation.closed


LENGTH_5 = b"Content-Length: 5"


class TestRefusals:
    """RFC 9112: what can be read in two ways is refused, and ends the connection (request smuggling)."""

    @pytest.mark.parametrize(
        ("code", "lines"),
        [
            # The length of the body.
            (400, [LENGTH_5, LENGTH_5]),
            (400, [LENGTH_5, b"Content-Length: 6"]),
            (400, [b"Content-Length: 5, 5"]),
            (400, [b"Content-Length: +5"]),
            (400, [b"Content-Length: -5"]),
            (400, [b"Content-Length: 0x5"]),
            (400, [b"Content-Length: 5_0"]),
            (400, [b"Content-Length:"]),
            (400, [b"Content-Length: \xb2"]),
            (400, [b"Content-Length: " + b"9" * 20]),
            (400, [LENGTH_5, b"Transfer-Encoding: chunked"]),
            (400, [b"Transfer-Encoding: chunked", LENGTH_5]),
            (501, [b"Transfer-Encoding: gzip, chunked"]),
            (501, [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"]),
            (501, [b"Transfer-Encoding: chunked, identity"]),
            (501, [b"Transfer-Encoding: xchunked"]),
            (501, [b"Transfer-Encoding:"]),
            (411, []),
            # The headers' form.
            (400, [b"Content-Length : 5"]),
            (400, [b" Content-Length: 5"]),
            (400, [LENGTH_5, b" folded"]),
            (400, [LENGTH_5, b"\tfolded"]),
            (400, [b"Transfer-Encoding: \x0bchunked"]),
            (400, [b"X: a\rTransfer-Encoding: chunked"]),
            (400, [b"X: a\nTransfer-Encoding: chunked"]),
            (400, [LENGTH_5, b"X: abc\nY: d"]),
            (400, [b"X: a\0"]),
            (400, [b"no colon"]),
            (400, [b": no name"]),
            (400, [b"na\xefve: x"]),
            # Headers that may come once.
            (400, [LENGTH_5, b"Host: localhost"]),
            (400, [LENGTH_5, b"X-Gearman-Unique: a", b"X-Gearman-Unique: b"]),
            (400, [LENGTH_5, b"X-Gearman-Background: true", b"X-Gearman-Background: false"]),
            # Too much.
            (431, [b"X: " + b"x" * MAX_LINE]),
            (431, [b"X: x"] * (MAX_HEADERS + 1)),
            (431, [b"X: " + b"x" * 4000] * 5),
            (413, [b"Content-Length: 67108865"]),
            (413, [b"Content-Length: " + b"9" * 19]),
        ],
    )
    def test_headers(self, wire: Wire, visitor: Visitor, code: int, lines: list[bytes]):
        reply = visitor.reply(raw(b"POST /f HTTP/1.1", b"Host: localhost", *lines) + b"12345" + request())
        assert reply.code == code
        assert reply.headers["connection"] == "close"
        assert reply.body.endswith(b".\n")
        assert visitor.conversation.closed
        assert visitor.conversation.refusal is not None
        assert not wire.core.functions, "what follows a refused request was read"

    @pytest.mark.parametrize(
        ("code", "line"),
        [
            (400, b"GET /f"),
            (400, b"GET  /f HTTP/1.1"),
            (400, b"GET /f HTTP/1.1 "),
            (400, b" GET /f HTTP/1.1"),
            (400, b"GET /a b HTTP/1.1"),
            (400, b"GET /f\x80 HTTP/1.1"),
            (400, b"GET /f http/1.1"),
            (400, b"GET /f HTTP/1.10"),
            (400, b"GET /f#part HTTP/1.1"),
            (400, b"GET /f\r HTTP/1.1"),
            (400, b"GET f HTTP/1.1"),
            (400, b"GET /%zz HTTP/1.1"),
            (400, b"GET /% HTTP/1.1"),
            (400, b"G(T /f HTTP/1.1"),
            (400, b"\x16\x03\x01\x02"),
            (414, b"GET /" + b"x" * MAX_LINE + b" HTTP/1.1"),
            (505, b"GET /f HTTP/2.0"),
            (505, b"PRI * HTTP/2.0"),
            (505, b"GET /f HTTP/0.9"),
            (405, b"get /f HTTP/1.1"),
            (405, b"DELETE /f HTTP/1.1"),
            (405, b"PATCH / HTTP/1.1"),
            (405, b"TRACE / HTTP/1.1"),
            (405, b"OPTIONS * HTTP/1.1"),
            (405, b"CONNECT localhost:80 HTTP/1.1"),
        ],
    )
    def test_request_lines(self, wire: Wire, visitor: Visitor, code: int, line: bytes):
        reply = visitor.reply(raw(line, b"Host: localhost") + request())
        assert reply.code == code
        assert visitor.conversation.closed
        assert not wire.core.functions
        if code == 405:
            assert reply.headers["allow"] == "GET, HEAD, POST, PUT"

    def test_lines_without_cr(self, visitor: Visitor):
        assert visitor.reply(b"GET /f HTTP/1.1\nHost: localhost\n\n").code == 400

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("body", ["Content-Length: 5", "Transfer-Encoding: chunked"])
    def test_body_where_none_belongs(self, visitor: Visitor, method: str, body: str):
        name, value = body.split(": ")
        data = request(method, **{name: value})
        assert visitor.reply(data + b"12345", to_head=method == "HEAD").code == 400

    def test_get_may_say_that_it_has_no_body(self, visitor: Visitor):
        visitor.says(request("GET", Content_Length="0"))
        assert visitor.waits

    def test_chunks_of_http_1_0(self, visitor: Visitor):
        assert visitor.reply(request(body=None, version="1.0", Transfer_Encoding="chunked")).code == 400

    @pytest.mark.parametrize(
        ("code", "chunks"),
        [
            (400, b"\r\n"),
            (400, b"0x3\r\nabc\r\n0\r\n\r\n"),
            (400, b"+3\r\nabc\r\n0\r\n\r\n"),
            (400, b"-1\r\n"),
            (400, b" 3\r\nabc\r\n0\r\n\r\n"),
            (400, b"3\nabc\r\n0\r\n\r\n"),
            (400, b"3\r\nabcd\r\n0\r\n\r\n"),
            (400, b"3\r\nabc\n0\r\n\r\n"),
            (400, b"3\r\nabcde0\r\n\r\n"),
            (400, b"3;a\x00\r\nabc\r\n"),
            (400, b"1" * 17 + b"\r\n"),
            (400, b"3;" + b"x" * MAX_LINE),
            (413, b"f" * 16 + b"\r\n"),
            (413, b"3C\r\n" + b"x" * 60 + b"\r\n28\r\n"),
            (431, b"0\r\n" + b"X: x\r\n" * (MAX_HEADERS + 1)),
            (400, b"0\r\nno colon\r\n\r\n"),
        ],
    )
    def test_chunks(self, wire: Wire, code: int, chunks: bytes):
        visitor = Visitor(wire, max_body=100)
        reply = visitor.reply(request(body=None, Transfer_Encoding="chunked") + chunks)
        assert reply.code == code
        assert not wire.core.functions

    @pytest.mark.parametrize("length", ["0", "3", "13"])
    def test_chunks_with_a_length(self, wire: Wire, visitor: Visitor, length: str):
        data = request(body=None, Content_Length=length, Transfer_Encoding="chunked")
        assert visitor.reply(data + b"3\r\nabc\r\n0\r\n\r\n").code == 400
        assert not wire.core.functions

    def test_trailers_are_no_headers(self, wire: Wire, visitor: Visitor):
        visitor.says(
            request(body=None, Transfer_Encoding="chunked") + b"0\r\nX-Gearman-Background: true\r\n\r\n"
        )
        assert visitor.waits
        assert not next(iter(wire.core.jobs.values())).background

    def test_limit_is_that_of_a_packet(self):
        # As a packet: f, NUL, -, NUL and the workload.
        assert Visitor(Wire(), max_body=10).reply(request(body=b"1234567")).code == 413
        visitor = Visitor(Wire(), max_body=10)
        visitor.says(request(body=b"123456"))
        assert visitor.waits

    def test_headers_that_would_take_long_to_match(self, visitor: Visitor):
        # Matched by trying where the value ends, this takes minutes: the test's time limit is the check.
        assert visitor.reply(raw(b"GET /f HTTP/1.1", b"X:" + b" \t" * 4000 + b"\x01")).code == 400

    def test_nothing_is_read_after_the_end(self, wire: Wire, visitor: Visitor):
        visitor.reply(request("BREW"))
        visitor.says(request())
        assert visitor.hears() == b""
        assert visitor.conversation.ahead == 0


class TestBrowsers:
    """Section 10: no page that somebody looks at submits jobs to a server on their machine."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:8080"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "none"},
            {"Referer": "https://evil.example/"},
            # <img referrerpolicy="no-referrer"> of a page without TLS, at an address in the local network.
            {"User_Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"},
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_refused(self, wire: Wire, visitor: Visitor, method: str, headers: dict[str, str]):
        reply = visitor.reply(request(method, **headers))
        assert (reply.code, reply.body) == (403, b"Browsers are not served.\n")
        assert visitor.conversation.closed
        assert not wire.core.functions

    def test_preflight_allows_nothing(self, visitor: Visitor):
        reply = visitor.reply(
            request("OPTIONS", Origin="https://evil.example", Access_Control_Request_Method="POST")
        )
        assert reply.code == 403
        assert not [name for name in reply.headers if name.startswith("access-control")]

    @pytest.mark.parametrize(
        "headers",
        [
            {"User_Agent": "curl/8.14.1"},
            # Node's fetch().
            {"User_Agent": "node", "Sec_Fetch_Mode": "cors", "Accept_Language": "*"},
        ],
    )
    def test_programs_are_served(self, visitor: Visitor, headers: dict[str, str]):
        visitor.says(request(**headers))
        assert visitor.waits

    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "192.0.2.7", "[::1]:8080", "jobs.example"]
    )
    def test_our_names(self, host: str):
        visitor = Visitor(Wire(), hosts=["Jobs.example"])
        visitor.says(request(Host=host))
        assert visitor.waits

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example@localhost",
            "localhost:8080:80",
            "[::1",
            "",
        ],
    )
    def test_other_names(self, wire: Wire, visitor: Visitor, host: str):
        """A name that leads here, but is not ours, is DNS rebinding."""
        reply = visitor.reply(request(Host=host))
        assert reply.code == 403
        assert b"--http-host" in reply.body
        assert not wire.core.functions

    def test_other_name_in_the_target(self, visitor: Visitor):
        assert visitor.reply(request("GET", "http://evil.example/f")).code == 403

    def test_no_name(self, visitor: Visitor):
        assert visitor.reply(raw(b"GET /f HTTP/1.1")).code == 400

    def test_http_1_0_needs_no_name(self, visitor: Visitor):
        visitor.says(raw(b"GET /f HTTP/1.0"))
        assert visitor.waits


# Real sockets.


class Site(Place):
    """A server with an HTTP port, and those that are connected to it."""

    def __init__(self, server: GearmanServer, port: int) -> None:
        super().__init__(server)
        self.port = port

    @property
    def core(self) -> JobServer:
        return self.server.core

    async def connect(self) -> Link:
        link = Link(*await asyncio.open_connection("127.0.0.1", self.port, limit=2**16))
        self.links.append(link)
        return link

    async def reply(self, link: Link) -> Reply:
        """The next reply on a connection that stays."""
        async with asyncio.timeout(LIMIT):
            head = await link.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            return Reply(head + await link.reader.readexactly(length))

    def worker(self, function: bytes) -> Peer:
        """A worker that takes the next job; there must be one."""
        peer = self.core.connected(99, "127.0.0.1", _Nobody())
        self.core.receive(peer, (P.CAN_DO, [function]))
        self.core.receive(peer, (P.GRAB_JOB, []))
        assert peer.running, "there is no job"
        return peer

    def complete(self, worker: Peer, result: bytes) -> None:
        self.core.receive(worker, (P.WORK_COMPLETE, [next(iter(worker.running)), result]))
        self.server.schedule_turn()


class _Nobody:
    """In the place of a worker's connection."""

    def write(self, output: list[bytes]) -> None:
        pass


@asynccontextmanager
async def site(**limits: Any) -> AsyncIterator[Site]:
    server = GearmanServer(JobServer(ServerOptions(name="test:1", epoch=7)), None, TransportLimits(**limits))
    wire_sockets, sockets = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    place = Site(server, sockets[0].getsockname()[1])
    async with served(place, wire_sockets, http_sockets=sockets):
        yield place


class TestSockets:
    """Section 10: limits, patience and the end, on real sockets."""

    @in_a_loop
    async def test_two_requests_on_one_connection(self):
        async with site() as place:
            link = await place.connect()
            for result in (b"one", b"two"):
                link.writer.write(request(body=result))
                await until(lambda: bool(place.core.jobs))
                place.complete(place.worker(b"f"), result)
                reply = await place.reply(link)
                assert (reply.code, reply.body) == (200, result)

    @in_a_loop
    async def test_pipelined_requests(self):
        async with site() as place:
            link = await place.connect()
            link.writer.write(request(X_Gearman_Background="true", X_Gearman_Unique="") * 50)
            replies = [await place.reply(link) for _ in range(50)]
            assert [reply.handle for reply in replies] == [handle(number) for number in range(1, 51)]

    @in_a_loop
    async def test_large_bodies_both_ways(self):
        async with site() as place:
            link = await place.connect()
            payload = bytes(range(256)) * 4096 * 8
            link.writer.write(request(body=payload))
            await until(lambda: bool(place.core.jobs))
            (job,) = place.core.jobs.values()
            assert job.workload == payload
            place.complete(place.worker(b"f"), payload)
            assert (await place.reply(link)).body == payload

    @in_a_loop
    async def test_small_chunks(self):
        async with site() as place:
            link = await place.connect()
            head = request(body=None, Transfer_Encoding="chunked")
            link.writer.write(head + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n")
            await until(lambda: bool(place.core.jobs))
            (job_there,) = place.core.jobs.values()
            assert job_there.workload == b"x" * 50_000
            place.complete(place.worker(b"f"), b"done")
            assert (await place.reply(link)).code == 200

    @in_a_loop
    async def test_client_that_leaves_drops_its_job(self):
        async with site() as place:
            link = await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            link.writer.close()
            await until(lambda: not place.core.jobs)

    @in_a_loop
    async def test_client_that_closes_its_half_is_gone(self):
        async with site() as place:
            link = await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            link.writer.write_eof()
            assert await link.end() == b""
            await until(lambda: not place.core.jobs)

    @in_a_loop
    async def test_background_job_is_told_to_who_closes_its_half_at_once(self):
        async with site() as place:
            link = await place.connect()
            link.writer.write(request(X_Gearman_Background="true"))
            link.writer.write_eof()
            assert Reply(await link.end()).code == 202

    @in_a_loop
    async def test_client_that_does_not_take_its_reply_is_left(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        async with site(http_idle=0.2, incomplete=0.2) as place:
            link = await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            place.complete(place.worker(b"f"), b"x" * 50_000_000)
            await until(lambda: not place.server.connections)

    @in_a_loop
    async def test_client_that_takes_its_reply_slowly_gets_it(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        async with site(http_idle=0.1, incomplete=1.0) as place:
            link = await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            began = asyncio.get_running_loop().time()
            place.complete(place.worker(b"f"), b"x" * 50_000_000)
            taken = 0
            async with asyncio.timeout(LIMIT):
                while taken < 50_000_000:
                    data = await link.reader.read(2**16)
                    assert data, "the reply is cut"
                    taken += len(data)
                    await asyncio.sleep(0.002)
            assert asyncio.get_running_loop().time() - began > 1.0, "that was too fast to show anything"

    @in_a_loop
    async def test_refused_client_sees_why(self):
        """The reply arrives though the body that it refuses was never read."""
        async with site(max_packet=1000) as place:
            link = await place.connect()
            link.writer.write(request(body=b"x" * 300_000))
            reply = Reply(await link.end())
            assert reply.code == 413

    @in_a_loop
    async def test_who_sends_ahead_is_not_read(self):
        async with site() as place:
            link = await place.connect()
            ahead = request(path="/g", body=b"x" * 1000)
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            (connection,) = place.server.connections
            sent = 0
            while sent < 200 * MAX_AHEAD and connection._transport.is_reading():
                link.writer.write(ahead * 100)
                sent += 100
                await asyncio.sleep(0)
            assert not connection._transport.is_reading(), "there is no end of reading"
            assert connection._conversation.ahead < MAX_AHEAD + 2**20
            place.complete(place.worker(b"f"), b"")
            assert (await place.reply(link)).code == 200
            await until(lambda: b"g" in place.core.functions)

    @in_a_loop
    async def test_slow_request_is_given_up(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        monkeypatch.setattr(http_connection_module, "LINGER", 0.2)
        async with site(incomplete=0.2) as place:
            link = await place.connect()
            link.writer.write(b"POST /f HTTP/1.1\r\nHost: localhost\r\nX: ")

            async def drip() -> None:
                # To send a little does not help.
                while not link.writer.is_closing():
                    link.writer.write(b"x")
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip())
            assert Reply(await link.end()).code == 408
            dripping.cancel()
            await until(lambda: not place.server.connections)

    @in_a_loop
    async def test_large_request_may_come_slowly(self):
        async with site() as place:
            link = await place.connect()
            await until(lambda: bool(place.server.connections))
            (connection,) = place.server.connections
            assert isinstance(connection, HTTPConnection)
            head = b"POST /f HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n"
            sent = 0

            async def send(size: int) -> float:
                """Send more of the body; when the server wants it to have gone on."""
                nonlocal sent
                link.writer.write(b"x" * size)
                sent += size
                await until(lambda: connection._conversation.ahead == sent)
                assert connection._stale is not None
                return connection._stale

            link.writer.write(head)
            begun = await send(100)
            assert await send(1000) == begun
            assert begun < (later := await send(PROGRESS))
            assert await send(1000) == later
            link.writer.write(b"x" * (2**20 - sent))
            await until(lambda: bool(place.core.jobs))
            place.complete(place.worker(b"f"), b"done")
            assert (await place.reply(link)).body == b"done"

    @in_a_loop
    async def test_idle_connection_is_closed(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        async with site(http_idle=0.2) as place:
            link = await place.connect()
            assert await link.end() == b""

    @in_a_loop
    async def test_waiting_for_a_job_is_not_idle(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        async with site(http_idle=0.1, incomplete=0.1) as place:
            idle, link = await place.connect(), await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            assert await idle.end() == b""
            place.complete(place.worker(b"f"), b"late")
            assert (await place.reply(link)).body == b"late"

    @in_a_loop
    async def test_lingering_ends(self, monkeypatch: pytest.MonkeyPatch):
        """Who has its last reply and does not leave is left."""
        monkeypatch.setattr(transport_module, "TICK", 0.02)
        monkeypatch.setattr(http_connection_module, "LINGER", 0.2)
        async with site() as place:
            link = await place.connect()
            link.writer.write(request("BREW"))
            assert Reply(await link.end()).code == 405
            await until(lambda: not place.server.connections)

    @in_a_loop
    async def test_too_many_connections(self):
        async with site(max_connections=1) as place:
            first = await place.connect()
            await until(lambda: len(place.server.connections) == 1)
            second = await place.connect()
            assert await second.end() == b""
            first.writer.write(request(X_Gearman_Background="true"))
            assert (await place.reply(first)).code == 202

    @in_a_loop
    async def test_end_of_the_server(self):
        async with site() as place:
            link = await place.connect()
            link.writer.write(request())
            await until(lambda: bool(place.core.jobs))
            place.stopped.set()
            assert Reply(await link.end()).code == 503


# Real processes.


class HTTPServerProcess(harness.GearmanServerProcess):
    """``manage.py gearman_server`` with an HTTP port."""

    def __init__(self, *, loop: str = "uvloop", options: tuple[str, ...] = ()) -> None:
        self.http_port = harness.free_port()
        super().__init__(
            store="memory",
            options=["--http-port", str(self.http_port), *options],
            env={"GEARMAN_LOOP": loop},
        )

    @contextmanager
    def client(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=LIMIT)
        try:
            yield connection
        finally:
            connection.close()


@pytest.fixture(params=["uvloop", "asyncio"])
def process(request: pytest.FixtureRequest) -> Iterator[HTTPServerProcess]:
    if request.param == "uvloop":
        needs.module("uvloop")
    with HTTPServerProcess(loop=request.param) as process:
        yield process


def reverse(job: Any) -> bytes:
    job.send_data(b"<")
    return bytes(reversed(job.workload)) + b">"


def fail(job: Any) -> bytes:
    raise ValueError("no")


@pytest.mark.acceptance
class TestProcesses:
    """Section 10: the command's own server, real workers, Python's and curl's clients."""

    def test_python_client(self, process: HTTPServerProcess):
        with harness.worker_thread({"reverse": reverse, "fail": fail}, process), process.client() as client:
            for body, result in (
                (b"Hello World!", b"<!dlroW olleH>"),
                (b"\0" * 2**20, b"<" + b"\0" * 2**20 + b">"),
            ):
                client.request("POST", "/reverse", body)
                reply = client.getresponse()
                assert (reply.status, reply.read()) == (200, result)
                assert (reply.getheader("X-Gearman-Job-Handle") or "").startswith("H:")
            client.request("POST", "/fail", b"")
            reply = client.getresponse()
            assert (reply.status, reply.read()) == (500, b"")
            assert reply.getheader("X-Gearman-Command") == "WORK_FAIL"
            # http.client sends an iterable in chunks.
            client.request("PUT", "/reverse", iter([b"ab", b"cd"]))
            reply = client.getresponse()
            assert (reply.status, reply.read()) == (200, b"<dcba>")
            client.request("HEAD", "/reverse")
            reply = client.getresponse()
            assert (reply.status, reply.read(), reply.getheader("Content-Length")) == (200, b"", "2")

    def test_background_job_runs_after_the_client_left(self, process: HTTPServerProcess):
        with process.client() as client:
            client.request("POST", "/note", b"later", {"X-Gearman-Background": "true"})
            reply = client.getresponse()
            assert (reply.status, reply.getheader("X-Gearman-Command")) == (202, "JOB_CREATED")
            reply.read()
        ran = threading.Event()

        def note(job: Any) -> bytes:
            assert job.workload == b"later"
            ran.set()
            return b""

        with harness.worker_thread({"note": note}, process):
            assert ran.wait(LIMIT)
        harness.wait_until(lambda: process.status()["note"][:2] == (0, 0))

    def test_foreground_job_of_a_client_that_left_is_dropped(self, process: HTTPServerProcess):
        with process.client() as client:
            client.request("POST", "/wait", b"")
            harness.wait_until(lambda: process.status() == {"wait": (1, 0, 0)})
        harness.wait_until(lambda: process.status() == {"wait": (0, 0, 0)})

    def test_client_that_waits_is_told_of_the_end(self, process: HTTPServerProcess):
        with process.client() as client:
            client.request("POST", "/wait", b"")
            harness.wait_until(lambda: process.status() == {"wait": (1, 0, 0)})
            process.stop()
            assert client.getresponse().status == 503

    def test_curl(self, process: HTTPServerProcess):
        curl = [program("curl"), "-sS", "--max-time", str(int(LIMIT)), "-w", "|%{http_code}"]
        url = f"http://localhost:{process.http_port}"

        def run(*arguments: str, stdin: bytes = b"") -> bytes:
            done = subprocess.run([*curl, *arguments], input=stdin, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        with harness.worker_thread({"reverse": reverse, "na\u00efve name": reverse}, process):
            assert run(f"{url}/reverse", "-d", "abc") == b"<cba>|200"
            assert run(f"{url}/na%C3%AFve%20name", "-d", "abc") == b"<cba>|200"
            assert run(f"{url}/reverse") == b"<>|200"
            # More than a megabyte makes curl expect 100-continue; from a pipe it comes in chunks.
            large = b"x" * 3_000_000
            assert run(f"{url}/reverse", "--data-binary", "@-", stdin=large) == b"<" + large + b">|200"
            assert run(f"{url}/reverse", "-T", "-", stdin=b"abc") == b"<cba>|200"
            assert run(f"{url}/reverse", "-0", "-d", "abc") == b"<cba>|200"
            assert run(f"{url}/reverse", f"{url}/reverse", "-d", "ab") == b"<ba>|200<ba>|200"
            assert run(f"{url}/reverse", "-X", "DELETE") == (
                b"Jobs are submitted by GET, HEAD, POST or PUT.\n|405"
            )
            assert run(f"{url}/reverse", "-d", "", "-H", "Origin: http://evil.example") == (
                b"Browsers are not served.\n|403"
            )
            assert run(f"{url}/reverse", "-d", "", "-H", "Host: evil.example").endswith(b"|403")

    def test_it_is_off_without_the_option(self, memory_server: harness.GearmanServerProcess):
        assert "HTTP" not in memory_server.stdout
        with socket.create_connection(("127.0.0.1", memory_server.port), timeout=LIMIT) as sock:
            sock.sendall(b"POST /f HTTP/1.1\r\n")
            assert sock.recv(1000) == b""

    def test_names_from_the_command_line(self):
        with (
            HTTPServerProcess(options=("--http-host", "jobs.example")) as process,
            process.client() as client,
        ):
            for host, status in (("jobs.example", 202), ("other.example", 403)):
                client.request(
                    "POST", "/f", b"", {"Host": f"{host}:{process.http_port}", "X-Gearman-Background": "true"}
                )
                reply = client.getresponse()
                reply.read()
                assert reply.status == status
