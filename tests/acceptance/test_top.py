"""``manage.py gearman_top``, of our server and gearmand."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_gearman.client.admin_client import FunctionCounters
from django_gearman.client.sync import Client
from django_gearman.management.commands import gearman_top
from django_gearman.management.commands.gearman_top import Rates, Snapshot, rates
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.interop.gearmand import Gearmand

pytestmark = pytest.mark.acceptance


def top(*arguments: str) -> str:
    """One look, in this process."""
    out = io.StringIO()
    call_command("gearman_top", "--once", "--interval", "0.1", *arguments, stdout=out, stderr=io.StringIO())
    return out.getvalue()


def row(shown: str, name: str) -> list[str]:
    """Words of the first line that has the name."""
    lines = [line for line in shown.splitlines() if name in line]
    assert lines, shown
    return lines[0].split()


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    """One that other tests may have left jobs at, but no workers."""
    with harness.server(store="memory") as process:
        yield process


@contextmanager
def busy(server: harness.GearmanServerProcess | int) -> Iterator[None]:
    """A worker that has a job and is not done with it, and another one that sleeps."""
    go = threading.Event()
    begun = threading.Event()

    def transcode(job: AssignedJob) -> bytes:
        job.send_status(3, 10)
        begun.set()
        go.wait(60)
        return b""

    port = server if isinstance(server, int) else server.port
    with (
        harness.worker_thread({"video.transcode": transcode}, server, client_id="web1:17"),
        harness.worker_thread({"photos.resize": lambda job: b""}, server, client_id="web1:18"),
        Client([f"127.0.0.1:{port}"], timeout=30) as client,
    ):
        client.do_background("video.transcode", b"")
        client.do_background("video.transcode", b"")
        assert begun.wait(30)
        harness.wait_until(lambda: "web1:18" in harness.ask(port, "workers"))
        try:
            yield
        finally:
            go.set()


class TestOurs:
    def test_what_goes_on(self):
        with harness.server(store="memory") as server, busy(server):
            shown = top("--servers", server.address)
        assert row(shown, server.address)[:7] == [server.address, "0.1.0", "2", "1", "1", "2", "1"]
        assert row(shown, "video.transcode")[:4] == ["video.transcode", "1", "1", "1"]
        working = row(shown, "web1:17")
        assert working[:3] == ["web1:17", "127.0.0.1", "video.transcode"]
        assert working[3].startswith("H:")
        assert working[4] == "1"
        assert working[5].startswith("0:")
        assert working[6] == "30%"
        assert row(shown, "web1:18") == ["web1:18", "127.0.0.1", "idle"]

    def test_rates(self, server: harness.GearmanServerProcess):
        stop = threading.Event()

        def submit() -> None:
            with Client([server.address], timeout=30) as client:
                while not stop.wait(0.001):
                    client.do_background("count", b"")

        with harness.worker_thread({"count": lambda job: b""}, server):
            thread = threading.Thread(target=submit)
            thread.start()
            try:
                harness.wait_until(lambda: "count" in harness.ask(server.port, "counters"))
                numbers = row(top("--servers", server.address), "count ")
            finally:
                stop.set()
                thread.join()
        assert float(numbers[4]) > 0
        assert float(numbers[5]) > 0
        assert numbers[6:] == ["0.0", "0.0"]

    def test_what_strangers_say(self, server: harness.GearmanServerProcess):
        """Neither rich's markup nor control characters of others do anything."""
        with Client([server.address], timeout=30) as client:
            client.do_background("[red]not red[/red] \u202e", b"")
        shown = top("--servers", server.address)
        assert "[red]not red[/red] \\u202e" in shown

    def test_nothing_to_show(self):
        with harness.server(store="memory") as process:
            shown = top("--servers", process.address)
        assert "No functions." in shown
        assert "No workers." in shown

    def test_more_than_there_is_room_for(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(gearman_top, "ROWS_ONCE", 3)
        with harness.server(store="memory") as process, Client([process.address], timeout=30) as client:
            for number in range(5):
                client.do_background(f"f{number}", b"")
            shown = top("--servers", process.address)
        assert "f2 " in shown
        assert "f3 " not in shown
        assert "... and 2 more" in shown


@pytest.mark.foreign
def test_gearmand_beside_ours(server: harness.GearmanServerProcess):
    with Gearmand() as gearmand, busy(gearmand.port):
        both = top("--servers", f"{server.address},{gearmand.address}")
        assert row(both, "video.transcode")[:5] == [gearmand.address, "video.transcode", "1", "1", "1"]
        assert row(both, "video.transcode")[5:] == ["-"] * 4
        assert row(both, "web1:17") == [gearmand.address, "web1:17", "127.0.0.1", "?"]


class TestMistakes:
    @harness.tried_again
    def test_server_that_is_down(self, server: harness.GearmanServerProcess):
        down = f"127.0.0.1:{harness.free_port()}"
        out = io.StringIO()
        with pytest.raises(CommandError, match=f"No job server answers at {down}"):
            call_command(
                *("gearman_top", "--once", "--interval", "0.1", "--servers", f"{server.address},{down}"),
                stdout=out,
            )
        assert row(out.getvalue(), f"{down}  ")[:2] == [down, "down"]
        assert row(out.getvalue(), f"{server.address}  0.1.0")

    def test_no_terminal(self):
        with pytest.raises(
            CommandError, match="Standard output is no terminal to draw on: use --once"
        ) as caught:
            call_command("gearman_top", stdout=io.StringIO())
        assert caught.value.returncode == 2

    def test_without_rich(self, monkeypatch: pytest.MonkeyPatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(CommandError, match=r"pip install rich \(our extra \[top\]\)"):
            top()

    @pytest.mark.parametrize("interval", ["0", "x", "-1", "nan"])
    def test_interval(self, interval: str):
        with pytest.raises(CommandError, match="is not an interval"):
            call_command("gearman_top", "--interval", interval)


class TestRates:
    def shot(self, at: float, *counters: FunctionCounters) -> Snapshot:
        return Snapshot("s", at, counters={each.name: each for each in counters})

    def test_between_two_looks(self):
        before = self.shot(10.0, FunctionCounters("f", 10, 10, 0, 10, 0, 0, 0))
        now = self.shot(12.0, FunctionCounters("f", 30, 20, 2, 14, 3, 1, 2))
        assert rates("f", now, before) == Rates(10.0, 5.0, 2.0, 1.0)

    def test_new_function(self):
        assert rates(
            "f", self.shot(12.0, FunctionCounters("f", 3, 0, 0, 0, 0, 0, 0)), self.shot(11.0)
        ) == Rates(3.0, 0.0, 0.0, 0.0)

    def test_server_that_was_started_anew(self):
        before = self.shot(10.0, FunctionCounters("f", 10, 10, 1, 10, 1, 0, 0))
        now = self.shot(12.0, FunctionCounters("f", 3, 3, 0, 3, 0, 0, 0))
        assert rates("f", now, before) == Rates()

    def test_first_look_and_other_servers(self):
        now = self.shot(12.0, FunctionCounters("f", 3, 3, 0, 3, 0, 0, 0))
        assert rates("f", now, None) == rates("f", now, Snapshot("s", 1.0)) == rates("g", now, now) == Rates()


def test_live(server: harness.GearmanServerProcess):
    """On a terminal it goes on until Ctrl-C, and leaves the screen as it was."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
    process: subprocess.Popen[bytes] | None = None
    data = b""
    try:
        process = subprocess.Popen(
            [*harness.MANAGE, "gearman_top", "--interval", "0.1", "--servers", server.address],
            cwd=harness.ROOT,
            env=environment() | {"TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=follower,
            stderr=subprocess.PIPE,
        )
        os.set_blocking(leader, False)

        def has(text: bytes) -> bool:
            nonlocal data
            try:
                data += os.read(leader, 65536)
            except BlockingIOError:
                pass
            return text in data

        harness.wait_until(lambda: has(b"No workers."), 30, "the first screen")
        with harness.worker_thread({"photos.resize": lambda job: b""}, server, client_id="web1:19"):
            harness.wait_until(lambda: has(b"web1:19"), 30, "a later screen")
        process.send_signal(signal.SIGINT)
        harness.wait_until(lambda: has(b"\x1b[?1049l"), 30, "the old screen")
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, b"")
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()
        os.close(leader)
        os.close(follower)


def environment() -> dict[str, Any]:
    return {name: value for name, value in harness.environment().items() if name not in ("COLUMNS", "LINES")}
