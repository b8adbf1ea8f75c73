"""Jobs called from the threads of forked web processes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from threading import Event
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from django_gearman.models import JobRecord
from tests import harness
from tests.app.jobs import add

from .conftest import SITE

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

Status = JobRecord.Status
CALLERS = 12
REQUESTS = 300


class Gunicorn(harness.ManagedProcess):
    """gunicorn with the test's site: processes of four threads each."""

    def __init__(
        self, *servers: harness.GearmanServerProcess, folder: Path, preload: bool, workers: int = 2
    ) -> None:
        self.port = harness.free_port()
        self._configuration = folder / "gunicorn.conf.py"
        self._configuration.write_text(
            dedent(
                f"""
                bind = "127.0.0.1:{self.port}"
                workers = {workers}
                worker_class = "gthread"
                threads = 4
                preload_app = {preload}
                control_socket_disable = True
                wsgi_app = "tests.acceptance.site.wsgi"

                def when_ready(server):
                    if {preload}:
                        # A connection that the forks must not share.
                        from tests.app.jobs import shout
                        assert shout.run(b"parent") == b"PARENT"
                    print("ready", flush=True)
                """
            )
        )
        super().__init__(
            ["gunicorn", "--config", str(self._configuration)],
            started="ready",
            env={
                **SITE,
                "GEARMAN_TEST_SERVER": ",".join(each.address for each in servers),
                # A server that is only slow is waited for; one that is away refuses at once.
                "GEARMAN_TEST_SETTINGS": json.dumps({"CONNECT_TIMEOUT": 60}),
            },
        )

    def _command(self) -> list[str]:
        return [sys.executable, "-W", "error", "-m", *self.arguments]

    def get(self, view: str, **query: Any) -> dict[str, Any]:
        with urlopen(f"http://127.0.0.1:{self.port}/{view}/?{urlencode(query)}", timeout=90) as response:
            answer: dict[str, Any] = json.load(response)
            return answer


@pytest.fixture(params=[False, True], ids=["loaded by each process", "preloaded"])
def gunicorn(
    request: pytest.FixtureRequest, site_server: harness.GearmanServerProcess, tmp_path: Path
) -> Iterator[Gunicorn]:
    with (
        harness.worker(site_server, processes=2, env=SITE),
        Gunicorn(site_server, folder=tmp_path, preload=request.param) as process,
    ):
        yield process


def test_every_request_gets_its_own_answer(gunicorn: Gunicorn):
    pids = set()

    def call(number: int) -> None:
        if number % 2:
            answer = gunicorn.get("run", text=f"text {number} ü")
            assert answer["answer"] == f"TEXT {number} ü"
        else:
            answer = gunicorn.get("enqueue", left=number)
            assert answer["left"] == number
            ids[answer["id"]] = number
        pids.add(answer["pid"])

    ids: dict[str, int] = {}
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(call, range(REQUESTS)))
    assert len(pids) == 2
    assert gunicorn.pid not in pids

    assert len(ids) == REQUESTS // 2
    records = JobRecord.objects.filter(function=add.name)
    harness.wait_until(
        lambda: records.filter(status=Status.SUCCESSFUL).count() == len(ids), what="the enqueued jobs' ends"
    )
    for id, number in ids.items():
        assert add.get_result(id).return_value == number + 1
    foreground = JobRecord.objects.filter(function="shout", background=False)
    harness.wait_until(
        lambda: not foreground.filter(status__in=JobRecord.LIVE).exists(), what="the records of the others"
    )
    assert foreground.filter(status=Status.SUCCESSFUL).count() == foreground.count() >= REQUESTS // 2


def test_new_processes(gunicorn: Gunicorn):
    """HUP under load: the old processes end, new ones go on, every answer is right."""
    enough = Event()

    def call_on(caller: int) -> set[int]:
        pids = set()
        number = 0
        while not enough.is_set():
            answer = gunicorn.get("run", text=f"text {caller} {number}")
            assert answer["answer"] == f"TEXT {caller} {number}"
            pids.add(answer["pid"])
            number += 1
        return pids

    before = set(harness.wait_until(lambda: len(gunicorn.children()) == 2 and gunicorn.children()))
    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call_on, number) for number in range(4)]
        try:
            gunicorn.signal(signal.SIGHUP)
            harness.wait_until(
                lambda: len(gunicorn.children()) == 2 and not before & set(gunicorn.children()),
                60.0,
                "two new processes",
            )
            after = set(gunicorn.children())
            assert {gunicorn.get("run", text="x")["pid"] for _ in range(20)} <= after
        finally:
            enough.set()
        answered = set().union(*(each.result(30) for each in callers))
    assert answered & after
