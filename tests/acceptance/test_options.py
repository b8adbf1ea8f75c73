"""
The command line of gearmand, with real processes wherever one is needed.

PROTOCOL sections 5.8, "Shutdown", and 7, "gearmand options".
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import re
import resource
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from django_gearman import Client
from django_gearman.conf import GearmanSettings
from django_gearman.management import server_options
from django_gearman.management.commands.gearman_server import Command, _default_name, _limits
from django_gearman.management.daemon import allow_descriptors, check_user
from django_gearman.management.server_options import expand, words_of
from django_gearman.models import JobRecord
from django_gearman.protocol.packets import RESPONSE, PacketType, encode_request
from django_gearman.protocol.reader import PacketReader
from django_gearman.server.connection import Keepalive, TransportLimits
from django_gearman.server.core import JobServer
from django_gearman.server.transport import GearmanServer, bind
from django_gearman.worker.loop import AssignedJob
from tests import harness, needs

from .conftest import LIMIT, call, missing, program
from .test_startup import refused

pytestmark = pytest.mark.acceptance

DOCUMENT = harness.ROOT / "docs" / "gearmand.md"
P = PacketType

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def options(*words: str) -> dict[str, Any]:
    """What the command makes of its options; CommandError if it refuses them."""
    return vars(parser().parse_args(words))


def parser() -> ArgumentParser:
    return Command().create_parser("manage.py", "gearman_server")


def server(*words: str, **keywords: Any) -> harness.GearmanServerProcess:
    """A server that keeps nothing, unless ``store`` says otherwise."""
    return harness.GearmanServerProcess(**{"store": "memory", "options": words, **keywords})


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """``manage.py gearman_server`` to its end."""
    return subprocess.run(
        [*harness.MANAGE, "gearman_server", *words],
        cwd=harness.ROOT,
        env=harness.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=harness.START_LIMIT,
        check=False,
    )


class Wire:
    """One connection that says what it is told to."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
        self._reader = PacketReader(RESPONSE)

    def send(self, kind: PacketType, *arguments: bytes) -> None:
        self.socket.sendall(encode_request(kind, *arguments))

    def hear(self) -> tuple[int, list[bytes]]:
        while (packet := self._reader.take()) is None:
            data = self.socket.recv(65536)
            assert data, "the server closed the connection"
            self._reader.feed(data)
        return packet

    def ask(self, kind: PacketType, *arguments: bytes) -> tuple[int, list[bytes]]:
        self.send(kind, *arguments)
        return self.hear()

    def sleep(self, *functions: bytes) -> None:
        """Offer functions and fall asleep; the server knows it when this returns."""
        for function in functions:
            self.send(P.CAN_DO, function)
        self.send(P.PRE_SLEEP)
        assert self.ask(P.ECHO_REQ, b"asleep")[0] == P.ECHO_RES

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


class Daemon:
    """A server in the background, which is no child of the test."""

    def __init__(self, *words: str, port: int) -> None:
        self.port = port
        self.started = run("--listen=127.0.0.1", f"-p{port}", "--store=memory", "--daemon", *words)
        self.pid = 0
        with suppress(OSError):
            self.pid = int(harness.ask(port, "getpid").split()[1])

    def leads_to(self, descriptor: int) -> str:
        return os.readlink(f"/proc/{self.pid}/fd/{descriptor}")

    def wait_gone(self) -> None:
        harness.wait_until(lambda: not harness.is_running(self.pid), harness.STOP_LIMIT, "the daemon's end")


@pytest.fixture
def daemon() -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(*words: str, port: int | None = None) -> Daemon:
        daemon = Daemon(*words, port=port or harness.free_port())
        started.append(daemon)
        return daemon

    yield start
    for each in started:
        if each.pid and harness.is_running(each.pid):
            os.kill(each.pid, signal.SIGTERM)
            each.wait_gone()


class TestDaemon:
    def test_returns_once_it_serves(self, daemon: Callable[..., Daemon], tmp_path: Path):
        path = tmp_path / "server.pid"
        server = daemon("--pid-file", str(path), "--log-file=none")
        assert (server.started.returncode, server.started.stderr) == (0, "")
        assert f"listens on 127.0.0.1:{server.port}" in server.started.stdout
        assert path.read_text() == f"{server.pid}\n"
        # Of its own session, and without the terminal; the folder is the same.
        assert os.getsid(server.pid) == server.pid
        assert {server.leads_to(descriptor) for descriptor in (0, 1, 2)} == {os.devnull}
        assert os.readlink(f"/proc/{server.pid}/cwd") == str(harness.ROOT)
        os.kill(server.pid, signal.SIGTERM)
        server.wait_gone()
        assert not path.exists()

    def test_keeps_stderr_for_the_log_when_told_so(self, tmp_path: Path):
        port = harness.free_port()
        with (tmp_path / "stderr").open("wb") as stderr:
            words = ["-d", "-lstderr", "--store=memory", f"--port={port}", "--listen=127.0.0.1"]
            subprocess.run(
                [*harness.MANAGE, "gearman_server", *words],
                cwd=harness.ROOT,
                env=harness.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                timeout=harness.START_LIMIT,
                check=True,
            )
        pid = int(harness.ask(port, "getpid").split()[1])
        try:
            assert os.readlink(f"/proc/{pid}/fd/1") == os.devnull
            assert os.readlink(f"/proc/{pid}/fd/2") == str(tmp_path / "stderr")
        finally:
            os.kill(pid, signal.SIGTERM)
        harness.wait_until(lambda: not harness.is_running(pid), harness.STOP_LIMIT, "its end")

    def test_tells_why_it_does_not_start(self, tmp_path: Path):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            path = tmp_path / "server.pid"
            line = refused("gearman_server", "-d", f"-p{port}", "-L127.0.0.1", f"-P{path}", "-qbuiltin")
        assert f"127.0.0.1:{port}" in line
        assert "in use" in line
        assert not path.exists()

    IMPORTS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from django_gearman.management.daemon import Background
parent = os.getpid()
"""
    INTERRUPTED_FORK = """
fork = os.fork
def interrupted():
    child = fork()
    if child:
        os.kill(parent, signal.SIGINT)
    return child
os.fork = interrupted
"""

    def background(self, script: str, *, before: str = "") -> subprocess.Popen[str]:
        code = f"{self.IMPORTS}{before}background = Background()\n{script}"
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(harness.ROOT)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_killed_before_it_is_ready(self):
        process = self.background("os.kill(os.getpid(), signal.SIGKILL)")
        assert process.communicate(timeout=LIMIT) == (
            "",
            "The server was ended by SIGKILL before it was ready.\n",
        )
        assert process.returncode == 1

    def test_exit_code_is_that_of_the_server(self):
        process = self.background("sys.exit(3)")
        process.communicate(timeout=LIMIT)
        assert process.returncode == 3

    def test_interrupt_ends_both(self):
        process = self.background("print('here', flush=True)\nsignal.pause()")
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        # The pipes end with the last of the two.
        assert "ended by SIGTERM" in process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 1

    def test_interrupt_right_after_the_fork_ends_both(self):
        process = self.background("signal.pause()", before=self.INTERRUPTED_FORK)
        assert "ended by SIGTERM" in process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 1

    def test_does_not_stay_when_nobody_waits_for_it(self):
        process = self.background(
            "print('here', flush=True)\n"
            "import time\n"
            "while os.getppid() == parent: time.sleep(0.01)\n"
            "try: background.detach(keep_stderr=True)\n"
            "except Exception as error: print(error, file=sys.stderr)"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.kill()
        assert process.communicate(timeout=LIMIT)[1] == (
            "Whoever started the server did not wait until it was ready.\n"
        )


class TestServiceFile:
    """docs/gearmand.md: nothing but the program changes."""

    def test_debians(self, daemon: Callable[..., Daemon], tmp_path: Path):
        (line,) = re.findall(r"^ExecStart=(.* \$PARAMS)$", DOCUMENT.read_text(), re.MULTILINE)
        words = shlex.split(line)
        assert [words[0].rsplit("/")[-1], *words[1:3]] == ["python", "/srv/site/manage.py", "gearman_server"]
        # /etc/default/gearman-job-server, with the backslashes that systemd takes away.
        parameters = "--listen=localhost   --daemon   --log-file=/var/log/gearman-job-server/gearmand.log"
        given = " ".join([*words[3:-1], parameters])
        for there in ("/run/gearman", "/var/log/gearman-job-server"):
            assert there in given
            given = given.replace(there, str(tmp_path))
        server = daemon(*shlex.split(given))
        assert server.started.returncode == 0, server.started.stderr
        assert (tmp_path / "gearmand.pid").read_text() == f"{server.pid}\n"
        # What its logrotate file does.
        (tmp_path / "gearmand.log").rename(tmp_path / "gearmand.log.1")
        os.kill(server.pid, signal.SIGHUP)
        harness.wait_until((tmp_path / "gearmand.log").exists, what="a new log file")
        os.kill(server.pid, signal.SIGTERM)
        server.wait_gone()
        assert "listens on" in (tmp_path / "gearmand.log.1").read_text()
        assert "stopped" in (tmp_path / "gearmand.log").read_text()


class TestPidFile:
    def test_holds_the_number_while_the_server_runs(self, tmp_path: Path):
        path = tmp_path / "server.pid"
        with server("-P", str(path)) as process:
            assert path.read_text() == f"{process.pid}\n"
            assert path.stat().st_mode & 0o777 == 0o644 & ~current_umask()
        assert not path.exists()

    def test_of_another_server_is_refused(self, tmp_path: Path):
        path = tmp_path / "server.pid"
        with server(f"--pid-file={path}") as process:
            line = refused("gearman_server", "--store=memory", "--port=0", f"--pid-file={path}")
            assert str(process.pid) in line
            assert str(path) in line
            assert path.read_text() == f"{process.pid}\n"

    def test_that_a_killed_server_left_is_taken(self, tmp_path: Path):
        path = tmp_path / "server.pid"
        process = server(f"--pid-file={path}")
        process.start()
        first = process.pid
        process.kill()
        assert path.read_text() == f"{first}\n"
        with process:
            assert path.read_text() == f"{process.pid}\n"

    def test_of_a_server_that_does_not_lock_stays_when_ours_does_not_start(self, tmp_path: Path):
        path = tmp_path / "gearmand.pid"
        path.write_text("1234\n")
        self.start_without_database(path)
        assert path.read_text() == "1234\n"

    def test_is_not_left_by_a_start_that_failed(self, tmp_path: Path):
        path = tmp_path / "server.pid"
        self.start_without_database(path)
        assert not path.exists()

    def start_without_database(self, pid_file: Path) -> None:
        """What is looked at after the pid file."""
        line = refused(
            "gearman_server",
            "--port=0",
            f"--pid-file={pid_file}",
            DATABASE_URL="sqlite:////nothing",
            GEARMAN_TEST_DATABASE=str(pid_file.parent / "no" / "folder" / "db"),
        )
        assert "out of reach" in line

    def test_other_files_are_left_alone(self, tmp_path: Path):
        target = tmp_path / "precious"
        target.write_text("text")
        assert "is no pid file" in refused("gearman_server", "--port=0", f"--pid-file={target}")
        assert target.read_text() == "text"
        link = tmp_path / "link.pid"
        link.symlink_to(tmp_path / "elsewhere")
        assert str(link) in refused("gearman_server", "--port=0", f"--pid-file={link}")
        assert not (tmp_path / "elsewhere").exists()
        assert "not a regular file" in refused("gearman_server", "--port=0", "--pid-file=/dev/null")
        assert Path("/dev/null").is_char_device()

    def test_folder_that_is_not_there(self, tmp_path: Path):
        path = tmp_path / "no" / "server.pid"
        line = refused("gearman_server", "--port=0", f"--pid-file={path}")
        assert str(path) in line
        assert "No such file" in line


def current_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class TestLog:
    def test_file(self, tmp_path: Path):
        path = tmp_path / "server.log"
        path.write_text("of yesterday\n")
        with server("-l", str(path), "-t4") as process:
            assert process.stdout.count("\n") == 1
        lines = path.read_text().splitlines()
        assert lines[0] == "of yesterday"
        assert [line.split(" ", 4)[2] for line in lines[1:]] == ["INFO"] * 3
        assert "-t" in lines[1]
        assert process.stderr == ""
        assert "listens on" in lines[2]
        assert "stopped" in lines[3]

    def test_level(self, tmp_path: Path):
        path = tmp_path / "server.log"
        with server(f"--log-file={path}", "--verbose=ERROR") as process:
            assert process.ask("verbose") == "OK ERROR\n"
        assert path.read_text() == ""

    def test_none(self):
        # A warning: Python would show it on stderr if nobody else took it.
        with server("-lnone") as process, Wire(process.port) as wire:
            wire.socket.sendall(b"\0BAD" + bytes(8))
            assert wire.socket.recv(1) == b""
        assert process.stderr == ""

    def test_file_that_cannot_be_written(self, tmp_path: Path):
        path = tmp_path / "no" / "server.log"
        assert str(path) in refused("gearman_server", "--port=0", "--store=memory", f"--log-file={path}")

    def test_hup_ends_a_server_at_a_terminal(self):
        with server() as process:
            process.signal(signal.SIGHUP)
            assert process.wait() == 0

    def test_hup_is_ignored_under_nohup(self):
        port = harness.free_port()
        with subprocess.Popen(
            [
                program("nohup"),
                *harness.MANAGE,
                "gearman_server",
                "--store=memory",
                "-L127.0.0.1",
                f"-p{port}",
            ],
            cwd=harness.ROOT,
            env=harness.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                assert "listens on" in process.stdout.readline()
                process.send_signal(signal.SIGHUP)
                # It would not stop before the next turns of its loop.
                for _ in range(20):
                    assert harness.ask(port, "version").startswith("OK")
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT) == 0

    @pytest.mark.parametrize("kind", ["unix", "udp"])
    def test_syslog(self, tmp_path: Path, kind: str):
        with ExitStack() as closing:
            if kind == "unix":
                address = str(tmp_path / "log")
                receiver = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                receiver.bind(address)
            else:
                receiver = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                receiver.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{receiver.getsockname()[1]}"
            receiver.settimeout(LIMIT)
            with server(f"--syslog={address}") as process:
                # 30: a daemon's information.
                expected = f"<30>gearman_server[{process.pid}]: INFO gearman_server "
                assert receiver.recv(4096).decode().startswith(expected)
            assert process.stderr == ""
            assert b"stopped" in receiver.recv(4096)

    def test_syslog_that_is_not_there(self, tmp_path: Path):
        address = str(tmp_path / "log")
        line = refused("gearman_server", "--port=0", "--store=memory", f"--syslog={address}")
        assert address in line
        assert "127.0.0.1:many" in refused(
            "gearman_server", "--port=0", "--store=memory", "--syslog=127.0.0.1:many"
        )

    def test_background_without_any(self, daemon: Callable[..., Daemon]):
        """It logs to syslog; where there is none, the start says so."""
        started = daemon().started
        assert started.returncode == 0
        expected = "" if Path("/dev/log").exists() else "No log is kept"
        assert started.stderr.startswith(expected)
        assert len(started.stderr.splitlines()) == bool(expected)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("FATAL", "CRITICAL"),
            ("ALERT", "CRITICAL"),
            ("CRITICAL", "CRITICAL"),
            ("ERROR", "ERROR"),
            ("WARNING", "WARNING"),
            ("NOTICE", "INFO"),
            ("INFO", "INFO"),
            ("debug", "DEBUG"),
        ],
    )
    def test_gearmands_eight_levels(self, given: str, expected: str):
        assert logging.getLevelName(options("--verbose", given)["verbose"]) == expected

    def test_djangos_verbosity_goes_on_working(self):
        with server("-v", "2") as process:
            assert process.ask("verbose") == "OK DEBUG\n"
        assert options("-v0")["verbosity"] == 0


class TestUser:
    def test_nobody_by_that_name(self):
        line = refused("gearman_server", "--port=0", "--user", "no-such-user")
        assert "'no-such-user'" in line

    def test_only_root_may(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(CommandError, match="Only root may become 'root'"):
            check_user("root")

    def test_of_the_process_itself(self):
        with server("-u", pwd.getpwuid(os.geteuid()).pw_name) as process:
            assert process.ask("version").startswith("OK")

    @needs_root
    def test_is_switched_to_once_all_is_open(self, tmp_path: Path):
        nobody = pwd.getpwnam("nobody")
        # Root's alone: what is there must be opened before.
        tmp_path.chmod(0o700)
        path = tmp_path / "server.pid"
        with server("-unobody", f"-P{path}") as process:
            status = Path(f"/proc/{process.pid}/status").read_text()
            groups = os.getgrouplist("nobody", nobody.pw_gid)
            for name, numbers in (("Uid", [nobody.pw_uid]), ("Gid", [nobody.pw_gid]), ("Groups", groups)):
                (ids,) = re.findall(rf"^{name}:(.*)$", status, re.MULTILINE)
                assert set(ids.split()) == {str(number) for number in numbers}, name
            with pytest.raises(PermissionError):
                as_user(nobody, lambda: path.read_text())
            assert path.read_text() == f"{process.pid}\n"
            with Client([process.address]) as client:
                assert client.echo(b"x") == b"x"
        # It may not remove the file, so no number is left in it, and the next one takes it.
        assert path.read_text() == ""
        with server(f"-P{path}") as process:
            assert path.read_text() == f"{process.pid}\n"

    @needs_root
    def test_log_file_is_the_users(self, tmp_path: Path):
        path = tmp_path / "server.log"
        tmp_path.chmod(0o755)
        line = refused("gearman_server", "--port=0", "--store=memory", "-unobody", f"-l{path}")
        assert str(path) in line
        assert "Permission denied" in line
        assert not path.exists()


def as_user(user: pwd.struct_passwd, what: Callable[[], Any]) -> Any:
    """Do something as somebody else, for a moment."""
    os.seteuid(user.pw_uid)
    try:
        return what()
    finally:
        os.seteuid(0)


@contextmanager
def connections(
    limits: TransportLimits, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> Iterator[Callable[[], socket.socket]]:
    """A server in this process; calling what it yields connects, and gives the server's end."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        loop = runner.get_loop()
        stopped = asyncio.Event()
        house = GearmanServer(JobServer(), None, limits)
        sockets = bind("127.0.0.1", 0)
        serving = loop.create_task(house.serve(sockets, stopped))
        clients: list[socket.socket] = []

        async def connected() -> None:
            async with asyncio.timeout(LIMIT):
                while len(house.connections) < len(clients):
                    await asyncio.sleep(0.005)

        def connect() -> socket.socket:
            clients.append(socket.create_connection(sockets[0].getsockname()))
            loop.run_until_complete(connected())
            (connection,) = house.connections
            sock: socket.socket = connection._transport.get_extra_info("socket")
            return sock

        loop.run_until_complete(asyncio.sleep(0))
        yield connect
        for client in clients:
            client.close()
        stopped.set()
        loop.run_until_complete(serving)


class TestKeepalive:
    VALUES = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")

    def values(self, sock: socket.socket) -> list[int]:
        return [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in self.VALUES]

    def test_off(self):
        with connections(TransportLimits()) as connect:
            assert not connect().getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    def test_the_systems_own(self):
        with socket.socket() as fresh, connections(TransportLimits(keepalive=Keepalive())) as connect:
            sock = connect()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert self.values(sock) == self.values(fresh)

    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_told(self, loop: str):
        factory = None if loop == "asyncio" else needs.module("uvloop").new_event_loop
        limits = TransportLimits(keepalive=Keepalive(idle=17, interval=5, count=4))
        with connections(limits, factory) as connect:
            sock = connect()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert self.values(sock) == [17, 5, 4]

    def test_from_the_command_line(self):
        def keepalive(*words: str) -> Keepalive | None:
            return _limits(options(*words), GearmanSettings()).keepalive

        assert keepalive("--keepalive-idle=17") is None
        assert keepalive("--keepalive") == Keepalive()
        assert keepalive(
            "--keepalive", "--keepalive-idle", "17", "--keepalive-interval", "-1", "--keepalive-count=4"
        ) == Keepalive(idle=17, count=4)

    @pytest.mark.parametrize("value", ["0", "-2", "40000", "x", ""])
    def test_values(self, value: str):
        with pytest.raises(CommandError, match=r"--keepalive-idle.*-1, the system's own"):
            options(f"--keepalive-idle={value}")


class TestDescriptors:
    def test_told(self):
        with server("-f", "200") as process, ExitStack() as open_ones:
            (limit,) = re.findall(
                r"^Max open files\s+(\d+)", Path(f"/proc/{process.pid}/limits").read_text(), re.MULTILINE
            )
            assert limit == "200"
            # 64 fewer.
            for _ in range(136):
                wire = open_ones.enter_context(Wire(process.port))
                assert wire.ask(P.ECHO_REQ, b"x")[0] == P.ECHO_RES
            with socket.create_connection(("127.0.0.1", process.port), timeout=LIMIT) as sock:
                try:
                    assert sock.recv(1) == b""
                except ConnectionResetError:
                    pass
            # There is still room for what is no connection.
            assert wire.ask(P.ECHO_REQ, b"x")[0] == P.ECHO_RES

    @pytest.fixture
    def soft_limit(self) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 2048:
            pytest.skip("this process may not have more descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @pytest.mark.usefixtures("soft_limit")
    def test_not_told_it_takes_what_it_wants_and_may(self):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert allow_descriptors(None, 1500) == 1500
        # Never less than there is.
        assert allow_descriptors(None, 1200) == 1500
        assert allow_descriptors(None, hard + 1) == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    def test_fewer_than_it_wants_are_told(self, monkeypatch: pytest.MonkeyPatch):
        process = server()
        command = ["sh", "-c", 'ulimit -n 364; exec "$@"', "sh", *process._command()]
        monkeypatch.setattr(process, "_command", lambda: command)
        with process:
            assert "lets this process have 300 connections, not 10000: LimitNOFILE" in process.stderr

    def test_more_than_the_system_has(self):
        line = refused("gearman_server", "--port=0", "--file-descriptors=2147483647")
        assert "2147483647 file descriptors" in line

    def test_core_dumps(self):
        with server("--coredump") as process:
            limits = Path(f"/proc/{process.pid}/limits").read_text()
        ((soft, hard),) = re.findall(r"^Max core file size\s+(\S+)\s+(\S+)", limits, re.MULTILINE)
        assert soft == hard

    def test_too_few(self):
        with pytest.raises(CommandError, match=r"--file-descriptors.*'100'.*use 128 or more"):
            options("-f100")


class TestConfigFile:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("", []),
            ("   ", []),
            ("# port=1", []),
            ("--port=4731", ["--port=4731"]),
            ("--port 4731", ["--port", "4731"]),
            ("-p 4731 --listen=::1  -d", ["-p", "4731", "--listen=::1", "-d"]),
            ("-d # at once", ["-d"]),
            ("port=4731", ["--port=4731"]),
            (" port = 4731 ", ["--port=4731"]),
            ("port 4731", ["--port=4731"]),
            ("daemon", ["--daemon"]),
            ("round-robin # in turn", ["--round-robin"]),
            ("port=4731 # ours", ["--port=4731"]),
            ("log-file = '/var/log/a # b.log'", ["--log-file=/var/log/a # b.log"]),
            ('--log-file "/var/log/a b.log"', ["--log-file", "/var/log/a b.log"]),
            ("libpq-conninfo = host=db user=x", ["--libpq-conninfo=host=db user=x"]),
        ],
    )
    def test_line(self, line: str, words: list[str]):
        assert words_of(line) == words

    @pytest.mark.parametrize(
        "line", ["=1", "4730", "'port", "--log-file 'x", "config-file=/x", "--config-file x"]
    )
    def test_line_that_is_none(self, line: str):
        with pytest.raises(ValueError, match=r"."):
            words_of(line)

    @pytest.mark.parametrize("way", [["--config-file"], ["--config-file="], ["@"]])
    def test_command_line_overrides_it_wherever_it_stands(self, tmp_path: Path, way: list[str]):
        file = tmp_path / "gearmand.conf"
        file.write_text("port=4731\nbacklog=7\n\n--exceptions\n")
        named = [*way, str(file)] if way == ["--config-file"] else [f"{way[0]}{file}"]
        for words in (["-p4732", *named], [*named, "-p4732"]):
            got = options(*expand(words))
            assert (got["port"], got["backlog"], got["exceptions"]) == (4732, 7, True)

    def test_server(self, tmp_path: Path):
        file = tmp_path / "gearmand.conf"
        file.write_text("# ours\nverbose = WARNING\nport 1\njob-handle-prefix mine\n")
        with server("--config-file", str(file)) as process, Wire(process.port) as wire:
            assert process.ask("verbose") == "OK WARNING\n"
            assert wire.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")[1][0].startswith(b"mine:")

    def test_problems_are_named(self, tmp_path: Path):
        file = tmp_path / "gearmand.conf"
        assert str(file) in refused("gearman_server", f"--config-file={file}")
        file.write_text("port=4731\n= 5\n")
        assert f"{file}, line 2: '= 5'" in refused("gearman_server", "--config-file", str(file))
        file.write_text("prot=4731\n")
        assert "--prot=4731" in refused("gearman_server", f"@{file}")
        file.write_bytes(b"\xff\xfe")
        assert "UTF-8" in refused("gearman_server", f"@{file}")
        assert "--config-file" in refused("gearman_server", "--config-file")

    def test_call_command_takes_none(self, tmp_path: Path):
        with pytest.raises(CommandError, match="--config-file"):
            call_command("gearman_server", config_file=str(tmp_path / "x"))


class TestCheckArgs:
    def test_right(self, tmp_path: Path):
        path = tmp_path / "server.pid"
        with socket.create_server(("127.0.0.1", 0)) as other:
            done = run("--check-args", "-d", f"-P{path}", f"-p{other.getsockname()[1]}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not path.exists()

    @pytest.mark.parametrize(
        "words",
        [
            ["--backlog=many"],
            ["--user=no-such-user"],
            ["--ssl"],
            ["--ssl-key=/nothing"],
            ["--listen=0.0.0.0"],
            ["-rhttp", "--http-listen=0.0.0.0"],
            ["--metrics-port=9730", "--metrics-listen=0.0.0.0"],
            ["more"],
        ],
    )
    def test_wrong(self, words: list[str]):
        assert refused("gearman_server", "--check-args", *words)


class TestVersionAndHelp:
    @pytest.mark.parametrize("option", ["-V", "--version"])
    def test_version(self, option: str):
        done = run(option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("gearman_server ")

    @pytest.mark.parametrize("option", ["-h", "--help"])
    def test_help(self, option: str):
        done = run(option)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--worker-wakeup" in done.stdout
        # It would be eighty lines of nothing.
        assert "--mysql-password" not in done.stdout


class TestValues:
    def test_port_by_the_name_of_a_service(self):
        try:
            number = socket.getservbyname("http", "tcp")
        except OSError:
            missing("this machine has no list of services")
        assert options("-p", "http")["port"] == number
        assert options("-p4731")["port"] == 4731

    @pytest.mark.parametrize(
        ("word", "named"),
        [
            ("--port=gibts-nicht", "'gibts-nicht'"),
            ("--port=65536", "65536"),
            ("--backlog=-1", "'-1'"),
            ("--backlog=99999999999", "'99999999999'"),
            ("--threads=many", "'many'"),
            ("--hashtable-buckets=x", "'x'"),
            ("--worker-wakeup=x", "'x'"),
            ("--verbose=LOUD", "NOTICE"),
            ("--protocol=gopher", "there is http"),
            ("--queue-type=paper", "'paper'"),
            ("--queue-type=libsqlite3", "--store database"),
            ("--queue-type=mysql", "DATABASES"),
            ("--queue-type=Postgres", "DATABASES"),
            ("--job-handle-prefix=", "''"),
            ("--job-handle-prefix=two words", "'two words'"),
            (f"--job-handle-prefix={'x' * 33}", "1 to 32"),
            ("--pid-file=", "''"),
            ("--log-file=", "''"),
            ("--function-order=none", "'none'"),
            # gearmand guesses no options either.
            ("--verb=INFO", "--verb=INFO"),
        ],
    )
    def test_refused(self, word: str, named: str):
        with pytest.raises(CommandError, match=re.escape(named)):
            options(word)

    def test_queue_type(self):
        assert options()["store"] == "database"
        assert options("-q", "builtin")["store"] == "memory"

    @pytest.mark.parametrize(
        ("words", "port"),
        [
            ([], None),
            (["-rhttp"], 8080),
            (["--http-port=81"], 81),
            (["--protocol", "http", "--http-port", "82"], 82),
        ],
    )
    def test_http(self, words: list[str], port: int | None):
        assert server_options.http_port(options(*words)) == port

    def test_backlog(self, monkeypatch: pytest.MonkeyPatch):
        told: list[int] = []
        original = socket.socket.listen

        def listen(sock: socket.socket, backlog: int) -> None:
            told.append(backlog)
            original(sock, backlog)

        monkeypatch.setattr(socket.socket, "listen", listen)
        with connections(TransportLimits(backlog=options("-b", "7")["backlog"])):
            pass
        assert told == [7]

    def test_address_that_the_machine_lacks_is_no_hindrance_when_it_has_another(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        """localhost is ::1 as well in many a hosts file, with and without IPv6."""
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        (sock,) = bind("localhost", 0)
        assert sock.getsockname()[0] == "127.0.0.1"
        sock.close()
        del found[1]
        with pytest.raises(OSError, match="assign"):
            bind("localhost", 0)


class TestHandles:
    """They never come back after a restart."""

    def handle(self, process: harness.GearmanServerProcess) -> str:
        with Client([process.address]) as client:
            return client.do_background("later")

    @pytest.mark.parametrize("words", [[], ["--job-handle-prefix=mine"]])
    def test_of_a_server_that_keeps_nothing(self, words: list[str]):
        process = server(*words, name="one")
        handles = []
        for _ in range(2):
            with process:
                handles.append(self.handle(process))
        assert len({*handles}) == 2
        beginning = "mine:" if words else "H:one:"
        assert all(re.fullmatch(rf"{beginning}\d+\.1", handle) for handle in handles)

    @pytest.mark.django_db(transaction=True)
    def test_of_servers_on_a_database(self):
        first = server("--job-handle-prefix=mine", store="database", name="one")
        second = server("--job-handle-prefix=mine", store="database", name="two")
        with first, second:
            handles = [self.handle(first), self.handle(second)]
            # A job that came in through the database.
            row = JobRecord.objects.create(function="later", workload=b"")
            with Client([first.address]) as client:
                client.claim()
            harness.wait_until(
                lambda: JobRecord.objects.filter(pk=row.pk, handle=f"mine:r{row.pk}").exists(), what="the row"
            )
        with first:
            handles.append(self.handle(first))
        assert len({*handles}) == 3
        assert all(re.fullmatch(r"mine:\d+-\d+\.1", handle) for handle in handles)


class TestNameOfOnesOwn:
    def test_short_host(self):
        assert _default_name("web-1.example.org", 4730) == "web-1.example.org:4730"

    def test_hosts_that_differ_only_at_the_end(self):
        names = {
            _default_name(f"django-gearman-server-6d4cf56db6-{end}", 65535) for end in ("x7k2p", "q9wzt")
        }
        assert len(names) == 2
        assert {server_options._name(name) for name in names} == names


class TestOrderAndWakeUp:
    def order(self, *words: str) -> list[bytes]:
        """Which functions' jobs a worker gets, who offers a and then b."""
        with server(*words) as process, Wire(process.port) as wire:
            for kind, function in ((P.SUBMIT_JOB_HIGH_BG, b"a"), (P.SUBMIT_JOB_LOW_BG, b"b")) * 2:
                assert wire.ask(kind, function, b"", b"")[0] == P.JOB_CREATED
            wire.send(P.CAN_DO, b"a")
            wire.send(P.CAN_DO, b"b")
            return [wire.ask(P.GRAB_JOB)[1][1] for _ in range(4)]

    def test_ours(self):
        assert self.order() == [b"a", b"a", b"b", b"b"]

    def test_round_robin(self):
        assert self.order("-R") == [b"b", b"a", b"b", b"a"]

    def test_gearmands(self):
        assert self.order("--function-order=gearmand") == [b"b", b"b", b"a", b"a"]

    def test_worker_wakeup(self):
        with server("-w", "2") as process, ExitStack() as leaving:
            workers = [leaving.enter_context(Wire(process.port)) for _ in range(3)]
            for worker in workers:
                worker.sleep(b"f")
            client = leaving.enter_context(Wire(process.port))
            assert client.ask(P.SUBMIT_JOB_BG, b"f", b"", b"")[0] == P.JOB_CREATED
            heard = [worker.ask(P.ECHO_REQ, b"x")[0] for worker in workers]
            assert sorted(heard) == sorted([P.NOOP, P.NOOP, P.ECHO_RES])


class TestDrain:
    """USR1."""

    def test_idle_server_ends_at_once(self):
        with server() as process, Wire(process.port) as wire:
            process.signal(signal.SIGUSR1)
            assert process.wait() == 0
            assert wire.socket.recv(1) == b""

    def test_serves_those_who_are_there_until_no_job_is_left(self):
        with server() as process, Wire(process.port) as wire, Wire(process.port) as worker:
            assert wire.ask(P.SUBMIT_JOB_BG, b"f", b"", b"first")[0] == P.JOB_CREATED
            process.signal(signal.SIGUSR1)

            def is_closed() -> bool:
                try:
                    socket.create_connection(("127.0.0.1", process.port), timeout=LIMIT).close()
                except ConnectionRefusedError:
                    return True
                return False

            harness.wait_until(is_closed, what="a closed door")
            assert wire.ask(P.SUBMIT_JOB, b"f", b"", b"second")[0] == P.JOB_CREATED
            worker.send(P.CAN_DO, b"f")
            for expected in (b"first", b"second"):
                kind, (handle, _, workload) = worker.ask(P.GRAB_JOB)
                assert (kind, workload) == (P.JOB_ASSIGN, expected)
                assert process.is_running
                worker.send(P.WORK_COMPLETE, handle, b"done")
            assert wire.hear() == (P.WORK_COMPLETE, [handle, b"done"])
            assert process.wait() == 0
            assert "stopped" in process.stdout


class TestAll:
    """Every option that the C gearmand tells of."""

    @pytest.fixture
    def told(self) -> list[tuple[str | None, str, bool]]:
        """(short, long, whether a value follows)"""
        help_text = call([program("gearmand"), "--help"]).stdout.decode()
        rows = re.findall(r"^  (?:(-\w) \[ )?(--[\w-]+)(?: \])?( arg)?", help_text, re.MULTILINE)
        found = [(short or None, long, bool(value)) for short, long, value in rows]
        assert len(found) > 45
        return [*found, (None, "--check-args", False)]

    @pytest.mark.foreign
    def test_is_taken(self, told: list[tuple[str | None, str, bool]]):
        known = parser()._option_string_actions
        for short, long, has_value in told:
            assert long in known, long
            takes_none = known[long].nargs == 0
            # An address may follow our --syslog.
            assert takes_none is not has_value or long == "--syslog", long
            if short is not None:
                assert short in known
                assert known[short].dest == known[long].dest or long == "--version", long

    @pytest.mark.foreign
    def test_is_in_the_document(self, told: list[tuple[str | None, str, bool]]):
        table = DOCUMENT.read_text()
        for short, long, _ in told:
            assert re.search(rf"`[^`]*{long}\b", table), long
            assert short is None or f"`{short}`" in table, short

    def test_ours_are_in_the_document_if_they_are_named_there(self):
        known = parser()._option_string_actions
        ours = DOCUMENT.read_text().partition("## Its options and ours")[2]
        mentioned = set(re.findall(r"`(--[a-z][\w-]*\w)\b(?!-?\.\.\.)", ours))
        assert mentioned - {"--status"} <= set(known)

    def test_without_effect(self):
        given = {
            "-t": "0",
            "--hashtable-buckets": "991",
            "--mysql-host": "db",
            "--libpq-conninfo": "host=a b",
        }
        words = [word for pair in given.items() for word in pair]
        with server("--store-queue-on-shutdown", *words, "--redis-port=1") as process:
            (line,) = process.stderr.splitlines()
        for option in [*given, "--redis-port", "--store-queue-on-shutdown"]:
            assert re.search(rf"{option}(,|$)", line), option
        # Values may be secrets.
        assert "host=a" not in line


class TestMovingAQueue:
    """docs/gearmand.md, "The persistent queue"."""

    SCHEMA = (
        "CREATE TABLE gearman_queue (unique_key TEXT, function_name TEXT, priority INTEGER, data BLOB, "
        "when_to_run INTEGER, PRIMARY KEY (unique_key, function_name))"
    )
    """PROTOCOL section 8."""

    def test_rows_of_libsqlite3(self, tmp_path: Path):
        (code,) = re.findall(
            r"<!-- code: move-queue -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
        )
        file = tmp_path / "queue.db"
        rows = [
            ("u1", "f", 2, b"low", 0),
            ("u2", "f", 1, b"normal", 0),
            ("u3", "f", 0, b"high\0", 0),
            ("", "f", 1, None, 0),
            ("u4", "f", 1, b"for later", 2_000_000_000),
        ]
        with closing(sqlite3.connect(file)) as queue, queue:
            queue.execute(self.SCHEMA)
            queue.executemany("INSERT INTO gearman_queue VALUES (?, ?, ?, ?, ?)", rows)
            # gearmand keeps a unique as it came, whatever its bytes.
            queue.execute("INSERT INTO gearman_queue VALUES (CAST(x'75ff' AS TEXT), 'f', 2, x'6f6464', 0)")
        seen: list[tuple[bytes, bytes]] = []

        def note(job: AssignedJob) -> bytes:
            seen.append((job.unique, job.workload))
            return b""

        with server() as process:
            for there, here in (
                ("/var/lib/gearman/queue.db", str(file)),
                ("127.0.0.1:4730", process.address),
            ):
                assert there in code
                code = code.replace(there, here)
            exec(code, {})
            with harness.worker_thread({"f": note}, process):
                harness.wait_until(
                    lambda: process.status()["f"][:2] == (1, 0), what="the job for later alone"
                )
        assert seen == [
            (b"u3", b"high\0"),
            (b"u2", b"normal"),
            (b"", b""),
            (b"u1", b"low"),
            (b"u\\xff", b"odd"),
        ]
