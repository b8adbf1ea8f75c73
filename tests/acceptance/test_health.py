"""``manage.py gearman_health`` and ``python -m django_gearman.health``."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from django_gearman.client.sync import Client
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.client.fake_server import Peer, fake_server
from tests.interop.gearmand import Gearmand
from tests.test_floors import WITHOUT_DJANGO
from tests.test_tls import Files

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def server() -> Iterator[harness.GearmanServerProcess]:
    with harness.server(store="memory") as process:
        yield process


def health(*arguments: str, code: int = 0) -> str:
    """The module in a process of its own, where Django cannot be imported; what it said."""
    start = WITHOUT_DJANGO.replace("for name in sys.argv[1:]:", "for name in ():")
    start += "\nfrom django_gearman.health import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start, *arguments],
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done
    assert (done.stderr if code == 0 else done.stdout) == ""
    return done.stdout or done.stderr


def command(*arguments: str) -> str:
    """The command in this process."""
    out = io.StringIO()
    call_command("gearman_health", *arguments, stdout=out)
    return out.getvalue()


def refusal(*arguments: str, code: int = 1) -> str:
    with pytest.raises(CommandError) as caught:
        command(*arguments)
    assert caught.value.returncode == code
    return str(caught.value)


class TestServers:
    def test_one_that_answers(self, server: harness.GearmanServerProcess):
        assert health("--servers", server.address) == f"{server.address} answers (0.1.0).\n"
        assert health("--servers", server.address, "--quiet") == ""
        assert command("--servers", server.address) == f"{server.address} answers (0.1.0).\n"

    def test_settings_lead_the_command(self, server: harness.GearmanServerProcess, settings: Any):
        settings.GEARMAN = server.setting
        assert server.address in command()
        settings.GEARMAN = {"default": {"SERVERS": server.address}}
        assert refusal().startswith("GEARMAN['default']['SERVERS'] must be a list")

    def test_one_that_is_not_there(self):
        address = f"127.0.0.1:{harness.free_port()}"
        said = (
            f"No job server answers at {address} (Connection refused); is `manage.py gearman_server` running?"
        )
        assert health("--servers", address, code=1) == f"{said}\n"
        assert refusal("--servers", address) == said

    def test_one_that_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            assert refusal("--servers", address, "--timeout", "0.2") == (
                f"The answer of {address} to 'version' took longer than 0.2 s."
            )

    def test_one_that_is_something_else(self):
        def talk(peer: Peer) -> None:
            peer.socket.sendall(b"\x1b[2J go away\n" * 3)
            peer.wait_for_end()

        with fake_server(talk) as port:
            said = refusal("--servers", f"127.0.0.1:{port}")
        assert "\x1b" not in said

    def test_some_of_several(self, server: harness.GearmanServerProcess):
        both = f"{server.address},127.0.0.1:{harness.free_port()}"
        assert refusal("--servers", both).startswith("No job server answers")
        assert command("--servers", both, "--any") == f"{server.address} answers (0.1.0).\n"

    @pytest.mark.foreign
    def test_gearmand(self):
        with Gearmand() as gearmand:
            assert "answers (1.1" in health("--servers", gearmand.address)
            assert "No worker serves f:" in health("--servers", gearmand.address, "f", code=1)

    def test_with_certificates(self, tmp_path: Path):
        files = Files(tmp_path)
        with harness.server(
            store="memory",
            options=[
                *("--tls-certificate", files["good.pem"], "--tls-key", files["good.key"]),
                *("--tls-ca-file", files["ca.pem"]),
            ],
        ) as process:
            given = ["--tls-ca", files["ca.pem"]]
            given += ["--tls-certificate", files["other.pem"], "--tls-key", files["other.key"]]
            assert "answers" in health("--servers", process.address, *given)
            assert "The connection to the job server" in health("--servers", process.address, code=1)

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--servers", "here:there"], 2, "here:there"),
            (["--timeout", "0"], 2, "'0' is not a time"),
            (["--tls-key", "k"], 2, "--tls-certificate and --tls-key need --tls-ca"),
            (["--tls-ca", "/nowhere"], 1, "TLS does not work: "),
        ],
    )
    def test_mistakes(self, arguments: list[str], code: int, message: str):
        assert message in health(*arguments, code=code)


class TestWorkers:
    def test_busy_is_not_dead(self, server: harness.GearmanServerProcess, tmp_path: Path):
        go = tmp_path / "go"

        def wait(job: AssignedJob) -> bytes:
            harness.wait_until(go.exists, 60)
            return b""

        assert health("--servers", server.address, "wait", code=1) == (
            "No worker serves wait: is `manage.py gearman_worker` running?\n"
        )
        with harness.worker_thread({"wait": wait}, server), Client([server.address]) as client:
            client.do_background("wait", b"")
            harness.wait_until(lambda: server.status()["wait"] == (1, 1, 1))
            assert health("--servers", server.address, "wait") == (
                f"{server.address} answers (0.1.0); workers serve wait.\n"
            )
            assert "No worker serves other" in health("--servers", server.address, "wait", "other", code=1)
            go.touch()

    def test_of_this_machine(self, server: harness.GearmanServerProcess):
        host = socket.gethostname()
        with harness.worker_thread({"f": lambda job: b""}, server, client_id=f"{host}x:1"):
            harness.wait_until(lambda: server.status().get("f", (0, 0, 0))[2])
            assert refusal("--servers", server.address, "--here") == (
                f"No worker of {host} is connected: is `manage.py gearman_worker` running here?"
            )
        with harness.worker_thread({"f": lambda job: b""}, server, client_id=f"{host}:1"):
            harness.wait_until(lambda: f"{host}:1" in server.ask("workers"))
            assert f"workers of {host} are connected" in command("--servers", server.address, "--here")

    def test_queues(self, server: harness.GearmanServerProcess):
        said = refusal("--servers", server.address, "--queues", "slow")
        # Tasks that may go to the queue are named beside the job that does.
        names = said.split("No worker serves ")[1].split(":")[0].split(", ")
        assert "tests.app.jobs.report" in names
        with harness.worker_thread(dict.fromkeys(names, lambda job: b""), server):
            harness.wait_until(lambda: all(server.status().get(name, (0, 0, 0))[2] for name in names))
            assert "workers serve tests.app.jobs.report" in command(
                "--servers", server.address, "--queues", "slow"
            )
        assert refusal("--queues", "nowhere", code=2).startswith("No function is in the queue nowhere. Known")


def test_module_can_be_run(server: harness.GearmanServerProcess):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django_gearman.health", "--servers", server.address],
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
