"""What a job logs, from its worker to the page of its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.test import Client as Browser

from django_gearman.models import JobRecord
from tests import harness
from tests.app import jobs

from .conftest import SITE

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


def test_log_of_a_job(
    site_server: harness.GearmanServerProcess, tmp_path: Path, settings: Any, admin_client: Browser
):
    settings.ROOT_URLCONF = "tests.admin.urls"
    go = tmp_path / "go"
    with harness.worker(site_server, processes=1, env=SITE):
        result = jobs.chatter.enqueue(str(go))

        def has_told() -> bool:
            result.refresh()
            return "attempt 1" in result.log and result.progress == (2, 3)

        # It says nothing more, and what it said is there: no other line pushes the last one out.
        harness.wait_until(has_told)
        go.touch()
        result.get(timeout=20)
    record = JobRecord.objects.get()
    first = record.past_attempts.get()
    for log, attempt in ((first.log, 1), (record.log, 2)):
        lines = log.splitlines()
        assert len(lines) == 2
        assert lines[0].endswith(f"INFO tests.app.jobs.chatter: <script>alert('attempt {attempt}')</script>")
        assert lines[1].endswith("WARNING django_gearman.tests: go is there")
    page = admin_client.get(f"/admin/django_gearman/jobrecord/{record.pk}/change/").content.decode()
    assert "What it logged" in page
    for attempt in (1, 2):
        assert f"&lt;script&gt;alert(&#x27;attempt {attempt}&#x27;)" in page
    assert "<script>alert" not in page
