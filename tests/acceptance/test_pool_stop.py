"""Stopping workers and replacing their code: by signals, as process 1, under systemd's protocol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from django_gearman.models import JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE, Trace, missing, program
from .site import pools
from .site.jobs import leave_trace

Server = harness.GearmanServerProcess
Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


def begun(folder: Path, name: str) -> list[int]:
    """Processes that began the job of that name, in order."""
    path = folder / f"{name}.begun"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


class TestPutBack:
    @pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
    def test_what_does_not_finish_in_time(self, site_server: Server, tmp_path: Path, group: bool):
        options = ["--grace", "1"]
        with harness.worker(site_server, processes=2, options=options, env=SITE) as worker:
            results = {name: pools.hold.enqueue(str(tmp_path), name) for name in ("quick", "long")}
            for name in results:
                harness.wait_until(lambda name=name: begun(tmp_path, name))
            (worker.signal_group if group else worker.signal)(signal.SIGTERM)
            harness.wait_until(lambda: "Stopping" in worker.stderr)
            (tmp_path / "quick.go").touch()
            assert results["quick"].get(timeout=30)
            assert worker.wait() == 0
            assert "1 jobs went back to the queue" in worker.stdout
        record = JobRecord.objects.get(pk=results["long"].id)
        harness.wait_until(lambda: (record.refresh_from_db(), record.status == Status.READY)[1])
        # It was nobody's fault: neither an attempt, nor a failure.
        assert (record.attempts, record.past_attempts.count()) == (0, 0)
        (tmp_path / "go").touch()
        with harness.worker(site_server, processes=1, env=SITE):
            assert results["long"].get(timeout=20)
        assert (results["long"].attempts, results["long"].errors) == (1, [])

    @pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
    def test_at_once_when_told_twice(self, site_server: Server, tmp_path: Path, group: bool):
        with harness.worker(site_server, processes=1, env=SITE) as worker:
            result = pools.hold.enqueue(str(tmp_path), "held")
            harness.wait_until(lambda: begun(tmp_path, "held"))
            tell = worker.signal_group if group else worker.signal
            tell(signal.SIGTERM)
            harness.wait_until(lambda: "Stopping" in worker.stderr)
            tell(signal.SIGTERM)
            assert worker.wait(20.0) == 0
        record = JobRecord.objects.get(pk=result.id)
        harness.wait_until(lambda: (record.refresh_from_db(), record.status == Status.READY)[1])
        assert record.attempts == 0


def test_deploys_under_load_lose_and_repeat_nothing(site_server: Server, trace: Trace):
    names = [f"job{number}" for number in range(150)]
    sent = iter(names)

    def send(count: int) -> None:
        for _ in range(count):
            leave_trace.enqueue(trace.path, next(sent))

    with harness.worker(site_server, processes=2, env=SITE) as worker:
        for _ in range(3):
            send(50)
            harness.wait_until(lambda: len(trace.names()) % 50 > 5)
            worker.restart()
        harness.wait_until(lambda: len(trace.names()) >= len(names))
    assert sorted(trace.names()) == sorted(names)
    assert set(JobRecord.objects.values_list("attempts", flat=True)) == {1}


def test_as_process_1(site_server: Server, tmp_path: Path):
    """Of a container: nobody else reaps its orphans, and signals without a handler do not arrive."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--pid", "--fork", "true"], check=False).returncode:
        missing("unshare cannot make a namespace of processes here")

    class Contained(harness.WorkerProcess):
        def _command(self) -> list[str]:
            assert unshare is not None
            return [unshare, "--pid", "--fork", "--kill-child=SIGKILL", *super()._command()]

    with Contained(site_server, processes=1, env=SITE) as contained:
        (parent,) = contained.children()
        result = pools.hold.enqueue(str(tmp_path), "held")
        harness.wait_until(lambda: begun(tmp_path, "held"))
        assert begun(tmp_path, "held") != [parent]
        os.kill(parent, signal.SIGTERM)
        harness.wait_until(lambda: "Stopping" in contained.stderr)
        (tmp_path / "go").touch()
        assert contained.wait() == 0
    assert result.get(timeout=30)
    assert result.attempts == 1


class Listener:
    """The socket of a service manager."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.path = str(path)
        self.heard: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (data := self._socket.recv(4096)) != b"end":
            self.heard.append(data.decode())

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", self.path)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(tmp_path / "notify")
    yield listener
    listener.close()


def test_service_manager_is_told(site_server: Server, manager: Listener):
    env = SITE | {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "400000"}
    with harness.worker(site_server, processes=2, env=env) as worker:
        harness.wait_until(lambda: "READY=1" in manager.heard)
        worker.wait_connected()
        harness.wait_until(lambda: manager.heard.count("WATCHDOG=1") >= 3)
        assert "STOPPING=1" not in manager.heard
        worker.signal(signal.SIGHUP)
        harness.wait_until(lambda: "has taken over" in worker.stdout)
        harness.wait_until(lambda: manager.heard.count("READY=1") == 2)
        assert any(told.startswith("RELOADING=1\nMONOTONIC_USEC=") for told in manager.heard)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert manager.heard[-1] == "STOPPING=1" or "STOPPING=1" in manager.heard


CODE = """
from django_gearman import job
@job(name="version")
def version() -> int:
    return {}
"""


@pytest.mark.parametrize("version", ["253", "before"])
def test_unit_of_the_documentation(tmp_path: Path, version: str):
    """systemd understands every line, or what is said of versions before 253."""
    analyze = program("systemd-analyze")
    text = (harness.ROOT / "docs" / "workers.md").read_text()
    (unit,) = re.findall(r"## Under systemd\n\n```ini\n(.*?)```", text, re.DOTALL)
    assert "Before systemd 253, use `Type=notify` and `ExecReload=kill -HUP $MAINPID`." in text
    if version == "before":
        unit = unit.replace("Type=notify-reload", "Type=notify\nExecReload=kill -HUP $MAINPID")
    unit = unit.replace("/srv/shop/venv/bin/python", sys.executable).replace("/srv/shop", str(tmp_path))
    file = tmp_path / "shop.service"
    file.write_text(unit.replace("User=shop", "User=root"))
    told = subprocess.run([analyze, "verify", file], capture_output=True, text=True, check=False)
    complaints = [line for line in told.stderr.splitlines() if "shop.service" in line]
    complaints = [line for line in complaints if "service type, ignoring: notify-reload" not in line]
    assert (told.returncode, complaints) == (0, [])


class TestReload:
    @pytest.fixture
    def env(self, tmp_path: Path) -> dict[str, str]:
        package = tmp_path / "path" / "changing"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "jobs.py").write_text(CODE.format(1))
        (tmp_path / "path" / "changed_settings.py").write_text(
            "from tests.acceptance.site.settings import *\nINSTALLED_APPS += ['changing']\n"
        )
        path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
        return {
            "PYTHONPATH": path,
            "DJANGO_SETTINGS_MODULE": "changed_settings",
            # A second is too coarse for the times of files that a test writes.
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def version(self) -> int:
        record = JobRecord.objects.create(function="version", workload=b'{"args": [], "kwargs": {}}')
        harness.wait_until(
            lambda: (record.refresh_from_db(), record.status == Status.SUCCESSFUL)[1], what="the version"
        )
        return int(bytes(record.result or b""))

    def test_hup_replaces_children_after_their_job(
        self, site_server: Server, tmp_path: Path, env: dict[str, str]
    ):
        with harness.worker(site_server, processes=2, env=env) as worker:
            worker.wait_connected()
            pid, before = worker.pid, worker.children()
            held = pools.hold.enqueue(str(tmp_path), "held")
            (holder,) = harness.wait_until(lambda: begun(tmp_path, "held"))
            assert self.version() == 1
            (tmp_path / "path/changing/jobs.py").write_text(CODE.format(2))
            worker.signal(signal.SIGHUP)
            harness.wait_until(lambda: "has taken over" in worker.stdout)
            harness.wait_until(
                lambda: len(worker.children()) == 2 and set(worker.children()) & set(before) == {holder}
            )
            assert self.version() == 2
            assert worker.pid == pid
            (tmp_path / "go").touch()
            assert held.get(timeout=30)[0] == holder
            assert held.attempts == 1
            harness.wait_until(
                lambda: len(worker.children()) == 2 and not set(worker.children()) & set(before)
            )
            # And it goes on being a supervisor: of those that it has replaced, too.
            os.kill(worker.children()[0], signal.SIGKILL)
            harness.wait_until(lambda: "another starts" in worker.stderr)
            assert self.version() == 2

    def test_code_that_does_not_start_is_not_loaded(
        self, site_server: Server, tmp_path: Path, env: dict[str, str]
    ):
        with harness.worker(site_server, processes=1, env=env) as worker:
            worker.wait_connected()
            before = worker.children()
            (tmp_path / "path/changing/jobs.py").write_text("this is no Python")
            worker.signal(signal.SIGHUP)
            harness.wait_until(lambda: "going on with the old" in worker.stderr)
            assert "SyntaxError" in worker.stderr
            assert worker.children() == before
            assert self.version() == 1
            (tmp_path / "path/changing/jobs.py").write_text(CODE.format(3))
            worker.signal(signal.SIGHUP)
            harness.wait_until(lambda: self.version() == 3)

    def test_change_of_a_file(self, site_server: Server, tmp_path: Path, env: dict[str, str]):
        with harness.worker(site_server, processes=1, options=["--reload"], env=env) as worker:
            assert self.version() == 1
            assert jobs.add.enqueue(1).get(timeout=30) == 2
            (tmp_path / "path/changing/jobs.py").write_text(CODE.format(2))
            harness.wait_until(lambda: "has taken over" in worker.stdout)
            harness.wait_until(lambda: self.version() == 2)

    def test_killed_parent_takes_children_of_old_code_along(
        self, site_server: Server, tmp_path: Path, env: dict[str, str]
    ):
        worker = harness.WorkerProcess(site_server, processes=2, env=env)
        with worker:
            pools.hold.enqueue(str(tmp_path), "held")
            (holder,) = harness.wait_until(lambda: begun(tmp_path, "held"))
            worker.signal(signal.SIGHUP)
            harness.wait_until(lambda: "has taken over" in worker.stdout)
            assert harness.is_running(holder)
            children = worker.children()
            worker.signal(signal.SIGKILL)
            harness.wait_until(lambda: not any(map(harness.is_running, children)), 60.0, "the children's end")
            worker.wait()
            worker.forget()
