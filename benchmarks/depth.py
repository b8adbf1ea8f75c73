"""
A queue that is larger than memory: what a million waiting jobs cost.

    python benchmarks/depth.py                      a million jobs of 1 KB, SQLite
    python benchmarks/depth.py --jobs 100000
    DATABASE_URL=postgres://... python benchmarks/depth.py

One connection submits, one worker drains, both pipelining. Told are rates by
tenths of the way, and memory beyond that of the empty server. That ``status``
counts every job, that jobs come out in the order in which they were submitted,
all of them and each once, and what memory and start-up may cost, is checked:
anything else ends the run. The database is one of its own, as tests have.
"""

# ruff: noqa: E402  (what is imported last wants Django set up)

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from threading import Thread
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.db import connection

from django_gearman.protocol.packets import PacketType as P
from django_gearman.protocol.packets import encode_request
from tests import harness

MEMORY = 150.0
"""Megabytes that the waiting jobs may cost."""

FIRST_CLIENT = 2.0
"""Seconds from the start of the process to the first client's answer, beyond those of an empty start."""

AHEAD = 500
"""Submissions, or grabs, in one write."""

HEADER = Struct(">4sII")


class Peer:
    """One connection, unbuffered on the way out and buffered on the way in."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60.0)
        self._file = self.socket.makefile("rb", 1 << 20)

    def hear(self) -> tuple[int, bytes]:
        _, kind, length = HEADER.unpack(self._file.read(HEADER.size))
        return kind, self._file.read(length)

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def submit(port: int, jobs: int, size: int) -> Iterator[float]:
    """Submit jobs that begin with their number; yields jobs per second of each tenth."""
    peer = Peer(port)
    payload = os.urandom(size - 9)
    tenth = jobs // 10

    def send(first: int) -> None:
        for start in range(first, first + tenth, AHEAD):
            numbers = range(start, min(start + AHEAD, first + tenth))
            packets = (encode_request(P.SUBMIT_JOB_BG, b"deep", b"", b"%09d" % n + payload) for n in numbers)
            peer.socket.sendall(b"".join(packets))

    for first in range(0, tenth * 10, tenth):
        began = monotonic()
        sender = Thread(target=send, args=(first,))
        sender.start()
        for _ in range(tenth):
            kind, body = peer.hear()
            assert kind == P.JOB_CREATED, body
        sender.join()
        yield tenth / (monotonic() - began)
    peer.close()


def drain(port: int, jobs: int) -> Iterator[float]:
    """Take all jobs, in order; yields jobs per second of each tenth."""
    peer = Peer(port)
    peer.socket.sendall(encode_request(P.CAN_DO, b"deep") + encode_request(P.GRAB_JOB) * 50)
    began, tenth = monotonic(), jobs // 10
    expected = 0
    said: list[bytes] = []
    while expected < jobs:
        kind, body = peer.hear()
        if kind == P.JOB_ASSIGN:
            handle, _, workload = body.split(b"\0", 2)
            assert int(workload[:9]) == expected, f"job {workload[:9]!r} came where {expected} was next"
            expected += 1
            said += [encode_request(P.WORK_COMPLETE, handle, b""), encode_request(P.GRAB_JOB)]
            if expected % tenth == 0:
                yield tenth / (monotonic() - began)
                began = monotonic()
        else:
            assert kind == P.NO_JOB, (kind, body)
            said.append(encode_request(P.GRAB_JOB))
        if len(said) >= 50 or kind == P.NO_JOB:
            peer.socket.sendall(b"".join(said))
            said.clear()
    peer.close()


def memory(server: harness.GearmanServerProcess) -> float:
    """Resident megabytes of the server's process."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def seconds_to_first_client(server: harness.GearmanServerProcess) -> float:
    began = monotonic()
    server.start()
    peer = Peer(server.port)
    peer.socket.sendall(encode_request(P.ECHO_REQ, b"first"))
    assert peer.hear() == (P.ECHO_RES, b"first")
    peer.close()
    return monotonic() - began


def check(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"Not as promised: {what}")


def rounded(rates: list[float]) -> str:
    return " ".join(f"{rate / 1000:.1f}k" for rate in rates)


def run(jobs: int, size: int, say: Callable[[str], None]) -> None:
    """
    Fill, restart and drain a queue.

    Raises:
        SystemExit: Something was not as promised.
    """
    server = harness.GearmanServerProcess(store="database", env={"PYTHONDEVMODE": ""})
    empty_start = seconds_to_first_client(server)
    try:
        empty = memory(server)
        peak = empty
        rates = []
        for rate in submit(server.port, jobs, size):
            rates.append(rate)
            peak = max(peak, memory(server))
        say(f"submissions/s by tenths          {rounded(rates)}")
        say(f"memory, MB beyond {empty:.0f}             {peak - empty:.0f}")
        check(peak - empty <= MEMORY, f"{peak - empty:.0f} MB for {jobs} waiting jobs")
        counts = server.ask("status").splitlines()
        check(counts == [f"deep\t{jobs}\t0\t0"], f"status says {counts}")
        server.kill()
        took = seconds_to_first_client(server)
        say(f"start to first client, s         {took:.2f} (empty: {empty_start:.2f})")
        check(took - empty_start <= FIRST_CLIENT, f"{took:.1f} s until the first client was answered")
        say(f"drained/s by tenths              {rounded(list(drain(server.port, jobs)))}")
        harness.wait_until(lambda: server.ask("status").startswith("deep\t0\t0"), what="the end")
    finally:
        server.kill()
        server.forget()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="a multiple of 10 (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1000, help="bytes of each (default: %(default)s)")
    options = parser.parse_args()
    name = connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        print(f"{options.jobs:,} jobs of {options.size} bytes on {connection.vendor} ({name})")
        run(options.jobs // 10 * 10, options.size, print)
    finally:
        connection.creation.destroy_test_db(name, verbosity=0)


if __name__ == "__main__":
    main()
