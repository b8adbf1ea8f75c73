"""
The job server under load, beside the C gearmand in the same run.

    python benchmarks/server.py [--seconds 2] [--rounds 3] [--durable]

Prints a table with a column per server; only the ratios mean anything. Both
are started here on free ports of the loopback and stopped at the end. gearmand
runs with one I/O thread (``-t 1``), its fast mode on few cores, and is left
out when it is not installed. ``--durable`` measures with the database store
(a SQLite file in a temporary folder) and gearmand's SQLite queue instead.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, perf_counter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from django_gearman.protocol.packets import RESPONSE, PacketType, encode_request  # noqa: E402
from django_gearman.protocol.reader import PacketReader  # noqa: E402

FUNCTION = b"bench"
PAYLOAD = b"x" * 100
GRAB = encode_request(PacketType.GRAB_JOB)
PRE_SLEEP = encode_request(PacketType.PRE_SLEEP)
SUBMIT = encode_request(PacketType.SUBMIT_JOB, FUNCTION, b"", PAYLOAD)


class Peer:
    """A blocking connection that counts as little as possible."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = PacketReader(RESPONSE)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> tuple[int, list[bytes]]:
        while (packet := self.reader.take()) is None:
            data = self.socket.recv(1 << 18)
            if not data:
                raise ConnectionError("the server closed the connection")
            self.reader.feed(data)
        return packet

    def close(self) -> None:
        self.socket.close()


def background(unique: int) -> bytes:
    # gearmand's stores overwrite jobs without a unique; the same work for both.
    return encode_request(PacketType.SUBMIT_JOB_BG, FUNCTION, b"%d" % unique, PAYLOAD)


def submissions_per_second(port: int, connections: int, jobs: int) -> float:
    """Pipelined background submissions, from the first byte sent to the last JOB_CREATED received."""
    peers = [Peer(port) for _ in range(connections)]
    each = jobs // connections
    outgoing = {
        peer.socket: memoryview(b"".join(background(index * each + n) for n in range(each)))
        for index, peer in enumerate(peers)
    }
    # All replies have one size but for the digits of the handle: count packets by their magic.
    missing = {peer.socket: each for peer in peers}
    tails = {peer.socket: b"" for peer in peers}
    for peer in peers:
        peer.socket.setblocking(False)
    started = perf_counter()
    while missing:
        readable, writable, _ = select.select(list(missing), list(outgoing), [], 30)
        assert readable or writable, "the server stopped answering"
        for sock in writable:
            sent = sock.send(outgoing[sock][: 1 << 18])
            outgoing[sock] = outgoing[sock][sent:]
            if not outgoing[sock]:
                del outgoing[sock]
        for sock in readable:
            data = tails[sock] + sock.recv(1 << 18)
            missing[sock] -= data.count(RESPONSE)
            tails[sock] = data[-3:]
            if missing[sock] <= 0:
                del missing[sock]
    elapsed = perf_counter() - started
    for peer in peers:
        peer.close()
    return each * connections / elapsed


def drain_per_second(port: int, workers: int, jobs: int) -> float:
    """Waiting background jobs run by workers that report and grab in one packet pair."""
    peers = [Peer(port) for _ in range(workers)]
    started = perf_counter()
    for peer in peers:
        peer.send(encode_request(PacketType.CAN_DO, FUNCTION) + GRAB)
    by_socket = {peer.socket: peer for peer in peers}
    done = 0
    while done < jobs:
        readable, _, _ = select.select(list(by_socket), [], [], 30)
        assert readable, f"the server stopped handing out after {done} of {jobs} jobs"
        for sock in readable:
            peer = by_socket[sock]
            kind, arguments = peer.receive()
            if kind == PacketType.JOB_ASSIGN:
                peer.send(encode_request(PacketType.WORK_COMPLETE, arguments[0], b"") + GRAB)
                done += 1
            elif kind == PacketType.NO_JOB:
                peer.send(PRE_SLEEP)
            elif kind == PacketType.NOOP:
                peer.send(GRAB)
    elapsed = perf_counter() - started
    for peer in peers:
        peer.close()
    return jobs / elapsed


@contextmanager
def echoing_workers(port: int, count: int) -> Iterator[None]:
    """Processes that answer jobs with their payload."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from benchmarks.server import echo_worker; echo_worker(int(sys.argv[1]))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(port), str(ROOT)], stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def echo_worker(port: int) -> None:
    peer = Peer(port)
    peer.send(encode_request(PacketType.CAN_DO, FUNCTION) + GRAB)
    print("ready", flush=True)
    while True:
        kind, arguments = peer.receive()
        if kind == PacketType.JOB_ASSIGN:
            peer.send(encode_request(PacketType.WORK_COMPLETE, arguments[0], arguments[2]) + GRAB)
        elif kind == PacketType.NO_JOB:
            peer.send(PRE_SLEEP)
        elif kind == PacketType.NOOP:
            peer.send(GRAB)


def round_trip_us(port: int, seconds: float) -> float:
    """Median of one foreground job after the other, in microseconds."""
    with echoing_workers(port, 1):
        peer = Peer(port)
        times = []
        deadline = monotonic() + seconds
        while monotonic() < deadline:
            started = perf_counter()
            peer.send(SUBMIT)
            while peer.receive()[0] != PacketType.WORK_COMPLETE:
                pass
            times.append(perf_counter() - started)
        peer.close()
    return statistics.median(times) * 1e6


def foreground_per_second(port: int, clients: int, workers: int, seconds: float) -> float:
    """Foreground jobs of several clients at once, each with one job under way."""
    with echoing_workers(port, workers):
        peers = {peer.socket: peer for peer in (Peer(port) for _ in range(clients))}
        for peer in peers.values():
            peer.send(SUBMIT)
        done = 0
        started = perf_counter()
        while perf_counter() - started < seconds:
            for sock in select.select(list(peers), [], [], 30)[0]:
                peer = peers[sock]
                if peer.receive()[0] == PacketType.WORK_COMPLETE:
                    done += 1
                    peer.send(SUBMIT)
                else:
                    while (packet := peer.reader.take()) is not None:
                        if packet[0] == PacketType.WORK_COMPLETE:
                            done += 1
                            peer.send(SUBMIT)
        elapsed = perf_counter() - started
        for peer in peers.values():
            peer.close()
    return done / elapsed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = monotonic() + 20
    while monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            select.select([], [], [], 0.05)
    raise RuntimeError(f"{process.args!r} does not listen on {port}")


@contextmanager
def ours(scratch: Path, *, durable: bool) -> Iterator[int]:
    port = free_port()
    environment = {**os.environ, "PROJECT_VAR": str(scratch), "GEARMAN_SERVERS": f"127.0.0.1:{port}"}
    manage = [sys.executable, str(ROOT / "manage.py")]
    if durable:
        subprocess.run([*manage, "migrate", "-v0"], check=True, env=environment)
    command = [*manage, "gearman_server", "-v0", "--store", "database" if durable else "memory"]
    with _running(command, port, environment):
        yield port


@contextmanager
def gearmand(scratch: Path, *, durable: bool) -> Iterator[int]:
    port = free_port()
    command = ["gearmand", "-L", "127.0.0.1", "-p", str(port), "-t", "1", "-l", "none", "--verbose", "ERROR"]
    if durable:
        command += ["-q", "libsqlite3", "--libsqlite3-db", str(scratch / "gearmand.sqlite3")]
    with _running(command, port, dict(os.environ)):
        yield port


@contextmanager
def _running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def scenarios(seconds: float, *, durable: bool) -> dict[str, Callable[[int], float]]:
    jobs = 5_000 if durable else 50_000
    found: dict[str, Callable[[int], float]] = {
        "submissions/s, 1 connection": lambda port: submissions_per_second(port, 1, jobs),
        "drain/s, 4 workers": lambda port: drain_per_second(port, 4, jobs),
        "submissions/s, 8 connections": lambda port: submissions_per_second(port, 8, jobs),
        "drain/s, 4 workers (again)": lambda port: drain_per_second(port, 4, jobs),
    }
    if not durable:
        found |= {
            "round trip, p50 us": lambda port: round_trip_us(port, seconds),
            "foreground/s, 8 clients x 4 workers": lambda port: foreground_per_second(port, 8, 4, seconds),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per timed scenario")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians are shown")
    parser.add_argument("--durable", action="store_true", help="with a database behind both servers")
    options = parser.parse_args()
    kinds = {"django_gearman": ours}
    if shutil.which("gearmand"):
        kinds["gearmand -t 1"] = gearmand
    results: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name, start in kinds.items():
            with ExitStack() as stack:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                port = stack.enter_context(start(scratch, durable=options.durable))
                for title, measure in scenarios(options.seconds, durable=options.durable).items():
                    results.setdefault(title, {}).setdefault(name, []).append(measure(port))
    print(f"{'':38}" + "".join(f"{name:>16}" for name in kinds) + f"{'ratio':>8}")
    for title, by_server in results.items():
        values = [statistics.median(by_server[name]) for name in kinds]
        ratio = f"{values[0] / values[1]:8.2f}" if len(values) > 1 else ""
        print(f"{title:38}" + "".join(f"{value:16,.0f}" for value in values) + ratio)


if __name__ == "__main__":
    main()
