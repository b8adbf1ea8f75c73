"""Workers whose job server goes and comes back; and supervisord, which has both come and go."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from django_gearman.models import JobRecord
from tests import harness, needs
from tests.app import jobs

from .conftest import SITE, Trace
from .site import pools
from .site.jobs import leave_trace

Server = harness.GearmanServerProcess
Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

BOUNCES = int(os.environ.get("GEARMAN_BOUNCES", "4"))


def test_result_of_a_job_that_ended_while_its_server_was_away(site_server: Server, tmp_path: Path):
    with harness.worker(site_server, processes=1, env=SITE) as worker:
        result = pools.hold.enqueue(str(tmp_path), "held")
        harness.wait_until((tmp_path / "held.begun").exists)
        site_server.kill()
        (tmp_path / "go").touch()
        harness.wait_until((tmp_path / "held.done").exists)
        site_server.start()
        assert result.get(timeout=30)[0] in worker.children()
        assert jobs.add.enqueue(1).get(timeout=30) == 2
    # It was not run again: its result was late, and nobody else had the job meanwhile.
    assert len((tmp_path / "held.begun").read_text().splitlines()) == 1
    assert result.attempts == 1


def test_job_that_runs_on_while_its_server_is_restarted(site_server: Server, tmp_path: Path):
    """Another worker is there, and has nothing to do; the job is not given to it."""
    with harness.worker(site_server, processes=2, env=SITE) as worker:
        worker.wait_connected()
        result = pools.hold.enqueue(str(tmp_path), "held")
        harness.wait_until((tmp_path / "held.begun").exists)
        site_server.stop()
        site_server.start()
        # The one that runs it comes back when it is done; the parent speaks for it meanwhile.
        harness.wait_until(lambda: site_server.status()[pools.hold.name][2] == 1, 60.0, "the other worker")
        assert jobs.add.enqueue(1).get(timeout=20) == 2
        (tmp_path / "go").touch()
        assert result.get(timeout=30)[0] in worker.children()
    assert len((tmp_path / "held.begun").read_text().splitlines()) == 1
    assert result.attempts == 1


def test_workers_survive_every_bounce_of_their_server(site_server: Server, trace: Trace):
    with harness.worker(site_server, processes=3, env=SITE) as worker:
        worker.wait_connected()
        children = worker.children()
        names = (f"job{number}" for number in itertools.count())
        sent: list[str] = []
        for bounce in range(BOUNCES):
            sent += itertools.islice(names, 20)
            for name in sent[-20:]:
                leave_trace.enqueue(trace.path, name)
            harness.wait_until(lambda sent=tuple(sent): len(set(trace.names())) >= len(sent) - 15)
            (site_server.kill if bounce % 2 else site_server.stop)()
            site_server.start()
        harness.wait_until(lambda: set(trace.names()) == set(sent), what="all jobs")
        assert worker.children() == children
        # All of them are back, not only the one that was quickest.
        harness.wait_until(lambda: site_server.status()[leave_trace.name][2] == 3, 60.0)


CONFIGURATION = """
[supervisord]
nodaemon=true
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
[unix_http_server]
file={folder}/s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{folder}/s
[program:gearman_server]
command={python} -W error manage.py gearman_server --listen 127.0.0.1 --port {port}
priority=10
stopwaitsecs=30
startsecs=1
redirect_stderr=true
stdout_logfile={folder}/server.log
[program:gearman_worker]
command={python} -W error manage.py gearman_worker --processes 2 --servers 127.0.0.1:{port}
priority=20
stopsignal=TERM
stopwaitsecs=40
startsecs=1
stopasgroup={group}
killasgroup=true
redirect_stderr=true
stdout_logfile={folder}/worker.log
"""


@pytest.mark.parametrize("group", ["false", "true"], ids=["parent", "group"])
def test_supervisorctl_restart_all_loses_and_repeats_nothing(
    transactional_db: None, settings: Any, tmp_path_factory: Any, trace: Trace, group: str
):
    needs.module("supervisor")
    # The path of a socket may not be long.
    folder = tmp_path_factory.mktemp("s")
    port = harness.free_port()
    settings.GEARMAN = {"default": {"SERVERS": [f"127.0.0.1:{port}"]}}
    configuration = folder / "supervisord.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, python=sys.executable, port=port, group=group)
    )
    env = harness.environment() | SITE | {"GEARMAN_TEST_SERVER": f"127.0.0.1:{port}"}
    env.pop("PYTHONDEVMODE")
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)]
    supervisord = subprocess.Popen(
        command, cwd=harness.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    over = threading.Event()
    names = [f"job{number}" for number in range(36)]

    def send() -> None:
        try:
            for name in names:
                pools.leave_trace_late.enqueue(trace.path, name)
                over.wait(0.1)
        finally:
            connections.close_all()

    sender = threading.Thread(target=send)
    try:
        harness.wait_until(lambda: len(trace.names()) > 5 if sender.ident else sender.start())
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(configuration), "restart", "all"],
            cwd=harness.ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "gearman_worker: started" in done.stdout, done.stdout + done.stderr
        sender.join()
        harness.wait_until(lambda: len(trace.names()) >= len(names), what="all jobs")
        assert sorted(trace.names()) == sorted(names)
        finished = JobRecord.objects.filter(status=Status.SUCCESSFUL, attempts=1)
        harness.wait_until(lambda: finished.count() == len(names), 60.0, "one attempt each")
    except BaseException as error:
        for log in folder.glob("*.log"):
            error.add_note(log.read_text(errors="replace")[-3000:])
        raise
    finally:
        over.set()
        supervisord.terminate()
        supervisord.wait(60)
        if sender.ident:
            sender.join()
