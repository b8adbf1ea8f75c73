"""What a job starts beside it: processes that it forks, and other programs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from django_gearman.models import JobRecord
from tests import harness
from tests.test_tls import Files

from .conftest import SITE
from .site import pools

Server = harness.GearmanServerProcess

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


class TestForks:
    """A process that a job forks has copies of the worker's connections, and leaves them alone."""

    def test_what_they_log_disturbs_nobody(self, tmp_path: Path, settings: Any):
        """With TLS they would send records of their own in the midst of the worker's."""
        files = Files(tmp_path)
        env = {**SITE, "GEARMAN_TEST_TLS": str(files.folder)}
        with harness.server(env=env) as server:
            settings.GEARMAN = {"default": {"SERVERS": [server.address], **files.settings}}
            with harness.worker(server, processes=1, env=env) as worker:
                assert pools.speak_in_children.enqueue().get(timeout=60) == [0, 0]
            assert "broke" not in worker.stderr
        assert JobRecord.objects.get().log.count("parent says") == 50

    @pytest.mark.parametrize("how", ["prefork", "threads"])
    def test_one_that_comes_back_ends(self, site_server: Server, how: str):
        """It is no second worker, and what it raises or returns is not what became of the job."""
        options = ["--threads", "2"] if how == "threads" else []
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            worker.wait_connected()
            for leaves, status in {"exits": 3, "raises": 1, "returns": 0}.items():
                assert pools.fork_one_that_exits.enqueue(leaves).get(timeout=60) == status
            assert "a child went wrong" in worker.stderr
            assert len(worker.children()) == 1


@pytest.mark.parametrize("options", [[], ["--threads", "2"]], ids=["prefork", "threads"])
def test_a_job_ends_what_it_started(site_server: Server, options: list[str]):
    """Though the worker's own processes pass over the signal."""
    with harness.worker(site_server, processes=1, options=options, env=SITE):
        assert pools.end_others.enqueue().get(timeout=60) == [-signal.SIGTERM] * 2
