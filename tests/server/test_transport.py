"""The job server on real sockets: limits, turns, and the end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, TypeVar

import pytest

from django_gearman.exceptions import LeaseLost, StoreError
from django_gearman.protocol.packets import CLAIM, RESPONSE, PacketType, encode_request
from django_gearman.protocol.reader import Packet, PacketReader
from django_gearman.server import text
from django_gearman.server import transport as transport_module
from django_gearman.server.connection import PACKETS_PER_TURN, PROGRESS, TransportLimits
from django_gearman.server.core import JobServer
from django_gearman.server.entries import Claimed, Entry, StoredJob
from django_gearman.server.job_store import JobStore, MemoryStore
from django_gearman.server.options import ServerOptions, Shutdown
from django_gearman.server.peers import Peer
from django_gearman.server.transport import GearmanServer, bind

from .harness import handle

P = PacketType
NUDGED = P.JOB_CREATED, [b"H:test:1:7.claim"]
LIMIT = 60.0
"""Seconds after which a condition that should come is given up."""


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.005)


class Link:
    """A connection to the server: bytes out, packets in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._packets = PacketReader(RESPONSE)

    def say(self, kind: PacketType, *arguments: bytes) -> None:
        self.writer.write(encode_request(kind, *arguments))

    async def hear(self, count: int = 1) -> list[Packet]:
        heard: list[Packet] = []
        async with asyncio.timeout(LIMIT):
            while len(heard) < count:
                packet = self._packets.take()
                if packet is not None:
                    heard.append(packet)
                    continue
                data = await self.reader.read(65536)
                assert data, f"closed after {heard}"
                self._packets.feed(data)
        return heard

    async def ask(self, kind: PacketType, *arguments: bytes) -> Packet:
        self.say(kind, *arguments)
        (packet,) = await self.hear()
        return packet

    async def line(self) -> bytes:
        async with asyncio.timeout(LIMIT):
            return await self.reader.readline()

    async def end(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(LIMIT):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


class Place:
    """A server that serves, and those that are connected to it."""

    def __init__(self, server: GearmanServer) -> None:
        self.server = server
        self.stopped = asyncio.Event()
        self.links: list[Link] = []
        self.serving: asyncio.Task[None]


class Hall(Place):
    """One for clients and workers."""

    def __init__(self, server: GearmanServer, address: tuple[str, int]) -> None:
        super().__init__(server)
        self.address = address

    async def connect(self, *, receive_buffer: int | None = None) -> Link:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        # A small limit, so that what is not asked for stays in the socket.
        link = Link(*await asyncio.open_connection(sock=sock, limit=2**16))
        self.links.append(link)
        return link

    async def worker(self, function: bytes) -> Link:
        link = await self.connect()
        link.say(P.CAN_DO, function)
        await link.ask(P.ECHO_REQ, b"registered")
        return link


@asynccontextmanager
async def hall(
    store: JobStore | None = None, core: JobServer | None = None, **limits: Any
) -> AsyncIterator[Hall]:
    options = ServerOptions(name="test:1", epoch=7, durable=store is not None)
    server = GearmanServer(core or JobServer(options), store, TransportLimits(**limits))
    sockets = bind("127.0.0.1", 0)
    async with served(Hall(server, sockets[0].getsockname()), sockets) as place:
        yield place


AnyPlace = TypeVar("AnyPlace", bound=Place)


@asynccontextmanager
async def served(place: AnyPlace, sockets: list[socket.socket], **options: Any) -> AsyncIterator[AnyPlace]:
    """A place whose server serves, and then ends in good order."""
    ready = asyncio.Event()
    serve = place.server.serve(sockets, place.stopped, ready=ready.set, **options)
    place.serving = asyncio.create_task(serve)
    await ready.wait()
    try:
        yield place
    finally:
        place.stopped.set()
        async with asyncio.timeout(LIMIT):
            await asyncio.wait([place.serving])
        for link in place.links:
            link.writer.close()
            try:
                await link.writer.wait_closed()
            except ConnectionError:
                pass  # closed by the server, as the test wanted
    place.serving.result()


class SlowStore(MemoryStore):
    """Writes only when it is let; then every time."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()
        self.closed = False

    def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
        assert self.let.wait(LIMIT)
        return super().write(entries, again=again)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def quick_ticks(monkeypatch):
    monkeypatch.setattr(transport_module, "TICK", 0.01)


class TestStream:
    """PROTOCOL section 1."""

    @pytest.mark.parametrize("store", [None, MemoryStore()], ids=["no store", "store"])
    @in_a_loop
    async def test_a_thousand_pipelined_submissions_are_answered_in_order(self, store):
        async with hall(store) as place:
            client = await place.connect()
            for _ in range(1000):
                client.say(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            client.say(P.ECHO_REQ, b"end")
            heard = await client.hear(1001)
            created = [(P.JOB_CREATED, [handle(number)]) for number in range(1, 1001)]
            assert heard == [*created, (P.ECHO_RES, [b"end"])]
        if store is not None:
            assert len(store.jobs) == 1000

    @in_a_loop
    async def test_packets_may_come_byte_by_byte(self):
        async with hall() as place:
            client = await place.connect()
            stream = encode_request(P.SUBMIT_JOB_BG, b"f", b"u", b"w") + encode_request(P.ECHO_REQ, b"x")
            for index in range(len(stream)):
                client.writer.write(stream[index : index + 1])
                # Read by the server, since it runs in this loop.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert await client.hear(2) == [(P.JOB_CREATED, [handle(1)]), (P.ECHO_RES, [b"x"])]

    @in_a_loop
    async def test_text_and_packets_alternate(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"status\r\n" + encode_request(P.ECHO_REQ, b"x") + b"nonsense\n")
            assert await client.line() == b".\n"
            assert await client.reader.readexactly(13) == b"\0RES\0\0\0\x11\0\0\0\x01x"
            assert await client.line() == b"ERR UNKNOWN_COMMAND Unknown+server+commandnonsense\r\n"

    @in_a_loop
    async def test_job_goes_from_client_to_worker_and_back(self):
        async with hall(MemoryStore()) as place:
            worker, client = await place.worker(b"f"), await place.connect()
            worker.say(P.PRE_SLEEP)
            assert await client.ask(P.SUBMIT_JOB, b"f", b"", b"abc") == (P.JOB_CREATED, [handle(1)])
            assert await worker.hear() == [(P.NOOP, [b""])]
            assert await worker.ask(P.GRAB_JOB) == (P.JOB_ASSIGN, [handle(1), b"f", b"abc"])
            worker.say(P.WORK_COMPLETE, handle(1), b"cba")
            assert await client.hear() == [(P.WORK_COMPLETE, [handle(1), b"cba"])]

    @in_a_loop
    async def test_what_nobody_waits_for_comes_in_a_moment(self):
        async with hall(MemoryStore()) as place:
            client = await place.connect()
            assert await client.ask(P.SUBMIT_JOB_BG, CLAIM, b"", b"") == NUDGED

    @in_a_loop
    async def test_what_nobody_waits_for_comes_first_with_what_is_waited_for(self):
        async with hall(MemoryStore()) as place:
            client = await place.connect()
            client.say(P.SUBMIT_JOB_BG, CLAIM, b"", b"")
            client.say(P.ECHO_REQ, b"x")
            assert await client.hear(2) == [NUDGED, (P.ECHO_RES, [b"x"])]
            # Nothing of it is told twice.
            await until(lambda: not place.server.core.patient)
            assert await client.ask(P.ECHO_REQ, b"y") == (P.ECHO_RES, [b"y"])

    @in_a_loop
    async def test_large_packets_pass(self):
        workload = bytes(range(256)) * 4 * 4096
        async with hall() as place:
            client = await place.connect()
            assert await client.ask(P.ECHO_REQ, workload) == (P.ECHO_RES, [workload])

    @in_a_loop
    async def test_answers_reach_a_client_that_has_finished_talking(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"status\n")
            client.writer.write_eof()
            assert await client.end() == b".\n"

    @in_a_loop
    async def test_worker_that_vanishes_gives_its_job_back(self):
        async with hall() as place:
            first, second, client = await place.worker(b"f"), await place.worker(b"f"), await place.connect()
            await client.ask(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            await first.ask(P.GRAB_JOB)
            second.say(P.PRE_SLEEP)
            first.writer.transport.abort()
            assert await second.hear() == [(P.NOOP, [b""])]
            assert await second.ask(P.GRAB_JOB) == (P.JOB_ASSIGN, [handle(1), b"f", b"w"])


class TestTurns:
    """DESIGN section 6: at most 200 packets per connection and turn of the loop, so that nobody starves."""

    @in_a_loop
    async def test_others_are_heard_between(self):
        order: list[Peer] = []

        class Watched(JobServer):
            def receive(self, peer: Peer, packet: Packet) -> None:
                order.append(peer)
                super().receive(peer, packet)

        async with hall(core=Watched()) as place:
            greedy, modest = await place.connect(), await place.connect()
            await greedy.ask(P.ECHO_REQ, b"here")
            await modest.ask(P.ECHO_REQ, b"here")
            order.clear()
            greedy.writer.write(encode_request(P.ECHO_REQ, b"x") * 2000)
            modest.say(P.ECHO_REQ, b"y")
            assert await modest.hear() == [(P.ECHO_RES, [b"y"])]
            assert len(await greedy.hear(2000)) == 2000
            runs = [len(order[: order.index(peer)]) for peer in set(order)]
            assert sorted(runs) == [0, 200]

    @in_a_loop
    async def test_lines_of_text_count_too_and_nothing_is_lost(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"version\n" * 1000 + encode_request(P.ECHO_REQ, b"end"))
            lines = [await client.line() for _ in range(1000)]
            assert len(set(lines)) == 1
            assert await client.hear() == [(P.ECHO_RES, [b"end"])]


class TestMalformedInput:
    """PROTOCOL section 4."""

    @pytest.mark.parametrize(
        "stream",
        [
            b"\0FOO" + bytes(8),
            b"\0REQ\xff\xff\xff\xff\0\0\0\0",
            b"\0REQ\0\0\0\x10\xff\xff\xff\xff",
            b"x" * 9000,
        ],
        ids=["magic", "type", "size", "line"],
    )
    @in_a_loop
    async def test_unreadable_stream_closes_that_connection_alone(self, stream):
        async with hall() as place:
            bad, good = await place.connect(), await place.connect()
            bad.writer.write(b"nonsense\n" + stream + encode_request(P.SUBMIT_JOB_BG, b"f", b"", b""))
            assert await bad.end() in (b"ERR UNKNOWN_COMMAND Unknown+server+commandnonsense\r\n", b"")
            assert await good.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            assert place.server.core.jobs == {}

    @in_a_loop
    async def test_readable_mistakes_are_answered_and_the_connection_goes_on(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"\0RES\0\0\0\x01\0\0\0\x01x" + b"\0REQ\0\0\0\x07\0\0\0\x04func")
            client.say(P.ECHO_REQ, b"x")
            assert await client.hear(3) == [
                (P.ERROR, [b"INVALID_MAGIC", b"Request magic expected"]),
                (P.ERROR, [b"INVALID_PACKET", b"Too few arguments in the packet"]),
                (P.ECHO_RES, [b"x"]),
            ]

    @in_a_loop
    async def test_line_of_too_many_words_is_the_last_thing_heard(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"version\na b c d e f\n" + encode_request(P.SUBMIT_JOB_BG, b"f", b"", b""))
            assert (await client.end()).startswith(b"OK ")
            assert place.server.core.jobs == {}

    @in_a_loop
    async def test_error_of_ours_ends_one_connection_and_is_logged(self, caplog):
        class Broken(JobServer):
            def receive(self, peer: Peer, packet: Packet) -> None:
                if packet[1] == [b"break"]:
                    raise ZeroDivisionError
                super().receive(peer, packet)

        async with hall(core=Broken()) as place:
            bad, good = await place.connect(), await place.connect()
            bad.say(P.ECHO_REQ, b"break")
            assert await bad.end() == b""
            assert await good.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
        assert "ZeroDivisionError" in caplog.text


class TestHTTP:
    """A page of any site may have a browser send to this port."""

    @pytest.mark.parametrize(
        "head",
        [
            b"POST / HTTP/1.1\r\nHost: localhost:4730\r\nUser-Agent: short\r\n\r\n",
            b"GET /create%20function HTTP/1.0\r\n\r\n",
            b"Host: localhost\r\n\r\n",
            b"hOST: localhost\nstatus\n",
        ],
    )
    @in_a_loop
    async def test_it_is_not_answered_nor_read_on(self, caplog: Any, head: bytes):
        async with hall() as place:
            browser, client = await place.connect(), await place.connect()
            packet = encode_request(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            browser.writer.write(head + packet + b"create function g\n")
            assert await browser.end() == b""
            assert "this is HTTP" in caplog.text
            client.writer.write(b"status\n")
            assert await client.line() == b".\n"

    @in_a_loop
    async def test_words_that_are_none_are_answered(self):
        async with hall() as place:
            client = await place.connect()
            client.writer.write(b"create function http\n\nhost\n")
            assert await client.line() == b"OK\r\n"
            assert await client.line() == b"ERR UNKNOWN_COMMAND Unknown+server+command\r\n"
            assert await client.line() == b"ERR UNKNOWN_COMMAND Unknown+server+commandhost\r\n"


class TestLimits:
    """DESIGN section 6."""

    @pytest.mark.parametrize(
        "limits",
        [{"output_hard": 2**18, "stuck": 0.05}, {"output_hard": 2**18, "output_total": 2**20}],
        ids=["stuck", "total"],
    )
    @in_a_loop
    async def test_peer_that_does_not_take_its_output_is_closed(self, quick_ticks, limits: dict[str, float]):
        async with hall(output_soft=2**16, **limits) as place:
            worker, client = await place.worker(b"f"), await place.connect(receive_buffer=2**14)
            client.writer.transport.pause_reading()
            client.say(P.SUBMIT_JOB, b"f", b"", b"")
            await until(lambda: len(place.server.core.jobs) == 1)
            assert (await worker.ask(P.GRAB_JOB))[0] == P.JOB_ASSIGN
            connections = place.server.connections
            async with asyncio.timeout(LIMIT):
                while len(connections) == 2:
                    worker.say(P.WORK_DATA, handle(1), b"x" * 2**16)
                    assert await worker.ask(P.ECHO_REQ, b"going on") == (P.ECHO_RES, [b"going on"])
            (left,) = connections
            assert left.peer.abilities
            assert not place.server.blocked

    @in_a_loop
    async def test_peers_for_each_of_which_a_little_waits_are_bounded_together(self, quick_ticks):
        async with hall(output_soft=2**23, output_total=2**23) as place:
            clients = [await place.connect(receive_buffer=2**14) for _ in range(8)]
            for client in clients:
                client.writer.transport.pause_reading()
                client.say(P.ECHO_REQ, b"x" * 7 * 2**20)
            # For none of them so much that it would not be read.
            await until(lambda: 0 < len(place.server.connections) < 8)
            await until(lambda: sum(each.unsent for each in place.server.connections) <= 2**23)
            assert (await (await place.connect()).ask(P.ECHO_REQ, b"x")) == (P.ECHO_RES, [b"x"])
            assert not place.server.blocked

    @in_a_loop
    async def test_what_is_told_a_thousand_times_is_not_put_together_first(self, monkeypatch):
        """One packet of a worker is as many for a client that submitted the same unique as often."""
        monkeypatch.setattr(transport_module, "TICK", 600.0)
        async with hall(output_total=2**24) as place:
            worker, client, other = await place.worker(b"f"), await place.connect(), await place.connect()
            client.writer.write(encode_request(P.SUBMIT_JOB, b"f", b"u", b"") * 1000)
            await client.hear(1000)
            assert (await worker.ask(P.GRAB_JOB))[0] == P.JOB_ASSIGN
            worker.say(P.WORK_DATA, handle(1), b"few")
            assert await client.hear(1000) == [(P.WORK_DATA, [handle(1), b"few"])] * 1000
            worker.say(P.WORK_DATA, handle(1), b"x" * 2**20)
            assert await client.end() == b""
            assert await other.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])

    @in_a_loop
    async def test_packet_above_the_hard_limit_arrives(self, quick_ticks):
        async with hall(output_soft=2**16, output_hard=2**18) as place:
            worker, client = await place.worker(b"f"), await place.connect(receive_buffer=2**14)
            data = b"x" * 2**23
            client.say(P.SUBMIT_JOB, b"f", b"", data)
            await until(lambda: len(place.server.core.jobs) == 1)
            kind, arguments = await worker.ask(P.GRAB_JOB)
            assert (kind, arguments[-1]) == (P.JOB_ASSIGN, data)
            worker.say(P.WORK_COMPLETE, handle(1), data)
            assert await client.hear(2) == [
                (P.JOB_CREATED, [handle(1)]),
                (P.WORK_COMPLETE, [handle(1), data]),
            ]

    @in_a_loop
    async def test_peer_that_takes_its_output_slowly_stays(self, monkeypatch):
        monkeypatch.setattr(transport_module, "TICK", 600.0)
        async with hall(output_soft=2**16, output_hard=2**18, stuck=10.0) as place:
            # What it does not ask for it does not take, but for a little.
            client = await place.connect(receive_buffer=2**14)
            client.say(P.ECHO_REQ, b"x" * 2**23)
            await until(lambda: len(place.server.blocked) == 1)
            (blocked,) = place.server.blocked
            now = place.server.loop.time()
            unsent, taken = blocked.unsent, 0
            assert not blocked._is_stuck(now + 9)
            assert blocked._is_stuck(now + 20)
            async with asyncio.timeout(LIMIT):
                while blocked.unsent == unsent:
                    taken += len(await client.reader.read(2**16))
                assert blocked.unsent > 2**18
                assert not blocked._is_stuck(now + 20)
                await client.reader.readexactly(2**23 + 12 - taken)
            await until(lambda: not place.server.blocked)

    @in_a_loop
    async def test_peer_that_does_not_take_its_output_is_not_read_above_the_soft_limit(self):
        soft, size, count = 2**16, 2**12, 4000
        async with hall(output_soft=soft, output_hard=2**30) as place:
            client = await place.connect(receive_buffer=2**14)
            client.writer.transport.pause_reading()
            client.writer.write(encode_request(P.ECHO_REQ, b"x" * size) * count)
            await until(lambda: all(connection._blocked for connection in place.server.connections))
            # It had its turns: whatever it was to read it has read.
            for _ in range(20):
                await (await place.connect()).ask(P.ECHO_REQ, b"turn")
            (blocked,) = [connection for connection in place.server.connections if connection._blocked]
            one_turn = PACKETS_PER_TURN * (size + 12)
            assert blocked._transport.get_write_buffer_size() < soft + 2 * one_turn
            client.writer.transport.resume_reading()
            assert await client.hear(count) == [(P.ECHO_RES, [b"x" * size])] * count

    @in_a_loop
    async def test_one_listing_is_sent_before_the_next_is_made(self):
        """A line of seven bytes may be answered by megabytes."""
        soft, count = 2**16, 100
        async with hall(output_soft=soft) as place:
            worker = await place.connect()
            for number in range(1000):
                worker.say(P.CAN_DO, b"%0480d" % number)
            await worker.ask(P.ECHO_REQ, b"registered")
            listing = text.answer(place.server.core, next(iter(place.server.core.peers)), b"status")
            assert listing is not None
            assert len(listing) > 6 * soft
            client = await place.connect(receive_buffer=2**14)
            client.writer.transport.pause_reading()
            client.writer.write(b"status\n" * count)
            await until(lambda: len(place.server.blocked) == 1)
            for _ in range(20):
                assert await worker.ask(P.ECHO_REQ, b"turn") == (P.ECHO_RES, [b"turn"])
            (blocked,) = place.server.blocked
            # What the system took at first, and one more.
            assert blocked.unsent <= 2 * len(listing)
            client.writer.transport.resume_reading()
            async with asyncio.timeout(LIMIT):
                assert await client.reader.readexactly(count * len(listing)) == count * listing

    @in_a_loop
    async def test_packet_that_does_not_come_to_its_end_closes(self, quick_ticks):
        async with hall(incomplete=0.05) as place:
            slow, idle = await place.connect(), await place.connect()
            await idle.ask(P.ECHO_REQ, b"x")
            slow.say(P.ECHO_REQ, b"x")
            slow.writer.write(encode_request(P.ECHO_REQ, b"never")[:-1])
            assert await slow.end() == b"\0RES\0\0\0\x11\0\0\0\x01x"
            assert await idle.ask(P.ECHO_REQ, b"idle for longer") == (P.ECHO_RES, [b"idle for longer"])

    @in_a_loop
    async def test_large_packet_may_come_slowly(self):
        async with hall() as place:
            client = await place.connect()
            await client.ask(P.ECHO_REQ, b"x")
            (connection,) = place.server.connections
            packet = encode_request(P.ECHO_REQ, b"x" * 2**20)
            sent = 0

            async def send(size: int) -> float:
                """Send more of it; when the server wants it to have gone on."""
                nonlocal sent
                client.writer.write(packet[sent : sent + size])
                sent += size
                await until(lambda: len(connection._reader._partial or b"") == sent)
                assert connection._stale is not None
                return connection._stale

            begun = await send(100)
            assert await send(1000) == begun
            assert begun < (later := await send(PROGRESS))
            assert await send(1000) == later
            assert later < await send(PROGRESS)
            client.writer.write(packet[sent:])
            assert await client.hear() == [(P.ECHO_RES, [b"x" * 2**20])]
            assert connection._stale is None

    @in_a_loop
    async def test_stream_that_is_always_inside_a_packet_goes_on(self, quick_ticks):
        """A busy client whose every read ends in the middle of the next packet."""
        async with hall(incomplete=0.1) as place:
            client = await place.connect()
            packet = encode_request(P.ECHO_REQ, b"steady")
            loop = asyncio.get_running_loop()
            deadline = loop.time() + 0.4
            client.writer.write(packet[:15])
            while loop.time() < deadline:
                client.writer.write(packet[15:] + packet[:15])
                assert await client.hear() == [(P.ECHO_RES, [b"steady"])]

    @in_a_loop
    async def test_peer_that_was_closed_and_does_not_read_is_gone_in_the_end(self, quick_ticks):
        async with hall(incomplete=0.05, output_soft=2**12) as place:
            client = await place.connect(receive_buffer=2**14)
            client.writer.transport.pause_reading()
            client.say(P.ECHO_REQ, b"x" * 2**23)
            client.writer.write(b"\0FOO" + bytes(8))
            await until(lambda: len(place.server.connections) == 1)
            await until(lambda: not place.server.connections)

    @in_a_loop
    async def test_a_crowd_above_the_limit_is_one_line(self, caplog: pytest.LogCaptureFixture):
        async with hall(max_connections=1) as place:
            await (await place.connect()).ask(P.ECHO_REQ, b"x")
            for _ in range(20):
                assert await (await place.connect()).end() == b""
            (line,) = (line for line in caplog.messages if "refused" in line)
            assert "too many are open already; --file-descriptors allows more" in line

    @in_a_loop
    async def test_connections_above_the_limit_are_closed_at_once(self):
        async with hall(max_connections=2) as place:
            first, second = await place.connect(), await place.connect()
            await first.ask(P.ECHO_REQ, b"x")
            await second.ask(P.ECHO_REQ, b"x")
            assert await (await place.connect()).end() == b""
            assert await first.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            second.writer.close()
            await until(lambda: len(place.server.connections) == 1)
            assert await (await place.connect()).ask(P.ECHO_REQ, b"y") == (P.ECHO_RES, [b"y"])


class TestStore:
    """JOB_CREATED of a background job means that the store has it."""

    @in_a_loop
    async def test_nobody_is_let_in_before_what_lies_at_the_door_is_here(self, monkeypatch: Any):
        """A worker may be back with a job whose hand-out was not written before the server was killed."""
        monkeypatch.setattr(transport_module, "FIRST_LOOK", LIMIT)
        let = threading.Event()

        class Slow(MemoryStore):
            def claim(self, *arguments: Any) -> Claimed:
                assert let.wait(LIMIT)
                return super().claim(*arguments)

        sockets = bind("127.0.0.1", 0)
        server = GearmanServer(JobServer(ServerOptions(name="test:1", epoch=7, durable=True)), Slow())
        ready, stopped = asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(server.serve(sockets, stopped, ready=ready.set))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not ready.is_set()
        let.set()
        async with asyncio.timeout(LIMIT):
            await ready.wait()
            stopped.set()
            await serving

    @in_a_loop
    async def test_store_that_hangs_keeps_nobody_out(self, monkeypatch: Any):
        monkeypatch.setattr(transport_module, "FIRST_LOOK", 0.01)
        let = threading.Event()

        class Hanging(MemoryStore):
            def claim(self, *arguments: Any) -> Claimed:
                assert let.wait(LIMIT)
                return super().claim(*arguments)

        async with hall(Hanging()) as place:
            client = await place.connect()
            assert await client.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            let.set()

    @in_a_loop
    async def test_loop_goes_on_while_the_store_takes_its_time(self):
        store = SlowStore()
        async with hall(store) as place:
            client, other = await place.connect(), await place.connect()
            client.say(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            await until(lambda: len(place.server.core.jobs) == 1)
            for _ in range(10):
                assert await other.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            assert store.jobs == {}
            store.let.set()
            assert await client.hear() == [(P.JOB_CREATED, [handle(1)])]
            assert list(store.jobs) == [handle(1)]
        assert store.closed

    @in_a_loop
    async def test_no_more_is_read_than_the_store_can_take(self):
        store = SlowStore()
        async with hall(store, unanswered=100) as place:
            client, other = await place.connect(), await place.connect()
            for number in range(10_000):
                client.say(P.SUBMIT_JOB_BG, b"f", b"", b"%d" % number)
            client.say(P.ECHO_REQ, b"last")
            core = place.server.core
            await until(lambda: len(core.jobs) >= 100)
            for _ in range(10):
                assert await other.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            assert len(core.jobs) < 100 + PACKETS_PER_TURN
            store.let.set()
            heard = await client.hear(10_001)
            assert {kind for kind, _ in heard[:-1]} == {P.JOB_CREATED}
            assert heard[-1] == (P.ECHO_RES, [b"last"])
            assert len(store.jobs) + len(store.unclaimed) == 10_000

    @in_a_loop
    async def test_no_more_is_read_than_may_wait_behind_a_submission(self):
        """What waits for the store to answer what comes before it is memory, too."""
        store, size, count = SlowStore(), 2**12, 4000
        async with hall(store, output_soft=2**16) as place:
            client, other = await place.connect(), await place.connect()
            client.say(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            await until(lambda: len(place.server.core.jobs) == 1)
            client.writer.write(encode_request(P.ECHO_REQ, b"x" * size) * count)
            kept = [connection for connection in place.server.connections if connection.peer.line is not None]
            await until(lambda: kept[0].kept > 2**16)
            for _ in range(10):
                assert await other.ask(P.ECHO_REQ, b"x") == (P.ECHO_RES, [b"x"])
            assert kept[0].kept < 2**16 + 2 * PACKETS_PER_TURN * (size + 12)
            store.let.set()
            heard = await client.hear(count + 1)
            assert heard == [(P.JOB_CREATED, [handle(1)]), *[(P.ECHO_RES, [b"x" * size])] * count]
            assert kept[0].peer.lined == 0

    @in_a_loop
    async def test_what_others_send_behind_a_submission_is_bounded(self, quick_ticks, caplog):
        store = SlowStore()
        async with hall(store, output_total=2**20) as place:
            worker, client = await place.worker(b"f"), await place.connect()
            client.say(P.SUBMIT_JOB, b"f", b"", b"")
            await client.hear()
            assert (await worker.ask(P.GRAB_JOB))[0] == P.JOB_ASSIGN
            client.say(P.SUBMIT_JOB_BG, b"g", b"", b"w")
            await until(lambda: len(place.server.core.jobs) == 2)
            async with asyncio.timeout(LIMIT):
                while len(place.server.connections) == 2:
                    worker.say(P.WORK_DATA, handle(1), b"x" * 2**16)
                    assert await worker.ask(P.ECHO_REQ, b"on") == (P.ECHO_RES, [b"on"])
            assert await client.end() == b""
            assert "the database has not answered what comes before" in caplog.text
            store.let.set()

    @in_a_loop
    async def test_store_that_comes_back_gets_everything(self):
        class Flaky(MemoryStore):
            failures = 2

            def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
                if self.failures:
                    self.failures -= 1
                    raise StoreError("down")
                return super().write(entries, again=again)

        async with hall(Flaky()) as place:
            client = await place.connect()
            assert await client.ask(P.SUBMIT_JOB_BG, b"f", b"", b"w") == (P.JOB_CREATED, [handle(1)])

    @in_a_loop
    async def test_lost_lease_ends_the_server_with_its_error(self):
        class Fenced(MemoryStore):
            def write(self, entries: Sequence[Entry], *, again: bool) -> dict[int, str]:
                raise LeaseLost("taken")

        async def serve_until_the_end() -> None:
            async with hall(Fenced()) as place:
                client = await place.connect()
                client.say(P.SUBMIT_JOB_BG, b"f", b"", b"w")
                reason = b"This job server was replaced by another"
                assert await client.hear() == [(P.ERROR, [b"QUEUE_ERROR", reason])]
                assert await client.end() == b""

        with pytest.raises(LeaseLost):
            await serve_until_the_end()

    @in_a_loop
    async def test_lost_lease_found_by_a_claim_ends_the_server_too(self):
        class Fenced(MemoryStore):
            def claim(self, limit: int, full: object, crowded: object = None) -> list[StoredJob]:
                raise LeaseLost("taken")

        with pytest.raises(LeaseLost):
            async with hall(Fenced()) as place:
                await asyncio.wait([place.serving], timeout=LIMIT)

    @in_a_loop
    async def test_error_of_ours_in_the_journal_ends_the_server_with_it(self, caplog):
        """It would go on without its journal otherwise, and nothing more would be written."""

        class Broken(JobServer):
            def committed(self, entries: Iterable[Entry]) -> None:
                raise ZeroDivisionError("ours")

        core = Broken(ServerOptions(durable=True))
        with pytest.raises(ZeroDivisionError):
            async with hall(MemoryStore(), core) as place:
                await asyncio.wait([place.serving], timeout=LIMIT)
        assert "ours" in caplog.text


class TestStop:
    """What is committed is told, what happened is written, and then it ends."""

    @in_a_loop
    async def test_submission_in_flight_is_acknowledged_before_the_end(self):
        store = SlowStore()
        async with hall(store) as place:
            client = await place.connect()
            client.say(P.SUBMIT_JOB_BG, b"f", b"", b"w")
            await until(lambda: len(place.server.core.jobs) == 1)
            place.stopped.set()
            store.let.set()
            assert await client.hear() == [(P.JOB_CREATED, [handle(1)])]
            assert await client.end() == b""
        assert list(store.jobs) == [handle(1)]
        assert store.closed

    @in_a_loop
    async def test_result_that_nobody_waits_for_is_written_before_the_end(self):
        store = MemoryStore()
        async with hall(store) as place:
            worker, client = await place.worker(b"f"), await place.connect()
            await client.ask(P.SUBMIT_JOB, b"f", b"", b"w")
            await worker.ask(P.GRAB_JOB)
            worker.say(P.WORK_COMPLETE, handle(1), b"r")
            await client.hear()
            place.stopped.set()
            assert await client.end() == b""
        assert store.finished[handle(1)].data == b"r"

    @in_a_loop
    async def test_port_is_free_afterwards_and_connections_are_closed(self):
        async with hall() as place:
            client = await place.connect()
            await client.ask(P.ECHO_REQ, b"x")
            place.stopped.set()
            assert await client.end() == b""
            await asyncio.wait([place.serving])
            for sock in bind(*place.address):
                sock.close()
            assert place.server.connections == set()
            assert place.server.core.peers == {}

    def test_taken_port_is_found_before_anything_is_touched(self):
        (taken,) = bind("127.0.0.1", 0)
        taken.listen()
        try:
            with pytest.raises(OSError, match="in use"):
                bind(*taken.getsockname())
        finally:
            taken.close()


class TestShutdown:
    """PROTOCOL sections 5.8 and 6: an operator ends the server."""

    def core(self, *, durable: bool = False) -> JobServer:
        return JobServer(ServerOptions(name="test:1", epoch=7, durable=durable, allow_shutdown=True))

    async def refused(self, place: Hall) -> None:
        with pytest.raises(ConnectionError):
            await asyncio.open_connection(*place.address)

    @in_a_loop
    async def test_immediate(self):
        async with hall(core=self.core()) as place:
            link = await place.connect()
            await link.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")
            link.writer.write(b"shutdown\n")
            assert await link.end() == b"OK\r\n"
            async with asyncio.timeout(LIMIT):
                await place.serving
            await self.refused(place)

    @in_a_loop
    async def test_graceful_without_jobs(self):
        async with hall(core=self.core()) as place:
            await place.worker(b"f")
            link = await place.connect()
            link.writer.write(b"shutdown graceful\n")
            assert await link.end() == b"OK\r\n"
            async with asyncio.timeout(LIMIT):
                await place.serving

    @in_a_loop
    async def test_graceful_serves_its_connections_until_no_job_is_left(self):
        async with hall(core=self.core()) as place:
            worker = await place.worker(b"f")
            link = await place.connect()
            link.say(P.SUBMIT_JOB, b"f", b"", b"1")
            await link.hear()
            link.writer.write(b"shutdown graceful\n")
            assert await link.line() == b"OK\r\n"
            await self.refused(place)
            link.say(P.SUBMIT_JOB, b"f", b"", b"2")
            await link.hear()
            for number in (1, 2):
                assert (await worker.ask(P.GRAB_JOB))[1][0] == handle(number)
                worker.say(P.WORK_COMPLETE, handle(number), b"result")
                assert await link.hear() == [(P.WORK_COMPLETE, [handle(number), b"result"])]
            async with asyncio.timeout(LIMIT):
                await place.serving

    @in_a_loop
    async def test_cancelling_the_last_job_lets_it_end(self):
        async with hall(core=self.core()) as place:
            link = await place.connect()
            await link.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")
            link.writer.write(b"shutdown graceful\ncancel job " + handle(1) + b"\n")
            assert await link.end() == b"OK\r\nOK\r\n"
            async with asyncio.timeout(LIMIT):
                await place.serving

    @in_a_loop
    async def test_second_thoughts(self):
        async with hall(core=self.core()) as place:
            link = await place.connect()
            await link.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")
            link.writer.write(b"shutdown graceful\n")
            assert await link.line() == b"OK\r\n"
            link.writer.write(b"shutdown\n")
            assert await link.end() == b"OK\r\n"
            async with asyncio.timeout(LIMIT):
                await place.serving

    @in_a_loop
    async def test_end_of_the_last_job_is_written_and_rows_stay_where_they_are(self):
        store = MemoryStore()
        async with hall(store, core=self.core(durable=True)) as place:
            worker = await place.worker(b"f")
            link = await place.connect()
            await link.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")
            await worker.ask(P.GRAB_JOB)
            link.writer.write(b"shutdown graceful\n")
            assert await link.line() == b"OK\r\n"
            store.unclaimed.append(StoredJob(b"H:r1", b"f", b"", b"", 0, 0, None))
            link.say(P.SUBMIT_JOB_BG, CLAIM, b"", b"")
            await link.hear()
            worker.say(P.WORK_COMPLETE, handle(1), b"result")
            async with asyncio.timeout(LIMIT):
                await place.serving
        assert list(store.finished) == [handle(1)]
        assert len(store.unclaimed) == 1

    @in_a_loop
    async def test_by_the_process(self):
        async with hall() as place:
            place.server.shut_down(Shutdown.GRACEFUL)
            async with asyncio.timeout(LIMIT):
                await place.serving
