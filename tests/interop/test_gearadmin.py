"""
``gearadmin``'s every option, and the text protocol below it, at our server and at the C gearmand.

The same jobs and workers are made at both. What they print must be the same
but for the order of rows, which is that of a hash table at gearmand's, and for
names that are each server's own: handles, process ids, descriptors, versions.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import django_gearman
from django_gearman import AdminClient, Client
from django_gearman.exceptions import ServerError
from django_gearman.protocol.packets import PacketType, encode_request
from tests import harness
from tests.acceptance.conftest import call, program

from .gearmand import Gearmand
from .languages import OurClient, Server

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]


class Scene:
    """A server with a worker that runs one job, and four jobs that wait."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self.server = server
        client = OurClient()
        self.worker = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        for function in (b"alpha", b"beta"):
            self.worker.sendall(encode_request(PacketType.CAN_DO, function))
        self.worker.sendall(encode_request(PacketType.SET_CLIENT_ID, b"some worker"))
        harness.wait_until(lambda: server.status().get("beta") == (0, 0, 1), what="the worker")
        self.handles = {
            client.background(server, "alpha", priority="high", unique="one"): "running",
            client.background(server, "alpha", unique="two"): "normal",
            client.background(server, "alpha", priority="low", unique="with space"): "low",
            client.background(server, "alpha", priority="low", unique=""): "low without unique",
            client.background(server, "gamma", unique="three"): "nobody's",
        }
        self.worker.sendall(encode_request(PacketType.GRAB_JOB))
        harness.wait_until(lambda: server.status()["alpha"] == (4, 1, 1), what="the job in hand")

    def handle(self, name: str) -> str:
        return next(handle for handle, each in self.handles.items() if each == name)

    def gearadmin(self, *options: str) -> str:
        """What the program printed, on both its outputs."""
        command = [program("gearadmin"), "-h", "127.0.0.1", "-p", str(self.server.port), *options]
        done = call(command)
        return done.stdout.decode() + done.stderr.decode()

    def comparable(self, text: str) -> list[str]:
        """Its lines in an order of their own, with the jobs' names for their handles."""
        for handle, name in self.handles.items():
            text = re.sub(rf"^{re.escape(handle)}\t", f"<{name}>\t", text, flags=re.M)
        return sorted(text.splitlines(keepends=True))

    def say(self, line: bytes) -> bytes:
        """The reply to a line, byte for byte."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=30) as sock:
            # The version is asked behind it, to know where the reply ends.
            sock.sendall(line + b"\r\nversion\r\n")
            received = b""
            end = b"OK %s\n" % self.version.encode()
            while not received.endswith(end):
                data = sock.recv(65536)
                if not data:
                    return received + b"<closed>"
                received += data
        return received.removesuffix(end)

    @property
    def version(self) -> str:
        return self.server.ask("version").removeprefix("OK ").rstrip()


@pytest.fixture
def ours(stack: ExitStack) -> Scene:
    return Scene(stack.enter_context(harness.server(store="memory")), stack)


@pytest.fixture
def theirs(stack: ExitStack) -> Scene:
    return Scene(stack.enter_context(Gearmand()), stack)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Scene, Scene]]:
    """Ours and theirs, for tests that change nothing or the same at both."""
    with ExitStack() as stack:
        ours = Scene(stack.enter_context(harness.server(store="memory")), stack)
        yield ours, Scene(stack.enter_context(Gearmand()), stack)


class TestOptions:
    def test_listings(self, both: tuple[Scene, Scene]):
        listings = {
            "--status": ["alpha\t4\t1\t1\n", "beta\t0\t0\t1\n", "gamma\t1\t0\t0\n"],
            "--priority-status": ["alpha\t0\t1\t2\t1\n", "beta\t0\t0\t0\t1\n", "gamma\t0\t1\t0\t0\n"],
            "--show-jobs": sorted(f"<{name}>\t0\t0\t1\n" for name in both[0].handles.values()),
            "--show-unique-jobs": ["\n", "one\n", "three\n", "two\n", "with space\n"],
        }
        for option, rows in listings.items():
            for scene in both:
                printed = scene.gearadmin(option)
                assert printed.endswith(".\n")
                assert scene.comparable(printed.removesuffix(".\n")) == rows, option

    def test_workers(self, both: tuple[Scene, Scene]):
        for scene in both:
            printed = scene.gearadmin("--workers")
            assert printed.endswith("\n.\n")
            rows = re.findall(r"^\d+ (127\.0\.0\.1 .*)$", printed, re.M)
            assert len(rows) == printed.count("\n") - 1
            # The clients that asked stand there too; some of them may be on their way out.
            assert "127.0.0.1 some worker : beta alpha" in rows
            assert set(rows) == {"127.0.0.1 some worker : beta alpha", "127.0.0.1 - :"}

    def test_the_server_itself(self, both: tuple[Scene, Scene]):
        for scene in both:
            assert scene.gearadmin("--getpid") == f"{scene.server.pid}\n"
        ours, theirs = both
        assert ours.gearadmin("--server-version") == f"{django_gearman.__version__}\n"
        assert theirs.gearadmin("--server-version").startswith("1.1.")
        assert ours.gearadmin("--server-verbose") == "INFO\n"
        assert theirs.gearadmin("--server-verbose") == "ERROR\n"

    def test_functions(self, ours: Scene, theirs: Scene):
        for options in (
            ["--create-function", "made"],
            ["--create-function", "made"],
            ["--status"],
            ["--drop-function", "made"],
            ["--drop-function", "made"],
            ["--drop-function", "alpha"],
            ["--create-function", "two words"],
            ["--status"],
        ):
            printed = [scene.comparable(scene.gearadmin(*options)) for scene in (ours, theirs)]
            assert printed[0] == printed[1], options
        assert ours.gearadmin("--create-function", "made") == "OK\n"
        assert ours.server.status()["made"] == (0, 0, 0)

    def test_function_with_jobs_is_not_dropped(self, ours: Scene):
        """gearmand says OK, and leaves the jobs where nobody can reach them."""
        answer = ours.gearadmin("--drop-function", "gamma")
        assert answer == "Error: there are still connected workers or executing clients\r\n"
        assert ours.server.status()["gamma"] == (1, 0, 0)

    def test_cancelled_job(self, ours: Scene, theirs: Scene):
        for scene in (ours, theirs):
            for name in ("low", "nobody's"):
                assert scene.gearadmin("--cancel-job", scene.handle(name)) == "OK\n"
            assert scene.gearadmin("--cancel-job", "H:nobody:1") == "Error: UNKNOWN_JOB\r\n"
        # Ours is gone; gearmand's stays listed until a worker would take it.
        assert ours.server.status() == {"alpha": (3, 1, 1), "beta": (0, 0, 1), "gamma": (0, 0, 0)}
        assert len(ours.gearadmin("--show-jobs").splitlines()) == 3 + 1
        assert ours.gearadmin("--cancel-job", ours.handle("low")) == "Error: UNKNOWN_JOB\r\n"

    def test_several_at_once(self, both: tuple[Scene, Scene]):
        printed = []
        for scene in both:
            text = scene.gearadmin("--status", "--getpid", "--priority-status")
            printed.append(scene.comparable(text.replace(str(scene.server.pid), "<pid>")))
        assert printed[0] == printed[1]
        assert len(printed[0]) == 1 + 2 * (3 + 1)


class TestBytes:
    """PROTOCOL section 6: the replies to the byte, line ends too."""

    @pytest.mark.parametrize(
        "line",
        [
            b"status",
            b"STATUS",
            b"status extra words",
            b"prioritystatus",
            b"show jobs",
            b"show unique jobs",
            b"show foo",
            b"show unique",
            b"show jobs x",
            b"show",
            b"cancel",
            b"cancel job",
            b"cancel foo bar",
            b"cancel job H:nobody:1",
            b"create function new",
            b"create function",
            b"create",
            b"create x y",
            b"drop function nobody",
            b"drop function alpha",
            b"drop function",
            b"drop",
            b"maxqueue alpha 5",
            b"maxqueue alpha 5 4 3",
            b"maxqueue nobody",
            b"maxqueue",
            b"shutdown",
            b"shutdown graceful",
            b"nonsense",
            b"non&sense",
            b"",
            b"one two three four five six",
        ],
        ids=lambda line: line.decode() or "empty",
    )
    def test_replies(self, both: tuple[Scene, Scene], line: bytes):
        replies = [scene.comparable(scene.say(line).decode()) for scene in both]
        assert replies[0] == replies[1]

    def test_admin_client_reads_both(self, both: tuple[Scene, Scene]):
        told = []
        for scene in both:
            with AdminClient(scene.server.address) as admin, Client([scene.server.address]) as client:
                assert admin.pid() == scene.server.pid
                assert admin.version() == scene.version
                with pytest.raises(ServerError, match="UNKNOWN_JOB"):
                    admin.cancel("H:nobody:1")
                admin.create_function("made")
                admin.drop_function("made")
                admin.set_queue_limit("alpha", 4)
                with pytest.raises(ServerError, match="QUEUE_ERROR"):
                    client.do_background("alpha")
                told.append(
                    (
                        sorted(admin.status(), key=lambda row: row.name),
                        sorted(admin.priority_status(), key=lambda row: row.name),
                        sorted((scene.handles[row.handle], row.retries, row.stored) for row in admin.jobs()),
                        sorted(admin.uniques()),
                        {(row.client_id, row.functions) for row in admin.workers()},
                    )
                )
        assert told[0] == told[1]
