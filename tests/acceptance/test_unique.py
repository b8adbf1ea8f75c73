"""One run for a hundred submissions of one unique, by both doors, with real processes."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from django_gearman.client.sync import Client
from django_gearman.models import JobRecord
from tests import harness
from tests.app.jobs import append_once

from .conftest import SITE

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


def test_hundred_submissions_make_one_run(tmp_path: Path, settings: Any):
    trace = str(tmp_path / "trace")
    workload = json.dumps({"args": [trace, "wire"], "kwargs": {}}).encode()
    unique = json.dumps([trace], separators=(",", ":"))
    together = threading.Barrier(10)

    def submit(number: int) -> None:
        together.wait(30)
        try:
            with Client([server.address], timeout=20) as client:
                for _ in range(10):
                    if number % 2:
                        append_once.enqueue(trace, "door")
                    else:
                        client.do_background(append_once.name, workload, unique=unique)
        finally:
            connection.close()

    with harness.server(env=SITE) as server:
        settings.GEARMAN = server.setting
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(submit, range(10)))
        assert JobRecord.objects.count() == 1
        with harness.worker(server, processes=2, env=SITE):
            # While it runs, too; and over a restart of the server.
            harness.wait_until(lambda: JobRecord.objects.filter(status="RUNNING").exists())
            (first,) = JobRecord.objects.all()
            assert append_once.enqueue(trace, "later").id == str(first.pk)
            assert append_once.enqueue(trace, "again").get(timeout=20) is None
            # When it has ended, the next is another.
            second = append_once.enqueue(trace, "second")
            assert second.id != str(first.pk)
            second.get(timeout=20)
    assert len(Path(trace).read_text().splitlines()) == 2
    assert JobRecord.objects.count() == 2


def test_unique_is_kept_over_a_restart(tmp_path: Path, settings: Any):
    trace = str(tmp_path / "trace")
    with harness.server(env=SITE) as server:
        settings.GEARMAN = server.setting
        first = append_once.enqueue(trace, "first")
        harness.wait_until(lambda: JobRecord.objects.exclude(handle=None).exists())
        server.kill()
        server.start()
        with Client([server.address], timeout=20) as client:
            unique = json.dumps([trace], separators=(",", ":"))
            assert (
                client.do_background(append_once.name, b"{}", unique=unique) == JobRecord.objects.get().handle
            )
        assert append_once.enqueue(trace, "again").id == first.id
    assert JobRecord.objects.count() == 1
